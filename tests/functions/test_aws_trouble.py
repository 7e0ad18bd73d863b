"""AWS refuses a call: what has been made or paid for is not lost, and nobody is told to pay again."""

from __future__ import annotations

import json
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import EndpointConnectionError

from tests.system import Context, function, rest_event


@pytest.fixture
def refuse(system):
    """Return a function that has the next calls of an operation fail: with a status, or without an answer.

    `about` are bytes that a call's body holds, if only such calls are to fail.
    """
    left: dict[str, tuple[int, int | None, bytes]] = {}

    def handler(model: Any, params: Any, **_: Any) -> tuple[AWSResponse, Any] | None:
        times, status, about = left.get(model.name, (0, None, b""))
        if not times or (about and about not in params["body"]):
            return None
        left[model.name] = (times - 1, status, about)
        if status is None:
            raise EndpointConnectionError(endpoint_url="https://aws.example")
        error = {"Error": {"Code": "Refused", "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
        return AWSResponse("https://aws.example", status, {}, None), error

    def start(operation: str, times: int = 1, status: int | None = None, about: bytes = b"") -> None:
        left[operation] = (times, status, about)

    # The functions make their clients, each with a copy of these events, when they first need them.
    events = boto3.DEFAULT_SESSION.events
    events.register("before-call", handler)
    yield start
    events.unregister("before-call", handler)


def test_a_key_that_cannot_be_looked_up_lets_nobody_in_and_costs_nothing(system, refuse):
    refuse("GetItem")
    answer = system.create()
    assert (answer.status, answer.json["code"]) == (500, "internal_error")
    assert system.objects("uploads") == []
    assert system.messages() == 0
    assert system.books().reserved == 0
    assert system.create().status == 202


def test_a_watched_job_that_cannot_be_read_is_still_the_callers(system, refuse):
    system.api("GET", "/jobs")
    refuse("GetItem", times=100)
    answer = system.create(wait=1)
    assert answer.status == 202
    assert answer.headers["location"].endswith(answer.json["id"])


@pytest.mark.parametrize("ask", [{"headers": {"Accept": "image/*"}}, {"base64": True}])
def test_pictures_that_cannot_be_read_are_left_to_their_urls(system, refuse, ask):
    key = {"Idempotency-Key": "k"}
    fields = {"base64": True} if ask.get("base64") else {}
    system.create(headers=key, **fields)
    system.deliver()
    refuse("GetObject", times=10)
    answer = system.create(wait=5, headers={**key, **ask.get("headers", {})}, **fields)
    assert answer.status == 200
    assert answer.json["outputs"][0]["url"]
    assert "image" not in answer.json


def test_an_answer_goes_out_without_a_balance_that_cannot_be_read(system, refuse):
    key = {"Idempotency-Key": "k"}
    system.create(headers=key)
    system.deliver()
    refuse("GetItem", times=10, about=b'{"S": "TEAM"}')
    answer = system.create(wait=5, headers=key)
    assert (answer.status, answer.json["status"]) == (200, "succeeded")
    assert "x-remaining-credits" not in answer.headers


def test_an_input_that_cannot_be_read_is_read_again_without_waiting_for_the_lease(system, refuse):
    job_id = system.create().json["id"]
    refuse("GetObject")
    [record] = system.receive()
    assert not system.work(record)
    assert system.job(job_id)["status"] == "queued"
    assert system.work(record)
    assert system.job(job_id)["status"] == "succeeded"
    assert len(system.segmind.calls) == 1


def test_a_job_that_cannot_be_finished_is_finished_later_and_paid_once(system, refuse):
    job_id = system.create(samples=2).json["id"]
    refuse("TransactWriteItems")
    [record] = system.receive()
    assert not system.work(record)
    assert system.books().reserved == 2000
    assert system.work(record)
    assert system.job(job_id)["status"] == "succeeded"
    assert len(system.segmind.calls) == 2
    books = system.books()
    assert (books.reserved, books.charged) == (0, 2000)


def test_a_job_that_cannot_be_canceled_is_canceled_later_and_paid_for_once(system, refuse):
    job_id = system.create().json["id"]
    refuse("TransactWriteItems")
    assert system.api("POST", f"/jobs/{job_id}/cancel").status == 500
    assert (system.job(job_id)["status"], system.books().reserved) == ("queued", 1000)
    assert system.api("POST", f"/jobs/{job_id}/cancel").status == 200
    books = system.books()
    assert (books.reserved, books.charged) == (0, 0)


@pytest.mark.parametrize(("status", "calls"), [(503, 2), (None, 2), (403, 1)])
def test_only_a_passing_refusal_to_store_a_picture_makes_another(system, refuse, status, calls):
    job_id = system.create().json["id"]
    refuse("PutObject", status=status)
    [record] = system.receive()
    done = system.work(record)
    if not done:
        system.work(record)
    assert len(system.segmind.calls) == calls
    assert system.job(job_id)["status"] == ("succeeded" if calls == 2 else "failed")


def test_a_sweep_that_cannot_send_tries_again_a_minute_later(system, refuse):
    job_id = system.create().json["id"]
    for record in system.receive():
        system.sqs.delete_message(QueueUrl=system.queue_url, ReceiptHandle=record["receiptHandle"])
    for _ in range(17):
        system.clock.advance(60)
        refuse("SendMessage")
        with pytest.raises(RuntimeError):
            system.sweep()
    system.clock.advance(60)
    assert system.sweep() == {"resent": 1}
    system.deliver()
    assert system.job(job_id)["status"] == "succeeded"


def test_an_unreadable_item_hides_no_job_behind_it(system):
    ids = [system.create().json["id"] for _ in range(8)]
    for job_id in ids[:4]:
        system.dynamodb.update_item(
            TableName="jobs",
            Key={"pk": {"S": "TEAM#default"}, "sk": {"S": f"JOB#{job_id}"}},
            UpdateExpression="SET params = :p",
            ExpressionAttributeValues={":p": {"S": "{"}},
        )
    system.clock.advance(60)
    assert system.sweep() == {"resent": 4}


def test_a_canceled_jobs_partial_outputs_are_gone(system):
    system.segmind.behave("503")
    job_id = system.create(samples=2).json["id"]
    [record] = system.receive()
    assert not system.work(record)
    assert len(system.objects("results")) == 1
    canceled = system.api("POST", f"/jobs/{job_id}/cancel").json
    assert (canceled["status"], canceled["outputs"]) == ("canceled", [])
    assert (canceled["credits"]["charged"], canceled["credits"]["released"]) == (0, 2000)
    assert system.work(record)
    assert system.objects("results") == []
    assert system.api("GET", f"/jobs/{job_id}/outputs/0").status == 404
    books = system.books()
    assert (books.reserved, books.charged) == (0, 0)


def test_the_key_of_a_deleted_job_says_so(system):
    key = {"Idempotency-Key": "k"}
    job_id = system.create(headers=key).json["id"]
    system.api("DELETE", f"/jobs/{job_id}")
    answer = system.create(headers=key)
    assert (answer.status, answer.json["code"]) == (410, "gone")


def test_a_list_too_long_for_one_answer_goes_on_with_its_cursor(system):
    # Six bytes a character in JSON: 120 KB a job, 12 MB for all.
    ids = [system.create(prompt="é" * 10_000, negative_prompt="ü" * 10_000).json["id"] for _ in range(50)]
    event = rest_event("GET", "/jobs", query={"limit": "100"})
    seen: list[str] = []
    pages = 0
    while True:
        answer = function("api").handler(event, Context())
        assert len(json.dumps(answer)) < 6_000_000
        page = json.loads(answer["body"])
        seen += [job["id"] for job in page["jobs"]]
        pages += 1
        if not page["cursor"]:
            break
        event = rest_event("GET", "/jobs", query={"limit": "100", "cursor": page["cursor"]})
    assert seen == ids[::-1]
    assert pages > 1


def test_a_list_is_measured_as_lambda_sends_it(system):
    # A quote is two bytes in the body, and four in the function's own JSON around it.
    ids = [system.create(prompt='"' * 10_000, negative_prompt='"' * 10_000).json["id"] for _ in range(70)]
    answer = function("api").handler(rest_event("GET", "/jobs", query={"limit": "100"}), Context())
    assert len(json.dumps(answer)) < 6_000_000
    page = json.loads(answer["body"])
    assert page["cursor"] == page["jobs"][-1]["id"]
    assert [job["id"] for job in page["jobs"]] == ids[::-1][: len(page["jobs"])]
