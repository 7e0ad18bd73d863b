"""The documentation as tests read it: pages, their links, and the rows of their tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.system import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "events").glob("*.md")])


def page(name: str) -> str:
    """Return the text of a page in `docs`."""
    return (ROOT / "docs" / name).read_text()


def prose(path: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def links(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield the file, and the heading or nothing, that each relative link of a page leads to."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if not re.match(r"[a-z]+:", link):
            file, _, heading = link.partition("#")
            yield (path.parent / file).resolve() if file else path, heading


def headings(path: Path) -> list[str]:
    """Return the names under which GitHub lets links lead to the headings of a page."""
    found = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found]


def rows(text: str) -> list[list[str]]:
    """Return the cells of all tables."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def section(text: str, heading: str) -> str:
    """Return what stands under a heading of the second level."""
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
