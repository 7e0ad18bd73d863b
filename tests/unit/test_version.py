"""The version stands where each of its readers can see it, and is the same everywhere."""

from __future__ import annotations

import re
import tomllib

from img2img import __version__
from tests.system import ROOT

CHANGES = (ROOT / "CHANGELOG.md").read_text()


def test_the_package_and_the_project_have_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__


def test_the_stacks_description_names_it():
    """It is what CloudFormation's console shows of a stack."""
    described = re.search(r"^Description: (.*)$", (ROOT / "template.yaml").read_text(), re.MULTILINE)
    assert described
    assert re.findall(r"\d+\.\d+\.\d+", described[1]) == [__version__]


def test_the_change_log_knows_it():
    """What is released is listed under its version, newest first; what is not, under `Unreleased`."""
    headings = re.findall(r"^## \[(.+?)\](.*)$", CHANGES, re.MULTILINE)
    assert headings[0][0] == "Unreleased"
    released = [name for name, _ in headings[1:]]
    assert all(re.fullmatch(r" - \d{4}-\d\d-\d\d", date) for _, date in headings[1:])
    assert released == sorted(released, key=lambda name: [int(part) for part in name.split(".")], reverse=True)
    if released:
        assert released[0] == __version__
    else:
        assert f"Version {__version__} is not released yet" in CHANGES


def test_the_kinds_of_changes_are_those_of_keep_a_changelog():
    kinds = re.findall(r"^### (.*)$", CHANGES, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
