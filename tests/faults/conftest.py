"""One deployment for each module: every test here makes jobs of its own and leaves the queues empty."""

from __future__ import annotations

import pytest

from tests.faults.calls import Calls
from tests.faults.deployment import Deployment
from tests.faults.endpoint import EndpointDeployment
from tests.system import running_system


@pytest.fixture(scope="module")
def _deployment(request):
    # A module that names a backend has its deployment with an endpoint.
    backend = getattr(request.module, "BACKEND", "segmind")
    with running_system(backend) as system:
        front = system.sagemaker
        with Calls(lambda: list(front.invocations) if front else ()).watched() as calls:
            yield (EndpointDeployment if front else Deployment)(system, calls)


@pytest.fixture
def deployment(_deployment):
    """The functions in one process, whose calls can be seen and interrupted."""
    _deployment.fresh()
    yield _deployment
    _deployment.assert_books_balance()
