"""A job as its item in DynamoDB. Every read goes through `to_job`, which bears what a newer version stored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from aws_lambda_powertools import Logger

from img2img.backends import Pending, Wait
from img2img.dynamo import Item, integer_in, number, string_in, text
from img2img.errors import NotUnderstood
from img2img.jobs.job import Job, Output, OutputStatus, Source, Status, Via
from img2img.money.prices import Receipt
from img2img.params import Img2ImgParams
from img2img.stored import known_fields

logger = Logger(child=True)


def job_key(team: str, job_id: str) -> dict[str, Any]:
    """Return the key of a job's item."""
    return {"pk": text(f"TEAM#{team}"), "sk": text(f"JOB#{job_id}")}


def outputs_json(outputs: tuple[Output, ...]) -> dict[str, str]:
    """Return the attribute that keeps the outputs."""
    return text(json.dumps([asdict(output) for output in outputs]))


def pending_json(pending: Mapping[int, Pending]) -> dict[str, str]:
    """Return the attribute that keeps the samples on their way."""
    return text(json.dumps({index: _pending(sample) for index, sample in pending.items()}))


def _pending(sample: Pending) -> dict[str, str]:
    # The backend's own notes stand beside the rest.
    return {**sample.notes, "backend": sample.backend, "reason": sample.reason}


def _to_pending(stored: Mapping[str, str]) -> Pending:
    notes = dict(stored)
    return Pending(backend=notes.pop("backend"), reason=notes.pop("reason", ""), notes=notes)


def to_item(job: Job) -> dict[str, Any]:
    """Return the attributes of a job that was just made; `to_job` reads them."""
    return {
        "key_id": text(job.key_id),
        "correlation_id": text(job.correlation_id),
        "status": text(job.status),
        "params": text(json.dumps(job.params.as_dict())),
        "metadata": text(json.dumps(dict(job.metadata))),
        "backend": text(job.backend),
        "via": text(job.via),
        "created_ms": number(job.created_ms),
        "deadline_at": number(job.deadline_at),
        "attempts": number(0),
        **receipt(job.credits),
        "price_version": text(job.credits.price_version),
        **({"source": text(json.dumps(asdict(job.source)))} if job.source else {}),
        **({"waited_until": number(job.waited_until)} if job.waited_until else {}),
        **(end(job) if job.status.is_terminal else {"due_at": number(job.due_at or job.deadline_at)}),
    }


def end(job: Job) -> dict[str, Any]:
    """Return the attributes that tell when and of what a job ended."""
    return {
        "completed_ms": number(job.completed_ms or 0),
        "error_code": text(job.error_code),
        "error_detail": text(job.error_detail),
    }


def receipt(credits: Receipt) -> dict[str, Any]:  # noqa: A002 (what they are called)
    """Return the attributes of a job that hold its amounts."""
    return {name: number(getattr(credits, name)) for name in ("reserved", "charged", "released")}


def expiry(item: Item) -> float:
    """Return when an item is gone, in epoch seconds, whether or not it has been deleted by then."""
    return integer_in(item, "expires_at") if "expires_at" in item else float("inf")


def to_job(item: Item) -> Job:
    """Read a job from its item. Raises `NotUnderstood` when its form is none that this version knows."""
    try:
        return _to_job(item)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise NotUnderstood("The job is stored in a form that this version of the service does not know") from None


def readable(items: Iterable[Item]) -> Iterator[Job]:
    """Yield the jobs of items, without those that cannot be read: they must not hide the others."""
    for item in items:
        try:
            yield to_job(item)
        except NotUnderstood:
            logger.error("unreadable job", key=item["sk"])


def _to_job(item: Item) -> Job:

    def integer(name: str) -> int | None:
        return integer_in(item, name) if name in item else None

    def stored(name: str, empty: str) -> Any:
        return json.loads(string_in(item, name) or empty)

    source = known_fields(Source, stored("source", "{}")) if "source" in item else None
    # The first version did not write it down.
    was = Via.INBOX if source and source.key.startswith("inbox/") else Via.API
    return Job(
        id=string_in(item, "sk").removeprefix("JOB#"),
        team=string_in(item, "pk").removeprefix("TEAM#"),
        key_id=string_in(item, "key_id"),
        correlation_id=string_in(item, "correlation_id"),
        status=Status(string_in(item, "status")),
        params=known_fields(Img2ImgParams, stored("params", "{}")),
        metadata=stored("metadata", "{}"),
        backend=string_in(item, "backend"),
        backend_reason=string_in(item, "backend_reason"),
        via=Via(string_in(item, "via") or was),
        source=source,
        created_ms=integer_in(item, "created_ms"),
        started_ms=integer("started_ms"),
        completed_ms=integer("completed_ms"),
        due_at=integer("due_at"),
        deadline_at=integer_in(item, "deadline_at"),
        attempts=integer_in(item, "attempts"),
        failures={int(index): count for index, count in stored("failures", "{}").items()},
        lease=string_in(item, "lease") or None,
        outputs=tuple(
            known_fields(Output, {**output, "status": OutputStatus(output["status"])})
            for output in stored("outputs", "[]")
        ),
        pending={int(index): _to_pending(sample) for index, sample in stored("pending", "{}").items()},
        look_ms=integer("look_ms") or None,
        waited_until=integer("waited_until"),
        waits_for=Wait(string_in(item, "waits_for")) if string_in(item, "waits_for") else None,
        error_code=string_in(item, "error_code"),
        error_detail=string_in(item, "error_detail"),
        credits=Receipt(
            reserved=integer_in(item, "reserved"),
            charged=integer_in(item, "charged"),
            released=integer_in(item, "released"),
            price_version=string_in(item, "price_version"),
        ),
    )
