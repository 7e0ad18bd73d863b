"""With `auto`, the worker killed around its call of Segmind and at each call after the endpoint has taken over.

As in `test_kill_endpoint.py`, a crash may repeat an invocation, never a charge.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.calls import InOrder, Meanwhile, apart, places
from tests.faults.deployment import PRICE
from tests.faults.endpoint import ASKED, EndpointDeployment

BACKEND = "auto"
ONE = (
    *("UpdateItem", "GetObject", "GetSecretValue", "POST 0", "PutObject 0", "InvokeEndpointAsync 0"),
    *("DescribeEndpoint", "UpdateItem #2"),
)
# Both ask Segmind before either knows that it is down.
FALL_BACK = ("POST 0", "POST 1", *ASKED)
TWO = ("UpdateItem", "GetObject", *FALL_BACK, "DescribeEndpoint", "UpdateItem #2")
# One that Segmind serves, and one that it does not.
HALF = ("POST 0", "POST 1", "PutObject 1", "PutObject 0", "InvokeEndpointAsync 0")
MIXED = ("UpdateItem", "GetObject", *HALF, "DescribeEndpoint", "UpdateItem #2")
INVOKED = places(ONE)[ONE.index("InvokeEndpointAsync 0") * 2 + 1 :]


def _down(deployment: EndpointDeployment, **fields: Any) -> str:
    """A job of a time in which Segmind does not serve."""
    if fields:
        deployment.warm()
    deployment.system.segmind.behave("503", times=9)
    return deployment.new_job(**fields)


def _half_down(deployment: EndpointDeployment) -> str:
    """A job of two samples, of which Segmind serves the second."""
    deployment.warm()
    deployment.system.segmind.behave("503")
    return deployment.new_job(samples=2)


def _assert_one_end(deployment: EndpointDeployment, job_id: str, samples: int = 1) -> None:
    deployment.assert_succeeded(job_id, samples)
    assert deployment.job_ids() == {job_id}
    assert deployment.spent() == PRICE * samples
    assert max(deployment.asked().values(), default=0) <= 2


def test_a_walk_takes_every_call_of_a_worker_that_falls_back(deployment):
    job_id = _down(deployment)
    deployment.run(InOrder())
    assert deployment.calls.made == list(ONE)
    deployment.settle()
    _assert_one_end(deployment, job_id)
    job = deployment.system.job(job_id)
    assert (job["backend"], job["backend_reason"]) == ("sagemaker", "backend_failed")


@pytest.mark.parametrize(("calls", "order"), [(TWO, FALL_BACK), (MIXED, HALF)])
def test_a_walk_takes_every_call_for_two_samples(deployment, calls, order):
    (_down(deployment, samples=2) if calls is TWO else _half_down(deployment))
    deployment.run(InOrder(order))
    assert deployment.calls.made == list(calls)


@pytest.mark.parametrize("recovered", [False, True])
@pytest.mark.parametrize(
    ("call", "moment", "notice_first"),
    [*((*place, False) for place in apart(places(ONE[3:]))), *((*place, True) for place in apart(INVOKED))],
)
def test_a_worker_killed_while_it_falls_back_is_followed_by_one_end(deployment, call, moment, recovered, notice_first):
    job_id = _down(deployment)
    deployment.kill_worker(call, moment)
    invoked, pending = deployment.asked()[0], deployment.pending(job_id)
    assert invoked == ((call, moment) in INVOKED)
    if recovered:
        deployment.system.segmind.reset()

    if notice_first:
        deployment.outlive_lease()
        deployment.listen()
        deployment.hear()
    deployment.return_messages()
    deployment.settle()

    _assert_one_end(deployment, job_id)
    job, segmind = deployment.system.job(job_id), deployment.system.segmind
    if pending or (invoked and notice_first):
        assert (job["backend"], deployment.asked()) == ("sagemaker", {0: 1})
    elif recovered:
        assert (job["backend"], job["backend_reason"]) == ("segmind", None)
        assert deployment.asked() == ({0: 1} if invoked else {})
    else:
        assert (job["backend"], job["backend_reason"]) == ("sagemaker", "backend_failed")
        assert deployment.asked() == {0: 1 + invoked}
    assert segmind.billed == (job["backend"] == "segmind")


@pytest.mark.parametrize(("call", "moment"), apart(places(TWO[2:])))
def test_a_worker_killed_while_two_samples_fall_back_is_followed_by_one_end(deployment, call, moment):
    job_id = _down(deployment, samples=2)
    deployment.kill_worker(call, moment, FALL_BACK)
    deployment.return_messages()
    deployment.settle()
    _assert_one_end(deployment, job_id, samples=2)
    assert deployment.system.segmind.billed == 0


@pytest.mark.parametrize(("call", "moment"), apart(places(MIXED[2:])))
def test_a_picture_of_segmind_that_is_stored_is_not_bought_again_when_the_other_sample_falls_back(
    deployment, call, moment
):
    job_id = _half_down(deployment)
    deployment.kill_worker(call, moment, HALF)
    stored, billed = len(deployment.results(job_id)), deployment.system.segmind.billed
    # Down for good, so that what is missing comes from the endpoint.
    deployment.system.segmind.behave("503", times=9)
    deployment.return_messages()
    deployment.settle()
    _assert_one_end(deployment, job_id, samples=2)
    assert deployment.system.segmind.billed == billed
    # The picture that was stored before the crash is the one that the job shows.
    assert len([key for key in deployment.results(job_id) if key.endswith("1.jpg")]) == stored


@pytest.mark.parametrize("how", ["cancel", "delete"])
@pytest.mark.parametrize(("call", "moment"), apart(places(ONE[3:])))
def test_a_job_ended_while_its_worker_falls_back_stays_ended(deployment, call, moment, how):
    job_id = _down(deployment)
    meanwhile = Meanwhile(deployment.calls, lambda: deployment.end(how, job_id), (call, moment))
    deployment.run(meanwhile)
    assert meanwhile.happened
    deployment.settle()
    assert deployment.results(job_id) == []
    assert deployment.spent() == 0
    deployment.assert_at_rest(job_id)
    assert deployment.job_ids() == (set() if how == "delete" else {job_id})
    assert how == "delete" or deployment.system.job(job_id)["status"] == "canceled"
