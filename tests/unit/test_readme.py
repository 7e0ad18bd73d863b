"""The README fits on a page and leads to all the others."""

from __future__ import annotations

from tests.system import ROOT
from tests.unit.pages import links

README = ROOT / "README.md"
LONGEST = 1200


def test_it_is_short():
    assert len(README.read_text().split()) <= LONGEST


def test_it_leads_to_every_page():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} | {"CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"}
    assert pages <= {path.name for path, _ in links(README)}
