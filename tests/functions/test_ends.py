"""Whoever ends a job, its end is logged and counted once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.functions.interruptions import fail, picture
from tests.functions.jobs import create
from tests.system import System, running_system

Ended = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def ended(caplog, capsys) -> Ended:
    """Return what was said of ended jobs since the last time: log lines and counts, by the job."""
    seen = [0]

    def read() -> list[dict[str, Any]]:
        records = [record for record in caplog.records if record.getMessage() == "job ended"]
        new, seen[0] = records[seen[0] :], len(records)
        written = [json.loads(line) for line in capsys.readouterr().out.splitlines() if '"JobsFailed"' in line]
        assert [record.job_id for record in new] == [metrics["job_id"] for metrics in written]
        return [
            {
                "job": record.job_id,
                "status": record.status,
                **{name: int(metrics[name][0]) for name in ("JobsSucceeded", "JobsFailed", "JobsCanceled")},
                "timed": "BackendTime" in metrics,
            }
            for record, metrics in zip(new, written, strict=True)
        ]

    return read


def end(job_id: str, status: str, *, timed: bool) -> dict[str, Any]:
    counted = {f"Jobs{name.capitalize()}": int(name == status) for name in ("succeeded", "failed", "canceled")}
    return {"job": job_id, "status": status, **counted, "timed": timed}


def awaited(system: System) -> dict[str, Any]:
    return system.api("POST", "/uploads", {"job": {"prompt": "a boat", "seed": 7}}).json["job"]


def test_by_the_worker(system, ended):
    job_id = create(system)
    [record] = system.receive()
    assert system.work(record)
    assert ended() == [end(job_id, "succeeded", timed=True)]
    assert system.work(record)
    assert ended() == [], "a second delivery ends nothing"


def test_by_the_worker_in_failure(system, ended):
    system.segmind.behave("400")
    job_id = create(system)
    assert system.deliver() == 1
    assert ended() == [end(job_id, "failed", timed=False)]


def test_by_the_collector(ended):
    with running_system("sagemaker") as system:
        job_id = create(system)
        assert system.deliver() == 1
        assert ended() == []
        system.settle()
        [notice] = system.receive("results")
        assert system.collect(notice)
        assert ended() == [end(job_id, "succeeded", timed=True)]
        assert system.collect(notice)
        assert ended() == []


def test_by_the_sweep(system, ended):
    late = create(system)
    unsent = awaited(system)["id"]
    system.clock.advance(1801)
    system.sweep()
    assert sorted(ended(), key=lambda each: each["status"]) == [
        end(unsent, "canceled", timed=False),
        end(late, "failed", timed=False),
    ]
    system.sweep()
    assert ended() == []


def test_by_ingest_of_a_file_that_is_no_image(system, ended):
    system.take_in()
    system.api("PUT", "/presets/art", {"prompt": "a boat"})
    system.s3.put_object(Bucket="uploads", Key="inbox/default/art/a.png", Body=b"no image")
    [notice] = system.receive("uploads")
    assert system.ingest(notice)
    [job] = system.api("GET", "/jobs").json["jobs"]
    assert ended() == [end(job["id"], "failed", timed=False)]
    assert system.ingest(notice)
    assert ended() == []


def test_by_ingest_of_an_upload_that_is_no_image(system, ended):
    system.take_in()
    job = awaited(system)
    system.s3.put_object(Bucket="uploads", Key=f"awaited/default/{job['id']}", Body=b"no image")
    assert system.take_in() == 1
    assert ended() == [end(job["id"], "failed", timed=False)]


def test_by_its_caller(system, ended):
    job_id = create(system)
    for _ in range(2):
        assert system.api("POST", f"/jobs/{job_id}/cancel").json["status"] == "canceled"
    assert ended() == [end(job_id, "canceled", timed=False)]
    system.deliver()
    assert ended() == []


def test_by_its_caller_who_deletes_it(system, ended):
    unfinished, done = create(system), create(system)
    records = {json.loads(record["body"])["job_id"]: record for record in system.receive()}
    assert system.work(records[done])
    assert ended() == [end(done, "succeeded", timed=True)]
    for job_id in (unfinished, done):
        assert system.api("DELETE", f"/jobs/{job_id}").status == 204
    assert ended() == [end(unfinished, "canceled", timed=False)]


def test_also_where_its_results_cannot_be_published(system, at, ended):
    system.take_in()
    system.api("PUT", "/presets/art", {"prompt": "a boat"})
    system.s3.put_object(Bucket="uploads", Key="inbox/default/art/a.png", Body=picture())
    assert system.take_in() == 1
    [record] = system.receive()
    at("before CopyObject", fail)
    assert not system.work(record)
    [job] = system.api("GET", "/jobs").json["jobs"]
    assert ended() == [end(job["id"], "succeeded", timed=True)]
    assert system.work(record)
    assert ended() == []
    assert "outbox/default/art/a.png.json" in system.objects("results")
