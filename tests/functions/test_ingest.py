"""Files that come into the inbox: a job of each version, however often and late S3 tells of it, and what it leaves."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from email.header import Header
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from tests.faults.calls import Killed
from tests.functions.interruptions import die, fail, picture
from tests.system import System, create_team, queue_url

PRICE = 1000
FIELDS = {"prompt": "a watercolour", "strength": 0.4, "seed": 7}
DAY = 86_400
KEY = "inbox/default/art/photo.png"
OUTBOX = "outbox/default/art/photo.png"


@pytest.fixture
def inbox(system, at) -> System:
    """A system whose team has a preset, after S3's test event; `at` before it makes its clients."""
    assert system.take_in() == 1
    system.services.presets.save("default", "art", FIELDS)
    return system


def drop(system: System, key: str = KEY, data: bytes | None = None, **metadata: str) -> str:
    """Put a file into the inbox."""
    system.s3.put_object(Bucket="uploads", Key=key, Body=picture() if data is None else data, Metadata=metadata)
    return key


def noticed(system: System, key: str = KEY, data: bytes | None = None, **metadata: str) -> Any:
    """Put a file into the inbox, and return the record of S3's notice of it."""
    drop(system, key, data, **metadata)
    [*_, record] = system.receive("uploads")
    return record


def jobs(system: System) -> list[Any]:
    found: list[Any] = system.api("GET", "/jobs").json["jobs"]
    return found


def only_job(system: System) -> Any:
    [job] = jobs(system)
    return job


def taken_in(system: System, key: str = KEY, data: bytes | None = None, **metadata: str) -> Any:
    """Put a file into the inbox, take it in, and return its job."""
    drop(system, key, data, **metadata)
    assert system.take_in() == 1
    return jobs(system)[0]


def outbox(system: System) -> list[str]:
    return [key for key in system.objects("results") if key.startswith("outbox/")]


def document(system: System, key: str = f"{OUTBOX}.json") -> Any:
    return json.loads(system.s3.get_object(Bucket="results", Key=key)["Body"].read())


def everything(system: System) -> Any:
    """Return what a team could see, and what would run."""
    contents = {
        (bucket, key): system.s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        for bucket in ("uploads", "results")
        for key in system.objects(bucket)
    }
    listed = [{name: job[name] for name in ("id", "status", "credits", "error")} for job in jobs(system)]
    return listed, system.books(), contents


def usage(system: System) -> dict[str, Any]:
    rows = system.api("GET", "/usage", query={"group_by": "key"}).json["rows"]
    return {row["key"]: row for row in rows}


def forget_notices(system: System) -> None:
    """Have Powertools' records run out, as after a day."""
    for item in system.dynamodb.scan(TableName="idempotency")["Items"]:
        past = {"expiration": {"N": str(int(time.time()) - 1)}}
        system.dynamodb.put_item(TableName="idempotency", Item={**item, **past})


def let_the_crashed_one_expire(system: System) -> None:
    """Put the end of an invocation that never completed into the past, as a minute would."""
    for item in system.dynamodb.scan(TableName="idempotency")["Items"]:
        past = {"in_progress_expiration": {"N": str(int(time.time() * 1000) - 1000)}}
        system.dynamodb.put_item(TableName="idempotency", Item={**item, **past})


# A file becomes a job


def test_a_file_becomes_a_job_like_any_other(inbox):
    queued = taken_in(inbox)
    assert queued["status"] == "queued"
    assert queued["credits"]["reserved"] == inbox.books().reserved == PRICE
    assert inbox.deliver() == 1
    job = inbox.job(queued["id"])
    assert job["status"] == "succeeded"
    assert {name: job["input"][name] for name in FIELDS} == FIELDS
    source = job["source"]
    assert (source["bucket"], source["key"], source["preset"]) == ("uploads", KEY, "art")
    assert source["version"]
    assert job["metadata"] == {}
    assert inbox.api("GET", f"/jobs/{job['id']}/outputs/0").status == 302
    books = inbox.books()
    assert (books.reserved, books.charged) == (0, PRICE)
    assert (usage(inbox)["inbox"]["jobs"], usage(inbox)["inbox"]["charged"]) == (1, PRICE)
    assert inbox.messages("uploads") == inbox.messages() == 0


def test_its_results_lie_in_the_outbox(inbox):
    job_id = taken_in(inbox, samples="2")["id"]
    assert outbox(inbox) == []
    inbox.deliver()
    assert outbox(inbox) == [f"{OUTBOX}-0.jpg", f"{OUTBOX}-1.jpg", f"{OUTBOX}.json"]
    for index in range(2):
        found = inbox.s3.get_object(Bucket="results", Key=f"{OUTBOX}-{index}.jpg")
        assert found["ContentType"] == "image/jpeg"
        assert found["Metadata"] == {"job-id": job_id, "seed": str(7 + index), "index": str(index)}
        original = inbox.s3.get_object(Bucket="results", Key=f"results/default/{job_id}/{index}.jpg")
        assert found["Body"].read() == original["Body"].read()


def test_the_document_in_the_outbox_is_the_job_without_what_goes_stale(inbox):
    job_id = taken_in(inbox)["id"]
    inbox.deliver()
    shown, found = inbox.job(job_id), document(inbox)
    assert "X-Amz" in json.dumps(shown)
    assert not any(part in json.dumps(found) for part in ("http", "X-Amz", "url"))
    for output in shown["outputs"]:
        del output["url"], output["url_expires_at"]
    assert found == {name: value for name, value in shown.items() if name not in ("urls", "status_detail")}
    head = inbox.s3.head_object(Bucket="results", Key=f"{OUTBOX}.json")
    assert head["ContentType"] == "application/json"


def test_the_document_comes_after_the_pictures_and_the_job_has_ended_by_then(inbox, at):
    seen: list[Any] = []
    taken_in(inbox)
    # The first PutObject of the worker is the picture itself.
    at("before CopyObject", lambda: at("before PutObject", lambda: seen.append((only_job(inbox), outbox(inbox)))))
    inbox.deliver()
    [(job, there)] = seen
    assert (job["status"], there) == ("succeeded", [f"{OUTBOX}-0.jpg"])


@pytest.mark.parametrize("wanted", ["png", "jpeg", "webp"])
def test_results_have_the_format_that_was_asked_for(inbox, wanted):
    taken_in(inbox, **{"output-format": wanted})
    inbox.deliver()
    extension = {"jpeg": "jpg"}.get(wanted, wanted)
    found = inbox.s3.get_object(Bucket="results", Key=f"{OUTBOX}-0.{extension}")
    assert found["ContentType"] == f"image/{wanted}"
    assert Image.open(io.BytesIO(found["Body"].read())).format == wanted.upper()


def test_of_four_samples_the_delivered_ones_are_published_and_paid(inbox):
    taken_in(inbox, samples="4")
    inbox.segmind.behave("400")
    inbox.deliver()
    job = only_job(inbox)
    outcomes = {output["index"]: output["status"] for output in job["outputs"]}
    assert (job["status"], sorted(outcomes.values())) == ("succeeded", ["failed"] + ["succeeded"] * 3)
    delivered = [index for index, outcome in outcomes.items() if outcome == "succeeded"]
    assert outbox(inbox) == [*(f"{OUTBOX}-{index}.jpg" for index in delivered), f"{OUTBOX}.json"]
    assert [output["status"] for output in document(inbox)["outputs"]] == [outcomes[index] for index in range(4)]
    books = inbox.books()
    assert (books.reserved, books.charged) == (0, 3 * PRICE)


@pytest.mark.parametrize(
    "name",
    [
        "red shoe+1.png",
        "caf\u00e9 \u57ce.png",
        "2026/11/a.png",
        "100%.png",
        "a#b?c=d&e.png",
        "x",
        "../x",
        ".json",
        "a~",
    ],
)
def test_a_file_may_have_any_name(inbox, name):
    key = f"inbox/default/art/{name}"
    assert taken_in(inbox, key)["source"]["key"] == key
    inbox.deliver()
    assert outbox(inbox) == sorted([f"outbox/default/art/{name}-0.jpg", f"outbox/default/art/{name}.json"])
    assert inbox.books().charged == PRICE


def test_files_of_one_name_under_two_presets_are_two(inbox):
    inbox.services.presets.save("default", "oil", {"prompt": "an oil painting"})
    for preset in ("art", "oil"):
        drop(inbox, f"inbox/default/{preset}/a.png")
    assert inbox.take_in() == inbox.deliver() == 2
    for preset, prompt in (("art", "a watercolour"), ("oil", "an oil painting")):
        assert document(inbox, f"outbox/default/{preset}/a.png.json")["input"]["prompt"] == prompt
    assert inbox.books().charged == 2 * PRICE


def test_a_job_belongs_to_the_team_in_its_key(inbox):
    create_team(inbox.services, "other", "key-of-the-other")
    inbox.services.presets.save("other", "art", {"prompt": "an oil painting"})
    drop(inbox, "inbox/other/art/a.png")
    assert inbox.take_in() == inbox.deliver() == 1
    assert jobs(inbox) == []
    assert document(inbox, "outbox/other/art/a.png.json")["input"]["prompt"] == "an oil painting"
    assert inbox.books("other").charged == PRICE
    assert inbox.books().charged == 0


# Metadata


def test_metadata_overrides_the_preset_and_what_is_none_of_ours_is_ignored(inbox):
    sent = {
        "prompt": "an oil painting",
        "Negative-Prompt": "fog",
        "strength": "0.75",
        "samples": "2",
        "preset": "another",
        "image": "x",
        "uploaded-by": "rclone",
        "mtime": "1790000000.5",
    }
    job = taken_in(inbox, **sent)
    wanted = {"prompt": "an oil painting", "negative_prompt": "fog", "strength": 0.75, "samples": 2, "seed": 7}
    assert {name: job["input"][name] for name in wanted} == wanted
    assert (job["metadata"], job["source"]["preset"]) == ({}, "art")
    assert job["credits"]["reserved"] == 2 * PRICE


PROMPT = "un ch\u00e2teau d'\u00e9t\u00e9 + 100% \u6d6e\u4e16\u7d75"


@pytest.mark.parametrize(
    "sent", [quote(PROMPT), Header(PROMPT, "utf-8", maxlinelen=75).encode(linesep="").replace("\n", "")]
)
def test_a_prompt_in_any_language_reaches_the_backend(inbox, sent):
    taken_in(inbox, prompt=sent)
    inbox.deliver()
    assert [call["body"]["prompt"] for call in inbox.segmind.calls] == [PROMPT]


def test_the_prompt_may_come_with_the_file_alone(inbox):
    inbox.services.presets.save("default", "art", {})
    assert taken_in(inbox, prompt="a boat")["input"]["prompt"] == "a boat"


def test_a_job_takes_the_preset_as_it_is_when_the_file_is_taken_in(inbox):
    drop(inbox)
    inbox.services.presets.save("default", "art", {"prompt": "later"})
    inbox.take_in()
    assert only_job(inbox)["input"]["prompt"] == "later"
    record = noticed(inbox, "inbox/default/art/b.png")
    inbox.ingest(record)
    inbox.services.presets.save("default", "art", {"prompt": "latest"})
    assert inbox.ingest(record)
    assert [job["input"]["prompt"] for job in jobs(inbox)] == ["later", "later"]


# Files that can't be run


def unreadable(system: System) -> str:
    return drop(system, data=b"this is no image")


def cut(system: System) -> str:
    return drop(system, data=picture()[:60])


def empty(system: System) -> str:
    return drop(system, data=b"")


def too_large(system: System) -> str:
    use = system.services
    use.settings = replace(use.settings, max_image_bytes=100)
    use.__dict__.pop("storage", None)
    return drop(system, data=picture() + b"x" * 100)


def too_many_pixels(system: System) -> str:
    system.services.settings = replace(system.services.settings, max_image_pixels=4000)
    return drop(system)


def unknown_preset(system: System) -> str:
    return drop(system, "inbox/default/oil/photo.png")


def impossible_preset(system: System) -> str:
    return drop(system, "inbox/default/No Such Preset!/photo.png")


def wrong_metadata(system: System) -> str:
    return drop(system, strength="2", samples="many")


def without_a_prompt(system: System) -> str:
    system.services.presets.save("default", "art", {})
    return drop(system)


def poor(system: System) -> str:
    system.services.credits.add("default", PRICE - 1 - system.books().balance)
    return drop(system)


def disabled(system: System) -> str:
    system.services.teams.enable("default", enabled=False)
    return drop(system)


FAILURES: dict[Callable[[System], str], tuple[str, str]] = {
    unreadable: ("unsupported_image", ""),
    cut: ("unsupported_image", ""),
    empty: ("unsupported_image", ""),
    too_large: ("too_large", ""),
    too_many_pixels: ("too_large", "pixels"),
    unknown_preset: ("preset_unknown", "There is no preset oil"),
    impossible_preset: ("preset_unknown", "There is no preset No Such Preset!"),
    wrong_metadata: ("invalid_request", "strength: must be a number from 0.1 to 1; samples: must be an integer"),
    without_a_prompt: ("invalid_request", "prompt: is required"),
    poor: ("insufficient_credits", "This costs 1 credits, the team's balance is 0.999"),
    disabled: ("team_disabled", ""),
}


def enabled(system: System) -> System:
    system.services.teams.enable("default", enabled=True)
    return system


@pytest.mark.parametrize("trouble", FAILURES, ids=lambda trouble: trouble.__name__)
def test_a_file_that_cannot_be_run_is_a_failed_job(inbox, trouble):
    code, detail = FAILURES[trouble]
    key = trouble(inbox)
    before = inbox.books()
    assert inbox.take_in() == 1
    assert inbox.messages("uploads") == inbox.messages() == 0
    job = only_job(enabled(inbox))
    assert (job["status"], job["error"]["code"], job["outputs"]) == ("failed", code, [])
    assert detail in job["error"]["detail"]
    assert (job["source"]["key"], job["source"]["preset"]) == (key, key.split("/")[2])
    assert (job["credits"]["reserved"], job["credits"]["charged"], job["credits"]["released"]) == (0, 0, 0)
    # One entry, of nothing.
    assert inbox.books() == replace(before, entries=before.entries + 1)
    assert (usage(inbox)["inbox"]["jobs"], usage(inbox)["inbox"]["failed"]) == (1, 1)
    error_file = f"{key.replace('inbox/', 'outbox/', 1)}.error.json"
    assert outbox(inbox) == [error_file]
    found = document(inbox, error_file)
    assert (found["id"], found["status"], found["error"]) == (job["id"], "failed", job["error"])
    assert "http" not in json.dumps(found)
    assert inbox.objects("uploads") == [key]


@pytest.mark.parametrize("trouble", FAILURES, ids=lambda trouble: trouble.__name__)
def test_a_repeated_notice_of_a_file_that_cannot_be_run_changes_nothing(inbox, trouble):
    trouble(inbox)
    [record] = inbox.receive("uploads")
    assert inbox.ingest(record)
    enabled(inbox)
    before = everything(inbox)
    assert inbox.ingest(record)
    assert everything(inbox) == before
    # By then it might even run.
    inbox.services.credits.add("default", 5 * PRICE)
    inbox.services.presets.save("default", "oil", FIELDS)
    before = everything(inbox)
    forget_notices(inbox)
    assert inbox.ingest(record)
    assert everything(inbox) == before
    assert inbox.messages() == 0


def test_after_a_top_up_a_new_upload_works(inbox):
    poor(inbox)
    inbox.take_in()
    inbox.services.credits.add("default", 1)
    drop(inbox)
    assert inbox.take_in() == inbox.deliver() == 1
    assert [job["status"] for job in jobs(inbox)] == ["succeeded", "failed"]
    assert outbox(inbox) == [f"{OUTBOX}-0.jpg", f"{OUTBOX}.json"]
    books = inbox.books()
    assert (books.balance, books.reserved, books.charged) == (0, 0, PRICE)


def test_the_preset_that_was_missing_serves_the_next_upload(inbox):
    unknown_preset(inbox)
    inbox.take_in()
    inbox.services.presets.save("default", "oil", FIELDS)
    unknown_preset(inbox)
    assert inbox.take_in() == inbox.deliver() == 1
    assert outbox(inbox) == ["outbox/default/oil/photo.png-0.jpg", "outbox/default/oil/photo.png.json"]


@pytest.mark.parametrize("behaviour", ["400", "black", "406-credits"])
def test_a_job_that_fails_later_leaves_its_error(inbox, behaviour):
    taken_in(inbox)
    inbox.segmind.behave(behaviour)
    assert inbox.deliver() == 1
    job = only_job(inbox)
    assert job["status"] == "failed"
    assert outbox(inbox) == [f"{OUTBOX}.error.json"]
    assert document(inbox, f"{OUTBOX}.error.json")["error"] == job["error"]
    books = inbox.books()
    assert (books.reserved, books.charged) == (0, 0)


def test_an_error_of_an_earlier_version_is_removed_by_a_success(inbox):
    taken_in(inbox, data=b"this is no image")
    assert outbox(inbox) == [f"{OUTBOX}.error.json"]
    job = taken_in(inbox)
    inbox.deliver()
    assert outbox(inbox) == [f"{OUTBOX}-0.jpg", f"{OUTBOX}.json"]
    assert document(inbox)["id"] == job["id"]
    assert inbox.books().charged == PRICE


def test_a_name_may_be_as_long_as_its_results_can_be_named(inbox):
    room = 1024 - len("outbox/default/art/") - len("-0.jpeg.error.json")
    for name in ("x" * room, "\u00e9" * (room // 2)):
        job = taken_in(inbox, f"inbox/default/art/{name}")
        assert job["status"] == "queued"
    assert inbox.deliver() == 2
    assert len(outbox(inbox)) == 4
    for name in ("x" * (room + 1), "\u00e9" * (room // 2 + 1)):
        job = taken_in(inbox, f"inbox/default/art/{name}")
        assert (job["status"], job["error"]["code"]) == ("failed", "invalid_request")
        assert job["error"]["detail"].startswith("key: is too long")
    # There is no place for it.
    assert len(outbox(inbox)) == 4
    assert inbox.books().charged == 2 * PRICE


# What belongs to nobody


NOBODYS = ["inbox/nobody/art/a.png", "inbox/a.png", "inbox/default/a.png", "inbox//art/a.png", "awaited/default/a.png"]


@pytest.mark.parametrize("key", NOBODYS)
def test_what_belongs_to_no_team_is_not_done_with(inbox, key, caplog):
    record = noticed(inbox, key)
    for _ in range(3):
        assert not inbox.ingest(record)
    assert inbox.messages("uploads") == 1
    assert jobs(inbox) == outbox(inbox) == []
    assert inbox.books().entries == 1
    errors = [line for line in caplog.records if line.levelname == "ERROR"]
    assert [line.getMessage() for line in errors] == ["belongs to no team"] * 3


def test_what_belongs_to_no_team_keeps_no_other_file_waiting(inbox):
    for key in (NOBODYS[0], KEY, NOBODYS[1]):
        drop(inbox, key)
    assert inbox.take_in() == 1
    assert (only_job(inbox)["status"], inbox.messages("uploads")) == ("queued", 2)


def test_a_team_that_is_made_later_gets_its_file(inbox):
    record = noticed(inbox, "inbox/late/art/a.png")
    assert not inbox.ingest(record)
    create_team(inbox.services, "late", "key-of-the-late")
    inbox.services.presets.save("late", "art", FIELDS)
    assert inbox.ingest(record)
    assert inbox.deliver() == 1
    assert inbox.books("late").charged == PRICE


@pytest.mark.parametrize("body", ["", "{", "{}", "null", "[]", '{"Records": [{}]}', '{"Records": 5}'])
def test_what_is_no_notice_is_not_done_with(inbox, body):
    inbox.sqs.send_message(QueueUrl=queue_url("uploads"), MessageBody=body)
    assert inbox.take_in() == 0
    assert (inbox.messages("uploads"), jobs(inbox)) == (1, [])


# What is nothing to do


def test_folder_markers_and_test_events_are_ignored(inbox):
    for key in ("inbox/", "inbox/default/", "inbox/default/art/", "inbox/default/art/2026/"):
        drop(inbox, key, b"")
    event = {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "uploads"}
    inbox.sqs.send_message(QueueUrl=queue_url("uploads"), MessageBody=json.dumps(event))
    assert inbox.take_in() == 5
    assert jobs(inbox) == outbox(inbox) == []
    assert inbox.messages("uploads") == 0


def test_what_the_service_writes_itself_starts_nothing(inbox):
    taken_in(inbox)
    inbox.deliver()
    inbox.create()
    inbox.api("POST", "/uploads", picture(), {"Content-Type": "image/png"})
    assert inbox.messages("uploads") == 0


def test_a_file_that_was_deleted_meanwhile_makes_no_job(inbox):
    drop(inbox)
    inbox.s3.delete_object(Bucket="uploads", Key=KEY)
    assert inbox.take_in() == 1
    assert jobs(inbox) == outbox(inbox) == []
    assert inbox.books().entries == 1
    assert inbox.messages("uploads") == 0
    # The same bytes under the same name are another version.
    assert taken_in(inbox)["status"] == "queued"


def test_one_message_may_tell_of_several_files(inbox):
    records = [noticed(inbox, f"inbox/default/art/{name}") for name in "abc"]
    bodies = [json.loads(record["body"])["Records"][0] for record in records]
    assert inbox.ingest({**records[0], "body": json.dumps({"Records": bodies})})
    assert len(jobs(inbox)) == inbox.messages() == 3
    # Two of them come once more.
    assert inbox.take_in() == 2
    assert len(jobs(inbox)) == inbox.messages() == 3
    inbox.deliver()
    assert inbox.books().charged == 3 * PRICE


def test_a_message_of_which_a_part_failed_makes_no_second_job(inbox):
    records = [noticed(inbox, key) for key in (KEY, NOBODYS[0], "inbox/default/art/b.png")]
    bodies = [json.loads(record["body"])["Records"][0] for record in records]
    both = {**records[0], "body": json.dumps({"Records": bodies})}
    for _ in range(2):
        assert not inbox.ingest(both)
    assert len(jobs(inbox)) == 1
    create_team(inbox.services, "nobody", "key-of-nobody")
    assert inbox.ingest(both)
    assert len(jobs(inbox)) == 2
    assert inbox.messages() == 2
    assert inbox.books().reserved == 2 * PRICE


# Notices that come again


def test_a_repeated_notice_makes_no_second_job(inbox):
    record = noticed(inbox)
    inbox.ingest(record)
    before = everything(inbox)
    for _ in range(2):
        assert inbox.ingest(record)
    assert everything(inbox) == before
    assert inbox.messages() == 1


@pytest.mark.parametrize("data", [picture(), b"this is no image"], ids=["good", "unreadable"])
def test_a_repeated_notice_is_counted_once(inbox, capsys, data):
    record = noticed(inbox, data=data)
    for _ in range(2):
        assert inbox.ingest(record)
    forget_notices(inbox)
    assert inbox.ingest(record)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    counted = {name: sum(name in line for line in lines) for name in ("ObjectsTakenIn", "JobsFailed", "FailuresByCode")}
    failed = int(data != picture())
    assert counted == {"ObjectsTakenIn": 1, "JobsFailed": failed, "FailuresByCode": failed}


@pytest.mark.parametrize("days", [0, 1.5, 13, 29])
@pytest.mark.parametrize("behaviour", ["success", "400"])
def test_a_notice_that_comes_again_after_the_end_changes_nothing(inbox, days, behaviour):
    """Powertools' own records last for a day: from then on the guard holds."""
    record = noticed(inbox)
    inbox.ingest(record)
    if behaviour != "success":
        inbox.segmind.behave(behaviour)
    inbox.deliver()
    inbox.clock.advance(days * DAY)
    if days > 1:
        forget_notices(inbox)
    before = everything(inbox)
    for _ in range(2):
        assert inbox.ingest(record)
    assert everything(inbox) == before
    assert (inbox.messages(), len(inbox.segmind.calls)) == (0, 1)


@pytest.mark.parametrize("remembered", [True, False], ids=["within a day", "later"])
def test_a_notice_that_comes_again_while_the_job_waits_or_runs_makes_no_second_one(inbox, at, remembered):
    record = noticed(inbox)
    inbox.ingest(record)

    def again() -> None:
        if not remembered:
            forget_notices(inbox)
        assert inbox.ingest(record)

    again()
    [first, *_] = inbox.receive()
    at("after UpdateItem", again)
    assert inbox.work(first)
    inbox.deliver()
    assert only_job(inbox)["status"] == "succeeded"
    assert len(inbox.segmind.calls) == 1
    assert inbox.books().charged == PRICE


def test_a_notice_that_is_being_worked_on_comes_back_later(inbox, at):
    record = noticed(inbox)
    late: list[bool] = []
    at("after TransactWriteItems", lambda: late.append(inbox.ingest(record)))
    assert inbox.ingest(record)
    assert late == [False]
    assert only_job(inbox)["status"] == "queued"
    assert inbox.messages() == 1


STEPS = [
    f"{moment} {operation}"
    for operation in ("GetItem", "PutItem", "GetObject", "PutObject", "TransactWriteItems", "SendMessage", "UpdateItem")
    for moment in ("before", "after")
]


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_between_any_two_steps_makes_no_second_job(inbox, at, step):
    record = noticed(inbox)
    at(step, die)
    with pytest.raises(Killed):
        inbox.ingest(record)
    let_the_crashed_one_expire(inbox)
    assert inbox.ingest(record)
    assert only_job(inbox)["status"] == "queued"
    assert inbox.deliver() >= 1
    assert outbox(inbox) == [f"{OUTBOX}-0.jpg", f"{OUTBOX}.json"]
    assert inbox.books().charged == PRICE


@pytest.mark.parametrize(
    "step", ["before TransactWriteItems", "after TransactWriteItems", "before PutObject", "after PutObject"]
)
def test_a_crash_around_a_failed_job_still_leaves_its_error(inbox, at, step):
    record = noticed(inbox, data=b"this is no image")
    at(step, die)
    with pytest.raises(Killed):
        inbox.ingest(record)
    let_the_crashed_one_expire(inbox)
    assert inbox.ingest(record)
    assert document(inbox, f"{OUTBOX}.error.json")["id"] == only_job(inbox)["id"]
    assert inbox.books().entries == 2


@pytest.mark.parametrize("operation", ["GetItem", "PutItem", "GetObject", "PutObject", "TransactWriteItems"])
def test_when_aws_is_in_trouble_the_notice_comes_again(inbox, at, operation):
    record = noticed(inbox)
    at(f"before {operation}", fail)
    assert not inbox.ingest(record)
    assert jobs(inbox) == outbox(inbox) == []
    assert inbox.ingest(record)
    assert only_job(inbox)["status"] == "queued"
    assert inbox.books().reserved == PRICE


def test_a_job_that_could_not_be_sent_is_sent_by_the_sweep(inbox, at):
    at("before SendMessage", fail)
    taken_in(inbox)
    assert inbox.messages() == 0
    inbox.clock.advance(61)
    assert inbox.sweep() == {"resent": 1}
    assert inbox.deliver() == 1
    assert outbox(inbox) == [f"{OUTBOX}-0.jpg", f"{OUTBOX}.json"]


# Several versions of a file


def test_a_file_that_is_overwritten_is_a_new_job(inbox):
    for shade in (90, 91):
        job = taken_in(inbox, data=picture(shade))
        inbox.deliver()
        assert document(inbox)["id"] == job["id"]
    assert len({job["source"]["version"] for job in jobs(inbox)}) == 2
    assert inbox.books().charged == 2 * PRICE


def test_the_same_bytes_again_are_a_new_job(inbox):
    for _ in range(2):
        taken_in(inbox)
        inbox.deliver()
    assert len(jobs(inbox)) == 2
    assert inbox.books().charged == 2 * PRICE


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "reordered"])
def test_of_two_versions_the_one_that_is_gone_makes_no_job(inbox, order):
    first, second = noticed(inbox, data=picture(1)), noticed(inbox, data=picture(2), strength="0.9")
    for record in [first, second][::order]:
        assert inbox.ingest(record)
        assert inbox.ingest(record)
    assert only_job(inbox)["input"]["strength"] == 0.9
    assert inbox.messages("uploads") == 0
    inbox.deliver()
    assert inbox.books().charged == PRICE


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "reordered"])
def test_where_versions_are_kept_each_is_a_job(inbox, order):
    inbox.s3.put_bucket_versioning(Bucket="uploads", VersioningConfiguration={"Status": "Enabled"})
    records = []
    for strength in ("0.1", "0.2", "0.3"):
        record = noticed(inbox, strength=strength)
        body = json.loads(record["body"])
        # As S3 names it; moto leaves it out.
        versions = inbox.s3.list_object_versions(Bucket="uploads", Prefix=KEY)["Versions"]
        [latest] = [version["VersionId"] for version in versions if version["IsLatest"]]
        body["Records"][0]["s3"]["object"]["versionId"] = latest
        records.append({**record, "body": json.dumps(body)})
    for record in (records * 2)[::order]:
        assert inbox.ingest(record)
    assert {job["input"]["strength"] for job in jobs(inbox)} == {0.1, 0.2, 0.3}
    assert len(jobs(inbox)) == 3
    assert inbox.deliver() == 3
    assert inbox.books().charged == 3 * PRICE


# What the outbox shows of several versions


def test_results_take_the_place_of_all_that_an_earlier_version_left(inbox):
    taken_in(inbox, samples="3")
    inbox.deliver()
    assert len(outbox(inbox)) == 4
    job = taken_in(inbox, samples="2", **{"output-format": "png"})
    inbox.deliver()
    assert outbox(inbox) == [f"{OUTBOX}-0.png", f"{OUTBOX}-1.png", f"{OUTBOX}.json"]
    assert document(inbox)["id"] == job["id"]


def test_an_error_takes_the_place_of_an_earlier_versions_results(inbox):
    taken_in(inbox)
    inbox.deliver()
    job = taken_in(inbox, data=b"this is no image")
    assert outbox(inbox) == [f"{OUTBOX}.error.json"]
    assert document(inbox, f"{OUTBOX}.error.json")["id"] == job["id"]


@pytest.mark.parametrize("behaviour", ["success", "400"])
def test_a_version_that_ends_later_than_its_successor_does_not_replace_it(inbox, behaviour):
    first, second = taken_in(inbox), taken_in(inbox)
    records = {json.loads(record["body"])["job_id"]: record for record in inbox.receive()}
    assert inbox.work(records[second["id"]])
    shown = {key: inbox.s3.get_object(Bucket="results", Key=key)["Body"].read() for key in outbox(inbox)}
    assert document(inbox)["id"] == second["id"]
    if behaviour != "success":
        inbox.segmind.behave(behaviour)
    assert inbox.work(records[first["id"]])
    assert {key: inbox.s3.get_object(Bucket="results", Key=key)["Body"].read() for key in outbox(inbox)} == shown
    ended = inbox.job(first["id"])
    assert ended["status"] == ("succeeded" if behaviour == "success" else "failed")
    assert inbox.books().charged == (2 if behaviour == "success" else 1) * PRICE


def test_a_late_message_of_an_earlier_version_changes_nothing(inbox):
    taken_in(inbox)
    [late] = inbox.receive()
    inbox.work(late)
    taken_in(inbox)
    inbox.deliver()
    before = everything(inbox)
    assert inbox.work(late)
    assert everything(inbox) == before


def test_a_late_notice_of_an_earlier_version_changes_nothing(inbox):
    late = noticed(inbox, data=b"this is no image")
    inbox.ingest(late)
    taken_in(inbox)
    inbox.deliver()
    before = everything(inbox)
    for forget in (int, lambda: forget_notices(inbox)):
        forget()
        assert inbox.ingest(late)
        assert everything(inbox) == before


# Its end


def test_a_message_that_comes_again_publishes_again(inbox):
    taken_in(inbox)
    [record] = inbox.receive()
    inbox.work(record)
    there = outbox(inbox)
    for key in there:
        inbox.s3.delete_object(Bucket="results", Key=key)
    assert inbox.work(record)
    assert outbox(inbox) == there
    assert len(inbox.segmind.calls) == 1
    assert inbox.books().charged == PRICE


@pytest.mark.parametrize("trouble", [die, fail], ids=lambda trouble: trouble.__name__)
@pytest.mark.parametrize("operation", ["UpdateItem", "CopyObject", "PutObject", "DeleteObject"])
def test_what_could_not_be_published_is_when_the_message_comes_again(inbox, at, trouble, operation):
    taken_in(inbox, data=b"this is no image")
    job = taken_in(inbox)
    [record] = inbox.receive()
    # From the end of the job on: it publishes next.
    at("after TransactWriteItems", lambda: at(f"before {operation}", trouble))
    if trouble is die:
        with pytest.raises(Killed):
            inbox.work(record)
    else:
        assert not inbox.work(record)
    assert inbox.job(job["id"])["status"] == "succeeded"
    assert inbox.work(record)
    assert outbox(inbox) == [f"{OUTBOX}-0.jpg", f"{OUTBOX}.json"]
    assert document(inbox)["id"] == job["id"]
    assert len(inbox.segmind.calls) == 1
    assert inbox.books().charged == PRICE


def test_a_job_past_its_deadline_leaves_its_error(inbox):
    job_id = taken_in(inbox)["id"]
    inbox.clock.advance(1801)
    assert inbox.sweep() == {"failed": 1}
    found = document(inbox, f"{OUTBOX}.error.json")
    assert (found["id"], found["status"], found["error"]["code"]) == (job_id, "failed", "deadline_exceeded")
    # The job's own message, and the one that the sweep sent in case it died.
    assert inbox.deliver() == 2
    assert outbox(inbox) == [f"{OUTBOX}.error.json"]
    books = inbox.books()
    assert (books.reserved, books.charged) == (0, 0)


@pytest.mark.parametrize("operation", ["PutObject", "TransactWriteItems"])
def test_a_sweep_that_crashed_is_followed_by_one_that_publishes_and_ends_the_job(inbox, at, operation):
    taken_in(inbox)
    inbox.clock.advance(1801)
    at(f"before {operation}", die)
    with pytest.raises(Killed):
        inbox.sweep()
    assert only_job(inbox)["status"] == ("queued" if operation == "TransactWriteItems" else "failed")
    inbox.sweep()
    inbox.deliver()
    assert only_job(inbox)["status"] == "failed"
    assert outbox(inbox) == [f"{OUTBOX}.error.json"]
    assert inbox.books().reserved == 0


def test_what_was_delivered_before_the_deadline_is_published(inbox):
    taken_in(inbox, samples="2")
    inbox.segmind.behave("503")
    assert inbox.deliver() == 0
    inbox.clock.advance(1801 + 130)
    assert inbox.sweep() == {"succeeded": 1}
    [published, _] = outbox(inbox)
    assert [output["status"] for output in document(inbox)["outputs"]].count("succeeded") == 1
    assert published in (f"{OUTBOX}-0.jpg", f"{OUTBOX}-1.jpg")
    assert inbox.books().charged == PRICE


def test_a_canceled_job_leaves_nothing_in_the_outbox(inbox):
    job_id = taken_in(inbox)["id"]
    [record] = inbox.receive()
    assert inbox.api("POST", f"/jobs/{job_id}/cancel").json["status"] == "canceled"
    assert inbox.work(record)
    inbox.clock.advance(3600)
    assert inbox.sweep() == {}
    assert inbox.objects("results") == []
    books = inbox.books()
    assert (books.reserved, books.charged, usage(inbox)["inbox"]["canceled"]) == (0, 0, 1)


def test_a_job_that_is_canceled_while_it_runs_leaves_nothing(inbox, at):
    job_id = taken_in(inbox)["id"]
    at("before PutObject", lambda: inbox.api("POST", f"/jobs/{job_id}/cancel"))
    assert inbox.deliver() == 1
    assert inbox.objects("results") == []
    assert inbox.books().charged == 0


def test_a_deleted_job_is_not_made_again(inbox):
    record = noticed(inbox)
    inbox.ingest(record)
    job_id = only_job(inbox)["id"]
    assert inbox.api("DELETE", f"/jobs/{job_id}").status == 204
    for forget in (int, lambda: forget_notices(inbox)):
        forget()
        assert inbox.ingest(record)
    assert inbox.deliver() == 1
    assert jobs(inbox) == inbox.objects("results") == []
    # The file is its sender's.
    assert inbox.objects("uploads") == [KEY]
    assert inbox.books().reserved == 0


def test_a_job_over_http_leaves_nothing_in_the_outbox(inbox):
    job_id = inbox.create().json["id"]
    inbox.deliver()
    assert inbox.job(job_id)["source"] is None
    assert outbox(inbox) == []
