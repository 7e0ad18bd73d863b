"""Worker and sweep killed at each call of publishing to the outbox and of giving up what a file or an upload started.

As in `test_kill.py`, the first test of a walk fails when its calls are no longer those that it names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.faults.calls import AFTER, BEFORE, MOMENTS, InOrder, Kill, Killed, Meanwhile, apart, places
from tests.faults.deployment import (
    IN_VAIN,
    LEASE,
    LOOKS,
    ONE_BY_ONE,
    PRICE,
    VISIBILITY,
    Deployment,
)


def _taken_in(deployment: Deployment, **metadata: str) -> str:
    """Make a job of a file."""
    deployment.warm()
    earlier = deployment.job_ids()
    deployment.put_file(**metadata)
    assert deployment.ingest()
    deployment.receive()
    (job_id,) = deployment.job_ids() - earlier
    return job_id


def _earlier_version_fails(deployment: Deployment) -> None:
    deployment.put_file(b"no image")
    assert deployment.ingest()


def _one_sample(deployment: Deployment) -> str:
    _earlier_version_fails(deployment)
    return _taken_in(deployment)


def _two_samples(deployment: Deployment) -> str:
    return _taken_in(deployment, samples="2")


def _refused(deployment: Deployment) -> str:
    _earlier_version_fails(deployment)
    job_id = _taken_in(deployment)
    deployment.system.segmind.behave("400", times=2)
    return job_id


@dataclass(frozen=True)
class Walk:
    """One delivery of a message: how to come to it, which calls it takes from the job's end on, and what is published.

    `again` are those of the next delivery after one that died at the job's end.
    """

    prepare: Callable[[Deployment], str]
    calls: tuple[str, ...]
    again: tuple[str, ...]
    pictures: tuple[int, ...]
    order: tuple[str, ...] = ()


WALKS = {
    "one sample": Walk(
        _one_sample,
        ("TransactWriteItems", "UpdateItem #2", "CopyObject", "PutObject", "DeleteObject", "UpdateItem #3", "GetItem"),
        ("UpdateItem", "UpdateItem #2", "CopyObject", "PutObject", "DeleteObject", "UpdateItem #3", "GetItem"),
        (0,),
    ),
    "two samples": Walk(
        _two_samples,
        ("TransactWriteItems", "UpdateItem #2", "CopyObject", "CopyObject #2", "PutObject", "GetItem"),
        ("UpdateItem", "UpdateItem #2", "CopyObject", "CopyObject #2", "PutObject", "GetItem"),
        (0, 1),
        ONE_BY_ONE,
    ),
    "refused": Walk(
        _refused,
        ("TransactWriteItems", "UpdateItem #2", "PutObject", "GetItem"),
        ("UpdateItem", "UpdateItem #2", "PutObject", "GetItem"),
        (),
    ),
}


def _places(*names: str, again: bool = False) -> list[Any]:
    return [
        pytest.param(name, call, moment, id=f"{name}-{moment} {call}")
        for name in names
        for call, moment in apart(places(WALKS[name].again if again else WALKS[name].calls))
    ]


def _assert_published(deployment: Deployment, walk: Walk, job_id: str) -> None:
    deployment.assert_published(job_id, *walk.pictures)
    # A refusal that nobody wrote down is asked for again; a picture never is.
    assert deployment.seeds() == Counter(walk.pictures or (0,)) or not walk.pictures
    assert deployment.account().charged == PRICE * len(walk.pictures)
    deployment.assert_at_rest(job_id)


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_takes_every_call_of_publishing(deployment, name):
    walk = WALKS[name]
    job_id = walk.prepare(deployment)
    deployment.run(InOrder(walk.order))
    assert tuple(deployment.calls.made[-len(walk.calls) :]) == walk.calls
    _assert_published_again(deployment, walk, job_id)


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_takes_every_call_of_the_next_delivery(deployment, name):
    walk = WALKS[name]
    job_id = walk.prepare(deployment)
    deployment.kill_worker("TransactWriteItems", AFTER, walk.order)
    deployment.run(InOrder())
    assert tuple(deployment.calls.made) == walk.again
    _assert_published_again(deployment, walk, job_id)


def _assert_published_again(deployment: Deployment, walk: Walk, job_id: str) -> None:
    before = deployment.outbox()
    deployment.settle()
    assert deployment.outbox() == before
    _assert_published(deployment, walk, job_id)


@pytest.mark.parametrize(("name", "call", "moment"), _places(*WALKS))
def test_a_worker_killed_while_it_publishes_is_followed_by_one_that_completes_the_outbox(
    deployment, name, call, moment
):
    walk = WALKS[name]
    job_id = walk.prepare(deployment)
    deployment.kill_worker(call, moment, walk.order)
    outbox = set(deployment.outbox())
    # Whoever finds the document finds the pictures.
    assert ".json" not in outbox or len(outbox - {".json", ".error.json"}) == len(walk.pictures)
    deployment.system.clock.advance(VISIBILITY)
    deployment.settle()
    _assert_published(deployment, walk, job_id)


@pytest.mark.parametrize(("name", "call", "moment"), _places("one sample", "refused", again=True))
def test_a_worker_killed_while_it_completes_the_outbox_is_followed_by_another(deployment, name, call, moment):
    walk = WALKS[name]
    job_id = walk.prepare(deployment)
    deployment.kill_worker("TransactWriteItems", AFTER)
    deployment.system.clock.advance(VISIBILITY)
    deployment.kill_worker(call, moment)
    deployment.system.clock.advance(VISIBILITY)
    deployment.settle()
    _assert_published(deployment, walk, job_id)


@pytest.mark.parametrize(("name", "call", "moment"), _places("one sample"))
def test_a_job_deleted_while_it_is_published_is_not_asked_for_again(deployment, name, call, moment):
    job_id = WALKS[name].prepare(deployment)
    meanwhile = Meanwhile(deployment.calls, lambda: deployment.end("delete", job_id), (call, moment))
    deployment.run(meanwhile)
    assert meanwhile.happened
    deployment.system.clock.advance(VISIBILITY)
    deployment.settle()
    assert job_id not in deployment.job_ids()
    assert (deployment.results(job_id), deployment.inputs(job_id)) == ([], [])
    assert deployment.seeds() == {0: 1}
    assert deployment.system.messages() == 0


# The sweep


def _forgotten(deployment: Deployment) -> str:
    """A file's job that no worker ever got to see."""
    job_id = _one_sample(deployment)
    deployment.lose_messages()
    deployment.system.clock.advance(deployment.system.services.settings.job_deadline + LEASE)
    return job_id


def _half_done(deployment: Deployment) -> str:
    """A file's job with one picture of two, whose message was lost while it waited for the backend."""
    job_id = _two_samples(deployment)
    deployment.system.segmind.behave("429")
    deployment.run(InOrder(("POST 1", "POST 0", "PutObject 0")))
    deployment.lose_messages()
    deployment.system.clock.advance(deployment.system.services.settings.job_deadline + LEASE)
    return job_id


def _not_uploaded(deployment: Deployment) -> str:
    job_id = deployment.new_awaiting_job()
    deployment.system.clock.advance(IN_VAIN + 1)
    return job_id


@dataclass(frozen=True)
class GivenUp:
    """What the sweep gives up: how to come to it, which calls that takes, and what comes of the job."""

    prepare: Callable[[Deployment], str]
    calls: tuple[str, ...]
    status: str
    error: str = ""
    pictures: tuple[int, ...] = ()


GIVEN_UP = {
    "forgotten": GivenUp(
        _forgotten,
        ("SendMessage", "TransactWriteItems", "UpdateItem", "PutObject", "GetItem"),
        "failed",
        "deadline_exceeded",
    ),
    "half done": GivenUp(
        _half_done,
        ("SendMessage", "TransactWriteItems", "UpdateItem", "CopyObject", "PutObject", "GetItem"),
        "succeeded",
        pictures=(0,),
    ),
    "not uploaded": GivenUp(_not_uploaded, ("TransactWriteItems",), "canceled", "upload_missing"),
}


# The places of a sweep at which the job has not ended.
BEFORE_ITS_END = (("SendMessage", BEFORE), ("SendMessage", AFTER), ("TransactWriteItems", BEFORE))


def _assert_given_up(deployment: Deployment, given_up: GivenUp, job_id: str) -> None:
    job = deployment.system.job(job_id)
    assert (job["status"], (job["error"] or {}).get("code", "")) == (given_up.status, given_up.error)
    if given_up.status == "canceled":
        assert deployment.outbox() == {}
    else:
        deployment.assert_published(job_id, *given_up.pictures)
    assert deployment.spent() == PRICE * len(given_up.pictures)
    deployment.assert_at_rest(job_id)


@pytest.mark.parametrize("name", GIVEN_UP)
def test_a_walk_takes_every_call_of_giving_up(deployment, name):
    job_id = GIVEN_UP[name].prepare(deployment)
    deployment.sweep(InOrder())
    assert [call for call in deployment.calls.made if call not in LOOKS] == list(GIVEN_UP[name].calls)
    deployment.settle()
    _assert_given_up(deployment, GIVEN_UP[name], job_id)


@pytest.mark.parametrize(
    ("name", "call", "moment"),
    [
        pytest.param(name, call, moment, id=f"{name}-{moment} {call}")
        for name, given_up in GIVEN_UP.items()
        for call, moment in apart(places(given_up.calls))
    ],
)
def test_a_sweep_killed_while_it_gives_up_is_followed_by_one_that_completes_it(deployment, name, call, moment):
    job_id = GIVEN_UP[name].prepare(deployment)
    asked = deployment.seeds()
    kill = Kill(call, moment)
    with pytest.raises(Killed):
        deployment.sweep(kill)
    deployment.restart()
    deployment.system.sweep()
    deployment.receive()
    deployment.settle()
    _assert_given_up(deployment, GIVEN_UP[name], job_id)
    assert deployment.seeds() == asked


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("call", GIVEN_UP["forgotten"].calls)
def test_the_outbox_tells_how_a_job_ended_that_a_worker_ends_while_the_sweep_gives_it_up(deployment, call, moment):
    job_id = _one_sample(deployment)
    deployment.kill_worker("PutObject 0", AFTER)
    deployment.system.clock.advance(deployment.system.services.settings.job_deadline + LEASE)
    meanwhile = Meanwhile(deployment.calls, deployment.work, (call, moment))
    deployment.sweep(meanwhile)
    assert meanwhile.happened
    deployment.settle()
    in_time = (call, moment) in BEFORE_ITS_END
    assert deployment.system.job(job_id)["status"] == ("succeeded" if in_time else "failed")
    deployment.assert_published(job_id, *([0] if in_time else []))
    assert deployment.seeds() == {0: 1}
    deployment.assert_at_rest(job_id)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("call", GIVEN_UP["forgotten"].calls)
def test_a_job_canceled_while_the_sweep_gives_it_up_leaves_no_error(deployment, call, moment):
    job_id = _forgotten(deployment)
    meanwhile = Meanwhile(deployment.calls, lambda: deployment.end("cancel", job_id), (call, moment))
    deployment.sweep(meanwhile)
    assert meanwhile.happened
    deployment.settle()
    if (call, moment) not in BEFORE_ITS_END:
        # It had failed before.
        deployment.assert_published(job_id)
    else:
        assert deployment.system.job(job_id)["status"] == "canceled"
        # But for the earlier version's.
        assert job_id not in deployment.outbox().get(".error.json", b"").decode()
    deployment.assert_at_rest(job_id)


# Versions


@pytest.mark.parametrize(("name", "call", "moment"), _places("one sample"))
def test_a_later_version_that_is_published_between_two_calls_of_an_earlier_one_stays(deployment, name, call, moment):
    WALKS[name].prepare(deployment)
    later = []

    def publish_later() -> None:
        held = set(deployment.held)
        later.append(_taken_in(deployment, samples="2"))
        deployment.work(set(deployment.held) - held)

    meanwhile = Meanwhile(deployment.calls, publish_later, (call, moment))
    deployment.run(meanwhile)
    assert meanwhile.happened
    deployment.settle()
    deployment.assert_published(later[0], 0, 1)


def test_an_earlier_version_whose_message_returns_late_replaces_nothing(deployment):
    earlier = _one_sample(deployment)
    deployment.kill_worker("TransactWriteItems", AFTER)
    (message,) = deployment.held
    later = _taken_in(deployment, samples="2")
    deployment.work(set(deployment.held) - {message})
    deployment.settle()
    deployment.assert_published(later, 0, 1)
    assert deployment.system.job(earlier)["status"] == "succeeded"
