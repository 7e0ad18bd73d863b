"""Jobs that a SageMaker endpoint works on: asked for by the worker, ended by its notices, whatever becomes of those."""

from __future__ import annotations

import io
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import boto3
import pytest
from PIL import Image

from tests.functions.interruptions import fail
from tests.functions.jobs import create, encoded
from tests.system import Context, System, function, running_system

PRICE = 1000
DEADLINE = 1800
LEASE = 130
PROMPT = "a quagga below a vermilion moon"
NEGATIVE = "wobbegong, xylophone"
BUSY = {"code": "endpoint_busy", "detail": "The GPU endpoint has the job, and answers by itself"}


@pytest.fixture
def system() -> Iterator[System]:
    """A deployment with an asynchronous endpoint."""
    with running_system("sagemaker") as started:
        yield started


@pytest.fixture
def realtime() -> Iterator[System]:
    """A deployment with an endpoint that answers in real time."""
    with running_system("sagemaker", asynchronous=False) as started:
        yield started


def started(system: System, **fields: Any) -> str:
    """Create a job and have the worker ask the endpoint for it; return its id."""
    job_id = create(system, **fields)
    assert system.deliver() == 1
    return job_id


def heard(system: System) -> list[dict[str, Any]]:
    """Wait for the endpoint, and return its notices."""
    system.settle()
    return system.receive("results")


def run_out(system: System, job_id: str) -> int:
    """Do what messages and notices ask for, each as often as it comes back, until the job has ended.

    Return how often one was told to come back.
    """
    undone: list[tuple[Callable[[dict[str, Any]], bool], dict[str, Any]]] = []
    again = 0
    for _ in range(40):
        undone += [(system.work, record) for record in system.receive("jobs")]
        undone += [(system.collect, record) for record in system.receive("results")]
        undone = [(handle, record) for handle, record in undone if not handle(record)]
        again += len(undone)
        if system.job(job_id)["completed_at"]:
            assert all(handle(record) for handle, record in undone)
            return again
        if system.sagemaker.endpoint.asynchronous:
            system.settle()
    raise AssertionError("the job does not end")


def let_go(system: System) -> None:
    """Have the container answer what it was told to hang on, once all that was asked for has come to it."""
    system.container.wait_for(len(system.sagemaker.invocations))
    system.container.release()


def calls(system: System) -> Counter[int]:
    """Return how often the container was asked for each seed."""
    return Counter(request["seed"] for request in system.container.requests)


def outcomes(job: Any) -> list[str]:
    return [output["status"] for output in job["outputs"]]


def assert_settled(system: System, *, charged: int) -> None:
    """Check that no credits are held any more, and what was paid in all."""
    books = system.books()
    assert (books.reserved, books.charged) == (0, charged)


def assert_over(system: System, job_id: str) -> None:
    """Check that nothing that comes late, or that time brings, changes how a job ended."""
    ended = system.item(job_id)
    stored = system.objects("results")
    if system.sagemaker.endpoint.asynchronous:
        system.settle()
    for record in system.receive("results"):
        assert system.collect(record)
    system.clock.advance(3600)
    assert system.sweep() == {}
    assert (system.messages("jobs"), system.messages("results")) == (0, 0)
    assert system.item(job_id) == ended
    assert system.objects("results") == stored


def rewritten(record: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a notice with other members; None leaves one out."""
    envelope = json.loads(record["body"])
    notice = {**json.loads(envelope["Message"]), **changes}
    envelope["Message"] = json.dumps({name: value for name, value in notice.items() if value is not None})
    return {**record, "body": json.dumps(envelope)}


@pytest.fixture
def told() -> Iterator[list[int]]:
    """The seconds after which messages were told to come back. It has to be asked for after the deployment."""
    found: list[int] = []

    def note(params: dict[str, Any], **_: Any) -> None:
        found.append(params["VisibilityTimeout"])

    # The functions make their clients, each with a copy of these events, when they first need them.
    events = boto3.DEFAULT_SESSION.events
    events.register("provide-client-params.sqs.ChangeMessageVisibility", note)
    yield found
    events.unregister("provide-client-params.sqs.ChangeMessageVisibility", note)


# Asked for, and collected


def test_a_job_is_asked_for_and_ends_with_its_notice(system):
    job_id = started(system, prompt=PROMPT, negative_prompt=NEGATIVE, guidance_scale=9, strength=0.7)
    waiting = system.job(job_id)
    assert (waiting["status"], waiting["outputs"], waiting["completed_at"]) == ("processing", [], None)
    assert waiting["status_detail"] == BUSY
    assert (waiting["backend"], waiting["backend_reason"]) == ("sagemaker", None)
    assert system.messages("jobs") == 0
    assert system.hear() == 1
    job = system.job(job_id)
    assert (job["status"], job["status_detail"], job["error"]) == ("succeeded", None, None)
    assert (job["backend"], job["backend_reason"]) == ("sagemaker", None)
    [output] = job["outputs"]
    assert (output["status"], output["seed"], output["content_type"]) == ("succeeded", 7, "image/png")
    assert (output["width"], output["height"]) == (512, 512)
    assert job["metrics"]["backend_ms"] == 20
    [asked] = system.container.requests
    assert (asked["prompt"], asked["negative_prompt"]) == (PROMPT, NEGATIVE)
    assert (asked["guidance_scale"], asked["strength"], asked["samples"]) == (9, 0.7, 1)
    assert job["credits"]["charged"] == PRICE
    assert_settled(system, charged=PRICE)
    assert_over(system, job_id)
    assert calls(system) == {7: 1}


def test_no_worker_is_busy_while_the_endpoint_works(system):
    system.container.next.append("hang")
    job_id = started(system)
    system.container.wait_for(1)
    assert "lease" not in system.item(job_id)
    let_go(system)
    assert system.hear() == 1


def test_usage_is_counted_under_the_endpoint(system):
    started(system, samples=2)
    system.hear()
    [row] = system.api("GET", "/usage", query={"group_by": "backend"}).json["rows"]
    assert (row["backend"], row["images"], row["charged"]) == ("sagemaker", 2, 2 * PRICE)


@pytest.mark.parametrize("seed", range(4))
def test_four_samples_end_whatever_the_order_of_their_notices(system, seed):
    job_id = started(system, samples=4)
    notices = heard(system)
    assert len(notices) == 4
    random.Random(seed).shuffle(notices)
    assert all(map(system.collect, notices))
    job = system.job(job_id)
    assert (job["status"], outcomes(job)) == ("succeeded", ["succeeded"] * 4)
    assert [output["seed"] for output in job["outputs"]] == [7, 8, 9, 10]
    assert len({output["sha256"] for output in job["outputs"]}) == 4
    assert calls(system) == {7: 1, 8: 1, 9: 1, 10: 1}
    assert_settled(system, charged=4 * PRICE)
    assert_over(system, job_id)


def test_what_has_ended_is_kept_while_another_sample_is_still_being_made(system):
    system.container.next.append("hang")
    job_id = started(system, samples=4)
    assert system.sagemaker.wait_for(lambda: system.sagemaker.notices == 3)
    assert sum(map(system.collect, system.receive("results"))) == 3
    waiting = system.job(job_id)
    assert (waiting["status"], waiting["status_detail"]) == ("processing", BUSY)
    assert len(system.objects("results")) == 3
    let_go(system)
    assert system.hear() == 1
    assert outcomes(system.job(job_id)) == ["succeeded"] * 4
    assert sum(calls(system).values()) == 4
    assert_settled(system, charged=4 * PRICE)


def test_pictures_come_in_the_format_that_was_asked_for(system):
    job_id = started(system, output_format="webp")
    system.hear()
    [output] = system.job(job_id)["outputs"]
    assert output["content_type"] == "image/webp"
    [key] = system.objects("results")
    body = system.s3.get_object(Bucket="results", Key=key)["Body"].read()
    assert Image.open(io.BytesIO(body)).format == "WEBP"


def test_a_caller_who_waits_gets_the_picture(system):
    undone: list[tuple[Any, dict[str, Any]]] = []

    def meanwhile(seconds: float) -> None:
        system.clock.advance(seconds)
        system.settle()
        undone.extend([(system.work, record) for record in system.receive()])
        undone.extend([(system.collect, record) for record in system.receive("results")])
        undone[:] = [(handle, record) for handle, record in undone if not handle(record)]

    system.services.sleep = meanwhile
    answer = system.create(wait=25, image=encoded(), headers={"Accept": "image/*"})
    assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
    assert Image.open(io.BytesIO(answer.content)).size == (512, 512)


# Notices: twice, lost, early, late


def test_a_notice_that_comes_twice_changes_nothing(system):
    system.sagemaker.treat_notices("twice")
    job_id = started(system)
    assert system.hear() == 2
    assert system.job(job_id)["status"] == "succeeded"
    assert_settled(system, charged=PRICE)
    assert_over(system, job_id)


@pytest.mark.parametrize("samples", [1, 4])
def test_a_lost_notice_is_made_up_for_by_the_sweep(system, samples):
    system.sagemaker.treat_notices("drop", samples)
    job_id = started(system, samples=samples)
    assert system.hear() == 0
    system.clock.advance(50)
    assert system.sweep() == {}
    system.clock.advance(11)
    assert system.sweep() == {"resent": 1}
    assert system.deliver() == 1
    assert outcomes(system.job(job_id)) == ["succeeded"] * samples
    assert sum(calls(system).values()) == samples
    assert_settled(system, charged=samples * PRICE)
    assert_over(system, job_id)


def test_one_notice_of_four_is_enough(system):
    system.sagemaker.treat_notices("drop", 3)
    job_id = started(system, samples=4)
    assert system.hear() == 1
    assert outcomes(system.job(job_id)) == ["succeeded"] * 4
    assert_settled(system, charged=4 * PRICE)


def test_a_sweep_leaves_a_job_that_is_being_made_in_peace(system):
    system.container.next.append("hang")
    job_id = started(system)
    for seconds in (61, 300, 700):
        system.clock.advance(seconds)
        assert system.sweep() == {"resent": 1}
        assert system.deliver() == 1
        assert system.job(job_id)["status"] == "processing"
    let_go(system)
    system.hear()
    assert system.job(job_id)["status"] == "succeeded"
    assert calls(system) == {7: 1}


def test_a_notice_that_overtakes_the_worker_comes_again(system, told, at):
    system.sagemaker.behave("early")
    job_id = create(system)
    early: list[dict[str, Any]] = []

    def overtake() -> None:
        early.extend(heard(system))
        assert not any(map(system.collect, early))

    at("after InvokeEndpointAsync", overtake)
    assert system.deliver() == 1
    assert told == [1]
    assert system.job(job_id)["status"] == "processing"
    [notice] = early
    assert system.collect(notice)
    assert system.job(job_id)["status"] == "succeeded"
    assert calls(system) == {7: 1}
    assert_settled(system, charged=PRICE)


def test_a_notice_waits_ever_longer_for_a_worker_that_holds_the_job(system, told, at):
    system.sagemaker.behave("early")
    create(system)

    def overtake() -> None:
        [notice] = heard(system)
        for receives in (1, 2, 3, 4, 30):
            notice["attributes"] = {"ApproximateReceiveCount": str(receives)}
            assert not system.collect(notice)

    at("after InvokeEndpointAsync", overtake)
    assert system.deliver() == 1
    assert told == [1, 2, 4, 8, 900]


def test_a_worker_that_died_after_it_had_asked_is_made_up_for_by_the_notice(system, at):
    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    job_id = create(system)
    [record] = system.receive()
    # The claim is the first update.
    at("before InvokeEndpointAsync", lambda: at("before UpdateItem", die))
    with pytest.raises(Killed):
        system.work(record)
    [notice] = heard(system)
    assert not system.collect(notice)
    system.clock.advance(LEASE)
    assert system.collect(notice)
    assert system.job(job_id)["status"] == "succeeded"
    assert calls(system) == {7: 1}
    assert_settled(system, charged=PRICE)


def test_a_notice_of_an_earlier_call_brings_its_picture(system):
    """The answer to the call was lost, so that the worker asked again; the first call ended all the same."""
    system.sagemaker.behave("cut")
    job_id = create(system)
    [record] = system.receive()
    assert not system.work(record)
    [earlier] = heard(system)
    system.container.next.append("hang")
    assert system.work(record)
    assert system.job(job_id)["status"] == "processing"
    assert system.collect(earlier)
    assert system.job(job_id)["status"] == "succeeded"
    let_go(system)
    assert_settled(system, charged=PRICE)
    assert_over(system, job_id)
    assert calls(system) == {7: 2}


def test_the_failure_of_an_earlier_call_counts_for_nothing(system):
    system.sagemaker.behave("cut")
    system.container.next.extend([400, "hang"])
    job_id = create(system)
    [record] = system.receive()
    assert not system.work(record)
    [earlier] = heard(system)
    assert system.work(record)
    assert system.collect(earlier)
    assert system.job(job_id)["status"] == "processing"
    let_go(system)
    assert system.hear() == 1
    assert system.job(job_id)["status"] == "succeeded"
    assert calls(system) == {7: 2}


# Failures


@pytest.mark.parametrize("behaviour", ["500", "timeout", "expired", "refused", "cut"])
def test_a_failed_call_is_made_again(system, behaviour):
    system.sagemaker.behave(behaviour)
    job_id = create(system)
    assert run_out(system, job_id) == 1
    assert system.job(job_id)["status"] == "succeeded"
    assert_settled(system, charged=PRICE)
    assert_over(system, job_id)


@pytest.mark.parametrize("behaviour", ["500", "timeout", "expired"])
def test_three_failed_calls_are_the_end(system, told, behaviour):
    system.sagemaker.behave(behaviour, 5)
    job_id = create(system)
    run_out(system, job_id)
    job = system.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "backend_failed")
    assert outcomes(job) == ["failed"]
    assert told == [2, 4]
    assert len(system.sagemaker.invocations) == 3
    assert job["credits"]["released"] == PRICE
    assert_settled(system, charged=0)
    assert_over(system, job_id)


def test_a_lost_notice_of_a_failure_is_made_up_for_as_well(system):
    system.sagemaker.behave("500")
    system.sagemaker.treat_notices("drop")
    job_id = started(system)
    assert heard(system) == []
    system.clock.advance(61)
    assert system.sweep() == {"resent": 1}
    assert run_out(system, job_id) == 1
    assert system.job(job_id)["status"] == "succeeded"
    assert_settled(system, charged=PRICE)


@pytest.mark.parametrize("samples", [1, 4])
def test_what_the_endpoint_refuses_is_not_asked_for_again(system, samples):
    system.container.next.extend([400] * samples)
    job_id = started(system, samples=samples)
    system.hear()
    job = system.job(job_id)
    assert job["status"] == "failed"
    assert job["error"] == {"code": "backend_refused", "detail": "The SageMaker endpoint answered 400"}
    assert sum(calls(system).values()) == samples
    assert_settled(system, charged=0)
    assert_over(system, job_id)


def test_what_the_endpoint_refuses_is_not_asked_for_again_though_the_notice_is_lost(system):
    system.container.next.append(400)
    system.sagemaker.treat_notices("drop")
    job_id = started(system)
    system.settle()
    system.clock.advance(61)
    assert system.sweep() == {"resent": 1}
    assert system.deliver() == 1
    job = system.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "backend_refused")
    assert calls(system) == {7: 1}


def test_a_busy_endpoint_is_waited_for_however_often(system, told):
    system.sagemaker.behave("503", 5)
    job_id = create(system)
    run_out(system, job_id)
    assert told == [10] * 5
    assert system.job(job_id)["status"] == "succeeded"
    assert_settled(system, charged=PRICE)


def test_only_the_sample_that_failed_is_asked_for_again(system):
    system.container.next.append(500)
    job_id = create(system, samples=4)
    run_out(system, job_id)
    job = system.job(job_id)
    assert outcomes(job) == ["succeeded"] * 4
    assert sorted(calls(system).values()) == [1, 1, 1, 2]
    assert_settled(system, charged=4 * PRICE)
    assert_over(system, job_id)


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_each_sample_has_attempts_of_its_own(system, samples):
    """Every sample fails once, and each notice comes by itself."""
    system.sagemaker.behave("expired", samples)
    job_id = create(system, samples=samples)
    run_out(system, job_id)
    job = system.job(job_id)
    assert (job["status"], outcomes(job)) == ("succeeded", ["succeeded"] * samples)
    assert len(system.sagemaker.invocations) == 2 * samples
    assert_settled(system, charged=samples * PRICE)


def test_a_sample_that_failed_does_not_come_again_with_the_notice_of_another(system):
    system.container.next.append(500)
    started(system, samples=2)
    failed, other = sorted(heard(system), key=lambda record: "Completed" in record["body"])
    assert not system.collect(failed)
    assert system.collect(other)
    assert sum(calls(system).values()) == 2
    assert system.collect(failed)
    system.settle()
    assert sum(calls(system).values()) == 3


def test_trouble_with_reading_answers_is_no_failure_of_a_sample(system, at):
    system.sagemaker.behave("expired")
    job_id = started(system, samples=2)

    expired, answered = sorted(heard(system), key=lambda record: "Completed" in record["body"])
    for _ in range(4):
        at("before GetObject", fail)
        assert not system.collect(answered)
    assert not system.collect(expired)
    assert system.collect(expired)
    run_out(system, job_id)
    assert outcomes(system.job(job_id)) == ["succeeded"] * 2


def test_one_sample_that_fails_for_good_leaves_the_others(system):
    system.container.next.append(400)
    job_id = started(system, samples=3)
    system.hear()
    job = system.job(job_id)
    assert (job["status"], job["error"]) == ("succeeded", None)
    assert sorted(outcomes(job)) == ["failed", "succeeded", "succeeded"]
    assert (job["credits"]["charged"], job["credits"]["released"]) == (2 * PRICE, PRICE)
    assert_settled(system, charged=2 * PRICE)
    assert_over(system, job_id)


def test_a_flagged_picture_is_blocked_and_not_paid_for(system):
    system.container.next.append("flagged")
    job_id = started(system)
    system.hear()
    job = system.job(job_id)
    assert (job["status"], job["error"]["code"], outcomes(job)) == ("failed", "output_blocked", ["blocked"])
    assert system.objects("results") == []
    assert_settled(system, charged=0)
    assert_over(system, job_id)


def test_a_flagged_picture_among_others_costs_only_itself(system):
    system.container.next.append("flagged")
    job_id = started(system, samples=3)
    system.hear()
    job = system.job(job_id)
    assert (job["status"], sorted(outcomes(job))) == ("succeeded", ["blocked", "succeeded", "succeeded"])
    assert job["credits"]["charged"] == 2 * PRICE
    assert_settled(system, charged=2 * PRICE)


@pytest.mark.parametrize("answer", [b"", b"no JSON", b"[]", b'{"image": "bm90IGFuIGltYWdl"}', b'{"image": null}'])
def test_an_answer_that_is_no_picture_fails_the_job(system, answer):
    job_id = started(system)
    [notice] = heard(system)
    [key] = [key for key in system.objects("uploads") if key.startswith("answers/")]
    system.s3.put_object(Bucket="uploads", Key=key, Body=answer)
    assert system.collect(notice)
    job = system.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "backend_broken")
    assert calls(system) == {7: 1}
    assert_settled(system, charged=0)


def test_an_answer_that_s3_does_not_give_yet_is_fetched_when_the_notice_comes_again(system, at):
    job_id = started(system)
    [notice] = heard(system)

    at("before GetObject", fail)
    assert not system.collect(notice)
    assert system.job(job_id)["status"] == "processing"
    assert system.collect(notice)
    assert system.job(job_id)["status"] == "succeeded"
    assert calls(system) == {7: 1}


@pytest.mark.parametrize("failures", [1, 2])
def test_a_picture_that_s3_does_not_take_is_not_made_again(system, at, failures):
    job_id = started(system)
    [notice] = heard(system)

    for _ in range(failures):
        at("before PutObject", fail)
        assert not system.collect(notice)
    assert system.collect(notice)
    assert system.job(job_id)["status"] == "succeeded"
    assert calls(system) == {7: 1}
    assert_settled(system, charged=PRICE)


# A cold endpoint


def test_a_job_says_why_it_waits(system):
    system.container.next.append("hang")
    system.sagemaker.chill(3600)
    job_id = started(system)
    starting = system.job(job_id)
    assert starting["status"] == "processing"
    assert starting["status_detail"]["code"] == "endpoint_starting"
    assert "is starting" in starting["status_detail"]["detail"]
    [listed] = system.api("GET", "/jobs").json["jobs"]
    assert listed["status_detail"] == starting["status_detail"]
    system.sagemaker.release()
    system.container.wait_for(1)
    system.clock.advance(61)
    assert system.sweep() == {"resent": 1}
    assert system.deliver() == 1
    assert system.job(job_id)["status_detail"] == BUSY
    let_go(system)
    assert system.hear() == 1
    ended = system.job(job_id)
    assert (ended["status"], ended["status_detail"]) == ("succeeded", None)


def test_a_queued_job_waits_for_nothing_of_the_endpoints(system):
    job_id = create(system)
    queued = system.job(job_id)
    assert (queued["status"], queued["status_detail"]) == ("queued", None)


# Canceled, deleted, too late


@pytest.mark.parametrize("samples", [1, 2])
def test_a_job_that_is_canceled_while_the_endpoint_works_leaves_nothing(system, samples):
    system.container.next.append("hang")
    job_id = started(system, samples=samples)
    if samples == 2:
        assert system.sagemaker.wait_for(lambda: system.sagemaker.notices == 1)
        assert sum(map(system.collect, system.receive("results"))) == 1
        assert len(system.objects("results")) == 1
    canceled = system.api("POST", f"/jobs/{job_id}/cancel").json
    assert (canceled["status"], canceled["status_detail"]) == ("canceled", None)
    assert canceled["credits"]["released"] == samples * PRICE
    let_go(system)
    assert system.hear() == 1
    assert system.objects("results") == []
    assert_settled(system, charged=0)
    assert_over(system, job_id)


def test_a_job_that_is_deleted_while_the_endpoint_works_leaves_nothing(system):
    system.container.next.append("hang")
    job_id = started(system)
    assert system.api("DELETE", f"/jobs/{job_id}").status == 204
    let_go(system)
    assert system.hear() == 1
    assert system.api("GET", f"/jobs/{job_id}").status == 404
    assert system.objects("results") == []
    assert_settled(system, charged=0)
    assert_over(system, job_id)


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_a_job_that_goes_while_its_picture_is_stored_leaves_nothing(system, at, how):
    job_id = started(system)
    [notice] = heard(system)

    def go() -> None:
        if how == "cancel":
            system.services.jobs.cancel("default", job_id)
        else:
            assert system.api("DELETE", f"/jobs/{job_id}").status == 204

    at("after PutObject", go)
    assert system.collect(notice)
    assert system.objects("results") == []
    assert_settled(system, charged=0)


def test_a_job_past_its_deadline_fails_though_the_endpoint_still_works(system):
    system.container.next.append("hang")
    job_id = started(system)
    system.clock.advance(DEADLINE)
    assert system.sweep() == {"resent": 1}
    assert system.deliver() == 1
    job = system.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "deadline_exceeded")
    assert job["status_detail"] is None
    assert_settled(system, charged=0)
    let_go(system)
    assert_over(system, job_id)
    assert system.objects("results") == []


def test_a_job_whose_messages_are_all_lost_fails_in_the_end(system):
    system.sagemaker.behave("lost")
    job_id = started(system)
    system.clock.advance(DEADLINE + LEASE)
    assert system.sweep() == {"failed": 1}
    assert system.job(job_id)["error"]["code"] == "deadline_exceeded"
    assert_settled(system, charged=0)
    assert_over(system, job_id)


def test_what_was_delivered_before_the_deadline_is_kept(system):
    system.sagemaker.behave("lost")
    job_id = started(system, samples=3)
    assert system.hear() == 2
    system.clock.advance(DEADLINE)
    system.sweep()
    system.deliver()
    job = system.job(job_id)
    assert (job["status"], sorted(outcomes(job))) == ("succeeded", ["failed", "succeeded", "succeeded"])
    failed = next(output for output in job["outputs"] if output["status"] == "failed")
    assert failed["error"]["code"] == "deadline_exceeded"
    assert_settled(system, charged=2 * PRICE)
    assert_over(system, job_id)


def test_a_picture_that_lies_there_at_the_deadline_counts(system):
    system.sagemaker.treat_notices("drop")
    job_id = started(system)
    system.settle()
    system.clock.advance(DEADLINE)
    assert system.sweep() == {"resent": 1}
    assert system.deliver() == 1
    assert system.job(job_id)["status"] == "succeeded"
    assert_settled(system, charged=PRICE)


# Another backend while samples are on their way


def test_a_job_is_made_by_segmind_once_the_endpoint_is_taken_out_of_service(system, monkeypatch):
    system.sagemaker.behave("lost", 2)
    job_id = started(system, samples=2)
    system.redeploy(monkeypatch, BACKEND="segmind", PRICE_BASE="3000")
    system.clock.advance(61)
    assert system.sweep() == {"resent": 1}
    assert system.deliver() == 1
    job = system.job(job_id)
    assert (job["status"], job["backend"], job["backend_reason"]) == ("succeeded", "segmind", None)
    assert job["credits"]["charged"] == 2 * PRICE
    assert system.segmind.summary()["calls_by_seed"] == {"7": 1, "8": 1}
    assert_settled(system, charged=2 * PRICE)


def test_what_the_endpoint_made_before_it_was_taken_out_of_service_is_not_made_again(system, monkeypatch):
    job_id = started(system)
    system.redeploy(monkeypatch, BACKEND="segmind")
    assert system.hear() == 1
    job = system.job(job_id)
    assert (job["status"], job["backend"]) == ("succeeded", "sagemaker")
    assert system.segmind.calls == []
    assert_settled(system, charged=PRICE)


def replace_endpoint(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put another endpoint in place of the one there is."""
    name = "another-endpoint"
    system.sagemaker.endpoint = replace(system.sagemaker.endpoint, name=name)
    system.redeploy(monkeypatch, SAGEMAKER_ENDPOINT=name)
    system.clock.advance(61)
    assert system.sweep() == {"resent": 1}


def test_what_an_endpoint_took_along_when_it_was_replaced_is_asked_for_again(system, monkeypatch):
    system.sagemaker.behave("lost", 2)
    job_id = started(system, samples=2)
    replace_endpoint(system, monkeypatch)
    run_out(system, job_id)
    assert outcomes(system.job(job_id)) == ["succeeded"] * 2
    assert len(system.sagemaker.invocations) == 4
    assert_settled(system, charged=2 * PRICE)


def test_what_an_endpoint_had_done_when_it_was_replaced_is_not_asked_for_again(system, monkeypatch):
    system.sagemaker.treat_notices("drop")
    job_id = started(system)
    system.settle()
    replace_endpoint(system, monkeypatch)
    run_out(system, job_id)
    assert system.job(job_id)["status"] == "succeeded"
    assert calls(system) == {7: 1}


# What is no notice


GARBAGE = [
    "",
    "no JSON",
    "[]",
    "{}",
    "null",
    '{"Message": 7}',
    '{"Message": "no JSON"}',
    '{"Message": "{}"}',
    json.dumps({"Message": json.dumps({"requestParameters": {"inputLocation": "s3://uploads/requests/x/0.json"}})}),
    json.dumps({"Service": "Amazon S3", "Event": "s3:TestEvent"}),
]


@pytest.mark.parametrize("body", GARBAGE)
def test_what_is_no_notice_goes_back_and_harms_nothing(system, told, body):
    job_id = started(system)
    [notice] = heard(system)
    before = system.item(job_id)
    garbage = {**notice, "body": body}
    event = {"Records": [garbage]}
    failed = {"batchItemFailures": [{"itemIdentifier": notice["messageId"]}]}
    for receives in (1, 2, 3):
        garbage["attributes"] = {"ApproximateReceiveCount": str(receives)}
        assert function("collect").handler(event, Context(60)) == failed
    assert told == [5, 20, 80]
    assert system.item(job_id) == before
    assert system.messages("results") == 1
    assert system.collect(notice)
    assert system.job(job_id)["status"] == "succeeded"


def test_one_bad_record_of_a_batch_keeps_no_other_back(system):
    job_id = started(system)
    [notice] = heard(system)
    bad = {**notice, "messageId": "bad", "body": "no JSON"}
    answer = function("collect").handler({"Records": [bad, notice]}, Context(60))
    assert answer == {"batchItemFailures": [{"itemIdentifier": "bad"}]}
    assert system.job(job_id)["status"] == "succeeded"


@pytest.mark.parametrize(
    "location",
    [
        "s3://uploads/requests/default/01ARZ3NDEKTSV4RRFFQ69G5FAV/1/0.json",
        "s3://uploads/requests/nobody/01ARZ3NDEKTSV4RRFFQ69G5FAV/1/0.json",
    ],
)
def test_a_notice_of_no_job_is_done_with(system, location):
    job_id = started(system)
    [notice] = heard(system)
    before = system.item(job_id)
    parameters = {"inputLocation": location, "endpointName": "e", "contentType": "application/json"}
    assert system.collect(rewritten(notice, requestParameters=parameters))
    assert system.item(job_id) == before
    assert system.objects("results") == []


def test_a_notice_of_a_sample_that_the_job_does_not_have_changes_nothing(system):
    system.sagemaker.behave("lost")
    job_id = started(system)
    other = started(system, seed=90)
    [notice] = heard(system)
    asked = system.sagemaker.invocations[0].input
    parameters = {"inputLocation": f"{asked.rpartition('/')[0]}/3.json"}
    assert system.collect(rewritten(notice, requestParameters=parameters))
    job = system.job(job_id)
    assert (job["status"], system.objects("results")) == ("processing", [])
    assert system.job(other)["status"] == "processing"


def test_a_failure_needs_no_reason(system):
    system.sagemaker.behave("500")
    job_id = started(system)
    [notice] = heard(system)
    assert not system.collect(rewritten(notice, failureReason=None, responseParameters=None))
    assert system.collect(notice)
    assert system.hear() == 1
    assert system.job(job_id)["status"] == "succeeded"


# Logs


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the functions log."""
    for name in ("api", "worker", "collect", "sweep"):
        function(name)
    written = io.StringIO()
    [handler] = logging.getLogger("img2img").handlers
    before = handler.setStream(written)
    yield written
    handler.setStream(before)


def test_no_prompt_and_no_picture_is_logged_or_shown(system, lines):
    """Not even when the container's own error quotes the request."""
    system.container.next.append(500)
    words = {"prompt": PROMPT, "negative_prompt": NEGATIVE}
    job_id = started(system, **words)
    [notice] = heard(system)
    assert not system.collect({**notice, "body": f"{PROMPT}, no JSON"})
    quoting = rewritten(notice, failureReason=f'Received server error (500) from primary with message "{PROMPT}"')
    assert not system.collect(quoting)
    assert system.collect(quoting)
    run_out(system, job_id)
    refused = started(system, seed=9, **words)
    [notice] = heard(system)
    text = f'Received client error (400) from primary with message "{PROMPT} {encoded()}"'
    assert system.collect(rewritten(notice, invocationStatus="Failed", failureReason=text, responseParameters=None))
    shown = json.dumps([system.job(job_id)["error"], system.job(refused)["error"], system.job(refused)["outputs"]])
    logged = lines.getvalue()
    records = [json.loads(line) for line in logged.splitlines()]
    assert {"job waits", "job ended", "unexpected"} <= {record["message"] for record in records}
    for word in ("quagga", "vermilion", "wobbegong", encoded()[:40]):
        assert word not in logged
        assert word not in shown


def test_a_log_line_tells_which_job_and_request_it_is_about(system, lines):
    job_id = started(system)
    system.hear()
    [ended] = [json.loads(line) for line in lines.getvalue().splitlines() if '"job ended"' in line]
    assert (ended["job_id"], ended["team"], ended["backend"]) == (job_id, "default", "sagemaker")
    assert ended["correlation_id"] == system.item(job_id)["correlation_id"]["S"]


# In real time


def test_an_endpoint_in_real_time_answers_the_worker(realtime):
    job_id = started(realtime, samples=4)
    job = realtime.job(job_id)
    assert (job["status"], outcomes(job)) == ("succeeded", ["succeeded"] * 4)
    assert (job["backend"], job["status_detail"], job["metrics"]["backend_ms"]) == ("sagemaker", None, 20)
    assert realtime.objects("uploads") == [f"inputs/default/{job_id}.png"]
    assert_settled(realtime, charged=4 * PRICE)
    assert_over(realtime, job_id)


def test_a_busy_endpoint_in_real_time_is_waited_for_however_often(realtime, told):
    realtime.container.next.extend([503] * 5)
    job_id = create(realtime)
    assert run_out(realtime, job_id) == 5
    assert told == [10] * 5
    assert realtime.job(job_id)["status"] == "succeeded"
    assert_settled(realtime, charged=PRICE)


@pytest.mark.parametrize("behaviour", ["500", "timeout", "refused", "cut"])
def test_a_failed_call_in_real_time_is_made_again(realtime, told, behaviour):
    realtime.sagemaker.behave(behaviour)
    job_id = create(realtime)
    assert run_out(realtime, job_id) == 1
    assert told == [2]
    assert realtime.job(job_id)["status"] == "succeeded"
    assert_settled(realtime, charged=PRICE)


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [("500", "backend_failed"), ("timeout", "backend_failed"), ("refused", "backend_failed"), ("cut", None)],
)
def test_three_failed_calls_in_real_time_are_the_end(realtime, behaviour, code):
    realtime.sagemaker.behave(behaviour, 5)
    job_id = create(realtime)
    assert run_out(realtime, job_id) == 2
    job = realtime.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", code or "backend_unreachable")
    assert realtime.sagemaker.summary()["behaviours"] == [behaviour] * 2
    assert_settled(realtime, charged=0)


def test_what_the_endpoint_refuses_in_real_time_is_the_end(realtime):
    realtime.container.next.append(400)
    job_id = started(realtime)
    assert realtime.job(job_id)["error"]["code"] == "backend_refused"
    assert len(realtime.container.requests) == 1
    assert_settled(realtime, charged=0)


def test_a_flagged_picture_in_real_time_is_blocked(realtime):
    realtime.container.next.append("flagged")
    job_id = started(realtime)
    assert outcomes(realtime.job(job_id)) == ["blocked"]
    assert_settled(realtime, charged=0)


def test_an_endpoint_that_is_not_there_is_unreachable(realtime):
    realtime.services.settings = replace(realtime.services.settings, sagemaker_endpoint="another")
    job_id = create(realtime)
    run_out(realtime, job_id)
    assert realtime.job(job_id)["error"]["code"] == "backend_unreachable"
    assert_settled(realtime, charged=0)
