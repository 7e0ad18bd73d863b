"""One deployment for each module: every test here makes jobs of its own and leaves the queue empty."""

from __future__ import annotations

import pytest

from tests.faults.calls import Calls
from tests.faults.deployment import Deployment
from tests.system import running_system


@pytest.fixture(scope="module")
def _deployment():  # noqa: ANN202
    with Calls().watched() as calls, running_system() as system:
        yield Deployment(system, calls)


@pytest.fixture
def deployment(_deployment):  # noqa: ANN001, ANN201
    """The functions in one process, whose calls can be seen and interrupted."""
    _deployment.fresh()
    return _deployment
