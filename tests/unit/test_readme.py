"""The README names every route, setting, parameter and make target."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from img2img.params import FIELDS
from img2img.settings import Settings
from tests.system import ROOT, function

README = (ROOT / "README.md").read_text()


def routes() -> list[str]:
    app = function("api").app
    found = [f"{route.method} {route.path}" for route in app._static_routes + app._dynamic_routes]
    return [re.sub(r"<(?:job_)?(\w+)>", r"{\1}", route) for route in found]


@pytest.mark.parametrize("route", routes())
def test_routes(route):
    assert f"`{route}`" in README


@pytest.mark.parametrize("setting", dataclasses.fields(Settings), ids=lambda setting: setting.name)
def test_settings_and_their_defaults(setting):
    row = next(line for line in README.splitlines() if f"`{setting.metadata['name']}`" in line)
    # An empty default stands for a resource that this stack does not have.
    if setting.default not in (dataclasses.MISSING, ""):
        assert f"| {setting.default} |" in row.replace("`", "")


def test_make_targets():
    targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(targets) >= 12
    assert [target for target in targets if f"`make {target}`" not in README] == []


def test_template_parameters():
    class Loader(yaml.SafeLoader):
        """YAML with CloudFormation's tags."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    template = yaml.load((ROOT / "template.yaml").read_text(), Loader)
    assert [name for name in template["Parameters"] if f"`{name}`" not in README] == []


def test_request_fields():
    assert [name for name in FIELDS if f"`{name}`" not in README] == []
