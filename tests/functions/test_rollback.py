"""A newer version was rolled back: what it stored is shown as it is, and left alone until that version is back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from img2img.admin.audit import audit
from tests.functions.interruptions import picture
from tests.functions.jobs import create, encoded
from tests.system import System, running_system


def change(system: System, job_id: str, **attributes: Any) -> None:
    """Store a job as a newer version would: strings and, as JSON, what is kept so."""
    names = {f"#{name}": name for name in attributes}
    values = {
        f":{name}": {"S": value if isinstance(value, str) else json.dumps(value)} for name, value in attributes.items()
    }
    system.dynamodb.update_item(
        TableName="jobs",
        Key={"pk": {"S": "TEAM#default"}, "sk": {"S": f"JOB#{job_id}"}},
        UpdateExpression="SET " + ", ".join(f"#{name} = :{name}" for name in attributes),
        ExpressionAttributeNames=names,
        ExpressionAttributeValues=values,
    )


def added(system: System, job_id: str, name: str, **fields: Any) -> Any:
    """Return what is stored as JSON under a name, with more fields."""
    return json.loads(system.item(job_id)[name]["S"]) | fields


OUTPUT = {"index": 0, "status": "archived", "seed": 7, "shelf": "B4"}
CALL = {"0": {"backend": "vertex", "reason": "", "operation": "op-1"}}


def test_attributes_that_are_not_known_are_ignored(system):
    job_id = create(system, metadata={"order": "1"})
    change(system, job_id, priority="high", params=added(system, job_id, "params", clip_skip=2))
    assert "clip_skip" not in system.job(job_id)["input"]
    assert system.deliver() == 1
    done = system.job(job_id)
    assert (done["status"], done["metadata"]) == ("succeeded", {"order": "1"})
    outputs = json.loads(system.item(job_id)["outputs"]["S"])
    change(system, job_id, outputs=[{**outputs[0], "thumbnail": "t"}])
    assert system.job(job_id)["outputs"][0]["sha256"] == done["outputs"][0]["sha256"]


def test_values_that_are_not_known_are_shown_as_stored_in_a_job_and_in_the_list(system):
    job_id = create(system)
    change(system, job_id, status="paused", backend="vertex", waits_for="gpu_shortage", outputs=[OUTPUT], pending=CALL)
    shown = system.job(job_id)
    assert (shown["status"], shown["backend"]) == ("paused", "vertex")
    assert shown["status_detail"] == {"code": "gpu_shortage", "detail": ""}
    assert [(output["status"], output["seed"]) for output in shown["outputs"]] == [("archived", 7)]
    assert system.api("GET", "/jobs").json["jobs"] == [shown]
    assert system.api("GET", f"/jobs/{job_id}/outputs/0").status == 404


def unknown_status(system: System, job_id: str) -> None:
    change(system, job_id, status="paused")


def unknown_output(system: System, job_id: str) -> None:
    change(system, job_id, outputs=[OUTPUT])


def unknown_call(system: System, job_id: str) -> None:
    change(system, job_id, pending=CALL)


def unknown_backend(system: System, job_id: str) -> None:
    change(system, job_id, backend="vertex")


NEWER = [unknown_status, unknown_output, unknown_call, unknown_backend]


@pytest.fixture(params=NEWER, ids=lambda newer: newer.__name__)
def newer(request, system) -> str:
    """Return the id of a job that a newer version has left in a state of its own."""
    job_id = create(system)
    request.param(system, job_id)
    return job_id


def without_times(stored: Any) -> Any:
    return {name: value for name, value in stored.items() if name not in ("due_at", "started_ms")}


def test_a_job_of_a_newer_version_is_not_run(system, newer):
    [record] = system.receive()
    for _ in range(4):
        before = system.item(newer)
        assert system.work(record), "the message is done with: the sweep of the newer version sends another"
        status = system.item(newer)["status"]
        # A claim that was undone leaves a call where it waits.
        assert status == ({"S": "processing"} if "pending" in before else before["status"])
        assert without_times(system.item(newer)) == without_times(before) | {"status": status}
    assert system.segmind.calls == []


@pytest.mark.parametrize("claimed", [False, True])
def test_a_job_of_a_newer_version_is_not_swept(system, newer, claimed, caplog):
    if claimed:
        system.deliver()
    before = system.item(newer)
    other = create(system)
    for seconds in (60, 1900):
        system.clock.advance(seconds)
        done = system.sweep()
        assert "skipped" not in done
    assert system.item(newer) == before
    assert system.job(other)["status"] == "failed", "it hides no other job"
    assert "stored by a newer version" in caplog.text


def test_a_job_of_a_status_that_is_not_known_is_not_canceled_or_deleted(system):
    job_id = create(system)
    unknown_status(system, job_id)
    before = system.item(job_id)
    canceled = system.api("POST", f"/jobs/{job_id}/cancel")
    assert (canceled.status, canceled.json["status"]) == (200, "paused")
    refused = system.api("DELETE", f"/jobs/{job_id}")
    assert (refused.status, refused.json["code"]) == (409, "not_understood")
    assert system.item(job_id) == before
    assert system.objects("uploads") == [f"inputs/default/{job_id}.png"]


@pytest.mark.parametrize("unknown", [unknown_output, unknown_call, unknown_backend])
def test_what_its_caller_gives_up_is_canceled_all_the_same(system, unknown):
    job_id = create(system)
    unknown(system, job_id)
    canceled = system.api("POST", f"/jobs/{job_id}/cancel").json
    assert (canceled["status"], canceled["credits"]["released"]) == ("canceled", 1000)
    assert system.books().reserved == 0


def test_the_newer_version_goes_on_where_it_was(system):
    job_id = create(system)
    unknown_call(system, job_id)
    for _ in range(4):
        assert system.deliver() in (0, 1)
    # It is back, knows the call, and that there is nothing to wait for any more.
    change(system, job_id, pending={})
    system.clock.advance(131)
    assert system.sweep() == {"resent": 1}
    assert system.deliver() == 1
    assert system.job(job_id)["status"] == "succeeded"
    assert system.books().charged == 1000


@pytest.mark.parametrize("unknown", [unknown_status, unknown_output, unknown_call, unknown_backend])
def test_a_notice_waits_for_the_newer_version(unknown):
    with running_system("sagemaker") as system:
        job_id = create(system, samples=2)
        assert system.deliver() == 1
        system.settle()
        notices = system.receive("results")
        before = system.item(job_id)
        unknown(system, job_id)
        for _ in range(4):
            assert not [notice for notice in notices if system.collect(notice)]
        assert system.messages("results") == 2
        names = ("status", "outputs", "pending", "backend")
        change(system, job_id, **{name: before[name]["S"] for name in names})
        assert all(system.collect(notice) for notice in notices)
        assert [output["status"] for output in system.job(job_id)["outputs"]] == ["succeeded"] * 2


def test_an_upload_waits_for_the_newer_version(system):
    system.take_in()
    job = system.api("POST", "/uploads", {"job": {"prompt": "a boat", "seed": 7}}).json["job"]
    change(system, job["id"], status="awaiting_mask")
    system.s3.put_object(Bucket="uploads", Key=f"awaited/default/{job['id']}", Body=picture())
    [notice] = system.receive("uploads")
    assert not system.ingest(notice)
    change(system, job["id"], status="awaiting_upload")
    assert system.ingest(notice)
    assert system.deliver() == 1
    assert system.job(job["id"])["status"] == "succeeded"


def test_what_a_newer_version_published_stays(system):
    system.take_in()
    save_preset(system, {"prompt": "a boat"})
    system.s3.put_object(Bucket="uploads", Key="inbox/default/p/a.png", Body=picture())
    assert system.take_in() == 1
    [record] = system.receive()
    assert system.work(record)
    published = {key: system.s3.head_object(Bucket="results", Key=key)["LastModified"] for key in outbox(system)}
    assert len(published) == 2
    [job] = system.api("GET", "/jobs").json["jobs"]
    [output] = json.loads(system.item(job["id"])["outputs"]["S"])
    for newer in ({"outputs": [{**output, "status": "upscaled"}]}, {"status": "upscaling"}):
        change(system, job["id"], **newer)
        assert system.work(record)
        assert outbox(system) == list(published)


def outbox(system: System) -> list[str]:
    return [key for key in system.objects("results") if key.startswith("outbox/")]


def test_results_that_are_not_known_are_left_alone(system):
    """A thumbnail, say, beside the pictures of an attempt that crashed."""
    job_id = create(system, samples=2)
    for name in ("0-small.webp", "7.png", "thumbnails/0.png"):
        system.s3.put_object(Bucket="results", Key=f"results/default/{job_id}/{name}", Body=b"x")
    system.dynamodb.update_item(
        TableName="jobs",
        Key={"pk": {"S": "TEAM#default"}, "sk": {"S": f"JOB#{job_id}"}},
        UpdateExpression="SET attempts = :one",
        ExpressionAttributeValues={":one": {"N": "1"}},
    )
    assert system.deliver() == 1
    assert [output["status"] for output in system.job(job_id)["outputs"]] == ["succeeded"] * 2


def test_an_error_that_is_not_known_is_answered_under_its_own_code(system):
    system.segmind.behave("400")
    key = {"Idempotency-Key": "k"}
    job_id = create(system, headers=key)
    assert system.deliver() == 1
    change(system, job_id, error_code="gpu_gone", error_detail="The GPU went away")
    again = system.create(image=encoded(), seed=7, headers=key)
    assert (again.status, again.json["code"], again.json["detail"]) == (500, "gpu_gone", "The GPU went away")


def test_a_job_that_cannot_be_read_is_a_conflict(system):
    job_id = create(system)
    change(system, job_id, outputs="[")
    for method in ("GET", "DELETE"):
        refused = system.api(method, f"/jobs/{job_id}")
        assert (refused.status, refused.json["code"]) == (409, "not_understood")
    assert system.api("GET", "/jobs").json["jobs"] == []


def test_a_repeat_finds_a_job_that_is_not_understood(system):
    job_id = create(system, headers={"Idempotency-Key": "k"})
    unknown_status(system, job_id)
    again = system.create(image=encoded(), seed=7, headers={"Idempotency-Key": "k"})
    assert (again.status, again.json["id"], again.json["status"]) == (202, job_id, "paused")


def save_preset(system: System, fields: dict[str, Any]) -> None:
    assert system.api("PUT", "/presets/p", {"prompt": "a boat"}).status == 201
    system.dynamodb.update_item(
        TableName="jobs",
        Key={"pk": {"S": "TEAM#default"}, "sk": {"S": "PRESET#p"}},
        UpdateExpression="SET #fields = :fields",
        ExpressionAttributeNames={"#fields": "fields"},
        ExpressionAttributeValues={":fields": {"S": json.dumps(fields)}},
    )


def test_a_preset_of_a_newer_version_is_shown_and_used_as_far_as_it_is_known(system):
    save_preset(system, {"prompt": "a boat", "clip_skip": 2})
    assert system.api("GET", "/presets/p").json["fields"] == {"prompt": "a boat", "clip_skip": 2}
    priced = system.api("POST", "/cost", {"preset": "p"})
    assert (priced.status, priced.json["input"]["prompt"]) == (200, "a boat")


def test_a_prompt_of_a_preset_that_is_not_accepted_is_named_once(system):
    save_preset(system, {"prompt": " "})
    refused = system.create(image=encoded(), preset="p", prompt=None)
    assert [error["field"] for error in refused.json["errors"]] == ["preset"]


def test_a_preset_with_a_value_that_is_not_known_is_refused_unless_the_request_has_its_own(system):
    save_preset(system, {"prompt": "a boat", "scheduler": "Restart"})
    refused = system.api("POST", "/cost", {"preset": "p"})
    assert refused.status == 400
    [error] = refused.json["errors"]
    assert error["field"] == "preset"
    assert error["detail"].startswith("p has a scheduler that must be one of DDIM, ")
    assert system.api("POST", "/cost", {"preset": "p", "scheduler": "LMS"}).status == 200


def test_a_message_of_a_newer_version_names_its_job(system):
    job_id = create(system)
    [record] = system.receive()
    record["body"] = json.dumps(json.loads(record["body"]) | {"trace": "t"})
    assert system.work(record)
    assert system.job(job_id)["status"] == "succeeded"


def test_books_with_an_entry_of_a_newer_version_still_add_up(system):
    system.dynamodb.put_item(
        TableName="jobs",
        Item={
            "pk": {"S": "TEAM#default"},
            "sk": {"S": "LEDGER#01M3250V00ZVZF0VYGYB9ZYA0Y#gift"},
            "at_ms": {"N": "1"},
            "added": {"N": "5"},
        },
    )
    system.dynamodb.update_item(
        TableName="jobs",
        Key={"pk": {"S": "TEAM#default"}, "sk": {"S": "TEAM"}},
        UpdateExpression="ADD balance :five, added :five, entries :one",
        ExpressionAttributeValues={":five": {"N": "5"}, ":one": {"N": "1"}},
    )
    assert system.books().added == 1_000_000_005


def test_a_counter_under_a_longer_key_is_read(system):
    create(system)
    assert system.deliver() == 1
    [counter] = [
        found for found in system.dynamodb.scan(TableName="jobs")["Items"] if found["sk"]["S"].startswith("USAGE#")
    ]
    counter["sk"]["S"] += "#sd15"
    system.dynamodb.put_item(TableName="jobs", Item=counter)
    assert system.api("GET", "/usage").json["total"]["jobs"] == 2


def test_a_counter_that_is_older_than_one_of_its_columns_is_read(system):
    create(system)
    assert system.deliver() == 1
    [counter] = [
        found for found in system.dynamodb.scan(TableName="jobs")["Items"] if found["sk"]["S"].startswith("USAGE#")
    ]
    system.dynamodb.update_item(
        TableName="jobs", Key={"pk": counter["pk"], "sk": counter["sk"]}, UpdateExpression="REMOVE canceled"
    )
    [row] = system.api("GET", "/usage").json["rows"]
    assert (row["jobs"], row["canceled"]) == (1, 0)


@pytest.mark.parametrize("newer", [{"output_format": "avif"}, {"scheduler": "Restart"}, {"img_width": 1024}])
def test_a_job_whose_parameters_are_not_known_is_left_alone(system, newer):
    job_id = create(system)
    change(system, job_id, params=added(system, job_id, "params", **newer))
    for _ in range(4):
        system.deliver()
        system.clock.advance(600)
        system.sweep()
    job = system.job(job_id)
    assert (job["status"], job["error"], job["credits"]["released"]) == ("queued", None, 0)
    assert {name: job["input"][name] for name in newer} == newer
    assert system.segmind.calls == []


def test_a_job_that_cannot_be_dealt_with_stops_no_sweep(system):
    jobs = [create(system) for _ in range(8)]
    change(system, jobs[0], outputs=[{"index": "0", "status": "succeeded", "seed": 7}])
    system.clock.advance(4000)
    with pytest.raises(RuntimeError, match="1 jobs were skipped"):
        system.sweep()
    assert {system.job(job_id)["status"] for job_id in jobs[1:]} == {"failed"}


def test_a_job_that_cannot_be_shown_hides_no_other(system):
    jobs = [create(system) for _ in range(3)]
    change(system, jobs[1], metadata="null")
    listed = system.api("GET", "/jobs")
    assert (listed.status, [job["id"] for job in listed.json["jobs"]]) == (200, [jobs[2], jobs[0]])


def test_an_output_whose_place_is_not_known_is_shown_without_a_url(system):
    job_id = create(system)
    change(system, job_id, status="succeeded", outputs=[{"index": 0, "status": "succeeded", "seed": 7}])
    [listed] = system.api("GET", "/jobs").json["jobs"]
    [output] = listed["outputs"]
    assert (output["status"], "url" in output) == ("succeeded", False)


def test_a_job_that_cannot_be_shown_is_a_conflict(system):
    job_id = create(system)
    change(system, job_id, metadata="null")
    assert system.api("GET", f"/jobs/{job_id}").status == 409


def test_a_job_that_cannot_be_read_is_a_difference_of_the_audit(system):
    job_id = create(system)
    change(system, job_id, outputs="[")
    use = system.services
    assert audit(use.credits, use.jobs, "default").differences == (f"job {job_id} cannot be read",)
