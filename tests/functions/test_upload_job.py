"""Upload and forget: a job that is announced with its upload, paid for in advance, and started by the upload itself."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import replace
from typing import Any

import pytest

from tests.faults.calls import Killed
from tests.functions.interruptions import die, fail, picture
from tests.system import Answer, System, create_team

PRICE = 1000
JOB = {"prompt": "a castle on a hill", "seed": 7}
# The form's life, and what S3's notice may take.
PATIENCE = 900 + 600


@pytest.fixture
def ready(system, at) -> System:
    """A system after S3's test event; `at` before it makes its clients."""
    assert system.take_in() == 1
    return system


def announce(system: System, key: str | None = None, *, job: Any = None, **others: Any) -> Answer:
    headers = {} if key is None else {"Idempotency-Key": key}
    return system.api("POST", "/uploads", {"job": JOB if job is None else job, **others}, headers)


def announced(system: System, **fields: Any) -> Any:
    answer = announce(system, job={**JOB, **fields})
    assert answer.status == 201, answer.content
    return answer.json


def send(system: System, form: Any, data: bytes | None = None) -> Any:
    """Upload as the form says, and return the record of S3's notice."""
    body = picture() if data is None else data
    key = form["fields"]["key"]
    system.s3.put_object(Bucket="uploads", Key=key, Body=body, ContentType=form["fields"]["Content-Type"])
    [*_, record] = system.receive("uploads")
    return record


def jobs(system: System, **query: str) -> list[Any]:
    found: list[Any] = system.api("GET", "/jobs", query=query).json["jobs"]
    return found


def assert_books(system: System, *, reserved: int = 0, charged: int = 0) -> None:
    books = system.books()
    assert (books.reserved, books.charged) == (reserved, charged)


def state(system: System) -> Any:
    listed = [{name: job[name] for name in ("id", "status", "credits", "error")} for job in jobs(system)]
    return listed, system.books(), system.objects("uploads"), system.objects("results")


# Announced


def test_a_job_is_announced_with_a_form_and_its_price(ready):
    # The form lasts as long as its job waits, in whole seconds: none may begin between the two.
    now = time.time()
    ready.services.clock = lambda: now
    answer = announce(ready, content_type="image/png", job={**JOB, "samples": 2, "metadata": {"order": "17"}})
    assert answer.status == 201
    form, job = answer.json, answer.json["job"]
    assert (job["status"], job["metadata"], job["input"]["samples"]) == ("awaiting_upload", {"order": "17"}, 2)
    assert job["credits"]["reserved"] == 2 * PRICE
    assert answer.headers["location"] == job["urls"]["get"] == f"https://api.example/v1/jobs/{job['id']}"
    assert (form["method"], form["max_bytes"], form["expires_in"]) == ("POST", 25_000_000, 900)
    key = f"awaited/default/{job['id']}"
    policy = json.loads(base64.b64decode(form["fields"]["policy"]))["conditions"]
    assert form["fields"]["key"] == key
    for condition in ({"key": key}, {"Content-Type": "image/png"}, ["content-length-range", 1, 25_000_000]):
        assert condition in policy
    assert "id" not in form
    assert ready.job(job["id"]) == job
    assert [listed["id"] for listed in jobs(ready, status="awaiting_upload")] == [job["id"]]
    assert ready.messages() == 0
    assert ready.objects("uploads") == []
    assert_books(ready, reserved=2 * PRICE)


def test_the_upload_starts_the_job(ready):
    form = announced(ready, metadata={"order": "17"})
    ready.clock.advance(600)
    assert ready.ingest(send(ready, form))
    job_id = form["job"]["id"]
    assert ready.job(job_id)["status"] == "queued"
    assert ready.deliver() == 1
    job = ready.job(job_id)
    assert (job["status"], job["metadata"], job["input"]) == ("succeeded", {"order": "17"}, form["job"]["input"])
    assert job["source"]["key"] == form["fields"]["key"]
    assert ready.api("GET", f"/jobs/{job_id}/outputs/0").status == 302
    # Its results have URLs, and no place of their own.
    assert ready.objects("results") == [f"results/default/{job_id}/0.jpg"]
    assert [row["key"] for row in ready.api("GET", "/usage").json["rows"]] == ["key-of-the-test"]
    assert_books(ready, charged=PRICE)


def test_the_time_to_run_begins_with_the_upload(ready):
    form = announced(ready)
    ready.clock.advance(PATIENCE - 1)
    assert ready.ingest(send(ready, form))
    ready.clock.advance(1700)
    assert ready.sweep() == {"resent": 1}
    assert ready.deliver() == 2
    assert ready.job(form["job"]["id"])["status"] == "succeeded"


def test_a_preset_gives_the_defaults(ready):
    ready.services.presets.save("default", "art", {"prompt": "a watercolour", "samples": 2})
    job = announce(ready, job={"preset": "art", "strength": "0.5"}).json["job"]
    assert (job["input"]["prompt"], job["input"]["samples"], job["input"]["strength"]) == ("a watercolour", 2, 0.5)
    assert job["source"]["preset"] == "art"
    assert_books(ready, reserved=2 * PRICE)


@pytest.mark.parametrize(
    ("job", "fields"),
    [
        ({}, {"job.prompt"}),
        ({"prompt": None}, {"job.prompt"}),
        ({"prompt": "p", "samples": 9, "fit": "x"}, {"job.samples", "job.fit"}),
        ({"prompt": "p", "nonsense": 1}, {"job.nonsense"}),
        ({"prompt": "p", "preset": "oil"}, {"job.preset"}),
        ({"prompt": "p", "preset": "a/b"}, {"job.preset"}),
        ({"prompt": "p", "image": "https://example.com/a.png"}, {"job.image"}),
        ({"prompt": "p", "image": "x"}, {"job.image"}),
        ({"prompt": "p", "metadata": {"a": 1}}, {"job.metadata"}),
    ],
)
def test_what_is_wrong_with_the_job_is_named(ready, job, fields):
    refused = announce(ready, job=job)
    assert (refused.status, refused.json["code"]) == (400, "invalid_request")
    assert {error["field"] for error in refused.json["errors"]} == fields
    assert all(field in refused.json["detail"] for field in fields)
    assert jobs(ready) == []
    assert ready.books().entries == 1


@pytest.mark.parametrize("job", ["x", 5, [], True])
def test_a_job_that_is_no_object_is_refused(ready, job):
    refused = announce(ready, job=job)
    assert refused.status == 400
    assert [error["field"].partition(".")[0] for error in refused.json["errors"]] == ["job"]


def test_what_is_wrong_beside_the_job_is_named(ready):
    refused = announce(ready, content_type="text/plain", team="other")
    assert {error["field"] for error in refused.json["errors"]} == {"content_type", "team"}
    assert jobs(ready) == []


def test_a_team_that_cannot_pay_gets_no_form(ready):
    ready.services.credits.add("default", PRICE - 1 - ready.books().balance)
    refused = announce(ready)
    assert (refused.status, refused.json["code"]) == (402, "insufficient_credits")
    assert (refused.json["price"], refused.json["balance"]) == (PRICE, PRICE - 1)
    assert "fields" not in refused.json
    assert jobs(ready) == []
    ready.services.credits.add("default", 1)
    assert announce(ready).status == 201
    assert ready.books().balance == 0


def test_what_an_awaited_job_holds_cannot_be_spent_twice(ready):
    ready.services.credits.add("default", PRICE - ready.books().balance)
    form = announced(ready)
    assert announce(ready).status == ready.create().status == 402
    ready.ingest(send(ready, form))
    ready.deliver()
    assert ready.books().balance == 0
    assert_books(ready, charged=PRICE)


# Once for each key


def test_a_repeated_announcement_is_the_same_job(ready):
    first, again = announce(ready, "k"), announce(ready, "k")
    assert (first.status, again.status) == (201, 201)
    assert again.json["job"]["id"] == first.json["job"]["id"]
    assert again.json["fields"]["key"] == first.json["fields"]["key"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert len(jobs(ready)) == 1
    assert_books(ready, reserved=PRICE)
    assert ready.ingest(send(ready, again.json))
    ready.deliver()
    assert announce(ready, "k").json["job"]["status"] == "succeeded"
    assert_books(ready, charged=PRICE)


def test_a_key_with_another_payload_is_refused(ready):
    announce(ready, "k")
    for job in ({**JOB, "seed": 8}, {**JOB, "metadata": {"a": "b"}}):
        assert announce(ready, "k", job=job).status == 422
    body = {**JOB, "image": base64.b64encode(picture()).decode()}
    direct = ready.api("POST", "/sd1.5-img2img", body, {"Idempotency-Key": "k", "Prefer": "wait=0"})
    assert (direct.status, direct.json["code"]) == (422, "idempotency_key_reused")
    assert announce(ready, "k" * 256).status == 400
    assert_books(ready, reserved=PRICE)


def test_without_a_key_every_announcement_is_a_job(ready):
    assert announced(ready)["job"]["id"] != announced(ready)["job"]["id"]
    assert_books(ready, reserved=2 * PRICE)


@pytest.mark.parametrize("step", ["before TransactWriteItems", "after TransactWriteItems", "before UpdateItem"])
def test_a_crash_while_it_is_announced_makes_no_second_job(ready, at, step):
    at(step, die)
    with pytest.raises(Killed):
        announce(ready, "k")
    for item in ready.dynamodb.scan(TableName="idempotency")["Items"]:
        past = {"in_progress_expiration": {"N": str(int(time.time() * 1000) - 1000)}}
        ready.dynamodb.put_item(TableName="idempotency", Item={**item, **past})
    assert announce(ready, "k").status == 201
    assert len(jobs(ready)) == 1
    assert_books(ready, reserved=PRICE)


# Uploads and their notices


def test_a_repeated_notice_changes_nothing(ready):
    form = announced(ready)
    record = send(ready, form)
    for _ in range(3):
        assert ready.ingest(record)
    assert len(jobs(ready)) == 1
    ready.deliver()
    before = state(ready)
    for _ in range(2):
        assert ready.ingest(record)
        ready.deliver()
    assert state(ready) == before
    assert len(ready.segmind.calls) == 1
    assert_books(ready, charged=PRICE)


def test_of_two_uploads_before_the_first_notice_the_one_that_is_there_counts(ready):
    form = announced(ready)
    first = send(ready, form, picture(1))
    second = send(ready, form, picture(2))
    assert ready.ingest(first)
    assert ready.job(form["job"]["id"])["status"] == "awaiting_upload"
    assert ready.ingest(second)
    assert ready.ingest(first)
    ready.deliver()
    assert ready.job(form["job"]["id"])["status"] == "succeeded"
    assert len(ready.segmind.calls) == 1
    assert_books(ready, charged=PRICE)


@pytest.mark.parametrize("run", [True, False], ids=["ended", "queued"])
def test_a_second_upload_after_the_first_was_taken_changes_nothing(ready, run):
    form = announced(ready)
    ready.ingest(send(ready, form, picture(1)))
    [sent] = [key for key in ready.objects("uploads") if key.startswith("inputs/")]
    taken = ready.s3.get_object(Bucket="uploads", Key=sent)["Body"].read()
    if run:
        ready.deliver()
    assert ready.ingest(send(ready, form, picture(200)))
    assert ready.s3.get_object(Bucket="uploads", Key=sent)["Body"].read() == taken
    ready.deliver()
    assert len(jobs(ready)) == len(ready.segmind.calls) == 1
    assert_books(ready, charged=PRICE)


@pytest.mark.parametrize(("data", "code"), [(b"this is no image", "unsupported_image"), (b"", "unsupported_image")])
def test_an_upload_that_cannot_be_read_fails_the_job_and_costs_nothing(ready, data, code):
    form = announced(ready, samples=2)
    record = send(ready, form, data)
    assert ready.ingest(record)
    job = ready.job(form["job"]["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", code)
    assert job["credits"]["released"] == 2 * PRICE
    before = state(ready)
    assert ready.ingest(record)
    # A better one comes too late: the job has ended.
    assert ready.ingest(send(ready, form))
    assert state(ready) == before
    assert ready.messages() == 0
    assert ready.objects("results") == []
    assert_books(ready)


def test_an_upload_that_is_too_large_fails_the_job_whatever_the_form_said(ready):
    ready.services.settings = replace(ready.services.settings, max_image_bytes=100)
    form = announced(ready)
    assert ready.ingest(send(ready, form, picture() + b"x" * 100))
    job = ready.job(form["job"]["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "too_large")
    assert_books(ready)


def test_an_upload_that_was_deleted_again_starts_nothing(ready):
    form = announced(ready)
    record = send(ready, form)
    ready.s3.delete_object(Bucket="uploads", Key=form["fields"]["key"])
    assert ready.ingest(record)
    assert ready.job(form["job"]["id"])["status"] == "awaiting_upload"
    assert ready.ingest(send(ready, form))
    ready.deliver()
    assert_books(ready, charged=PRICE)


@pytest.mark.parametrize("operation", ["GetItem", "GetObject", "PutObject", "UpdateItem"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_between_any_two_steps_of_taking_it_in(ready, at, operation, moment):
    form = announced(ready)
    record = send(ready, form)
    at(f"{moment} {operation}", die)
    with pytest.raises(Killed):
        ready.ingest(record)
    assert ready.ingest(record)
    assert ready.deliver() == 1
    assert ready.job(form["job"]["id"])["status"] == "succeeded"
    assert_books(ready, charged=PRICE)


def test_a_start_that_could_not_be_sent_is_sent_by_the_sweep(ready, at):
    form = announced(ready)
    record = send(ready, form)
    at("before SendMessage", fail)
    assert ready.ingest(record)
    assert ready.messages() == 0
    ready.clock.advance(61)
    assert ready.sweep() == {"resent": 1}
    ready.deliver()
    assert_books(ready, charged=PRICE)


def test_a_place_in_the_name_of_a_job_that_never_was_starts_nothing(ready):
    form = announced(ready)
    create_team(ready.services, "other", "key-of-the-other")
    job_id = form["job"]["id"]
    never_was = job_id[:-1] + ("Y" if job_id.endswith("Z") else "Z")
    for key in (f"awaited/other/{job_id}", f"awaited/default/{never_was}", f"awaited/nobody/{job_id}"):
        assert ready.ingest(send(ready, {"fields": {**form["fields"], "key": key}}))
    assert ready.job(job_id)["status"] == "awaiting_upload"
    assert ready.messages("uploads") == ready.messages() == 0
    assert ready.books("other").entries == 1
    assert_books(ready, reserved=PRICE)


def test_a_job_that_does_not_wait_is_not_started_by_an_object_of_its_name(ready):
    job_id = ready.create(**JOB).json["id"]
    [before] = [key for key in ready.objects("uploads") if key.startswith("inputs/")]
    sent = ready.s3.get_object(Bucket="uploads", Key=before)["Body"].read()
    ready.ingest(send(ready, {"fields": {"key": f"awaited/default/{job_id}", "Content-Type": "image/png"}}))
    assert ready.s3.get_object(Bucket="uploads", Key=before)["Body"].read() == sent
    ready.deliver()
    assert len(ready.segmind.calls) == 1
    assert_books(ready, charged=PRICE)


# Nothing comes


def test_a_job_whose_upload_does_not_come_is_canceled_with_its_credits_back(ready):
    form = announced(ready)
    ready.clock.advance(PATIENCE - 2)
    assert ready.sweep() == {}
    ready.clock.advance(3)
    assert ready.sweep() == {"canceled": 1}
    job = ready.job(form["job"]["id"])
    assert (job["status"], job["error"]["code"]) == ("canceled", "upload_missing")
    assert (job["credits"]["charged"], job["credits"]["released"]) == (0, PRICE)
    assert ready.sweep() == {}
    [row] = ready.api("GET", "/usage").json["rows"]
    assert (row["jobs"], row["canceled"], row["charged"]) == (1, 1, 0)
    assert_books(ready)


def test_an_upload_after_that_starts_nothing(ready):
    form = announced(ready)
    ready.clock.advance(PATIENCE + 1)
    ready.sweep()
    before = state(ready)[:2]
    assert ready.ingest(send(ready, form))
    assert state(ready)[:2] == before
    assert ready.messages() == 0
    assert_books(ready)


def test_an_upload_that_came_is_not_missed_by_a_late_sweep(ready):
    form = announced(ready)
    record = send(ready, form)
    ready.clock.advance(PATIENCE + 1)
    assert ready.ingest(record)
    assert ready.sweep() == {}
    ready.deliver()
    assert ready.job(form["job"]["id"])["status"] == "succeeded"
    assert_books(ready, charged=PRICE)


def test_a_notice_in_the_middle_of_a_sweep_wins(ready, at):
    form = announced(ready)
    record = send(ready, form)
    ready.clock.advance(PATIENCE + 1)
    at("before TransactWriteItems", lambda: ready.ingest(record))
    assert ready.sweep() == {}
    assert ready.deliver() == 1
    assert ready.job(form["job"]["id"])["status"] == "succeeded"
    assert_books(ready, charged=PRICE)


@pytest.mark.parametrize("step", ["before GetObject", "before PutObject", "before UpdateItem"])
def test_a_sweep_in_the_middle_of_a_notice_wins(ready, at, step):
    form = announced(ready)
    record = send(ready, form)
    ready.clock.advance(PATIENCE + 1)
    swept: list[dict[str, int]] = []
    at(step, lambda: swept.append(ready.sweep()))
    assert ready.ingest(record)
    assert swept == [{"canceled": 1}]
    ready.deliver()
    assert ready.job(form["job"]["id"])["error"]["code"] == "upload_missing"
    assert ready.segmind.calls == []
    assert_books(ready)


def test_a_sweep_that_finds_the_upload_unreadable_at_the_same_time_settles_once(ready, at):
    form = announced(ready)
    record = send(ready, form, b"this is no image")
    ready.clock.advance(PATIENCE + 1)
    at("before TransactWriteItems", ready.sweep)
    assert ready.ingest(record)
    assert ready.job(form["job"]["id"])["status"] == "canceled"
    assert ready.books().entries == 3
    assert_books(ready)


# Canceled and deleted


def test_an_awaiting_job_can_be_canceled(ready):
    form = announced(ready)
    job_id = form["job"]["id"]
    canceled = ready.api("POST", f"/jobs/{job_id}/cancel").json
    assert (canceled["status"], canceled["error"]) == ("canceled", None)
    assert_books(ready)
    assert ready.ingest(send(ready, form))
    ready.clock.advance(PATIENCE + 1)
    assert ready.sweep() == {}
    assert ready.deliver() == 0
    assert ready.job(job_id)["status"] == "canceled"
    assert_books(ready)


@pytest.mark.parametrize("uploaded", [True, False])
def test_a_deleted_job_leaves_nothing_and_cannot_be_started(ready, uploaded):
    form = announced(ready)
    record = send(ready, form) if uploaded else None
    assert ready.api("DELETE", f"/jobs/{form['job']['id']}").status == 204
    assert ready.objects("uploads") == []
    assert ready.ingest(record or send(ready, form))
    assert (jobs(ready), ready.messages("uploads"), ready.messages()) == ([], 0, 0)
    assert_books(ready)


def test_a_deleted_job_takes_its_upload_with_it(ready):
    form = announced(ready)
    ready.ingest(send(ready, form))
    ready.deliver()
    assert form["fields"]["key"] in ready.objects("uploads")
    assert ready.api("DELETE", f"/jobs/{form['job']['id']}").status == 204
    assert ready.objects("uploads") == ready.objects("results") == []
    assert_books(ready, charged=PRICE)


def test_an_awaiting_job_of_a_team_that_was_disabled_is_settled_all_the_same(ready):
    form, other = announced(ready), announced(ready)
    ready.services.teams.enable("default", enabled=False)
    assert ready.ingest(send(ready, form))
    ready.deliver()
    ready.clock.advance(PATIENCE + 1)
    assert ready.sweep() == {"canceled": 1}
    ready.services.teams.enable("default", enabled=True)
    assert [ready.job(job["job"]["id"])["status"] for job in (form, other)] == ["succeeded", "canceled"]
    assert_books(ready, charged=PRICE)


def test_an_upload_without_a_job_is_as_it_was(ready):
    form = ready.api("POST", "/uploads", {"content_type": "image/png"})
    assert (form.status, form.json["fields"]["key"]) == (201, f"uploads/default/{form.json['id']}")
    assert "job" not in form.json
    ready.s3.put_object(Bucket="uploads", Key=form.json["fields"]["key"], Body=picture())
    assert ready.messages("uploads") == 0
    assert ready.create(image=form.json["id"]).status == 202
