"""The API killed at each of its AWS calls in turn, just before and just after the call took effect.

As in `test_kill.py`, the first test of a walk fails when its calls are no longer those that it names.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.faults.calls import AFTER, MOMENTS, InOrder, Kill, Killed, apart, places
from tests.faults.deployment import LEASE, PRICE, VISIBILITY, Deployment, request_body, short_lived

# How a process that has seen no caller yet learns who it is: the key, then the team.
CALLER = ("GetItem", "GetItem #2")


@dataclass(frozen=True)
class Create:
    """One way to create a job: what to send, and which calls it takes.

    A `cold` process is one that has seen no caller yet.
    """

    calls: tuple[str, ...]
    headers: Mapping[str, str] = field(default_factory=dict)
    key: bool = False
    upload: bool = False
    cold: bool = False

    def request(self, deployment: Deployment) -> tuple[dict[str, Any], dict[str, str]]:
        """Make the process ready; return body and headers, the same at every try."""
        body = request_body(image=deployment.upload()) if self.upload else request_body()
        key = {"Idempotency-Key": str(uuid.uuid4())} if self.key else {}
        if not self.cold:
            deployment.warm_api()
        return body, {"Prefer": "wait=0", **self.headers, **key}


CREATES = {
    "no key": Create(("PutObject", "TransactWriteItems", "SendMessage")),
    "waits for the picture": Create(
        ("PutObject", "TransactWriteItems", "SendMessage", "GetItem", "GetItem #2", "GetObject 0"),
        {"Prefer": "wait=25", "Accept": "image/jpeg"},
    ),
    "key": Create(("PutItem", "PutObject", "TransactWriteItems", "SendMessage", "UpdateItem"), key=True),
    "key and upload": Create(
        ("PutItem", "GetObject", "PutObject", "TransactWriteItems", "SendMessage", "UpdateItem"),
        key=True,
        upload=True,
    ),
    "key, cold": Create(
        (*CALLER, "PutItem", "PutObject", "TransactWriteItems", "SendMessage", "UpdateItem"), key=True, cold=True
    ),
}


def _create_places(name: str, *rest: str) -> list[Any]:
    return [
        pytest.param(name, call, moment, *rest, id="-".join([name, f"{moment} {call}", *rest]))
        for call, moment in apart(places(CREATES[name].calls))
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
        *_create_places("key, cold", "at once"),
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
    assert deployment.spent() == PRICE


@pytest.mark.parametrize(("name", "call", "moment"), _create_places("key"))
def test_the_key_of_the_last_job_that_a_team_can_pay_finds_that_job_after_a_kill(deployment, name, call, moment):
    deployment.leave(PRICE)
    body, headers = _kill_create(deployment, name, (call, moment))
    again = deployment.post(body, headers)
    assert again.status == 202, again.json
    _sweep_and_settle(deployment)
    deployment.assert_succeeded(again.json["id"])
    assert (deployment.account().charged, deployment.account().balance) == (PRICE, 0)
    assert deployment.post(body, headers).json["id"] == again.json["id"]
    refused = deployment.post(body, {"Prefer": "wait=0"})
    assert (refused.status, refused.json["code"]) == (402, "insufficient_credits")
    assert deployment.job_ids() == {again.json["id"]}


REFUSED = ("PutItem", "PutObject", "TransactWriteItems", "DeleteObject", "DeleteItem")


def test_a_walk_takes_every_call_of_a_create_that_the_team_cannot_pay(deployment):
    deployment.leave(PRICE - 1)
    body, headers = CREATES["key"].request(deployment)
    with deployment.calls.shown_to(InOrder()):
        assert deployment.post(body, headers).status == 402
    assert deployment.calls.made == list(REFUSED)
    assert deployment.system.objects("uploads") == []


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("call", REFUSED)
def test_a_create_that_the_team_cannot_pay_takes_nothing_and_is_one_job_after_a_top_up(deployment, call, moment):
    deployment.leave(PRICE - 1)
    body, headers = CREATES["key"].request(deployment)
    with deployment.calls.shown_to(Kill(call, moment)), pytest.raises(Killed):
        deployment.post(body, headers, short_lived())
    deployment.restart()
    assert (deployment.job_ids(), deployment.spent()) == (set(), 0)

    assert deployment.post(body, headers).status == 402
    deployment.leave(PRICE)
    created = deployment.post(body, headers)
    assert created.status == 202, created.json
    deployment.settle()
    deployment.assert_succeeded(created.json["id"])
    assert deployment.spent() == PRICE


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
    assert deployment.spent() == PRICE * len(deployment.job_ids())


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
    assert deployment.spent() == PRICE * len(deployment.job_ids())


def test_the_key_of_a_killed_create_is_in_flight_for_as_long_as_it_could_have_run(deployment):
    body, headers = CREATES["key"].request(deployment)
    with deployment.calls.shown_to(Kill("PutObject", AFTER)), pytest.raises(Killed):
        deployment.post(body, headers)
    deployment.restart()
    again = deployment.post(body, headers)
    assert (again.status, again.json["code"], again.headers["retry-after"]) == (409, "idempotency_in_flight", "1")
    assert deployment.job_ids() == set()


# Cancel and delete


def _picture_stored(deployment: Deployment) -> str:
    """A job whose worker died with its picture stored: the message will come back."""
    job_id = deployment.new_job()
    deployment.kill_worker("PutObject 0", AFTER)
    return job_id


def _succeeded(deployment: Deployment) -> str:
    job_id = deployment.new_job()
    deployment.settle()
    return job_id


@dataclass(frozen=True)
class End:
    """One way to end a job: what is asked for, of what job, and which calls it takes."""

    how: str
    prepare: Callable[[Deployment], str]
    calls: tuple[str, ...]
    cold: bool = False

    def begin(self, deployment: Deployment) -> str:
        """Make the job and the process ready; return the job's id."""
        job_id = self.prepare(deployment)
        deployment.restart()
        if not self.cold:
            deployment.warm_api()
        return job_id


CANCEL = ("GetItem", "TransactWriteItems")
REMOVE = ("DeleteObject", "ListObjectsV2", "DeleteObject 0", "DeleteItem")
ENDS = {
    "cancel": End("cancel", Deployment.new_job, CANCEL),
    "cancel, cold": End("cancel", Deployment.new_job, (*CALLER, "GetItem #3", "TransactWriteItems"), cold=True),
    "cancel of a job at work": End("cancel", _picture_stored, CANCEL),
    "delete": End("delete", _picture_stored, (*CANCEL, *REMOVE)),
    "delete of a job that has ended": End("delete", _succeeded, ("GetItem", *REMOVE)),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_walk_takes_every_call_of_cancel_and_delete(deployment, name):
    job_id = ENDS[name].begin(deployment)
    with deployment.calls.shown_to(InOrder()):
        deployment.end(ENDS[name].how, job_id)
    assert deployment.calls.made == list(ENDS[name].calls)


def _end_places(again: str, *names: str) -> Iterator[Any]:
    for name in names:
        for call, moment in apart(places(ENDS[name].calls)):
            yield pytest.param(name, call, moment, again, id=f"{name}-{moment} {call}-{again}")


@pytest.mark.parametrize(
    ("name", "call", "moment", "again"),
    [*_end_places("at once", *ENDS), *_end_places("later", "cancel", "cancel of a job at work", "delete")],
)
def test_cancel_and_delete_killed_at_any_call_can_be_sent_again(deployment, name, call, moment, again):
    end = ENDS[name]
    job_id = end.begin(deployment)
    reached = end.calls.index(call) + (moment == AFTER)
    canceled = "TransactWriteItems" in end.calls[:reached]
    with deployment.calls.shown_to(Kill(call, moment)), pytest.raises(Killed):
        deployment.end(end.how, job_id)
    deployment.restart()
    if again == "later":
        deployment.system.clock.advance(VISIBILITY)
        _sweep_and_settle(deployment)
    runs = end.prepare is _succeeded or (again == "later" and not canceled)

    if end.how == "cancel":
        answer = deployment.system.api("POST", f"/jobs/{job_id}/cancel")
        assert (answer.status, answer.json["status"]) == (200, "succeeded" if runs else "canceled")
    else:
        answer = deployment.system.api("DELETE", f"/jobs/{job_id}")
        assert answer.status == (404 if reached == len(end.calls) else 204)
    deployment.system.clock.advance(VISIBILITY)
    deployment.settle()

    assert deployment.spent() == (PRICE if runs else 0)
    if end.how == "delete":
        assert deployment.job_ids() == set()
        assert deployment.inputs(job_id) == []
    if runs and end.how == "cancel":
        deployment.assert_succeeded(job_id)
    else:
        assert deployment.results(job_id) == []
        deployment.assert_at_rest(job_id)
