"""template.yaml as written, and as SAM translates it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from samtranslator.parser.parser import Parser
from samtranslator.translator.translator import Translator
from samtranslator.yaml_helper import yaml_parse

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]


def read_template() -> Json:
    """Return the template as written, its intrinsics in their long form."""
    template: Json = yaml_parse((ROOT / "template.yaml").read_text())
    return template


def translate(source: Json, *, artefacts: str = "one") -> Json:
    """Return what CloudFormation gets. `artefacts` stands for the content of code and layers."""
    for name, resource in source["Resources"].items():
        for key in ("CodeUri", "ContentUri"):
            if key in resource.get("Properties", {}):
                resource["Properties"][key] = f"s3://artefacts/{artefacts}/{name}"
    translator = Translator(None, Parser(), None, boto3.Session(region_name="eu-west-1"))
    translated: Json = translator.translate(source, {}, get_managed_policy_map=dict)
    return translated


class Template:
    """The translated template, by type and by name."""

    def __init__(self, translated: Json) -> None:
        self.resources: dict[str, Json] = translated["Resources"]

    def of_type(self, kind: str) -> dict[str, Json]:
        """Return the properties of every resource of a kind, of which there is one at least."""
        found = {name: r["Properties"] for name, r in self.resources.items() if r["Type"] == kind}
        assert found, f"there is no {kind}"
        return found

    def properties(self, name: str) -> Json:
        properties: Json = self.resources[name]["Properties"]
        return properties

    @property
    def api(self) -> Json:
        """The OpenAPI document of the one API."""
        body: Json = self.properties("Api")["Body"]
        return body

    def operations(self) -> list[tuple[str, str, Json]]:
        """Return method, path and definition of every route, preflights included; there are some of both."""
        found = [
            (method.upper(), path, definition)
            for path, methods in self.api["paths"].items()
            for method, definition in methods.items()
        ]
        assert {method for method, _, _ in found} >= {"OPTIONS", "GET", "POST"}
        return found

    def statements(self) -> list[tuple[str, Json]]:
        """Return the resource and the statement of everything that grants or denies, trust policies aside.

        There are some of both.
        """
        policies = [
            (name, policy["PolicyDocument"])
            for name, role in self.of_type("AWS::IAM::Role").items()
            for policy in role.get("Policies", [])
        ]
        for kind in ("AWS::S3::BucketPolicy", "AWS::SQS::QueuePolicy"):
            policies += [(name, properties["PolicyDocument"]) for name, properties in self.of_type(kind).items()]
        found = [(name, statement) for name, document in policies for statement in document["Statement"]]
        assert {statement["Effect"] for _, statement in found} == {"Allow", "Deny"}
        return found


@pytest.fixture(scope="session", autouse=True)
def _quiet_translator() -> None:
    # It warns about feature toggles that only AWS's own deployment has.
    logging.getLogger("samtranslator").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def source() -> Json:
    """The template as written."""
    return read_template()


@pytest.fixture(scope="session")
def template() -> Template:
    """The translated template."""
    return Template(translate(read_template()))


@pytest.fixture(scope="session")
def version_of() -> Callable[..., str]:
    """Return the logical id of the version that the API function's alias points at, after a change of the template."""

    def version(change: Callable[[Json], object] = lambda _: None, *, artefacts: str = "one") -> str:
        changed = read_template()
        change(changed)
        versions = Template(translate(changed, artefacts=artefacts)).of_type("AWS::Lambda::Version")
        (name,) = versions
        return name

    return version
