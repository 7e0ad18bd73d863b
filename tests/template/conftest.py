"""template.yaml as written, as SAM translates it, and what each choice of backend leaves of that."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import pytest
from samtranslator.parser.parser import Parser
from samtranslator.translator.translator import Translator
from samtranslator.yaml_helper import yaml_parse

from local.conditions import under_conditions
from tests.template.flows import Call, record_calls

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]
# What an operator gives with any other backend than Segmind.
ENDPOINT = {
    "EndpointImageUri": "123456789012.dkr.ecr.eu-west-1.amazonaws.com/img2img-endpoint:1",
    "ModelDataUri": "s3://models/sd15/",
}
TOPIC = "arn:aws:sns:eu-west-1:123456789012:alarms"


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


@cache
def _translated() -> str:
    return json.dumps(translate(read_template()))


def deployment(**parameters: str) -> Json:
    """Return what CloudFormation makes with these parameters: conditions are decided, parameters have their values."""
    template: Json = json.loads(_translated())
    for name, value in parameters.items():
        template["Parameters"][name]["Default"] = value
    return under_conditions(template, {})


class Template:
    """The translated template, by type and by name."""

    def __init__(self, translated: Json) -> None:
        self.resources: dict[str, Json] = translated["Resources"]
        self.outputs: dict[str, Json] = translated["Outputs"]

    def of_type(self, kind: str) -> dict[str, Json]:
        """Return the properties of every resource of a kind, of which there is one at least."""
        found = {name: r["Properties"] for name, r in self.resources.items() if r["Type"] == kind}
        assert found, f"there is no {kind}"
        return found

    def kinds(self) -> set[str]:
        """Return the types of all resources."""
        return {resource["Type"] for resource in self.resources.values()}

    def properties(self, name: str) -> Json:
        properties: Json = self.resources[name]["Properties"]
        return properties

    @property
    def api(self) -> Json:
        """The OpenAPI document of the main API."""
        return self.document("Api")

    @property
    def compatible(self) -> Json:
        """The OpenAPI document of the API for Segmind's own clients."""
        return self.document("CompatibleApi")

    def document(self, api: str) -> Json:
        """Return the OpenAPI document of an API."""
        body: Json = self.properties(api)["Body"]
        return body

    def operations(self, api: str = "Api") -> list[tuple[str, str, Json]]:
        """Return method, path and definition of every route of an API, preflights included."""
        found = [
            (method.upper(), path, definition)
            for path, methods in self.document(api)["paths"].items()
            for method, definition in methods.items()
        ]
        assert {method for method, _, _ in found} >= {"GET", "POST"}
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
        for kind in ("AWS::S3::BucketPolicy", "AWS::SQS::QueuePolicy", "AWS::SNS::TopicPolicy"):
            if kind in self.kinds():
                policies += [(name, properties["PolicyDocument"]) for name, properties in self.of_type(kind).items()]
        found = [(name, statement) for name, document in policies for statement in document["Statement"]]
        assert {statement["Effect"] for _, statement in found} == {"Allow", "Deny"}
        return found

    def grants(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield who grants, the action, the thing it may be done to, and the statement's id, of all that is allowed."""
        for name, statement in self.statements():
            if statement["Effect"] == "Allow":
                for action in as_list(statement["Action"]):
                    for resource in as_list(statement["Resource"]):
                        yield name, action, _place(resource), statement["Sid"]

    def dashboard(self) -> str:
        """Return the dashboard's JSON, in which only names of resources and parameters are to be filled in."""
        text, parts = self.properties("Dashboard")["DashboardBody"]["Fn::Sub"]
        for name, part in parts.items():
            text = text.replace(f"${{{name}}}", part["Fn::Sub"] if part else "")
        return str(text)

    def widgets(self) -> list[Json]:
        """Return the dashboard's widgets, with 0 for every name."""
        found: list[Json] = json.loads(re.sub(r"\$\{[^}]+\}", "0", self.dashboard()))["widgets"]
        return found

    def names_of_settings(self) -> dict[str, str]:
        """Return, by what the tests call a table, bucket, queue or secret, its name in the template."""
        variables = self.properties("WorkerFunction")["Environment"]["Variables"]
        return {
            os.environ[variable]: value["Ref"]
            for variable, value in variables.items()
            if isinstance(value, dict) and value.get("Ref") in self.resources and variable in os.environ
        }


def as_list(value: Any) -> list[Any]:
    """Return what may stand alone or in a list as a list."""
    return value if isinstance(value, list) else [value]


def _place(resource: Any) -> str:
    match resource:
        case "*":
            return "*"
        case {"Ref": str(name)} | {"Fn::GetAtt": [str(name), "Arn"]}:
            return name
        case {"Fn::Sub": str(text)}:
            return text.replace("${", "").replace(".Arn}", "")
        case {"Fn::Sub": [str(text), _]}:
            return text
    raise AssertionError(resource)


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
    """All that can be deployed together: both backends, the endpoint called through its queue, alarms that notify."""
    return Template(deployment(Backend="auto", SageMakerInvocation="async", AlarmTopicArn=TOPIC, **ENDPOINT))


@pytest.fixture(scope="session")
def segmind() -> Template:
    """What is deployed when nothing is chosen."""
    return Template(deployment())


@pytest.fixture(scope="session")
def calls() -> list[Call]:
    """What the functions ask of AWS while everything happens to them that ever does."""
    return record_calls()


@pytest.fixture(scope="session")
def version_of() -> Callable[..., str]:
    """Return the logical id of the version that a function's alias points at, after a change of the template."""

    def version(function: str, change: Callable[[Json], object] = lambda _: None, *, artefacts: str = "one") -> str:
        changed = read_template()
        change(changed)
        versions = Template(translate(changed, artefacts=artefacts)).of_type("AWS::Lambda::Version")
        (name,) = (name for name, version in versions.items() if version["FunctionName"] == {"Ref": function})
        return name

    return version
