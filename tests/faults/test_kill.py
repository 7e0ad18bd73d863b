"""A process killed at each of its AWS and HTTP calls in turn, just before and just after the call took effect.

Each walk names the calls it takes. The first test of a walk makes them undisturbed and fails when they are no longer
those, so that a call which is added or moved is walked as well.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.faults.calls import AFTER, BEFORE, MOMENTS, SEED, InOrder, Kill, Killed, Meanwhile
from tests.faults.deployment import (
    LEASE,
    ONE_BY_ONE,
    SIDE_BY_SIDE,
    VISIBILITY,
    Deployment,
    request_body,
    short_lived,
)

# The worker


def _one_sample(deployment: Deployment) -> str:
    return deployment.new_job()


def _two_samples(deployment: Deployment) -> str:
    deployment.warm()
    return deployment.new_job(samples=2)


def _rate_limited(deployment: Deployment) -> str:
    deployment.warm()
    deployment.system.segmind.behave("429")
    return deployment.new_job()


def _after_a_crash(deployment: Deployment) -> str:
    job_id = _two_samples(deployment)
    deployment.kill_worker("PutObject 0", AFTER, ONE_BY_ONE)
    deployment.warm()
    deployment.system.clock.advance(VISIBILITY)
    return job_id


@dataclass(frozen=True)
class Walk:
    """One delivery of a message: how to come to it, and which calls it takes."""

    prepare: Callable[[Deployment], str]
    calls: tuple[str, ...]
    order: tuple[str, ...] = ()
    samples: int = 1


WALKS = {
    "one sample": Walk(
        _one_sample,
        ("UpdateItem", "GetObject", "GetSecretValue", "POST 0", "PutObject 0", "TransactWriteItems"),
    ),
    "one by one": Walk(
        _two_samples, ("UpdateItem", "GetObject", *ONE_BY_ONE, "TransactWriteItems"), order=ONE_BY_ONE, samples=2
    ),
    "side by side": Walk(
        _two_samples, ("UpdateItem", "GetObject", *SIDE_BY_SIDE, "TransactWriteItems"), order=SIDE_BY_SIDE, samples=2
    ),
    "rate limited": Walk(
        _rate_limited, ("UpdateItem", "GetObject", "POST 0", "UpdateItem #2", "ChangeMessageVisibility")
    ),
    "after a crash": Walk(
        _after_a_crash,
        ("UpdateItem", "ListObjectsV2", "HeadObject 0", "GetObject", "POST 1", "PutObject 1", "TransactWriteItems"),
        samples=2,
    ),
}


def _message_returns(deployment: Deployment) -> None:
    deployment.system.clock.advance(VISIBILITY)
    deployment.work()


def _sweep_comes_first(deployment: Deployment) -> None:
    deployment.system.clock.advance(LEASE + 1)
    deployment.system.sweep()
    # The message of the dead worker is still invisible, and comes back when all is done.
    deployment.work(deployment.receive())
    deployment.system.clock.advance(VISIBILITY)
    deployment.work()


def _message_returns_too_early(deployment: Deployment) -> None:
    """A second delivery finds the dead worker's lease, so that the message is gone and only the schedule is left."""
    deployment.work()
    deployment.system.clock.advance(LEASE + 1)
    deployment.system.sweep()
    deployment.receive()
    deployment.work()


RETURNS = (_message_returns, _sweep_comes_first, _message_returns_too_early)


def _places(*returns: Callable[[Deployment], None], walks: tuple[str, ...]) -> Iterator[Any]:
    for walk, back in itertools.product(walks, returns):
        for call, moment in itertools.product(WALKS[walk].calls, MOMENTS):
            yield pytest.param(walk, call, moment, back, id=f"{walk}-{moment} {call}-{back.__name__.strip('_')}")


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_takes_every_call_of_the_worker(deployment, walk):
    WALKS[walk].prepare(deployment)
    deployment.run(InOrder(WALKS[walk].order))
    assert deployment.calls.made == list(WALKS[walk].calls)


@pytest.mark.parametrize(
    ("walk", "call", "moment", "redeliver"),
    [
        *_places(*RETURNS, walks=("one sample",)),
        *_places(_message_returns, walks=("one by one", "side by side", "rate limited", "after a crash")),
    ],
)
def test_a_worker_killed_at_any_call_loses_no_job_and_pays_for_no_stored_output_again(
    deployment, walk, call, moment, redeliver
):
    segmind = deployment.system.segmind
    job_id = WALKS[walk].prepare(deployment)
    deployment.kill_worker(call, moment, WALKS[walk].order)
    stored = {int(key[-5]) for key in deployment.results(job_id)}
    asked, billed = deployment.seeds(), segmind.billed

    redeliver(deployment)
    deployment.settle()

    deployment.assert_succeeded(job_id, WALKS[walk].samples)
    assert segmind.billed - billed == WALKS[walk].samples - len(stored)
    assert not stored & set(deployment.seeds() - asked)
    assert deployment.job_ids() == {job_id}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("call", ["UpdateItem", "GetObject", "POST 0"])
def test_a_job_whose_worker_always_dies_ends_as_an_internal_error(deployment, call, moment):
    job_id = _one_sample(deployment)
    counted = (call, moment) != ("UpdateItem", BEFORE)
    for _ in range(3):
        deployment.kill_worker(call, moment)
        deployment.system.clock.advance(LEASE + 1)
    calls = len(deployment.system.segmind.calls)
    assert calls == (3 if (call, moment) == ("POST 0", AFTER) else 0)

    deployment.settle()

    job = deployment.system.job(job_id)
    if counted:
        assert (job["status"], job["error"]["code"]) == ("failed", "internal_error")
        assert len(deployment.system.segmind.calls) == calls
        assert deployment.results(job_id) == []
    else:
        # Nothing of those attempts is known, and nothing was asked of the backend.
        assert job["status"] == "succeeded"
    deployment.assert_at_rest(job_id)


def test_outputs_that_are_stored_make_the_job_succeed_however_often_its_worker_died(deployment):
    job_id = _one_sample(deployment)
    for _ in range(5):
        deployment.kill_worker("TransactWriteItems", BEFORE)
        deployment.system.clock.advance(LEASE + 1)
    deployment.settle()
    deployment.assert_succeeded(job_id)
    assert deployment.seeds() == {0: 1}


def test_a_sample_that_always_kills_its_worker_is_shown_as_failed_beside_the_one_that_is_stored(deployment):
    job_id = _two_samples(deployment)
    deployment.kill_worker("POST 1", AFTER, ONE_BY_ONE)
    for _ in range(2):
        deployment.system.clock.advance(LEASE + 1)
        deployment.kill_worker("POST 1", AFTER)
    deployment.system.clock.advance(LEASE + 1)
    deployment.settle()
    job = deployment.system.job(job_id)
    assert job["status"] == "succeeded"
    assert [(o["index"], o["status"], o["seed"]) for o in job["outputs"]] == [
        (0, "succeeded", SEED),
        (1, "failed", SEED + 1),
    ]
    assert job["outputs"][1]["error"]["code"] == "internal_error"
    assert deployment.seeds() == {0: 1, 1: 3}
    deployment.assert_at_rest(job_id)


@pytest.mark.parametrize(("call", "moment"), [("UpdateItem", BEFORE), ("TransactWriteItems", BEFORE)])
def test_a_job_that_nobody_can_finish_fails_at_its_deadline(deployment, call, moment):
    job_id = _one_sample(deployment)
    deadline = int(deployment.item(job_id)["deadline_at"]["N"])
    while deployment.system.clock() < deadline + LEASE:
        deployment.kill_worker(call, moment)
        deployment.system.clock.advance(LEASE + 1)
    assert deployment.system.sweep() == {"failed": 1}
    deployment.settle()
    job = deployment.system.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "deadline_exceeded")
    assert len(deployment.system.segmind.calls) <= 1
    deployment.assert_at_rest(job_id)


CANCELED_MEANWHILE = (
    *("UpdateItem", "GetObject", "GetSecretValue", "POST 0", "PutObject 0", "TransactWriteItems"),
    *("GetItem", "ListObjectsV2", "DeleteObject 0"),
)


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_the_walk_of_a_job_that_ends_meanwhile_takes_every_call(deployment, how):
    job_id = _one_sample(deployment)
    deployment.run(Meanwhile(deployment.calls, lambda: deployment.end(how, job_id), ("POST 0", AFTER)))
    assert deployment.calls.made == list(CANCELED_MEANWHILE)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("call", CANCELED_MEANWHILE[CANCELED_MEANWHILE.index("PutObject 0") :])
@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_a_worker_killed_after_its_job_was_ended_leaves_no_picture(deployment, how, call, moment):
    job_id = _one_sample(deployment)
    kill = Meanwhile(deployment.calls, lambda: deployment.end(how, job_id), ("POST 0", AFTER), kill=(call, moment))
    with pytest.raises(Killed):
        deployment.run(kill)
    deployment.restart()

    deployment.system.clock.advance(VISIBILITY)
    deployment.settle()

    assert deployment.results(job_id) == []
    assert deployment.system.messages() == 0
    answer = deployment.system.api("GET", f"/jobs/{job_id}")
    assert answer.status == 404 if how == "delete" else answer.json["status"] == "canceled"


# The API


@dataclass(frozen=True)
class Create:
    """One way to create a job: what to send, and which calls it takes."""

    calls: tuple[str, ...]
    headers: Mapping[str, str] = field(default_factory=dict)
    key: bool = False
    upload: bool = False

    def request(self, deployment: Deployment) -> tuple[dict[str, Any], dict[str, str]]:
        """Return body and headers, the same at every try."""
        body = request_body(image=deployment.upload()) if self.upload else request_body()
        key = {"Idempotency-Key": str(uuid.uuid4())} if self.key else {}
        return body, {"Prefer": "wait=0", **self.headers, **key}


CREATES = {
    "no key": Create(("PutObject", "TransactWriteItems", "SendMessage")),
    "waits for the picture": Create(
        ("PutObject", "TransactWriteItems", "SendMessage", "GetItem", "GetObject 0"),
        {"Prefer": "wait=25", "Accept": "image/jpeg"},
    ),
    "key": Create(("PutItem", "PutObject", "TransactWriteItems", "SendMessage", "UpdateItem"), key=True),
    "key and upload": Create(
        ("PutItem", "GetObject", "PutObject", "TransactWriteItems", "SendMessage", "UpdateItem"),
        key=True,
        upload=True,
    ),
}


def _create_places(name: str, *rest: str) -> list[Any]:
    return [
        pytest.param(name, call, moment, *rest, id="-".join([name, f"{moment} {call}", *rest]))
        for call, moment in itertools.product(CREATES[name].calls, MOMENTS)
    ]


@contextmanager
def _worker_works_while_the_api_waits(deployment: Deployment) -> Iterator[None]:
    def work(_seconds: float) -> None:
        with deployment.calls.unseen():
            deployment.receive()
            deployment.work()

    services = deployment.system.services
    services.sleep, sleep = work, services.sleep
    yield
    services.sleep = sleep


def _kill_create(deployment: Deployment, name: str, place: tuple[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Send a request that dies; return it."""
    body, headers = CREATES[name].request(deployment)
    waits = headers["Prefer"] != "wait=0"
    kill = Kill(*place)
    with (
        _worker_works_while_the_api_waits(deployment),
        deployment.calls.shown_to(kill),
        pytest.raises(Killed),
    ):
        deployment.post(body, headers, None if waits else short_lived())
    assert kill.dead
    deployment.restart()
    return body, headers


def _sweep_and_settle(deployment: Deployment) -> None:
    deployment.system.clock.advance(LEASE + 1)
    deployment.system.sweep()
    deployment.settle()


@pytest.mark.parametrize("name", CREATES)
def test_a_walk_takes_every_call_of_create(deployment, name):
    body, headers = CREATES[name].request(deployment)
    with _worker_works_while_the_api_waits(deployment), deployment.calls.shown_to(InOrder()):
        answer = deployment.post(body, headers)
    assert answer.status == (202 if headers["Prefer"] == "wait=0" else 200)
    assert deployment.calls.made == list(CREATES[name].calls)


@pytest.mark.parametrize(
    ("name", "call", "moment", "comes_back"),
    [
        *_create_places("key", "at once"),
        *_create_places("key", "later"),
        *_create_places("key and upload", "at once"),
    ],
)
def test_create_killed_at_any_call_and_sent_again_with_its_key_is_one_job(deployment, name, call, moment, comes_back):
    body, headers = _kill_create(deployment, name, (call, moment))
    if comes_back == "later":
        _sweep_and_settle(deployment)
        assert all(deployment.system.job(job_id)["status"] == "succeeded" for job_id in deployment.job_ids())

    again = deployment.post(body, headers)
    assert again.status in (200, 202), again.json
    _sweep_and_settle(deployment)

    job_id = again.json["id"]
    assert deployment.job_ids() == {job_id}
    deployment.assert_succeeded(job_id)
    assert deployment.seeds() == {0: 1}
    replay = deployment.post(body, headers)
    assert (replay.status, replay.headers["idempotent-replayed"], replay.json["id"]) == (200, "true", job_id)
    assert deployment.job_ids() == {job_id}


@pytest.mark.parametrize(
    ("name", "call", "moment"), [*_create_places("no key"), *_create_places("waits for the picture")]
)
def test_create_killed_at_any_call_leaves_a_job_that_succeeds_or_none(deployment, name, call, moment):
    body, _ = _kill_create(deployment, name, (call, moment))
    created = deployment.job_ids()
    calls = CREATES[name].calls
    has_job = calls.index(call) + (moment == AFTER) > calls.index("TransactWriteItems")
    assert len(created) == has_job
    _sweep_and_settle(deployment)
    for job_id in created:
        deployment.assert_succeeded(job_id)
    assert deployment.seeds() == ({0: 1} if has_job else {})

    # Without a key the caller's next try is another job.
    again = deployment.post(body, {"Prefer": "wait=0"})
    assert again.status == 202
    deployment.settle()
    deployment.assert_succeeded(again.json["id"])
    assert deployment.job_ids() == created | {again.json["id"]}


@pytest.mark.parametrize(("name", "call", "moment"), _create_places("key"))
def test_another_payload_with_the_key_of_a_killed_create_never_makes_a_second_job(deployment, name, call, moment):
    body, headers = _kill_create(deployment, name, (call, moment))
    created = deployment.job_ids()
    other = deployment.post({**body, "prompt": "a ship at sea"}, headers)
    if created:
        assert (other.status, other.json["code"]) == (422, "idempotency_key_reused")
        assert deployment.job_ids() == created
    else:
        # The first request left nothing but its claim on the key, which has run out.
        assert other.status in (202, 422)
        assert len(deployment.job_ids()) == (other.status == 202)


def test_the_key_of_a_killed_create_is_in_flight_for_as_long_as_it_could_have_run(deployment):
    body, headers = CREATES["key"].request(deployment)
    with deployment.calls.shown_to(Kill("PutObject", AFTER)), pytest.raises(Killed):
        deployment.post(body, headers)
    deployment.restart()
    again = deployment.post(body, headers)
    assert (again.status, again.json["code"], again.headers["retry-after"]) == (409, "idempotency_in_flight", "1")
    assert deployment.job_ids() == set()


DELETE = ("UpdateItem", "DeleteObject", "ListObjectsV2", "DeleteObject 0", "DeleteItem")


def test_a_walk_takes_every_call_of_delete(deployment):
    job_id = deployment.new_job()
    deployment.settle()
    with deployment.calls.shown_to(InOrder()):
        assert deployment.system.api("DELETE", f"/jobs/{job_id}").status == 204
    assert deployment.calls.made == list(DELETE)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("call", DELETE)
def test_delete_killed_at_any_call_can_be_sent_again(deployment, call, moment):
    job_id = deployment.new_job()
    deployment.settle()
    with deployment.calls.shown_to(Kill(call, moment)), pytest.raises(Killed):
        deployment.system.api("DELETE", f"/jobs/{job_id}")
    deployment.restart()

    again = deployment.system.api("DELETE", f"/jobs/{job_id}")

    assert again.status == (404 if (call, moment) == ("DeleteItem", AFTER) else 204)
    assert deployment.job_ids() == set()
    assert deployment.results(job_id) == []
    assert deployment.inputs(job_id) == []


# The sweep


def _forgotten(deployment: Deployment) -> str:
    """A job whose message was never sent."""
    job_id = deployment.new_job()
    deployment.lose_messages()
    return job_id


def _abandoned(deployment: Deployment) -> str:
    """A job whose worker died and whose message is lost."""
    job_id = deployment.new_job()
    deployment.kill_worker("POST 0", BEFORE)
    deployment.lose_messages()
    return job_id


def _overdue(deployment: Deployment) -> str:
    """A job past its deadline."""
    job_id = _forgotten(deployment)
    deployment.system.clock.advance(deployment.system.services.settings.job_deadline)
    return job_id


# The index has four shards, and a job may be in any of them: where its own calls come in between differs.
LOOKS = ("Query", "Query #2", "Query #3", "Query #4")
SWEEPS: Mapping[Callable[[Deployment], str], tuple[str, ...]] = {
    _forgotten: (*LOOKS, "UpdateItem", "SendMessage"),
    _abandoned: (*LOOKS, "SendMessage"),
    _overdue: (*LOOKS, "TransactWriteItems"),
}


@pytest.mark.parametrize("prepare", SWEEPS)
def test_a_walk_takes_every_call_of_the_sweep(deployment, prepare):
    prepare(deployment)
    deployment.system.clock.advance(LEASE + 1)
    with deployment.calls.shown_to(InOrder()):
        deployment.system.sweep()
    assert sorted(deployment.calls.made) == sorted(SWEEPS[prepare])


@pytest.mark.parametrize(
    ("prepare", "call", "moment"),
    [
        pytest.param(prepare, call, moment, id=f"{prepare.__name__.strip('_')}-{moment} {call}")
        for prepare, calls in SWEEPS.items()
        # Dead at a look, a sweep has done nothing yet or all there is: one kind of job shows that.
        for call, moment in itertools.product(calls if prepare is _forgotten else calls[len(LOOKS) :], MOMENTS)
    ],
)
def test_a_sweep_killed_at_any_call_is_made_good_by_later_ones(deployment, prepare, call, moment):
    job_id = prepare(deployment)
    deployment.system.clock.advance(LEASE + 1)
    with deployment.calls.shown_to(Kill(call, moment)), pytest.raises(Killed):
        deployment.system.sweep()
    deployment.restart()

    # What the dead one had put off comes again after the job's age, which is below twice the lease.
    deployment.system.clock.advance(2 * LEASE)
    deployment.system.sweep()
    deployment.settle()

    if prepare is _overdue:
        assert deployment.system.job(job_id)["error"]["code"] == "deadline_exceeded"
        assert deployment.seeds() == {}
        deployment.assert_at_rest(job_id)
    else:
        deployment.assert_succeeded(job_id)
        assert deployment.seeds() == {0: 1}
