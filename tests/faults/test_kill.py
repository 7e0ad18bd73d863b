"""Worker, sweep and top-up killed at each of their AWS and HTTP calls in turn, just before and after it took effect.

Each walk names the calls it takes. The first test of a walk makes them undisturbed and fails when they are no longer
those, so that a call which is added or moved is walked as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from img2img.errors import AlreadyExists
from tests.faults.calls import AFTER, BEFORE, MOMENTS, SEED, InOrder, Kill, Killed, Meanwhile, apart, places
from tests.faults.deployment import (
    LEASE,
    LOOKS,
    ONE_BY_ONE,
    PRICE,
    SIDE_BY_SIDE,
    TEAM,
    VISIBILITY,
    Deployment,
)
from tests.faults.walks import Walk

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
    deployment.return_messages()


def _sweep_comes_first(deployment: Deployment) -> None:
    deployment.outlive_lease()
    deployment.system.sweep()
    # The message of the dead worker is still invisible, and comes back when all is done.
    deployment.work(deployment.receive())
    deployment.return_messages()


def _message_returns_too_early(deployment: Deployment) -> None:
    """A second delivery finds the dead worker's lease, so that the message is gone and only the schedule is left."""
    deployment.work()
    deployment.outlive_lease()
    deployment.system.sweep()
    deployment.receive()
    deployment.work()


RETURNS = (_message_returns, _sweep_comes_first, _message_returns_too_early)


def _places(*returns: Callable[[Deployment], None], walks: tuple[str, ...]) -> Iterator[Any]:
    for walk, back in itertools.product(walks, returns):
        for call, moment in WALKS[walk].gaps:
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
    assert deployment.spent() == PRICE * WALKS[walk].samples


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("call", ["UpdateItem", "GetObject", "POST 0"])
def test_a_job_whose_worker_always_dies_ends_as_an_internal_error(deployment, call, moment):
    job_id = _one_sample(deployment)
    counted = (call, moment) != ("UpdateItem", BEFORE)
    for _ in range(3):
        deployment.kill_worker(call, moment)
        deployment.outlive_lease()
    calls = len(deployment.system.segmind.calls)
    assert calls == (3 if (call, moment) == ("POST 0", AFTER) else 0)

    deployment.settle()

    job = deployment.system.job(job_id)
    if counted:
        assert (job["status"], job["error"]["code"]) == ("failed", "internal_error")
        assert len(deployment.system.segmind.calls) == calls
        assert deployment.results(job_id) == []
        assert deployment.spent() == 0
    else:
        # Nothing of those attempts is known, and nothing was asked of the backend.
        assert job["status"] == "succeeded"
    deployment.assert_at_rest(job_id)


def test_outputs_that_are_stored_make_the_job_succeed_however_often_its_worker_died(deployment):
    job_id = _one_sample(deployment)
    for _ in range(5):
        deployment.kill_worker("TransactWriteItems", BEFORE)
        deployment.outlive_lease()
    deployment.settle()
    deployment.assert_succeeded(job_id)
    assert deployment.seeds() == {0: 1}


def test_a_sample_that_always_kills_its_worker_is_shown_as_failed_beside_the_one_that_is_stored(deployment):
    job_id = _two_samples(deployment)
    deployment.kill_worker("POST 1", AFTER, ONE_BY_ONE)
    for _ in range(2):
        deployment.outlive_lease()
        deployment.kill_worker("POST 1", AFTER)
    deployment.outlive_lease()
    deployment.settle()
    job = deployment.system.job(job_id)
    assert job["status"] == "succeeded"
    assert [(o["index"], o["status"], o["seed"]) for o in job["outputs"]] == [
        (0, "succeeded", SEED),
        (1, "failed", SEED + 1),
    ]
    assert job["outputs"][1]["error"]["code"] == "internal_error"
    assert deployment.seeds() == {0: 1, 1: 3}
    assert deployment.spent() == PRICE
    deployment.assert_at_rest(job_id)


@pytest.mark.parametrize(("call", "moment"), [("UpdateItem", BEFORE), ("TransactWriteItems", BEFORE)])
def test_a_job_that_nobody_can_finish_fails_at_its_deadline(deployment, call, moment):
    job_id = _one_sample(deployment)
    deadline = int(deployment.item(job_id)["deadline_at"]["N"])
    while deployment.system.clock() < deadline + LEASE:
        deployment.kill_worker(call, moment)
        deployment.outlive_lease()
    assert deployment.system.sweep() == {"failed": 1}
    deployment.settle()
    job = deployment.system.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "deadline_exceeded")
    assert len(deployment.system.segmind.calls) <= 1
    assert deployment.spent() == 0
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
    assert deployment.spent() == 0
    deployment.assert_at_rest(job_id)
    answer = deployment.system.api("GET", f"/jobs/{job_id}")
    assert answer.status == 404 if how == "delete" else answer.json["status"] == "canceled"


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


SWEEPS: Mapping[Callable[[Deployment], str], tuple[str, ...]] = {
    _forgotten: (*LOOKS, "UpdateItem", "SendMessage"),
    _abandoned: (*LOOKS, "SendMessage"),
    _overdue: (*LOOKS, "TransactWriteItems"),
}


@pytest.mark.parametrize("prepare", SWEEPS)
def test_a_walk_takes_every_call_of_the_sweep(deployment, prepare):
    prepare(deployment)
    deployment.outlive_lease()
    with deployment.calls.shown_to(InOrder()):
        deployment.system.sweep()
    assert sorted(deployment.calls.made) == sorted(SWEEPS[prepare])


@pytest.mark.parametrize(
    ("prepare", "call", "moment"),
    [
        pytest.param(prepare, call, moment, id=f"{prepare.__name__.strip('_')}-{moment} {call}")
        for prepare, calls in SWEEPS.items()
        # Dead at a look, a sweep has done nothing yet or all there is: one kind of job shows that.
        for call, moment in apart(places(calls if prepare is _forgotten else calls[len(LOOKS) :]))
    ],
)
def test_a_sweep_killed_at_any_call_is_made_good_by_later_ones(deployment, prepare, call, moment):
    job_id = prepare(deployment)
    deployment.outlive_lease()
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
        assert deployment.spent() == 0
        deployment.assert_at_rest(job_id)
    else:
        deployment.assert_succeeded(job_id)
        assert deployment.seeds() == {0: 1}


# The operator


def test_a_walk_takes_every_call_of_a_top_up(deployment):
    with deployment.calls.shown_to(InOrder()):
        deployment.system.services.credits.add(TEAM, 5000, reference="invoice-1")
    assert deployment.calls.made == ["TransactWriteItems"]


@pytest.mark.parametrize("amount", [5000, -5000])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_top_up_killed_and_repeated_with_its_reference_is_booked_once(deployment, moment, amount):
    def top_up() -> None:
        deployment.system.services.credits.add(TEAM, amount, reference="invoice-1", note="paid")

    before = deployment.account()
    with deployment.calls.shown_to(Kill("TransactWriteItems", moment)), pytest.raises(Killed):
        top_up()
    deployment.restart()
    booked = moment == AFTER
    assert deployment.account().balance == before.balance + amount * booked

    if not booked:
        top_up()
    with pytest.raises(AlreadyExists):
        top_up()

    after = deployment.account()
    assert (after.balance, after.added) == (before.balance + amount, before.added + amount)
    assert after.entries == before.entries + 1
