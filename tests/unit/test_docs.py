"""The documentation names what there is, each on the page for those who look for it, and nothing that is not there."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from endpoint.settings import Settings as EndpointSettings
from img2img.admin import cli
from img2img.errors import ServiceError, _tree
from img2img.params import FIELDS, REQUIRED, Field
from img2img.settings import Settings
from tests.system import ROOT, function
from tests.unit.pages import PAGES, headings, links, page, rows, section

API, OPERATE, ENDPOINT, DEVELOPMENT, ARCHITECTURE = (
    page(f"{name}.md") for name in ("api", "operate", "endpoint", "development", "architecture")
)
PACKAGE = ROOT / "layers/core/python"
TEMPLATE = (ROOT / "template.yaml").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.findall(r"^([\w-]+):.*##", MAKEFILE, re.MULTILINE)


class Loader(yaml.SafeLoader):
    """YAML with CloudFormation's tags, which are of no matter here."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
DEPLOYED = yaml.load(TEMPLATE, Loader)


def row_of(text: str, name: str) -> list[str]:
    """Return the one row that has something in its first two cells, without backticks around cells."""
    found = [row for row in rows(text) if f"`{name}`" in " ".join(row[:2])]
    assert len(found) == 1, f"one row of a table must name `{name}`, not {len(found)}"
    return [cell.strip("`") for cell in found[0]]


# ---------------------------------------------------------------- Links


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for file, heading in links(path):
        assert file.is_relative_to(ROOT), file
        assert file.is_file(), file
        assert not heading or heading in headings(file), f"{file.name}#{heading}"


def test_there_are_links_to_follow():
    assert sum(1 for path in PAGES for _ in links(path)) > 40


# ---------------------------------------------------------------- The API


def routes() -> list[str]:
    app = function("api").app
    found = [f"{route.method} {route.path}" for route in app._static_routes + app._dynamic_routes]
    return [re.sub(r"<(?:job_)?(\w+)>", r"{\1}", route) for route in found]


@pytest.mark.parametrize("route", routes())
def test_routes(route):
    assert f"`{route}`" in section(API, "Routes")


def compatible_routes() -> list[str]:
    events = DEPLOYED["Resources"]["CompatibleFunction"]["Properties"]["Events"].values()
    return [f"{event['Properties']['Method']} {event['Properties']['Path']}" for event in events]


@pytest.mark.parametrize("route", compatible_routes())
def test_routes_for_segminds_clients(route):
    assert f"`{route}`" in section(API, "Segmind's clients")


def shown(default: object) -> str:
    if default is REQUIRED:
        return "required"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return f"{default:g}"
    # Also what is empty.
    return str(default or "none")


@pytest.mark.parametrize("field", FIELDS.values(), ids=lambda field: field.name)
def test_request_fields(field: Field):
    accepts = field.kind.accepts.removeprefix("must be ")
    assert f"| `{field.name}` | {accepts} | {shown(field.default)} | {field.description} |" in API


def test_no_request_field_is_made_up():
    named = [row[0] for row in rows(section(API, "Requests")) if row[0].startswith("`")]
    assert named == [f"`{name}`" for name in FIELDS]


def errors() -> list[type[ServiceError]]:
    return [error for error in _tree(ServiceError) if "code" in error.__dict__]


@pytest.mark.parametrize("error", errors(), ids=lambda error: error.code)
def test_error_codes_and_their_status(error):
    assert [row for row in rows(API) if row[0] == str(error.status) and f"`{error.code}`" in row[1]]


def test_codes_of_the_gateways_own_errors():
    codes = set(re.findall(r'"code": "(\w+)"', TEMPLATE))
    assert len(codes) > 5
    assert [code for code in codes if f"`{code}`" not in section(API, "Answers")] == []


# ---------------------------------------------------------------- Operation

PARAMETERS = section(OPERATE, "Parameters") + section(ENDPOINT, "Parameters")


@pytest.mark.parametrize("setting", dataclasses.fields(Settings), ids=lambda setting: setting.name)
def test_settings_and_their_defaults(setting):
    row = row_of(PARAMETERS, setting.metadata["name"])
    # An empty default stands for a resource that this stack does not have.
    if setting.default not in (dataclasses.MISSING, ""):
        assert str(setting.default) in row[2:3]


@pytest.mark.parametrize(("name", "parameter"), DEPLOYED["Parameters"].items(), ids=list(DEPLOYED["Parameters"]))
def test_parameters_and_their_defaults(name, parameter):
    assert (str(parameter["Default"]) or "none") in row_of(PARAMETERS, name)[1:3]


def test_alarms():
    alarms = [name for name, resource in DEPLOYED["Resources"].items() if resource["Type"] == "AWS::CloudWatch::Alarm"]
    assert len(alarms) > 20
    assert [name for name in alarms if f"`{name}`" not in section(OPERATE, "Alarms")] == []


def test_metrics():
    files = [*PACKAGE.rglob("*.py"), *ROOT.glob("functions/*/app.py")]
    metrics = {name for file in files for name in re.findall(r'_metric\(\s*"(\w+)"', file.read_text())}
    assert len(metrics) > 10
    assert [name for name in metrics if f"`{name}`" not in section(OPERATE, "Watch")] == []


def commands(parser: argparse.ArgumentParser, words: str = "") -> Iterator[str]:
    groups = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield words.strip()
    for name, child in (groups[0] if groups else {}).items():
        yield from commands(child, f"{words} {name}")


@pytest.mark.parametrize("command", list(commands(cli._parser())))
def test_the_operators_commands(command):
    assert re.search(rf"`{command}[` ]", section(OPERATE, "Teams, keys, credits"))


# ---------------------------------------------------------------- The endpoint


@pytest.mark.parametrize("setting", dataclasses.fields(EndpointSettings), ids=lambda setting: setting.name)
def test_settings_of_the_container_and_their_defaults(setting):
    default = ",".join(setting.default) if isinstance(setting.default, tuple) else str(setting.default)
    assert row_of(section(ENDPOINT, "The container alone"), setting.metadata["name"])[1] == (default or "none")


# ---------------------------------------------------------------- Development


def test_make_targets():
    assert len(TARGETS) >= 12
    assert [target for target in TARGETS if f"`make {target}`" not in section(DEVELOPMENT, "Make targets")] == []


def test_no_make_target_is_made_up():
    named = {
        name for path in PAGES for name in re.findall(r"(?:^|`)make ([a-z][\w-]*)", path.read_text(), re.MULTILINE)
    }
    assert named
    assert named <= set(TARGETS)


def test_hooks_run_what_make_lint_runs():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert recipe
    lint = [line.strip().replace("$(PY)", ".venv/bin/python") for line in recipe[1].splitlines()]
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    assert [hook["entry"] for hook in repositories[0]["hooks"]] == lint


def test_every_folder_of_tests_is_listed():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert [name for name in sorted(folders) if f"`tests/{name}`" not in section(DEVELOPMENT, "Tests")] == []


# ---------------------------------------------------------------- Architecture and decisions


CHANGES = rows(section(ARCHITECTURE, "Where to change what"))[2:]


def test_there_are_changes():
    assert len(CHANGES) >= 10


def path_of(name: str) -> Path | None:
    """Return what a name in the table of changes means; None for what is no path."""
    if "/" not in name and not name.endswith((".py", ".yaml", ".md")):
        return None
    return (PACKAGE if name.startswith("img2img/") else ROOT) / name


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change[0])
def test_where_to_change_what(change):
    """Each path is there, and whatever else is named stands in one of the row's files."""
    names = re.findall(r"`([^`]+)`", " ".join(change))
    paths = [path for name in names if (path := path_of(name))]
    assert paths
    assert [path for path in paths if not path.exists()] == []
    text = "\n".join(path.read_text() for path in paths if path.is_file())
    assert [name for name in names if not path_of(name) and not re.search(rf"\b{re.escape(name)}\b", text)] == []


def test_where_things_are():
    named = [row[0].strip("`") for row in rows(section(ARCHITECTURE, "Where things are"))[2:]]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_floors_are_those_that_hold():
    """The picture of the package's floors is the one that tests/unit/test_boundaries.py checks."""
    drawn = re.search(r"^    (flows.*)\n +(>.*)$", ARCHITECTURE, re.MULTILINE)
    assert drawn
    floors = [{room.strip() for room in floor.split(",")} for floor in f"{drawn[1]} {drawn[2]}".split(">")]
    source = ast.parse((ROOT / "tests/unit/test_boundaries.py").read_text())
    listed = next(node.value for node in source.body if isinstance(node, ast.Assign) and node.targets[0].id == "FLOORS")
    assert floors == ast.literal_eval(listed)[1:]


@pytest.mark.parametrize("path", sorted((ROOT / "docs/decisions").glob("0*.md")), ids=lambda path: path.stem[:4])
def test_decisions(path):
    text = path.read_text()
    number = int(path.stem[:4])
    assert re.match(rf"# {number}\. .+\n\n\d{{4}}-\d\d-\d\d\n\n## Context\n", text)
    assert headings(path)[1:] == ["context", "decision", "consequences"]
    title, date = re.match(r"# \d+\. (.+)\n\n(.+)\n", text).groups()
    assert f"| {number} | {date} | [{title}]({path.name}) |" in page("decisions/README.md")
