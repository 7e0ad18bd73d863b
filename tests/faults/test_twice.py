"""Messages that come twice or too late, and jobs that are canceled or deleted while a worker is at them."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from img2img.flows.intake import Caller
from img2img.flows.run import run_job
from img2img.flows.submit import submit
from img2img.requests import parse_request
from tests.faults.calls import AFTER, BEFORE, Meanwhile, apart, places
from tests.faults.deployment import (
    LEASE,
    ONE_BY_ONE,
    PRICE,
    TEAM,
    VISIBILITY,
    Deployment,
    request_body,
    short_lived,
)
from tests.system import API_KEY_ID, Context

TWO_SAMPLES = ("UpdateItem", "GetObject", *ONE_BY_ONE, "TransactWriteItems")


def _places(calls: tuple[str, ...]) -> list[Any]:
    return [pytest.param(call, moment, id=f"{moment} {call}") for call, moment in apart(places(calls))]


def _run_while(deployment: Deployment, happens: Callable[[], Any], place: tuple[str, str], order: Any = ()) -> None:
    """Hand the held message to the worker; something happens at one of its calls. Then all goes on as ever."""
    meanwhile = Meanwhile(deployment.calls, happens, place, order)
    deployment.run(meanwhile)
    assert meanwhile.happened


@pytest.mark.parametrize(("call", "moment"), _places(TWO_SAMPLES))
def test_a_message_that_comes_twice_at_once_runs_its_job_once(deployment, call, moment):
    deployment.warm()
    job_id = deployment.new_job(samples=2)
    message = next(iter(deployment.held.values()))
    done = []
    _run_while(deployment, lambda: done.append(deployment.system.work(message)), (call, moment), ONE_BY_ONE)
    assert done == [True]
    deployment.assert_succeeded(job_id, samples=2)
    assert deployment.seeds() == {0: 1, 1: 1}
    assert deployment.spent() == 2 * PRICE


class _OneWriteAtATime:
    """A step that gives moto what DynamoDB has: of two conditional writes of one item, one comes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self, name: str, moment: str) -> None:
        if name.startswith("POST"):
            return
        if moment == BEFORE:
            assert self._lock.acquire(timeout=30)
        else:
            self._lock.release()


def test_workers_that_start_together_run_a_job_once(deployment):
    job_id = deployment.new_job(samples=2)
    services = deployment.system.services
    _ = services.jobs, services.storage, services.backend
    together = threading.Barrier(4, timeout=30)

    def work(_number: int) -> bool:
        together.wait()
        return run_job(services, "default", job_id).job is not None

    with deployment.calls.shown_to(_OneWriteAtATime()), ThreadPoolExecutor(4) as pool:
        ran = list(pool.map(work, range(4)))
    assert sorted(ran) == [False, False, False, True]
    deployment.settle()
    deployment.assert_succeeded(job_id, samples=2)
    assert deployment.seeds() == {0: 1, 1: 1}
    assert deployment.spent() == 2 * PRICE


@pytest.mark.parametrize("answer", ["a picture", "429"])
def test_a_worker_that_outlives_its_lease_changes_nothing_of_what_the_next_one_holds(deployment, answer):
    deployment.warm()
    if answer == "429":
        deployment.system.segmind.behave("429")
    job_id = deployment.new_job()
    taken_over = []

    def take_over() -> None:
        deployment.system.clock.advance(LEASE + 1)
        taken_over.append(deployment.system.services.jobs.claim("default", job_id, lease_seconds=LEASE)[1])

    _run_while(deployment, take_over, ("POST 0", AFTER))
    item = deployment.item(job_id)
    assert (item["status"]["S"], item["lease"]["S"]) == ("processing", taken_over[0].lease)
    # The next one dies; what the first had stored is found again all the same.
    deployment.system.clock.advance(LEASE + 1)
    deployment.settle()
    deployment.assert_succeeded(job_id)
    assert deployment.system.segmind.billed == 1
    assert deployment.spent() == PRICE


def test_a_message_that_comes_again_after_the_end_changes_nothing(deployment):
    job_id = deployment.new_job()
    message = next(iter(deployment.held.values()))
    assert deployment.system.work(message)
    ended = deployment.item(job_id)
    deployment.system.clock.advance(VISIBILITY)
    assert deployment.system.work(message)
    assert deployment.item(job_id) == ended
    assert deployment.seeds() == {0: 1}
    assert deployment.spent() == PRICE


@pytest.mark.parametrize("end", ["cancel", "delete"])
def test_a_message_that_comes_after_its_job_was_ended_asks_nothing_of_the_backend(deployment, end):
    job_id = deployment.new_job()
    deployment.end(end, job_id)
    deployment.settle()
    assert deployment.seeds() == {}
    assert deployment.results(job_id) == []
    assert deployment.spent() == 0
    deployment.assert_at_rest(job_id)


@pytest.mark.parametrize("end", ["cancel", "delete"])
@pytest.mark.parametrize(("call", "moment"), _places(TWO_SAMPLES))
def test_a_job_ended_between_two_calls_of_its_worker_stays_ended_and_leaves_no_picture(deployment, call, moment, end):
    deployment.warm()
    job_id = deployment.new_job(samples=2)
    _run_while(deployment, lambda: deployment.end(end, job_id), (call, moment), ONE_BY_ONE)
    deployment.settle()
    if (call, moment, end) == ("TransactWriteItems", AFTER, "cancel"):
        # It had succeeded before.
        deployment.assert_succeeded(job_id, samples=2)
    else:
        _assert_ended(deployment, end, job_id)
    assert deployment.spent() == (2 * PRICE if (call, moment) == ("TransactWriteItems", AFTER) else 0)
    assert max(deployment.seeds().values(), default=0) <= 1


def _sweep_gives_up(deployment: Deployment, _job_id: str = "") -> None:
    deployment.system.clock.advance(deployment.system.services.settings.job_deadline + LEASE)
    deployment.system.sweep()


@pytest.mark.parametrize(("call", "moment"), _places(TWO_SAMPLES))
def test_a_job_that_the_sweep_gives_up_between_two_calls_of_its_worker_is_not_charged(deployment, call, moment):
    deployment.warm()
    job_id = deployment.new_job(samples=2)

    _run_while(deployment, lambda: _sweep_gives_up(deployment), (call, moment), ONE_BY_ONE)
    deployment.settle()
    if (call, moment) == ("TransactWriteItems", AFTER):
        # It had succeeded before.
        deployment.assert_succeeded(job_id, samples=2)
        assert deployment.spent() == 2 * PRICE
    else:
        assert deployment.system.job(job_id)["error"]["code"] == "deadline_exceeded"
        deployment.assert_at_rest(job_id)
        assert deployment.spent() == 0


@pytest.mark.parametrize(("call", "moment"), _places(("UpdateItem", "TransactWriteItems")))
def test_a_top_up_between_two_calls_of_a_worker_is_kept(deployment, call, moment):
    deployment.warm()
    job_id = deployment.new_job(samples=2)
    before = deployment.account()
    _run_while(deployment, lambda: deployment.system.services.credits.add(TEAM, 5000), (call, moment), ONE_BY_ONE)
    deployment.settle()
    deployment.assert_succeeded(job_id, samples=2)
    after = deployment.account()
    assert (after.balance, after.charged) == (before.balance + 5000, 2 * PRICE)


def _worker_finishes(deployment: Deployment, _job_id: str) -> None:
    deployment.work()


def _worker_claims(deployment: Deployment, job_id: str) -> None:
    deployment.system.services.jobs.claim(TEAM, job_id, lease_seconds=LEASE)


def _canceled_too(deployment: Deployment, job_id: str) -> None:
    deployment.system.services.jobs.cancel(TEAM, job_id)


@pytest.mark.parametrize(("call", "moment"), _places(("GetItem", "TransactWriteItems")))
@pytest.mark.parametrize(
    ("happens", "status", "charged"),
    [
        (_worker_finishes, "succeeded", PRICE),
        (_worker_claims, "canceled", 0),
        (_sweep_gives_up, "failed", 0),
        (_canceled_too, "canceled", 0),
    ],
)
def test_a_job_that_moves_on_between_two_calls_of_its_cancel_ends_once(
    deployment, call, moment, happens, status, charged
):
    job_id = deployment.new_job()
    if (call, moment) == ("TransactWriteItems", AFTER):
        status, charged = "canceled", 0
    meanwhile = Meanwhile(deployment.calls, lambda: happens(deployment, job_id), (call, moment))
    with deployment.calls.shown_to(meanwhile):
        answer = deployment.system.api("POST", f"/jobs/{job_id}/cancel")
    assert meanwhile.happened
    assert (answer.status, answer.json["status"]) == (200, status)
    deployment.settle()
    shown = deployment.system.job(job_id)
    assert (shown["status"], shown["credits"]["charged"]) == (status, charged)
    deployment.assert_at_rest(job_id)
    assert deployment.spent() == charged


CREATE = ("PutItem", "PutObject", "TransactWriteItems", "SendMessage", "UpdateItem")


@pytest.mark.parametrize(("call", "moment"), _places(CREATE))
def test_a_key_that_comes_again_between_two_calls_of_its_create_is_one_job(deployment, call, moment):
    deployment.warm_api()
    body, key = request_body(), str(uuid.uuid4())
    services, caller = deployment.system.services, Caller(TEAM, API_KEY_ID, "again")
    others = []

    def again() -> None:
        request = parse_request(body, {}.__getitem__)
        others.append(submit(services, caller, request, idempotency_key=key, context=Context()).job.id)

    # The first one's claim on its key runs out at once.
    meanwhile = Meanwhile(deployment.calls, again, (call, moment))
    with deployment.calls.shown_to(meanwhile):
        answer = deployment.post(body, {"Prefer": "wait=0", "Idempotency-Key": key}, short_lived())
    assert (answer.status, [answer.json["id"]]) == (202, others)
    deployment.receive()
    deployment.settle()
    assert deployment.job_ids() == set(others)
    deployment.assert_succeeded(others[0])
    assert deployment.seeds() == {0: 1}
    assert deployment.spent() == PRICE


@pytest.mark.parametrize("end", ["cancel", "delete"])
@pytest.mark.parametrize(("call", "moment"), _places(("UpdateItem #2", "ChangeMessageVisibility")))
def test_a_job_ended_while_it_is_put_off_stays_ended(deployment, call, moment, end):
    deployment.warm()
    deployment.system.segmind.behave("429")
    job_id = deployment.new_job()
    _run_while(deployment, lambda: deployment.end(end, job_id), (call, moment))
    deployment.settle()
    _assert_ended(deployment, end, job_id)
    assert len(deployment.system.segmind.calls) <= 1


def _assert_ended(deployment: Deployment, how: str, job_id: str) -> None:
    assert deployment.results(job_id) == []
    answer = deployment.system.api("GET", f"/jobs/{job_id}")
    if how == "delete":
        assert answer.status == 404
        assert deployment.inputs(job_id) == []
        assert deployment.job_ids() == set()
    else:
        assert answer.json["status"] == "canceled"
        assert answer.json["outputs"] == []
    deployment.assert_at_rest(job_id)


@pytest.mark.parametrize(
    ("call", "moment"), _places(("Query", "Query #4", "Query #5", "BatchGetItem", "UpdateItem", "SendMessage"))
)
def test_two_sweeps_at_once_do_no_harm(deployment, call, moment):
    job_id = deployment.new_job()
    deployment.lose_messages()
    deployment.system.clock.advance(LEASE + 1)
    other = Meanwhile(deployment.calls, deployment.system.sweep, (call, moment))
    with deployment.calls.shown_to(other):
        deployment.system.sweep()
    deployment.settle()
    deployment.assert_succeeded(job_id)
    assert deployment.seeds() == {0: 1}
