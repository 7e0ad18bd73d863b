"""Steps in at the AWS calls of the functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest


@pytest.fixture
def at(system) -> Iterator[Callable[[str, Callable[[], Any]], None]]:
    """Have something happen before or after the next AWS call of an operation."""
    steps: dict[str, Callable[[], Any]] = {}

    def before(model: Any, **_: Any) -> None:
        steps.pop(f"before {model.name}", int)()

    def after(model: Any, **_: Any) -> None:
        steps.pop(f"after {model.name}", int)()

    # The functions make their clients, each with a copy of these events, when they first need them.
    events = boto3.DEFAULT_SESSION.events
    events.register("before-call", before)
    events.register("after-call", after)
    yield steps.__setitem__
    events.unregister("before-call", before)
    events.unregister("after-call", after)
