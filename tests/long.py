"""Whether tests take their time: `make test-long` sets `LONG=1`."""

from __future__ import annotations

import os

LONG = bool(os.environ.get("LONG"))
# Of the fault walks only what a short run leaves out: for `make mutants`.
REST = os.environ.get("LONG") == "rest"


def examples(count: int) -> int:
    """Return how many examples a random test draws that draws so many in a short run."""
    return count * 10 if LONG else count
