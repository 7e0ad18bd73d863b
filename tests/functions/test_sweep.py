"""What becomes of jobs that no message, or no worker, looks after any more."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from img2img.errors import BackendUnreachable
from img2img.flows.sweep import sweep
from img2img.jobs.job import Status, given_up
from tests.faults.calls import Killed
from tests.functions.interruptions import die, fail
from tests.functions.jobs import create, encoded
from tests.system import System

LEASE = 130
DEADLINE = 1800


def lose_messages(system: System) -> None:
    """Empty the queue, as if what was in it had never been sent."""
    for record in system.receive():
        system.sqs.delete_message(QueueUrl=system.queue_url, ReceiptHandle=record["receiptHandle"])


def forgotten(system: System, **fields: Any) -> str:
    """Create a job whose message is lost."""
    job_id = create(system, **fields)
    lose_messages(system)
    return job_id


def crashed(system: System, at: Callable[..., None], operation: str = "GetObject", **fields: Any) -> str:
    """Create a job whose worker dies before a call, and whose message is lost."""
    job_id = create(system, **fields)
    [record] = system.receive()
    at(f"before {operation}", die)
    with pytest.raises(Killed):
        system.work(record)
    lose_messages(system)
    return job_id


def assert_settled(system: System, *, charged: int) -> None:
    """Check that no credits are held any more, and what was paid in all."""
    books = system.books()
    assert (books.reserved, books.charged) == (0, charged)


# Queued and forgotten


def test_a_job_on_its_way_is_left_alone(system):
    create(system)
    system.clock.advance(50)
    assert system.sweep() == {}
    assert system.messages() == 1


def test_a_forgotten_job_is_sent_again(system):
    job_id = forgotten(system)
    system.clock.advance(60)
    assert system.sweep() == {"resent": 1}
    [record] = system.receive()
    assert json.loads(record["body"]) == {
        "team": "default",
        "job_id": job_id,
        "correlation_id": system.item(job_id)["correlation_id"]["S"],
        "look": False,
    }
    assert system.work(record)
    assert system.job(job_id)["status"] == "succeeded"
    assert system.sweep() == {}


def test_a_forgotten_job_is_sent_again_ever_later(system):
    forgotten(system)
    sent_at = []
    for minute in range(1, 30):
        system.clock.advance(60)
        if system.sweep().get("resent"):
            sent_at.append(minute)
    pauses = [late - early for early, late in itertools.pairwise(sent_at)]
    assert sent_at[0] in (1, 2)
    assert pauses == sorted(pauses)
    assert 3 <= len(sent_at) <= 6
    assert system.messages() == len(sent_at)


def test_repeated_messages_run_a_job_once(system):
    job_id = create(system)
    for seconds in (61, 65, 140):
        system.clock.advance(seconds)
        assert system.sweep() == {"resent": 1}
    assert system.messages() == 4
    assert system.deliver() == 4
    assert system.job(job_id)["status"] == "succeeded"
    assert len(system.segmind.calls) == 1
    assert_settled(system, charged=1000)


def test_a_job_whose_message_could_not_be_sent_is_sent_by_the_sweep(system, at):
    at("before SendMessage", fail)
    job_id = create(system)
    assert system.messages() == 0
    system.clock.advance(60)
    assert system.sweep() == {"resent": 1}
    system.deliver()
    assert system.job(job_id)["status"] == "succeeded"


def test_many_forgotten_jobs_are_all_sent(system):
    jobs = {forgotten(system) for _ in range(9)}
    system.clock.advance(60)
    assert system.sweep() == {"resent": 9}
    assert {json.loads(record["body"])["job_id"] for record in system.receive()} == jobs


def test_a_released_job_is_sent_again_when_its_message_is_lost(system):
    system.segmind.behave("500")
    job_id = create(system)
    [record] = system.receive()
    assert not system.work(record)
    system.sqs.delete_message(QueueUrl=system.queue_url, ReceiptHandle=record["receiptHandle"])
    system.clock.advance(50)
    assert system.sweep() == {}
    system.clock.advance(12)
    assert system.sweep() == {"resent": 1}
    assert system.deliver() == 1
    assert system.job(job_id)["status"] == "succeeded"


# Leases


def test_a_job_whose_worker_died_is_sent_again_when_its_lease_has_run_out(system, at):
    job_id = crashed(system, at)
    assert system.job(job_id)["status"] == "processing"
    system.clock.advance(LEASE - 20)
    assert system.sweep() == {}
    system.clock.advance(20)
    assert system.sweep() == {"resent": 1}
    assert system.deliver() == 1
    assert system.job(job_id)["status"] == "succeeded"
    assert len(system.segmind.calls) == 1
    assert system.sweep() == {}


def test_pictures_stored_before_the_crash_are_not_made_again(system, at):
    job_id = crashed(system, at, "TransactWriteItems", samples=3)
    assert len(system.objects("results")) == 3
    system.clock.advance(LEASE)
    system.sweep()
    system.deliver()
    job = system.job(job_id)
    assert [output["status"] for output in job["outputs"]] == ["succeeded"] * 3
    assert system.segmind.summary()["calls_by_seed"] == {"7": 1, "8": 1, "9": 1}
    assert_settled(system, charged=3000)


def test_a_worker_that_was_only_slow_keeps_its_job(system, at):
    """The lease has run out and the job was sent again, but nobody has claimed it yet."""
    job_id = create(system)
    [record] = system.receive()

    def meanwhile() -> None:
        system.clock.advance(LEASE)
        assert sweep(system.services) == {"resent": 1}

    at("before PutObject", meanwhile)
    assert system.work(record)
    assert system.job(job_id)["status"] == "succeeded"
    assert system.deliver() == 1
    assert len(system.segmind.calls) == 1


# Deadlines


def test_a_job_past_its_deadline_fails(system):
    job_id = forgotten(system)
    system.clock.advance(DEADLINE)
    assert system.sweep() == {"failed": 1}
    job = system.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "deadline_exceeded")
    assert job["completed_at"]
    assert [output["error"]["code"] for output in job["outputs"]] == ["deadline_exceeded"]
    assert system.segmind.calls == []
    assert system.sweep() == {}
    assert_settled(system, charged=0)


def test_a_job_that_was_sent_again_just_before_its_deadline_fails_in_time(system):
    job_id = forgotten(system)
    system.clock.advance(DEADLINE - 10)
    assert system.sweep() == {"resent": 1}
    lose_messages(system)
    system.clock.advance(10)
    assert system.sweep() == {"failed": 1}
    assert system.job(job_id)["error"]["code"] == "deadline_exceeded"


def test_a_message_that_comes_after_the_deadline_costs_nothing(system):
    job_id = create(system)
    system.clock.advance(DEADLINE)
    assert system.deliver() == 1
    assert system.job(job_id)["error"]["code"] == "deadline_exceeded"
    assert system.segmind.calls == []


def test_a_job_that_failed_meanwhile_is_not_run(system):
    job_id = create(system)
    system.clock.advance(DEADLINE)
    assert system.sweep() == {"failed": 1}
    ended = system.job(job_id)
    assert system.deliver() == 1
    assert system.job(job_id) == ended
    assert system.segmind.calls == []


def test_a_crashed_job_fails_at_its_deadline(system, at):
    job_id = crashed(system, at)
    system.clock.advance(DEADLINE)
    assert system.sweep() == {"resent": 1}, "a worker may still find what an attempt has stored"
    system.clock.advance(LEASE)
    assert system.sweep() == {"failed": 1}
    assert system.job(job_id)["error"]["code"] == "deadline_exceeded"


def test_a_picture_stored_before_a_crash_is_delivered_after_the_deadline(system, at):
    job_id = crashed(system, at, "TransactWriteItems")
    system.clock.advance(DEADLINE)
    system.sweep()
    system.deliver()
    assert system.job(job_id)["status"] == "succeeded"
    assert len(system.segmind.calls) == 1


def test_the_sweep_keeps_the_pictures_that_were_delivered_before_the_deadline(system):
    system.segmind.behave("503")
    job_id = create(system, samples=2)
    [record] = system.receive()
    assert not system.work(record)
    system.clock.advance(DEADLINE + LEASE)
    assert system.sweep() == {"succeeded": 1}
    job = system.job(job_id)
    assert job["status"] == "succeeded"
    assert sorted(output["status"] for output in job["outputs"]) == ["failed", "succeeded"]
    assert (job["credits"]["charged"], job["credits"]["released"]) == (1000, 1000)
    assert_settled(system, charged=1000)


def test_who_waits_for_a_job_past_its_deadline_gets_a_504(system):
    request = {"image": encoded(), "headers": {"Idempotency-Key": "k"}}
    job_id = forgotten(system, headers=request["headers"])
    system.clock.advance(DEADLINE - 10)

    def sleep(_: float) -> None:
        system.clock.advance(10)
        system.sweep()

    system.services.sleep = sleep
    answer = system.create(wait=25, seed=7, **request)
    assert (answer.status, answer.json["code"], answer.json["job_id"]) == (504, "deadline_exceeded", job_id)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["location"].endswith(job_id)
    assert system.job(job_id)["status"] == "failed"


# Finished jobs


@pytest.mark.parametrize("end", ["succeeded", "failed", "canceled"])
def test_finished_jobs_are_never_touched(system, end):
    if end == "failed":
        system.segmind.behave("400")
    job_id = create(system)
    if end == "canceled":
        system.api("POST", f"/jobs/{job_id}/cancel")
    system.deliver()
    before = system.item(job_id)
    assert before["status"]["S"] == end
    for seconds in (61, LEASE, DEADLINE, 86_400):
        system.clock.advance(seconds)
        assert system.sweep() == {}
    assert system.item(job_id) == before
    assert system.messages() == 0


@pytest.mark.parametrize("end", ["cancel", "delete", "run"])
def test_a_job_that_ends_while_it_is_swept_stays_ended(system, at, end):
    job_id = forgotten(system)
    system.clock.advance(DEADLINE)
    jobs = system.services.jobs

    def meanwhile() -> None:
        if end == "delete":
            assert system.api("DELETE", f"/jobs/{job_id}").status == 204
        elif end == "cancel":
            jobs.cancel("default", job_id)
        else:
            _, claimed = jobs.claim("default", job_id, lease_seconds=LEASE)
            assert jobs.finish(given_up(claimed, BackendUnreachable("away")))

    at("before TransactWriteItems", meanwhile)
    assert sweep(system.services) == {}
    answer = system.api("GET", f"/jobs/{job_id}")
    assert answer.status == (404 if end == "delete" else 200)
    if end != "delete":
        assert answer.json["status"] == ("canceled" if end == "cancel" else "failed")
        assert (answer.json["error"] or {}).get("code") == (None if end == "cancel" else "backend_unreachable")
    assert_settled(system, charged=0)


def test_a_job_that_is_claimed_while_it_is_swept_stays_claimed(system, at):
    job_id = forgotten(system)
    system.clock.advance(60)
    jobs = system.services.jobs
    at("before UpdateItem", lambda: jobs.claim("default", job_id, lease_seconds=LEASE))
    sweep(system.services)
    claimed = jobs.get("default", job_id)
    system.deliver()
    assert claimed.status is Status.PROCESSING
    assert jobs.get("default", job_id) == claimed
    assert system.segmind.calls == []


# Two at once, and none to the end


@pytest.mark.parametrize("operation", ["UpdateItem", "SendMessage"])
def test_two_sweeps_at_once_do_a_job_once(system, at, operation):
    job_id = forgotten(system)
    system.clock.advance(60)
    inner: list[dict[str, int]] = []
    at(f"before {operation}", lambda: inner.append(dict(sweep(system.services))))
    assert dict(sweep(system.services)) == inner[0] == {"resent": 1}
    assert system.deliver() == 2
    assert system.job(job_id)["status"] == "succeeded"
    assert len(system.segmind.calls) == 1


def test_two_sweeps_at_once_fail_a_job_once(system, at):
    job_id = forgotten(system)
    system.clock.advance(DEADLINE)
    inner: list[dict[str, int]] = []
    at("before TransactWriteItems", lambda: inner.append(dict(sweep(system.services))))
    assert dict(sweep(system.services)) == {}
    assert inner == [{"failed": 1}]
    assert system.job(job_id)["error"]["code"] == "deadline_exceeded"
    assert_settled(system, charged=0)


def test_two_sweeps_at_once_of_a_crashed_job_do_no_harm(system, at):
    job_id = crashed(system, at)
    system.clock.advance(LEASE)
    at("before SendMessage", lambda: sweep(system.services))
    sweep(system.services)
    assert 1 <= system.messages() <= 2
    system.deliver()
    assert system.job(job_id)["status"] == "succeeded"
    assert len(system.segmind.calls) == 1


def test_a_job_that_cannot_be_sent_is_sent_by_a_later_sweep(system, at):
    jobs = [forgotten(system) for _ in range(2)]
    system.clock.advance(60)
    at("before SendMessage", fail)
    with pytest.raises(RuntimeError, match="1 jobs were skipped"):
        system.sweep()
    assert system.messages() == 1, "the trouble of one job keeps no other waiting"
    system.clock.advance(120)
    assert system.sweep()["resent"] >= 1
    system.deliver()
    assert {system.job(job_id)["status"] for job_id in jobs} == {"succeeded"}


# Metrics


def test_what_the_sweep_ended_is_counted_like_any_other_failure(system, capsys):
    job_id = forgotten(system)
    correlation_id = system.item(job_id)["correlation_id"]["S"]
    system.clock.advance(DEADLINE)
    capsys.readouterr()
    system.sweep()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if '"_aws"' in line]
    assert sum(sum(line.get("JobsFailed", [])) for line in lines) == 1
    [failure] = [line for line in lines if "FailuresByCode" in line]
    assert failure["code"] == "deadline_exceeded"
    assert (failure["job_id"], failure["correlation_id"]) == (job_id, correlation_id)
