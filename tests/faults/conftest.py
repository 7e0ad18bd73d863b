"""One deployment for each module: every test here makes jobs of its own and leaves the queues empty."""

from __future__ import annotations

import pytest

from tests.faults.calls import Calls
from tests.faults.deployment import Deployment
from tests.faults.endpoint import EndpointDeployment
from tests.faults.queue import QueueDeployment
from tests.system import running_system


@pytest.fixture(scope="module")
def _deployment(request):
    # A module that names a backend has its deployment with an endpoint.
    backend = getattr(request.module, "BACKEND", "segmind")
    segmind_api = getattr(request.module, "SEGMIND_API", "v1")
    with running_system(backend, segmind_api=segmind_api) as system:
        front = system.sagemaker
        with Calls(lambda: list(front.invocations) if front else ()).watched() as calls:
            kind = EndpointDeployment if front else QueueDeployment if segmind_api == "v2" else Deployment
            yield kind(system, calls)


@pytest.fixture
def deployment(_deployment):
    """The functions in one process, whose calls can be seen and interrupted."""
    _deployment.fresh()
    yield _deployment
    _deployment.assert_books_balance()
