"""Segmind's v2 behind the worker: submitted, let go of, looked at again through the queue, fetched, settled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.system import System, queue_url, running_system


@pytest.fixture
def system() -> Iterator[System]:
    with running_system(segmind_api="v2") as started:
        yield started


@pytest.fixture
def auto() -> Iterator[System]:
    with running_system("auto", segmind_api="v2") as started:
        yield started


def pending(system: System, job_id: str) -> dict[str, dict[str, str]]:
    """Return what a job's item says of what is under way."""
    found: dict[str, dict[str, str]] = json.loads(system.item(job_id).get("pending", {"S": "{}"})["S"])
    return found


def submitted(system: System, latency: float = 60, **fields: object) -> str:
    """Create a job and have it submitted; the request takes until `release`."""
    system.segmind.latency = latency
    job_id = str(system.create(**fields).json["id"])
    assert system.deliver() == 1
    return job_id


def look(system: System, seconds: float = 5) -> int:
    """Let time pass and hand the messages to the worker."""
    system.clock.advance(seconds)
    return system.deliver()


def test_a_picture_is_submitted_let_go_of_and_fetched_at_the_next_look(system):
    job_id = submitted(system)
    job = system.job(job_id)
    assert (job["status"], job["status_detail"]["code"]) == ("processing", "backend_busy")
    assert set(pending(system, job_id)["0"]) == {"request_id", "asked_at", "backend", "reason"}
    [record] = system.receive()
    assert json.loads(record["body"])["look"]
    system.segmind.release()
    assert look(system, 1) == 1
    assert system.job(job_id)["status"] == "succeeded"
    assert system.segmind.looks == ["status", "response", "output"]
    # The key is for the API alone.
    assert system.segmind.keys_shown == Counter({"status": 1, "response": 1, "output": 0})
    assert (system.segmind.billed, system.messages()) == (1, 0)
    system.books()


def test_looks_come_after_1_2_3_5_5_seconds_each_as_a_message_of_its_own(system):
    job_id = submitted(system)
    waits = []
    for _ in range(6):
        job = system.services.jobs.get("default", job_id)
        waits.append(round((job.look_ms - int(system.clock() * 1000)) / 1000))
        assert job.due_at > job.look_ms / 1000 + 50
        [record] = system.receive()
        system.clock.advance(waits[-1])
        assert system.work(record)
    assert waits == [1, 2, 3, 5, 5, 5]
    assert (system.segmind.billed, len(system.segmind.calls), system.messages()) == (1, 1, 1)


def test_a_second_message_looks_but_starts_no_second_chain(system):
    job_id = submitted(system)
    system.services.queue.send(system.services.jobs.get("default", job_id))
    assert system.messages() == 2
    system.clock.advance(1)
    assert system.deliver() == 2
    assert system.messages() == 1


def test_a_look_that_was_lost_is_made_up_for_by_the_sweep(system):
    job_id = submitted(system)
    [record] = system.receive()
    system.sqs.delete_message(QueueUrl=queue_url("jobs"), ReceiptHandle=record["receiptHandle"])
    system.segmind.release()
    system.clock.advance(90)
    assert system.sweep() == {"resent": 1}
    assert system.deliver() == 1
    assert system.job(job_id)["status"] == "succeeded"
    assert system.segmind.billed == 1


def test_each_of_several_samples_is_written_down_at_once(system, monkeypatch):
    notes = []
    note = system.services.jobs.note
    monkeypatch.setattr(system.services.jobs, "note", lambda job: notes.append(len(job.pending)) or note(job))
    job_id = submitted(system, samples=3)
    assert sorted(notes) == [1, 2, 3]
    assert set(pending(system, job_id)) == {"0", "1", "2"}
    system.segmind.release()
    look(system, 1)
    assert [output["status"] for output in system.job(job_id)["outputs"]] == ["succeeded"] * 3
    assert system.segmind.billed == 3


def test_one_sample_is_written_down_by_the_release_alone(system, monkeypatch):
    monkeypatch.setattr(system.services.jobs, "note", lambda job: pytest.fail("a write too many"))
    assert pending(system, submitted(system))


def test_while_its_caller_waits_the_worker_looks_itself(system, monkeypatch):
    slept = []
    system.segmind.latency = 60

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            system.segmind.release()

    monkeypatch.setattr(system.services, "sleep", sleep)
    # As `POST` with Prefer: wait stores it; here nobody runs the worker meanwhile.
    monkeypatch.setattr("functions.api.app.watch", lambda use, job, seconds: job)
    job_id = system.create(wait=20).json["id"]
    assert system.deliver() == 1
    assert system.job(job_id)["status"] == "succeeded"
    assert slept == [1.0] * 3
    assert system.messages() == 0


def test_a_caller_who_does_not_wait_is_not_waited_for(system):
    job = system.services.jobs.get("default", submitted(system))
    assert job.waited_until is None


def test_a_run_that_failed_is_asked_for_again_by_a_message_that_asks(system):
    system.segmind.behave("failed")
    job_id = submitted(system, latency=0)
    assert look(system, 1) == 1
    [record] = system.receive()
    assert not json.loads(record["body"])["look"]
    assert look(system) == 1
    assert look(system, 1) == 1
    assert system.job(job_id)["status"] == "succeeded"
    assert (len(system.segmind.calls), system.segmind.billed) == (2, 1)


def test_a_run_that_always_fails_fails_the_job_and_costs_nothing(system):
    system.segmind.behave("failed", times=3)
    job_id = submitted(system, latency=0)
    for _ in range(6):
        look(system, 10)
    job = system.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "backend_failed")
    assert "could not make a picture" in job["error"]["detail"]
    assert (len(system.segmind.calls), system.segmind.billed, system.books().charged) == (3, 0, 0)


def test_a_look_asks_for_nothing_that_waits_for_its_rate_limit(system):
    system.segmind.behave("429")
    system.segmind.reset_in = 60
    system.segmind.latency = 60
    job_id = system.create(samples=2).json["id"]
    [record] = system.receive()
    assert not system.work(record)
    [message] = [found for found in system.receive() if found["messageId"] != record["messageId"]]
    system.segmind.release()
    system.clock.advance(1)
    assert system.work(message)
    assert len(system.segmind.calls) == 2
    system.clock.advance(60)
    assert system.work(record)
    system.segmind.release()
    look(system, 1)
    assert system.job(job_id)["status"] == "succeeded"
    assert system.segmind.billed == 2


@pytest.mark.parametrize("step", ["status", "response", "output"])
@pytest.mark.parametrize("trouble", ["429", "500", "502", "503", "504", "cut", "cut-before"])
def test_a_look_that_fails_is_made_again_and_nothing_is_asked_for_again(system, step, trouble):
    job_id = submitted(system, latency=0)
    system.segmind.behave(trouble, at=step)
    look(system, 1)
    assert system.job(job_id)["status"] == "processing"
    look(system)
    assert system.job(job_id)["status"] == "succeeded"
    assert (len(system.segmind.calls), system.segmind.billed) == (1, 1)


ENDS = {
    ("400", "status"): "backend_refused",
    ("401", "status"): "backend_unauthorized",
    ("403", "response"): "backend_unauthorized",
    ("404", "status"): "backend_broken",
    ("404", "response"): "backend_broken",
    ("404", "output"): "backend_broken",
    ("406-credits", "status"): "backend_out_of_credits",
    ("406-content-type", "status"): "backend_refused",
    ("410", "status"): "backend_gone",
    ("410", "response"): "backend_gone",
    ("410", "output"): "backend_broken",
    ("empty", "response"): "backend_broken",
    ("elsewhere", "response"): "backend_broken",
}


@pytest.mark.parametrize(("trouble", "step"), ENDS)
def test_what_brings_no_picture_any_more_ends_the_job(system, trouble, step):
    job_id = submitted(system, latency=0)
    system.segmind.behave(trouble, at=step, times=2)
    look(system, 20)
    job = system.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", ENDS[trouble, step])
    assert len(system.segmind.calls) == 1
    assert system.books().charged == 0


def test_a_request_whose_record_expired_ends_the_job(system):
    job_id = submitted(system, latency=0)
    system.segmind.expire()
    look(system, 1)
    # It may only not be known everywhere yet.
    assert system.job(job_id)["status"] == "processing"
    look(system, 20)
    assert system.job(job_id)["error"]["code"] == "backend_broken"
    assert len(system.segmind.calls) == 1


SUBMITS = {
    "400": ("backend_refused", 1),
    "403": ("backend_unauthorized", 1),
    "404": ("backend_refused", 1),
    "406-credits": ("backend_out_of_credits", 1),
    "406-content-type": ("backend_refused", 1),
    "410": ("backend_gone", 1),
    "500": ("backend_failed", 3),
    "502": ("backend_failed", 3),
    "503": ("backend_failed", 3),
    "504": ("backend_gateway_timeout", 3),
    "cut": ("backend_broken", 1),
    "cut-before": ("backend_broken", 1),
    "html": ("backend_broken", 1),
}


@pytest.mark.parametrize("trouble", SUBMITS)
def test_errors_of_a_submit(system, trouble):
    system.segmind.behave(trouble, times=3)
    job_id = system.create().json["id"]
    [record] = system.receive()
    while not system.work(record):
        system.clock.advance(10)
    job = system.job(job_id)
    assert (job["status"], job["error"]["code"], len(system.segmind.calls)) == ("failed", *SUBMITS[trouble])


@pytest.mark.parametrize(
    "environment", [{"SEGMIND_API": "v1"}, {"BACKEND": "sagemaker", "SAGEMAKER_ENDPOINT": "img2img-endpoint"}]
)
def test_what_was_submitted_is_followed_whatever_the_settings_say_by_then(system, monkeypatch, environment):
    job_id = submitted(system)
    system.segmind.release()
    system.redeploy(monkeypatch, **environment)
    look(system, 1)
    job = system.job(job_id)
    assert (job["status"], job["backend"]) == ("succeeded", "segmind")
    assert (len(system.segmind.calls), system.segmind.billed) == (1, 1)


def test_a_canceled_job_is_not_looked_at(system):
    job_id = submitted(system)
    system.api("POST", f"/jobs/{job_id}/cancel")
    look(system, 1)
    assert (system.segmind.looks, system.messages(), system.job(job_id)["status"]) == ([], 0, "canceled")


def test_a_picture_that_is_never_done_ends_at_the_deadline(system):
    job_id = submitted(system)
    look(system, 1801)
    assert system.job(job_id)["error"]["code"] == "deadline_exceeded"
    assert system.messages() == 0


def test_a_model_that_is_gone_is_counted_for_its_alarm(system, capsys):
    system.segmind.behave("410")
    system.create()
    system.deliver()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["BackendGone"] for line in lines if "BackendGone" in line] == [[1.0]]


@pytest.mark.parametrize(("trouble", "reason"), [("410", "backend_gone"), ("503", "backend_failed")])
def test_auto_goes_to_the_endpoint_when_a_submit_is_refused(auto, trouble, reason):
    auto.segmind.behave(trouble)
    job_id = auto.create().json["id"]
    auto.deliver()
    auto.hear()
    job = auto.job(job_id)
    assert (job["status"], job["backend"], job["backend_reason"]) == ("succeeded", "sagemaker", reason)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"behaviour": "failed"}, "backend_failed"),
        ({"behaviour": "410", "at": "status"}, "backend_gone"),
        ({"behaviour": "406-credits", "at": "response"}, "backend_out_of_credits"),
    ],
)
def test_auto_goes_to_the_endpoint_when_what_was_submitted_comes_to_nothing(auto, told, reason):
    auto.segmind.behave(**told)
    job_id = submitted(auto, latency=0)
    assert look(auto, 1) == 1
    auto.hear()
    job = auto.job(job_id)
    assert (job["status"], job["backend"], job["backend_reason"]) == ("succeeded", "sagemaker", reason)
    assert len(auto.segmind.calls) == 1
    auto.books()


def test_auto_goes_to_the_endpoint_when_segmind_takes_too_long(auto):
    job_id = submitted(auto)
    for _ in range(3):
        assert look(auto, 2) == 1
    assert auto.job(job_id)["backend"] == "segmind"
    assert look(auto, 2) == 1
    auto.hear()
    job = auto.job(job_id)
    assert (job["status"], job["backend"], job["backend_reason"]) == ("succeeded", "sagemaker", "backend_timeout")


def test_auto_serves_by_segmind_what_segmind_can(auto):
    job_id = submitted(auto, latency=0)
    look(auto, 1)
    job = auto.job(job_id)
    assert (job["status"], job["backend"], job["backend_reason"]) == ("succeeded", "segmind", None)
