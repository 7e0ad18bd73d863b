"""Segmind first, the SageMaker endpoint when that cannot serve: what a job tells of it, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.functions.jobs import create
from tests.system import System, running_system

PRICE = 1000
FALLBACK_SECONDS = 2
# What Segmind does, and the reason that the job gives for its other backend.
OUTAGES = {
    "401": "backend_unauthorized",
    "403": "backend_unauthorized",
    "406-credits": "backend_out_of_credits",
    "410": "backend_gone",
    "500": "backend_failed",
    "503": "backend_failed",
    "504": "backend_gateway_timeout",
    "hang": "backend_timeout",
}


@pytest.fixture(params=["async", "realtime"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    """A deployment with both backends, the endpoint called in either way."""
    monkeypatch.setenv("FALLBACK_AFTER_SECONDS", str(FALLBACK_SECONDS))
    monkeypatch.setenv("PRICE_BASE", f"{PRICE},sagemaker=300")
    with running_system("auto", asynchronous=request.param == "async") as started:
        yield started


def run(system: System, **fields: Any) -> Any:
    """Create a job, do once what its message and the endpoint's notices ask for, and return it."""
    job_id = create(system, **fields)
    system.deliver()
    if system.sagemaker.endpoint.asynchronous:
        system.hear()
    return system.job(job_id)


def used(system: System) -> dict[str, tuple[int, int]]:
    """Return images and amount by backend."""
    rows = system.api("GET", "/usage", query={"group_by": "backend"}).json["rows"]
    return {row["backend"]: (row["images"], row["charged"]) for row in rows}


def assert_settled(system: System, *, charged: int) -> None:
    books = system.books()
    assert (books.reserved, books.charged) == (0, charged)


def served(system: System) -> tuple[int, int]:
    """Return how many calls Segmind and the endpoint got."""
    return len(system.segmind.calls), len(system.container.requests)


def test_segmind_serves_as_long_as_it_can(system):
    job = run(system, samples=2)
    assert (job["status"], job["backend"], job["backend_reason"]) == ("succeeded", "segmind", None)
    assert served(system) == (2, 0)
    assert used(system) == {"segmind": (2, 2 * PRICE)}
    assert_settled(system, charged=2 * PRICE)


@pytest.mark.parametrize("behaviour", OUTAGES)
def test_the_endpoint_serves_what_segmind_cannot_and_the_job_says_why(system, behaviour):
    system.segmind.behave(behaviour, 5)
    job = run(system)
    assert (job["status"], job["error"], job["status_detail"]) == ("succeeded", None, None)
    assert (job["backend"], job["backend_reason"]) == ("sagemaker", OUTAGES[behaviour])
    [output] = job["outputs"]
    assert (output["seed"], output["content_type"]) == (7, "image/png")
    assert len(system.container.requests) == 1
    assert used(system) == {"sagemaker": (1, PRICE)}
    assert_settled(system, charged=PRICE)


@pytest.mark.parametrize("system", ["async"], indirect=True)
def test_the_reason_is_told_while_the_endpoint_works(system):
    system.segmind.behave("503")
    system.container.next.append("hang")
    job_id = create(system)
    system.deliver()
    job = system.job(job_id)
    assert (job["status"], job["backend"], job["backend_reason"]) == ("processing", "sagemaker", "backend_failed")
    assert job["status_detail"]["code"] == "endpoint_busy"
    system.container.wait_for(1)
    system.container.release()
    system.hear()
    assert system.job(job_id)["backend_reason"] == "backend_failed"


def test_a_segmind_that_is_gone_is_none(system):
    system.segmind.stop()
    job = run(system)
    assert (job["status"], job["backend"], job["backend_reason"]) == ("succeeded", "sagemaker", "backend_unreachable")


def test_a_key_that_segmind_does_not_know_any_more_fails_no_job(system):
    system.segmind.rotate("SG_another_key")
    job = run(system)
    assert (job["status"], job["backend_reason"]) == ("succeeded", "backend_unauthorized")


def test_a_rate_limit_past_the_deadline_leads_to_the_endpoint(system):
    system.services.settings = replace(system.services.settings, job_deadline=60)
    system.segmind.reset_in = 3600
    system.segmind.behave("429")
    job = run(system)
    assert (job["status"], job["backend"], job["backend_reason"]) == ("succeeded", "sagemaker", "backend_rate_limited")
    assert_settled(system, charged=PRICE)


def test_rate_limits_without_end_leave_the_endpoint_the_time_it_needs(system):
    system.segmind.reset_in = 10
    system.segmind.behave("429", 9)
    job_id = create(system)
    [record] = system.receive()
    for _ in range(2):
        assert not system.work(record)
        system.clock.advance(100)
    # Of the 1,800 seconds there are those left that it may take to start, or to answer in real time.
    asynchronous = system.sagemaker.endpoint.asynchronous
    system.clock.advance(1_005 if asynchronous else 1_540)
    assert system.work(record)
    if asynchronous:
        system.hear()
    job = system.job(job_id)
    assert (job["status"], job["backend"], job["backend_reason"]) == ("succeeded", "sagemaker", "backend_rate_limited")
    assert served(system) == (3, 1)


def test_a_rate_limit_before_the_deadline_is_waited_for(system):
    system.segmind.reset_in = 30
    system.segmind.behave("429")
    job_id = create(system)
    [record] = system.receive()
    assert not system.work(record)
    assert system.job(job_id)["status"] == "queued"
    assert system.work(record)
    job = system.job(job_id)
    assert (job["status"], job["backend"], job["backend_reason"]) == ("succeeded", "segmind", None)
    assert served(system) == (2, 0)


@pytest.mark.parametrize(
    ("behaviour", "code"), [("400", "backend_refused"), ("cut", "backend_broken"), ("garbage", "backend_broken")]
)
def test_what_is_the_requests_fault_or_may_have_been_billed_stays_with_segmind(system, behaviour, code):
    system.segmind.behave(behaviour)
    job = run(system)
    assert (job["status"], job["error"]["code"]) == ("failed", code)
    assert (job["backend"], job["backend_reason"]) == ("segmind", None)
    assert served(system) == (1, 0)
    assert_settled(system, charged=0)


def test_a_black_picture_is_blocked_and_not_asked_for_elsewhere(system):
    system.segmind.behave("black")
    job = run(system)
    assert (job["status"], job["error"]["code"]) == ("failed", "output_blocked")
    assert served(system) == (1, 0)


def test_segmind_is_left_alone_for_half_a_minute(system):
    system.segmind.behave("406-credits")
    assert run(system)["backend"] == "sagemaker"
    system.clock.advance(25)
    job = run(system)
    assert (job["backend"], job["backend_reason"]) == ("sagemaker", "backend_out_of_credits")
    assert served(system) == (1, 2)
    system.clock.advance(6)
    job = run(system)
    assert (job["backend"], job["backend_reason"]) == ("segmind", None)
    assert served(system) == (2, 2)
    assert used(system) == {"sagemaker": (2, 2 * PRICE), "segmind": (1, PRICE)}
    assert_settled(system, charged=3 * PRICE)


def test_the_price_is_the_one_that_was_quoted(system):
    quoted = system.api("POST", "/cost", {"prompt": "a castle", "samples": 2}).json
    assert (quoted["backend"], quoted["price"]) == ("segmind", 2 * PRICE)
    system.segmind.behave("503", 2)
    job = run(system, samples=2)
    assert job["backend"] == "sagemaker"
    assert (job["credits"]["reserved"], job["credits"]["charged"]) == (2 * PRICE, 2 * PRICE)


def test_one_sample_that_the_endpoint_had_to_serve_tells_of_all(system):
    """Segmind fails for one while the others are on their way to it."""
    system.segmind.latency = 0.5
    system.segmind.behave("503")
    job = run(system, samples=4)
    assert [output["status"] for output in job["outputs"]] == ["succeeded"] * 4
    assert [output["seed"] for output in job["outputs"]] == [7, 8, 9, 10]
    assert (job["backend"], job["backend_reason"]) == ("sagemaker", "backend_failed")
    assert served(system) == (4, 1)
    assert used(system) == {"sagemaker": (4, 4 * PRICE)}
    assert_settled(system, charged=4 * PRICE)


def test_a_sample_that_segmind_served_is_not_asked_for_again(system):
    system.segmind.latency = 0.3
    system.segmind.behave("503")
    job_id = create(system, samples=4)
    system.deliver()
    if system.sagemaker.endpoint.asynchronous:
        waiting = system.job(job_id)
        assert (waiting["status"], waiting["backend"]) == ("processing", "sagemaker")
        assert len(system.objects("results")) == 3
        assert system.hear() == 1
    assert system.job(job_id)["status"] == "succeeded"
    assert system.segmind.summary()["calls_by_seed"] == {"7": 1, "8": 1, "9": 1, "10": 1}
    assert len(system.container.requests) == 1


@pytest.mark.parametrize(("status", "code"), [(400, "backend_refused"), (500, "backend_failed")])
def test_a_job_that_neither_can_serve_fails_of_the_last_error(system, status, code):
    system.segmind.behave("503", 20)
    system.container.next.extend([status] * 20)
    job_id = create(system)
    undone: list[Any] = []
    for _ in range(12):
        undone += [(system.work, record) for record in system.receive()]
        if system.sagemaker.endpoint.asynchronous:
            system.settle()
        undone += [(system.collect, record) for record in system.receive("results")]
        undone = [(handle, record) for handle, record in undone if not handle(record)]
    assert undone == []
    job = system.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", code)
    assert len(system.container.requests) == (1 if status == 400 else 3)
    assert system.objects("results") == []
    assert_settled(system, charged=0)


def test_a_job_of_two_outages_gives_the_last_reason(system):
    """The functions start anew between them, as after an update of the stack."""
    system.segmind.behave("503")
    system.container.next.append(500)
    job_id = create(system)
    records = system.receive()
    undone = [record for record in records if not system.work(record)]
    if system.sagemaker.endpoint.asynchronous:
        system.settle()
        undone = [record for record in system.receive("results") if not system.collect(record)]
    system.restart()
    system.segmind.behave("406-credits")
    [record] = undone
    assert system.collect(record) if system.sagemaker.endpoint.asynchronous else system.work(record)
    if system.sagemaker.endpoint.asynchronous:
        assert system.hear() == 1
    job = system.job(job_id)
    assert (job["status"], job["backend"], job["backend_reason"]) == (
        "succeeded",
        "sagemaker",
        "backend_out_of_credits",
    )
    assert_settled(system, charged=PRICE)
