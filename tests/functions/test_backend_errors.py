"""What becomes of a job when Segmind refuses, fails, hangs or answers nonsense, and how often it is asked."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import boto3
import pytest
from botocore.exceptions import EndpointConnectionError
from PIL import Image

from img2img.errors import recorded_error
from local.http_server import Handler, LoopbackServer
from tests.system import SEGMIND_KEY, System

ROTATED = "SG_fedcba9876543210"


@cache
def picture() -> str:
    """Return a small picture as a request carries it: Segmind's answers are what counts here."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def create(system: System, **fields: Any) -> str:
    """Create a job that nobody waits for, and return its id."""
    created = system.create(**{"image": picture(), "seed": 7, **fields})
    assert created.status == 202, created.content
    return str(created.json["id"])


def run(system: System, times: int = 10) -> int:
    """Hand the one message to the worker, as often as it comes back; return how often it was handed over."""
    [record] = system.receive()
    for count in range(1, times + 1):
        if system.work(record):
            return count
    return times


def waited_for(system: System, **fields: Any) -> Any:
    """Create a job and wait for it, while a worker looks after the queue."""
    undone: list[dict[str, Any]] = []

    def meanwhile(seconds: float) -> None:
        system.clock.advance(seconds)
        undone.extend(system.receive())
        undone[:] = [record for record in undone if not system.work(record)]

    system.services.sleep = meanwhile
    return system.create(wait=25, **{"image": picture(), "seed": 7, **fields})


class Aws:
    """The AWS calls that the functions make; one that `refuse` holds for gets no answer."""

    def __init__(self) -> None:
        self.made: list[tuple[str, dict[str, Any]]] = []
        self.refused: list[str] = []

    def refuse(self, operation: str) -> None:
        """Have the next call of an operation fail."""
        self.refused.append(operation)

    def __call__(self, params: dict[str, Any], model: Any, **_: Any) -> None:
        self.made.append((model.name, params))
        if model.name in self.refused:
            self.refused.remove(model.name)
            raise EndpointConnectionError(endpoint_url="https://aws.example")

    @property
    def delays(self) -> list[int]:
        """The seconds after which messages were told to come back."""
        return [params["VisibilityTimeout"] for name, params in self.made if name == "ChangeMessageVisibility"]


@pytest.fixture
def aws(system) -> Iterator[Aws]:
    calls = Aws()
    # The functions make their clients, each with a copy of these events, when they first need them.
    events = boto3.DEFAULT_SESSION.events
    events.register("provide-client-params", calls)
    yield calls
    events.unregister("provide-client-params", calls)


def statuses(job: Any) -> Counter[str]:
    return Counter(output["status"] for output in job["outputs"])


# behaviour of the stand-in: (code, HTTP status of a waiting create, calls, what the detail says)
ENDS = {
    "400": ("backend_refused", 502, 1, "Segmind answered 400: Bad request: Invalid parameters"),
    "401": ("backend_unauthorized", 503, 1, "Segmind answered 401: Unauthorized: Invalid API key"),
    "403": ("backend_unauthorized", 503, 1, "Segmind answered 403: Forbidden: No access to this model"),
    "404": ("backend_refused", 502, 1, "Segmind answered 404: Not found: Model not found"),
    "405": ("backend_refused", 502, 1, "Segmind answered 405: 405 Method Not Allowed"),
    "406-credits": ("backend_out_of_credits", 503, 1, "Segmind answered 406: Insufficient credits"),
    "406-content-type": ("backend_refused", 502, 1, "Content type must be application/json"),
    "410": ("backend_gone", 503, 1, "Segmind answered 410: Gone: The model was retired"),
    "500": ("backend_failed", 502, 3, "Segmind answered 500: Internal server error"),
    "502": ("backend_failed", 502, 3, "Segmind answered 502: Bad gateway"),
    "503": ("backend_failed", 502, 3, "Segmind answered 503: Service unavailable"),
    "504": ("backend_gateway_timeout", 504, 3, "Segmind answered 504: Gateway timeout"),
    "hang": ("backend_timeout", 504, 1, "did not answer in time"),
    "cut": ("backend_broken", 502, 1, "broke off"),
    "cut-before": ("backend_broken", 502, 1, "broke off"),
    "html": ("backend_broken", 502, 1, "Segmind answered 200 with no image: Welcome"),
    "garbage": ("backend_broken", 502, 1, "no image"),
    "empty": ("backend_broken", 502, 1, "no image"),
    "black": ("output_blocked", 502, 1, "all-black picture"),
}


@pytest.mark.parametrize("behaviour", ENDS)
def test_how_a_job_ends_and_how_often_segmind_was_asked(system, behaviour):
    code, status, calls, detail = ENDS[behaviour]
    if behaviour == "hang":
        system.services.settings = replace(system.services.settings, segmind_timeout=0.3)
    system.segmind.behave(behaviour, 10)
    answer = waited_for(system)
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
    problem = answer.json
    assert (problem["code"], problem["status"], problem["title"]) == (code, status, recorded_error(code, "").title)
    assert detail in problem["detail"]
    assert answer.headers["location"] == f"https://api.example/v1/jobs/{problem['job_id']}"
    job = system.job(problem["job_id"])
    assert job["status"] == "failed"
    assert job["error"] == {"code": code, "detail": problem["detail"]}
    assert [output["status"] for output in job["outputs"]] == ["blocked" if behaviour == "black" else "failed"]
    assert job["outputs"][0]["error"]["code"] == code
    assert "url" not in job["outputs"][0]
    assert job["completed_at"]
    assert len(system.segmind.calls) == calls
    assert system.messages() == 0
    assert system.objects("results") == []


def test_no_failed_job_is_tried_again(system):
    system.segmind.behave("400")
    job_id = create(system)
    [record] = system.receive()
    assert system.work(record)
    ended = system.job(job_id)
    assert system.work(record)
    system.clock.advance(3600)
    assert system.sweep() == {}
    assert system.job(job_id) == ended
    assert len(system.segmind.calls) == 1


# Repeats


@pytest.mark.parametrize("behaviour", ["500", "502", "503", "504"])
def test_an_error_of_segminds_is_repeated_after_a_while(system, aws, behaviour):
    system.segmind.behave(behaviour)
    job_id = create(system)
    [record] = system.receive()
    assert not system.work(record)
    message = {"QueueUrl": system.queue_url, "ReceiptHandle": record["receiptHandle"]}
    assert aws.made[-1] == ("ChangeMessageVisibility", {**message, "VisibilityTimeout": 2})
    assert system.receive() == []
    waiting = system.job(job_id)
    assert (waiting["status"], waiting["error"], waiting["outputs"]) == ("queued", None, [])
    assert system.work(record)
    job = system.job(job_id)
    assert (job["status"], job["error"]) == ("succeeded", None)
    assert system.segmind.summary()["calls_by_seed"] == {"7": 2}
    assert system.messages() == 0


def test_each_repeat_waits_longer(system, aws):
    system.segmind.behave("500", 3)
    create(system)
    assert run(system) == 3
    assert aws.delays == [2, 4]


def test_a_repeat_that_would_come_after_the_deadline_is_none(system):
    now = system.clock()
    system.services.clock = lambda: now
    system.services.settings = replace(system.services.settings, job_deadline=2)
    system.segmind.behave("500", 5)
    job_id = create(system)
    assert run(system) == 1
    assert system.job(job_id)["error"]["code"] == "backend_failed"
    assert len(system.segmind.calls) == 1


def test_a_connection_that_was_never_made_is_repeated(system):
    system.segmind.stop()
    job_id = create(system)
    [record] = system.receive()
    assert not system.work(record)
    system.segmind.start()
    assert system.work(record)
    assert system.job(job_id)["status"] == "succeeded"
    assert len(system.segmind.calls) == 1


def test_a_backend_that_stays_away_is_unreachable(system):
    system.segmind.stop()
    answer = waited_for(system)
    assert (answer.status, answer.json["code"]) == (502, "backend_unreachable")
    assert "No connection to Segmind" in answer.json["detail"]
    assert system.messages() == 0


def test_a_kept_connection_that_the_other_side_has_closed_costs_nothing(system):
    create(system)
    run(system)
    system.segmind.stop()
    system.segmind.start()
    job_id = create(system)
    assert run(system) == 1
    assert system.job(job_id)["status"] == "succeeded"
    assert len(system.segmind.calls) == 2


def test_json_with_an_image_in_it_is_an_image(system):
    system.segmind.behave("json")
    job_id = create(system)
    run(system)
    [output] = system.job(job_id)["outputs"]
    assert (output["status"], output["content_type"], output["width"]) == ("succeeded", "image/jpeg", 512)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b'{"status": "ok"}'),
        ("application/json", b'{"image": ""}'),
        ("application/json", b'{"image": "no base64!"}'),
        ("application/json", b'{"image": "bm90IGFuIGltYWdl"}'),
        ("application/json", b"{broken"),
        ("text/plain", b"ok"),
        ("image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    ],
)
def test_a_200_without_an_image_may_have_been_billed_and_is_not_repeated(system, kind, body):
    calls = []

    class Wrong(Handler):
        def do_POST(self) -> None:
            calls.append(self.read_body(10_000_000))
            self.reply(200, [("Content-Type", kind)], body)

    server = LoopbackServer(Wrong)
    server.start()
    try:
        system.services.settings = replace(system.services.settings, segmind_base_url=f"http://{server.address}/v1")
        job_id = create(system)
        assert run(system) == 1
    finally:
        server.stop()
    assert system.job(job_id)["error"]["code"] == "backend_broken"
    assert len(calls) == 1


# Rate limits


def test_a_rate_limit_is_waited_for_until_its_reset(system, aws):
    system.segmind.reset_in = 40
    system.segmind.behave("429")
    job_id = create(system)
    [record] = system.receive()
    assert not system.work(record)
    [delay] = aws.delays
    assert 30 < delay <= 40
    assert system.job(job_id)["status"] == "queued"
    assert system.work(record)
    assert system.job(job_id)["status"] == "succeeded"


def test_rate_limits_are_no_attempts(system):
    for behaviour in ("429", "429", "500", "429", "429", "500", "429", "429"):
        system.segmind.behave(behaviour)
    job_id = create(system)
    assert run(system) == 9
    assert system.job(job_id)["status"] == "succeeded"


def test_errors_between_rate_limits_are_attempts(system):
    for behaviour in ("429", "500", "429", "500", "429", "500"):
        system.segmind.behave(behaviour)
    job_id = create(system)
    assert run(system) == 6
    assert system.job(job_id)["error"]["code"] == "backend_failed"
    assert len(system.segmind.calls) == 6


def test_a_rate_limit_that_outlasts_the_deadline_fails_the_job(system):
    system.services.settings = replace(system.services.settings, job_deadline=30)
    system.segmind.reset_in = 60
    system.segmind.behave("429")
    answer = waited_for(system)
    assert (answer.status, answer.json["code"]) == (503, "backend_rate_limited")
    assert answer.json["detail"] == "Segmind answered 429: Rate limit exceeded"
    assert system.job(answer.json["job_id"])["status"] == "failed"
    assert (len(system.segmind.calls), system.messages()) == (1, 0)


def test_a_sweep_leaves_a_rate_limited_job_to_its_message(system):
    system.segmind.reset_in = 100
    system.segmind.behave("429")
    create(system)
    [record] = system.receive()
    assert not system.work(record)
    system.clock.advance(100)
    assert system.sweep() == {}


# Several samples


def test_each_sample_ends_in_its_own_way(system):
    system.segmind.behave("black")
    system.segmind.behave("400")
    answer = waited_for(system, samples=3)
    assert answer.status == 200
    job = answer.json
    assert (job["status"], job["error"]) == ("succeeded", None)
    assert [output["index"] for output in job["outputs"]] == [0, 1, 2]
    assert [output["seed"] for output in job["outputs"]] == [7, 8, 9]
    by_status = {output["status"]: output for output in job["outputs"]}
    assert set(by_status) == {"blocked", "failed", "succeeded"}
    assert by_status["blocked"]["error"]["code"] == "output_blocked"
    assert by_status["failed"]["error"] == {
        "code": "backend_refused",
        "detail": "Segmind answered 400: Bad request: Invalid parameters",
    }
    assert "error" not in by_status["succeeded"]
    assert [("url" in by_status[name]) for name in ("blocked", "failed", "succeeded")] == [False, False, True]
    assert len(system.objects("results")) == 1
    assert len(system.segmind.calls) == 3
    for output in job["outputs"]:
        link = system.api("GET", f"/jobs/{job['id']}/outputs/{output['index']}")
        assert link.status == (302 if output is by_status["succeeded"] else 404)


def test_only_what_may_be_repeated_is_asked_for_again(system):
    for behaviour in ("400", "500", "black"):
        system.segmind.behave(behaviour)
    job_id = create(system, samples=4)
    [record] = system.receive()
    assert not system.work(record)
    assert len(system.segmind.calls) == 4
    assert len(system.objects("results")) == 1
    assert system.work(record)
    job = system.job(job_id)
    assert job["status"] == "succeeded"
    assert statuses(job) == {"succeeded": 2, "failed": 1, "blocked": 1}
    assert sorted(system.segmind.summary()["calls_by_seed"].values()) == [1, 1, 1, 2]
    assert len(system.objects("results")) == 2


def test_a_refused_sample_stays_refused_when_another_never_recovers(system):
    system.segmind.behave("400")
    system.segmind.behave("503", 3)
    job_id = create(system, samples=2)
    assert run(system) == 3
    job = system.job(job_id)
    assert job["status"] == "failed"
    assert {output["error"]["code"] for output in job["outputs"]} == {"backend_refused", "backend_failed"}
    assert sorted(system.segmind.summary()["calls_by_seed"].values()) == [1, 3]


def test_samples_that_ended_are_not_shown_before_the_job_ends(system):
    system.segmind.behave("500")
    job_id = create(system, samples=2)
    [record] = system.receive()
    assert not system.work(record)
    assert system.job(job_id)["outputs"] == []
    assert system.api("GET", f"/jobs/{job_id}/outputs/0").status == 404
    assert system.api("GET", f"/jobs/{job_id}/outputs/1").status == 404


def test_a_rate_limited_sample_and_a_failing_one_wait_for_the_later_of_both(system, aws):
    system.segmind.reset_in = 50
    system.segmind.behave("429")
    system.segmind.behave("500")
    job_id = create(system, samples=2)
    [record] = system.receive()
    assert not system.work(record)
    [delay] = aws.delays
    assert 40 < delay <= 50
    assert system.work(record)
    assert statuses(system.job(job_id)) == {"succeeded": 2}
    assert len(system.segmind.calls) == 4


def test_the_deadline_keeps_the_pictures_that_were_delivered(system):
    system.segmind.behave("429")
    job_id = create(system, samples=2)
    [record] = system.receive()
    assert not system.work(record)
    system.clock.advance(1800)
    assert system.work(record)
    job = system.job(job_id)
    assert job["status"] == "succeeded"
    assert statuses(job) == {"succeeded": 1, "failed": 1}
    [late] = [output for output in job["outputs"] if output["status"] == "failed"]
    assert late["error"]["code"] == "deadline_exceeded"
    assert len(system.segmind.calls) == 2


# The key


def test_a_key_rotated_while_the_worker_is_warm_costs_no_job(system):
    first = create(system)
    run(system)
    system.secrets.put_secret_value(SecretId="segmind", SecretString=ROTATED)
    system.segmind.rotate(ROTATED)
    second = create(system)
    assert run(system) == 1
    third = create(system)
    assert run(system) == 1
    assert [system.job(job_id)["status"] for job_id in (first, second, third)] == ["succeeded"] * 3
    # Once with the old key, once with the new one; after that the new one is known.
    assert [call["key_accepted"] for call in system.segmind.calls] == [True, False, True, True]
    assert system.segmind.billed == 3


def test_a_rotation_with_four_samples_in_flight_costs_at_most_one_call_each(system):
    create(system)
    run(system)
    system.secrets.put_secret_value(SecretId="segmind", SecretString=ROTATED)
    system.segmind.rotate(ROTATED)
    job_id = create(system, samples=4)
    assert run(system) == 1
    assert statuses(system.job(job_id)) == {"succeeded": 4}
    assert len(system.segmind.calls) <= 1 + 4 + 4
    assert system.segmind.billed == 5


def test_a_wrong_key_is_tried_at_most_twice(system):
    system.segmind.rotate(ROTATED)
    answer = waited_for(system)
    assert (answer.status, answer.json["code"]) == (503, "backend_unauthorized")
    assert 1 <= len(system.segmind.calls) <= 2
    assert SEGMIND_KEY not in json.dumps(system.job(answer.json["job_id"]))


def test_a_key_rotated_to_a_wrong_one_is_tried_exactly_twice(system):
    create(system)
    run(system)
    system.secrets.put_secret_value(SecretId="segmind", SecretString="SG_mistyped")
    system.segmind.rotate(ROTATED)
    job_id = create(system)
    assert run(system) == 1
    assert system.job(job_id)["error"]["code"] == "backend_unauthorized"
    assert len(system.segmind.calls) == 1 + 2


@pytest.mark.parametrize("secret", ["unset", "  unset\n", " "])
def test_a_key_that_was_never_set_is_not_tried(system, secret):
    system.secrets.put_secret_value(SecretId="segmind", SecretString=secret)
    answer = waited_for(system)
    assert (answer.status, answer.json["code"]) == (503, "backend_unauthorized")
    assert answer.json["detail"] == "The Segmind key is not set"
    assert system.segmind.calls == []


def test_the_first_key_counts_at_once(system):
    system.secrets.put_secret_value(SecretId="segmind", SecretString="unset")
    create(system)
    run(system)
    system.secrets.put_secret_value(SecretId="segmind", SecretString=SEGMIND_KEY)
    job_id = create(system)
    run(system)
    assert system.job(job_id)["status"] == "succeeded"


def test_a_key_that_cannot_be_read_for_a_moment_fails_no_job(system, aws):
    aws.refuse("GetSecretValue")
    job_id = create(system)
    assert run(system) == 2
    assert aws.refused == []
    assert system.job(job_id)["status"] == "succeeded"


def test_a_key_that_can_never_be_read_ends_the_job(system):
    system.secrets.delete_secret(SecretId="segmind", ForceDeleteWithoutRecovery=True)
    job_id = create(system)
    assert run(system) == 3
    job = system.job(job_id)
    assert job["status"] == "failed"
    assert job["error"]["code"].startswith("backend_")
    assert system.segmind.calls == []


# Crashes


def test_a_job_whose_worker_always_crashes_fails_of_that(system):
    job_id = create(system)
    for key in system.objects("uploads"):
        system.s3.delete_object(Bucket="uploads", Key=key)
    for _ in range(4):
        system.deliver()
        system.clock.advance(200)
        system.sweep()
    job = system.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "internal_error")
    assert system.segmind.calls == []


def test_a_picture_that_could_not_be_stored_is_made_again(system, aws):
    job_id = create(system, samples=2)
    aws.refuse("PutObject")
    assert run(system) == 2
    assert system.job(job_id)["status"] == "succeeded"
    assert sorted(system.segmind.summary()["calls_by_seed"].values()) == [1, 2]


@pytest.mark.parametrize("operation", ["UpdateItem", "GetObject", "TransactWriteItems"])
def test_no_picture_is_made_twice_because_aws_failed_for_a_moment(system, aws, operation):
    job_id = create(system, samples=2)
    aws.refuse(operation)
    [record] = system.receive()
    assert not system.work(record)
    assert aws.delays == [5]
    system.work(record)
    system.clock.advance(200)
    system.sweep()
    system.deliver()
    assert system.job(job_id)["status"] == "succeeded"
    assert system.segmind.summary()["calls_by_seed"] == {"7": 1, "8": 1}


# What is left of Segmind's account, and of the team's


def metrics(out: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return [line for line in lines if "_aws" in line]


def test_segminds_remaining_credits_become_a_metric_and_are_no_callers_business(system, capsys):
    system.segmind.credits = 50.0
    answer = waited_for(system, samples=2)
    assert answer.headers["x-remaining-credits"] == "999998"
    assert b"49.99" not in answer.content
    [found] = [line for line in metrics(capsys.readouterr().out) if "SegmindRemainingCredits" in line]
    assert found["SegmindRemainingCredits"] == [49.992]
    [directive] = found["_aws"]["CloudWatchMetrics"]
    assert directive["Namespace"] == "Img2Img"
    assert {"Name": "SegmindRemainingCredits", "Unit": "Count"} in directive["Metrics"]
    assert found["job_id"] == answer.json["id"]


@pytest.mark.parametrize(
    ("left", "shown"),
    [(12_500, "12.5"), (1_234_567_250, "1234567.25"), (1_000_000, "1000"), (1, "0.001"), (10, "0.01"), (0, "0")],
)
def test_the_remaining_credits_are_the_teams_balance_as_a_plain_number(system, left, shown):
    price, balance = 1000, system.books().balance
    system.services.credits.add("default", left + price - balance)
    answer = waited_for(system)
    assert answer.status == 200
    assert answer.headers["x-remaining-credits"] == shown
    assert system.books().balance == left


def test_the_remaining_credits_of_a_failed_job_are_what_they_were(system):
    system.segmind.behave("400")
    answer = waited_for(system)
    assert (answer.status, answer.headers["x-remaining-credits"]) == (502, "1000000")


def test_a_sample_that_failed_or_was_blocked_is_not_charged(system):
    for behaviour in ("400", "black"):
        system.segmind.behave(behaviour)
    answer = waited_for(system, samples=4)
    assert answer.status == 200
    assert answer.headers["x-remaining-credits"] == "999998"
    assert answer.json["credits"] == {"reserved": 4000, "charged": 2000, "released": 2000, "price_version": "1:1000"}
    assert system.books().charged == 2000


def test_the_remaining_credits_of_an_earlier_attempt_are_kept(system, capsys):
    system.segmind.credits = 50.0
    system.segmind.behave("500")
    job_id = create(system, samples=2)
    [record] = system.receive()
    assert not system.work(record)
    assert [
        line["SegmindRemainingCredits"] for line in metrics(capsys.readouterr().out) if "BackendRetries" in line
    ] == [[49.996]]
    assert system.work(record)
    assert system.job(job_id)["status"] == "succeeded"


def test_a_failure_is_counted_under_its_code(system, capsys):
    system.segmind.behave("406-credits")
    answer = waited_for(system)
    lines = metrics(capsys.readouterr().out)
    [failure] = [line for line in lines if "FailuresByCode" in line]
    assert (failure["code"], failure["FailuresByCode"]) == ("backend_out_of_credits", [1])
    assert failure["job_id"] == answer.json["job_id"]
    [ended] = [line for line in lines if "JobsFailed" in line]
    assert (ended["JobsFailed"], ended["JobsSucceeded"]) == ([1], [0])


def test_an_account_that_runs_dry_is_out_of_credits(system):
    system.segmind.credits = 0.004
    first = create(system)
    run(system)
    answer = waited_for(system)
    assert system.job(first)["status"] == "succeeded"
    assert (answer.status, answer.json["code"]) == (503, "backend_out_of_credits")
