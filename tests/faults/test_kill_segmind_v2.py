"""The worker killed at each of its calls on the way of a job through Segmind's v2.

No sample is paid twice once the id of its request is stored; a crash before that may have one made a second time. As in
`test_kill.py`, the first test of a walk fails when its calls are no longer those that it names.
"""

from __future__ import annotations

import itertools

import pytest

from tests.faults.calls import AFTER, BEFORE, InOrder, Meanwhile
from tests.faults.deployment import PRICE
from tests.faults.queue import FETCH, FETCHED, SUBMITTED, SUBMITTED_SIDE_BY_SIDE, QueueDeployment
from tests.faults.walks import Walk

SEGMIND_API = "v2"


def _new(deployment: QueueDeployment, samples: int = 1) -> str:
    deployment.warm()
    deployment.system.segmind.latency = 60
    return deployment.new_job(samples=samples)


def _two(deployment: QueueDeployment) -> str:
    return _new(deployment, samples=2)


def _awaited(deployment: QueueDeployment) -> str:
    job_id = _new(deployment)
    deployment.system.segmind.latency = 0
    deployment.have_a_caller_wait(job_id)
    return job_id


def _on_its_way(deployment: QueueDeployment) -> str:
    return deployment.submit()


def _done(deployment: QueueDeployment) -> str:
    return deployment.submit(latency=0)


def _both_done(deployment: QueueDeployment) -> str:
    return deployment.submit(samples=2, latency=0)


def _failed(deployment: QueueDeployment) -> str:
    deployment.warm()
    deployment.system.segmind.behave("failed")
    job_id = deployment.new_job()
    deployment.work()
    deployment.receive()
    deployment.system.clock.advance(1)
    return job_id


WALKS = {
    "submitted": Walk(_new, ("UpdateItem", "GetObject", "POST 0", "UpdateItem #2", "SendMessage")),
    "submitted one by one": Walk(
        _two, ("UpdateItem", "GetObject", *SUBMITTED, "UpdateItem #2", "SendMessage"), order=SUBMITTED, samples=2
    ),
    "submitted side by side": Walk(
        _two,
        ("UpdateItem", "GetObject", *SUBMITTED_SIDE_BY_SIDE, "UpdateItem #2", "SendMessage"),
        order=SUBMITTED_SIDE_BY_SIDE,
        samples=2,
    ),
    "awaited": Walk(_awaited, ("UpdateItem", "GetObject", "POST 0", "UpdateItem 0", *FETCH, "TransactWriteItems")),
    "looked at": Walk(_on_its_way, ("UpdateItem", "GetStatus 0", "UpdateItem #2", "SendMessage")),
    "fetched": Walk(_done, ("UpdateItem", *FETCH, "TransactWriteItems")),
    "fetched one by one": Walk(_both_done, ("UpdateItem", *FETCHED, "TransactWriteItems"), order=FETCHED, samples=2),
    "failed": Walk(_failed, ("UpdateItem", "GetStatus 0", "UpdateItem #2", "SendMessage")),
}


def _message_returns(deployment: QueueDeployment) -> None:
    deployment.return_messages()


def _sweep_comes_first(deployment: QueueDeployment) -> None:
    deployment.outlive_lease()
    deployment.system.sweep()
    deployment.work(deployment.receive())


RETURNS = (_message_returns, _sweep_comes_first)


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_takes_every_call_of_the_worker(deployment, walk):
    WALKS[walk].prepare(deployment)
    deployment.run(InOrder(WALKS[walk].order))
    assert deployment.calls.made == list(WALKS[walk].calls)


@pytest.mark.parametrize(
    ("walk", "call", "moment", "redeliver"),
    [
        pytest.param(walk, *place, back, id=f"{walk}-{place[1]} {place[0]}-{back.__name__.strip('_')}")
        for walk, back in itertools.product(WALKS, RETURNS)
        for place in WALKS[walk].gaps
    ],
)
def test_a_worker_killed_at_any_call_pays_for_no_sample_twice_whose_id_is_stored(
    deployment, walk, call, moment, redeliver
):
    job_id = WALKS[walk].prepare(deployment)
    deployment.kill_worker(call, moment, WALKS[walk].order)
    asked, kept = deployment.seeds(), deployment.kept(job_id)

    redeliver(deployment)
    deployment.settle()

    samples = WALKS[walk].samples
    deployment.assert_succeeded(job_id, samples)
    # What failed at Segmind is not billed, and asked for again.
    failed = walk == "failed"
    again = {index: asked[index] + (failed or index not in kept) for index in range(samples)}
    assert deployment.seeds() == again
    assert deployment.system.segmind.billed == sum(again.values()) - failed
    assert deployment.job_ids() == {job_id}
    assert deployment.spent() == PRICE * samples


@pytest.mark.parametrize("how", ["cancel", "delete"])
@pytest.mark.parametrize(
    ("walk", "call", "moment"),
    [
        pytest.param(walk, *place, id=f"{walk}-{place[1]} {place[0]}")
        for walk in ("submitted", "fetched")
        for place in WALKS[walk].gaps
    ],
)
def test_a_job_ended_meanwhile_stays_ended(deployment, walk, call, moment, how):
    job_id = WALKS[walk].prepare(deployment)
    meanwhile = Meanwhile(deployment.calls, lambda: deployment.end(how, job_id), (call, moment))
    deployment.run(meanwhile)
    assert meanwhile.happened
    deployment.settle()
    deployment.assert_at_rest(job_id)
    succeeded_before = (call, moment) == ("TransactWriteItems", AFTER)
    assert bool(deployment.results(job_id)) == (succeeded_before and how == "cancel")
    assert deployment.spent() == PRICE * succeeded_before


@pytest.mark.parametrize("call", ["GetStatus 0", "PutObject 0"])
def test_a_job_whose_looks_always_die_pays_once(deployment, call):
    job_id = WALKS["fetched"].prepare(deployment)
    for _ in range(5):
        deployment.kill_worker(call, BEFORE)
        deployment.outlive_lease()
    deployment.settle()
    deployment.assert_succeeded(job_id)
    assert (deployment.seeds(), deployment.system.segmind.billed) == ({0: 1}, 1)
