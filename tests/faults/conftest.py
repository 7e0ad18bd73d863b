"""One deployment for each module: every test here makes jobs of its own and leaves the queue empty."""

from __future__ import annotations

import pytest

from tests.faults.calls import Calls
from tests.faults.deployment import Deployment
from tests.system import running_system


@pytest.fixture(scope="module")
def _deployment():
    with running_system() as system, Calls().watched() as calls:
        yield Deployment(system, calls)


@pytest.fixture
def deployment(_deployment):
    """The functions in one process, whose calls can be seen and interrupted."""
    _deployment.fresh()
    yield _deployment
    _deployment.assert_books_balance()
