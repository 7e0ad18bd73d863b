"""The sample events: one for each trigger, taken by its function."""

from __future__ import annotations

import json

from tests.system import ROOT, Context, function


def sample(name: str) -> dict:
    return json.loads((ROOT / "events" / name).read_text())


def test_the_api_event_makes_a_job_that_runs(system):
    event = sample("api-create.json")
    system.services.teams.add_key(event["requestContext"]["identity"]["apiKeyId"], "default", label="sample")
    answer = function("api").handler(event, Context())
    assert answer["statusCode"] == 202
    assert system.deliver() == 1
    assert system.job(json.loads(answer["body"])["id"])["status"] == "succeeded"


def test_the_queue_event_names_a_job_that_is_gone(system):
    assert function("worker").handler(sample("jobs-queue.json"), Context()) == {"batchItemFailures": []}


def test_the_schedule_event_sweeps(system):
    assert function("sweep").handler(sample("schedule.json"), Context()) == {}
