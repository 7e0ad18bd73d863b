"""The Segmind stand-in for the modules that talk to it, and faults of AWS."""

from __future__ import annotations

from collections.abc import Iterator

import boto3
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


@pytest.fixture
def before_calls():
    """Return a function that has something done before each call of an operation by a client made from then on."""
    registered = []

    def register(operation, act):
        def handler(model, **_):
            if model.name == operation:
                act()

        registered.append(handler)
        boto3.DEFAULT_SESSION.events.register("before-call", handler)

    yield register
    for handler in registered:
        boto3.DEFAULT_SESSION.events.unregister("before-call", handler)
