"""One running stack for all tests of a worker, on ports of its own."""

from __future__ import annotations

import pytest

from img2img.admin.stack import Operator
from local.stack import Stack
from tests.stack.client import Client


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    """The whole system on one machine; its clock stands still, so that a test says when the sweep runs."""
    with Stack(logs=tmp_path_factory.mktemp("logs"), schedules=False) as running:
        yield running


@pytest.fixture(scope="session")
def admin(stack):
    """What the operator of the stack works with."""
    return Operator("local", **stack.aws)


@pytest.fixture(scope="session")
def new_key(stack, admin):
    """Make a key for a team, as `key create` does, and return its caller."""

    def make(team: str) -> Client:
        with admin.keys.new(team) as key:
            admin.teams.add_key(key.id, team, label=f"key of {team}")
        return Client(stack.url, key.value, key.id)

    return make


@pytest.fixture(scope="session")
def new_team(admin, new_key):
    """Make a team with a key and, if asked to, thousandths of a credit; return its caller."""

    def make(team: str, thousandths: int = 0) -> Client:
        admin.teams.create(team)
        if thousandths:
            admin.credits.add(team, thousandths)
        return new_key(team)

    return make
