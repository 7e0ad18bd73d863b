"""The Segmind stand-in for the modules that talk to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from local.segmind import SegmindStandIn


@pytest.fixture(scope="module")
def _running(request: pytest.FixtureRequest) -> Iterator[SegmindStandIn]:
    with SegmindStandIn(request.module.KEY) as stand_in:
        yield stand_in


@pytest.fixture
def segmind(_running: SegmindStandIn) -> SegmindStandIn:
    """A stand-in as fresh as new, which takes the test module's `KEY`."""
    _running.reset()
    return _running
