"""The sample events: one for each trigger, taken by its function."""

from __future__ import annotations

import hashlib
import json
from urllib.parse import unquote_plus

from tests.system import ROOT, Context, function

SAMPLES = {
    "api": "api-create.json",
    "worker": "jobs-queue.json",
    "ingest": "uploads-queue.json",
    "collect": "collect-queue.json",
    "sweep": "schedule.json",
    "segmind": "segmind-generate.json",
}


def sample(name: str) -> dict:
    return json.loads((ROOT / "events" / SAMPLES[name]).read_text())


def test_each_function_has_an_event():
    assert {path.parent.name for path in ROOT.glob("functions/*/app.py")} == set(SAMPLES)
    assert {path.name for path in ROOT.glob("events/*.json")} == set(SAMPLES.values())


def test_the_api_event_makes_a_job_that_runs(system):
    event = sample("api")
    system.services.teams.add_key(event["requestContext"]["identity"]["apiKeyId"], "default", label="sample")
    answer = function("api").handler(event, Context())
    assert answer["statusCode"] == 202
    assert system.deliver() == 1
    assert system.job(json.loads(answer["body"])["id"])["status"] == "succeeded"


def test_the_event_of_segminds_clients_brings_the_picture(system):
    event = sample("segmind")
    system.services.teams.add_key(event["requestContext"]["identity"]["apiKeyId"], "default", label="sample")
    system.services.sleep = lambda _: system.deliver()
    answer = function("segmind").handler(event, Context())
    assert (answer["statusCode"], answer["isBase64Encoded"]) == (200, True)
    assert answer["multiValueHeaders"]["Content-Type"] == ["image/jpeg"]


def test_the_queue_event_names_a_job_that_is_gone(system):
    assert function("worker").handler(sample("worker"), Context()) == {"batchItemFailures": []}


def test_the_uploads_event_makes_a_job_of_the_sample_photo(system):
    (notice,) = json.loads(sample("ingest")["Records"][0]["body"])["Records"]
    named = notice["s3"]["object"]
    photo = (ROOT / "events/sample.jpg").read_bytes()
    assert (named["size"], named["eTag"]) == (len(photo), hashlib.md5(photo).hexdigest())
    key = unquote_plus(named["key"])
    assert system.api("PUT", "/presets/watercolour", {"prompt": "a watercolour"}).status == 201
    system.s3.put_object(Bucket="uploads", Key=key, Body=photo)
    assert function("ingest").handler(sample("ingest"), Context()) == {"batchItemFailures": []}
    assert system.deliver() == 1
    (job,) = system.api("GET", "/jobs").json["jobs"]
    assert (job["status"], job["input"]["prompt"]) == ("succeeded", "a watercolour")
    assert (job["source"]["bucket"], job["source"]["key"]) == (notice["s3"]["bucket"]["name"], key)
    place = key.replace("inbox/", "outbox/", 1)
    delivered = [key for key in system.objects("results") if key.startswith("outbox/")]
    assert delivered == [f"{place}-0.jpg", f"{place}.json"]


def test_the_uploads_event_names_an_object_that_is_gone(system):
    assert function("ingest").handler(sample("ingest"), Context()) == {"batchItemFailures": []}
    assert system.api("GET", "/jobs").json["jobs"] == []


def test_the_schedule_event_sweeps(system):
    assert function("sweep").handler(sample("sweep"), Context()) == {}


def test_messages_carry_their_own_digests():
    records = [record for name in ("worker", "ingest") for record in sample(name)["Records"]]
    for record in records:
        assert record["md5OfBody"] == hashlib.md5(record["body"].encode()).hexdigest()


def test_the_results_event_tells_of_a_job_that_is_gone(system):
    assert function("collect").handler(sample("collect"), Context()) == {"batchItemFailures": []}
