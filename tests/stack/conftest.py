"""One running stack for all tests of a worker, on ports of its own."""

from __future__ import annotations

import pytest

from local.stack import Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    """The whole system on one machine; its clock stands still, so that a test says when the sweep runs."""
    with Stack(logs=tmp_path_factory.mktemp("logs"), schedules=False) as running:
        yield running
