"""Ingest killed at each of its AWS calls in turn, and notices that come twice, late or while something else happens.

As in `test_kill.py`, the first test of a walk fails when its calls are no longer those that it names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.faults.calls import AFTER, BEFORE, MOMENTS, InOrder, Meanwhile, apart, places
from tests.faults.deployment import IN_VAIN, LEASE, PRESET, PRICE, Deployment, short_lived
from tests.system import Context

NO_IMAGE = b"no image"


def _file(deployment: Deployment) -> str:
    deployment.put_file()
    return ""


def _unreadable(deployment: Deployment) -> str:
    deployment.put_file(NO_IMAGE)
    return ""


def _unknown_preset(deployment: Deployment) -> str:
    deployment.put_file(preset="unknown")
    return ""


def _no_credits(deployment: Deployment) -> str:
    deployment.leave(PRICE - 1)
    deployment.put_file()
    return ""


def _awaited(deployment: Deployment) -> str:
    job_id = deployment.new_awaiting_job()
    deployment.put_awaited(job_id)
    return job_id


def _awaited_unreadable(deployment: Deployment) -> str:
    job_id = deployment.new_awaiting_job()
    deployment.put_awaited(job_id, NO_IMAGE)
    return job_id


@dataclass(frozen=True)
class Walk:
    """One notice: how to come to it, which calls it takes, and what its job fails of, if it does."""

    prepare: Callable[[Deployment], str]
    calls: tuple[str, ...]
    error: str = ""
    preset: str = PRESET
    inbox: bool = True

    def done(self, call: str, moment: str) -> tuple[str, ...]:
        """Return the calls that have taken effect at a place."""
        return self.calls[: self.calls.index(call) + (moment == AFTER)]


# The team, the claim on the notice, the object.
LOOK = ("GetItem", "PutItem", "GetObject")
# What the outbox shows, the error, and the claim's end.
PUBLISH = ("UpdateItem", "PutObject", "GetItem #3", "UpdateItem #2")
FILES = {
    "file": Walk(_file, (*LOOK, "GetItem #2", "PutObject", "TransactWriteItems", "SendMessage", "UpdateItem")),
    "unreadable": Walk(_unreadable, (*LOOK, "GetItem #2", "TransactWriteItems", *PUBLISH), "unsupported_image"),
    "unknown preset": Walk(
        _unknown_preset, (*LOOK, "GetItem #2", "TransactWriteItems", *PUBLISH), "preset_unknown", preset="unknown"
    ),
    "no credits": Walk(
        _no_credits,
        (
            *(*LOOK, "GetItem #2", "PutObject", "TransactWriteItems", "DeleteObject"),
            *("TransactWriteItems #2", "UpdateItem", "PutObject #2", "GetItem #3", "UpdateItem #2"),
        ),
        "insufficient_credits",
    ),
}
AWAITED = {
    "awaited": Walk(_awaited, ("GetItem", "GetObject", "PutObject", "UpdateItem", "SendMessage"), inbox=False),
    "awaited, unreadable": Walk(
        _awaited_unreadable, ("GetItem", "GetObject", "TransactWriteItems"), "unsupported_image", inbox=False
    ),
}
WALKS = FILES | AWAITED


def _work(deployment: Deployment) -> None:
    """Let the sweep and then a worker find whatever job there is."""
    deployment.system.clock.advance(LEASE + 1)
    deployment.system.sweep()
    deployment.settle()


def _assert_one_job(deployment: Deployment, walk: Walk) -> str:
    """Check what came of a notice, and that it changes nothing any more; return the job's id."""
    deployment.receive()
    deployment.settle()
    (job_id,) = deployment.job_ids()
    _assert_done(deployment, walk, job_id)
    ended, outbox = deployment.item(job_id), deployment.outbox(walk.preset)
    assert deployment.ingest()
    deployment.forget_claims()
    assert deployment.ingest()
    assert deployment.receive() == []
    assert deployment.job_ids() == {job_id}
    assert (deployment.item(job_id), deployment.outbox(walk.preset)) == (ended, outbox)
    assert deployment.inputs(job_id) or walk.error
    return job_id


def _assert_done(deployment: Deployment, walk: Walk, job_id: str) -> None:
    if walk.error:
        job = deployment.system.job(job_id)
        assert (job["status"], job["error"]["code"]) == ("failed", walk.error)
        assert deployment.seeds() == {}
        deployment.assert_at_rest(job_id)
    else:
        deployment.assert_succeeded(job_id)
        assert deployment.seeds() == {0: 1}
    if walk.inbox:
        deployment.assert_published(job_id, *([] if walk.error else [0]), preset=walk.preset)
    else:
        assert deployment.outbox(walk.preset) == {}
    account = deployment.account()
    assert (account.charged, account.reserved) == (0 if walk.error else PRICE, 0)


def _places(*names: str) -> list[Any]:
    return [
        pytest.param(name, call, moment, id=f"{name}-{moment} {call}")
        for name in names
        for call, moment in apart(places(WALKS[name].calls))
    ]


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_takes_every_call_of_ingest(deployment, name):
    WALKS[name].prepare(deployment)
    assert deployment.ingest(InOrder())
    assert deployment.calls.made == list(WALKS[name].calls)
    _assert_one_job(deployment, WALKS[name])


@pytest.mark.parametrize(("name", "call", "moment"), _places(*WALKS))
def test_ingest_killed_at_any_call_makes_one_job_of_each_object(deployment, name, call, moment):
    walk = WALKS[name]
    job_id = walk.prepare(deployment)
    deployment.kill_ingest(call, moment)
    assert deployment.ingest()
    assert deployment.ingest()
    assert _assert_one_job(deployment, walk) == job_id or walk.inbox


@pytest.mark.parametrize(("name", "call", "moment"), _places("awaited"))
def test_a_killed_ingest_whose_job_is_run_before_its_notice_returns_makes_one_job(deployment, name, call, moment):
    job_id = WALKS[name].prepare(deployment)
    deployment.kill_ingest(call, moment)
    _work(deployment)
    assert deployment.ingest()
    assert _assert_one_job(deployment, WALKS[name]) == job_id


@pytest.mark.parametrize(("name", "call", "moment"), _places("file"))
def test_a_notice_whose_ingest_may_still_be_at_work_waits_until_it_is_not(deployment, name, call, moment):
    walk = WALKS[name]
    walk.prepare(deployment)
    deployment.kill_ingest(call, moment, Context(60))
    done = walk.done(call, moment)
    assert deployment.ingest() is not ("PutItem" in done and "UpdateItem" not in done)
    _work(deployment)
    deployment.forget_claims()
    assert deployment.ingest()
    _assert_one_job(deployment, walk)


@pytest.mark.parametrize("happens", ["preset deleted", "credits spent", "topped up", "team disabled"])
def test_what_a_killed_ingest_has_decided_stands_whatever_changes_before_its_notice_returns(deployment, happens):
    deployment.put_file()
    deployment.kill_ingest("TransactWriteItems", AFTER)
    services = deployment.system.services
    match happens:
        case "preset deleted":
            services.presets.delete("default", PRESET)
        case "credits spent":
            deployment.leave(0)
        case "topped up":
            deployment.leave(10 * PRICE)
        case "team disabled":
            services.teams.enable("default", enabled=False)
    assert deployment.ingest()
    services.teams.enable("default", enabled=True)
    _assert_one_job(deployment, WALKS["file"])


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("call", WALKS["no credits"].calls[5:])
def test_a_file_that_the_team_could_not_pay_is_one_job_when_it_is_topped_up_before_the_notice_returns(
    deployment, call, moment
):
    walk = WALKS["no credits"]
    walk.prepare(deployment)
    deployment.kill_ingest(call, moment)
    decided = "TransactWriteItems #2" in walk.done(call, moment)
    deployment.leave(PRICE)
    assert deployment.ingest()
    _assert_one_job(deployment, walk if decided else WALKS["file"])


def test_a_deleted_job_does_not_come_back_with_its_notice(deployment):
    deployment.put_file()
    assert deployment.ingest()
    (job_id,) = deployment.job_ids()
    deployment.end("delete", job_id)
    assert deployment.ingest()
    deployment.forget_claims()
    assert deployment.ingest()
    deployment.receive()
    deployment.settle()
    assert (deployment.job_ids(), deployment.seeds(), deployment.outbox()) == (set(), {}, {})
    assert deployment.spent() == 0


# Something else happens at one of its calls


def _meanwhile(
    deployment: Deployment, happens: Callable[[], Any], place: tuple[str, str], context: Context | None = None
) -> bool:
    meanwhile = Meanwhile(deployment.calls, happens, place)
    done = deployment.ingest(meanwhile, context)
    assert meanwhile.happened
    return done


@pytest.mark.parametrize(("name", "call", "moment"), _places("file", "unreadable", "no credits", *AWAITED))
def test_a_notice_that_comes_twice_at_once_makes_one_job(deployment, name, call, moment):
    walk = WALKS[name]
    walk.prepare(deployment)
    # The first one's claim on the notice runs out at once.
    assert _meanwhile(deployment, deployment.ingest, (call, moment), short_lived())
    _assert_one_job(deployment, walk)


@pytest.mark.parametrize(("name", "call", "moment"), _places("file"))
def test_of_a_notice_that_comes_twice_at_once_the_second_waits_for_the_first(deployment, name, call, moment):
    walk = WALKS[name]
    walk.prepare(deployment)
    seconds = []
    assert _meanwhile(deployment, lambda: seconds.append(deployment.ingest()), (call, moment))
    done = walk.done(call, moment)
    assert seconds == [not ("PutItem" in done and "UpdateItem" not in done)]
    _assert_one_job(deployment, walk)


@pytest.mark.parametrize("end", ["cancel", "delete"])
@pytest.mark.parametrize(("name", "call", "moment"), _places(*AWAITED))
def test_a_job_ended_between_two_calls_of_its_start_stays_ended(deployment, name, call, moment, end):
    walk = AWAITED[name]
    job_id = walk.prepare(deployment)
    assert _meanwhile(deployment, lambda: deployment.end(end, job_id), (call, moment))
    assert deployment.ingest()
    _work(deployment)
    answer = deployment.system.api("GET", f"/jobs/{job_id}")
    if end == "delete":
        assert answer.status == 404
        assert deployment.inputs(job_id) == []
    else:
        # A job that had failed before stays so.
        failed = "TransactWriteItems" in walk.done(call, moment)
        assert answer.json["status"] == ("failed" if failed else "canceled")
    assert (deployment.seeds(), deployment.results(job_id), deployment.spent()) == ({}, [], 0)
    deployment.assert_at_rest(job_id)


def _sweep_too_late(deployment: Deployment) -> dict[str, int]:
    deployment.system.clock.advance(IN_VAIN + 1)
    return deployment.system.sweep()


@pytest.mark.parametrize(("name", "call", "moment"), _places(*AWAITED))
def test_an_upload_that_is_given_up_between_two_calls_of_its_start_is_run_or_released(deployment, name, call, moment):
    walk = AWAITED[name]
    job_id = walk.prepare(deployment)
    assert _meanwhile(deployment, lambda: _sweep_too_late(deployment), (call, moment))
    in_time = bool({"UpdateItem", "TransactWriteItems"} & set(walk.done(call, moment)))
    _assert_run_or_released(deployment, walk, job_id, in_time=in_time)


@pytest.mark.parametrize("name", AWAITED)
@pytest.mark.parametrize(
    ("call", "moment", "in_time"),
    [
        ("Query", BEFORE, True),
        ("TransactWriteItems", BEFORE, True),
        ("TransactWriteItems", AFTER, False),
        ("BatchGetItem", AFTER, False),
    ],
)
def test_an_upload_that_comes_between_two_calls_of_giving_it_up_is_run_or_released(
    deployment, name, call, moment, in_time
):
    walk = AWAITED[name]
    job_id = walk.prepare(deployment)
    deployment.system.clock.advance(IN_VAIN + 1)
    meanwhile = Meanwhile(deployment.calls, deployment.ingest, (call, moment))
    deployment.sweep(meanwhile)
    assert meanwhile.happened
    _assert_run_or_released(deployment, walk, job_id, in_time=in_time)


def _assert_run_or_released(deployment: Deployment, walk: Walk, job_id: str, *, in_time: bool) -> None:
    assert deployment.ingest()
    if in_time:
        assert _assert_one_job(deployment, walk) == job_id
        return
    _work(deployment)
    job = deployment.system.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("canceled", "upload_missing")
    assert (deployment.seeds(), deployment.spent(), deployment.account().reserved) == ({}, 0, 0)
    deployment.assert_at_rest(job_id)
