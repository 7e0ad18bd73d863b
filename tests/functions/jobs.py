"""Jobs of a small picture."""

from __future__ import annotations

import base64
from functools import cache
from typing import Any

from tests.functions.interruptions import picture
from tests.system import System


@cache
def encoded() -> str:
    """Return the picture as a request carries it."""
    return base64.b64encode(picture()).decode()


def create(system: System, **fields: Any) -> str:
    """Create a job that nobody waits for, and return its id."""
    created = system.create(**{"image": encoded(), "seed": 7, **fields})
    assert created.status == 202, created.content
    return str(created.json["id"])
