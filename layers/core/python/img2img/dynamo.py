"""DynamoDB's forms of values and errors, and a job's item."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from botocore.exceptions import ClientError

from img2img.backends import Pending
from img2img.jobs import Job, Output, OutputStatus, Source, Status, Wait
from img2img.params import Img2ImgParams
from img2img.prices import Receipt

T = TypeVar("T")
Item = Mapping[str, Any]

# A conflict means that another writer holds the item for milliseconds. A team's item is written by all of its jobs: 50
# at once need some 50 rounds of 10 ms, the tries below up to 6 s.
_CONFLICT_TRIES = 16
_LONGEST_PAUSE = 0.5
# The last two are what a plain call's throttling, which botocore waits out, is called inside a transaction.
_PASSING = {"TransactionConflict", "ThrottlingError", "ProvisionedThroughputExceeded"}
# SnapStart copies the state of the `random` module's own generator into every clone.
_jitter = random.SystemRandom()


def text(value: str) -> dict[str, str]:
    """Return a DynamoDB string."""
    return {"S": value}


def number(value: int) -> dict[str, str]:
    """Return a DynamoDB number."""
    return {"N": str(value)}


def error_code(error: ClientError) -> str:
    """Return the name that AWS gives an error."""
    return str(error.response.get("Error", {}).get("Code"))


def cancellations(error: ClientError) -> list[str]:
    """Return why each write of a transaction was refused, in request order; "None" for a good one."""
    return [str(reason.get("Code")) for reason in error.response.get("CancellationReasons", [])]


def _is_conflict(error: ClientError) -> bool:
    """Whether another transaction held an item; botocore retries neither form of it."""
    if error_code(error) == "TransactionCanceledException":
        return not _PASSING.isdisjoint(cancellations(error))
    return error_code(error) == "TransactionConflictException"


def through_conflicts(call: Callable[[], T]) -> T:
    """Make a call again while another transaction holds one of its items."""
    for attempt in range(_CONFLICT_TRIES):
        try:
            return call()
        except ClientError as error:
            if attempt == _CONFLICT_TRIES - 1 or not _is_conflict(error):
                raise
            time.sleep(_jitter.uniform(0, min(0.01 * 2**attempt, _LONGEST_PAUSE)))
    raise AssertionError("unreachable")


def outputs_json(outputs: tuple[Output, ...]) -> dict[str, str]:
    """Return the attribute that keeps the outputs."""
    return text(json.dumps([asdict(output) for output in outputs]))


def pending_json(pending: Mapping[int, Pending]) -> dict[str, str]:
    """Return the attribute that keeps the samples on their way."""
    return text(json.dumps({index: asdict(sample) for index, sample in pending.items()}))


def new_job(job: Job) -> dict[str, Any]:
    """Return the attributes of a job that was just made; `to_job` reads them."""
    return {
        "key_id": text(job.key_id),
        "correlation_id": text(job.correlation_id),
        "status": text(job.status),
        "params": text(json.dumps(job.params.as_dict())),
        "metadata": text(json.dumps(dict(job.metadata))),
        "backend": text(job.backend),
        "created_ms": number(job.created_ms),
        "deadline_at": number(job.deadline_at),
        "attempts": number(0),
        **receipt(job.credits),
        "price_version": text(job.credits.price_version),
        **({"source": text(json.dumps(asdict(job.source)))} if job.source else {}),
        **(_ended(job) if job.status.is_terminal else {"due_at": number(job.due_at or job.deadline_at)}),
    }


def _ended(job: Job) -> dict[str, Any]:
    return {
        "completed_ms": number(job.completed_ms or 0),
        "error_code": text(job.error_code),
        "error_detail": text(job.error_detail),
    }


def receipt(credits: Receipt) -> dict[str, Any]:  # noqa: A002 (what they are called)
    """Return the attributes of a job that hold its amounts."""
    return {name: number(getattr(credits, name)) for name in ("reserved", "charged", "released")}


def to_job(item: Item) -> Job:
    """Read a job from its item."""

    def string(name: str) -> str:
        return str(item[name]["S"]) if name in item else ""

    def integer(name: str) -> int | None:
        return int(item[name]["N"]) if name in item else None

    return Job(
        id=string("sk").removeprefix("JOB#"),
        team=string("pk").removeprefix("TEAM#"),
        key_id=string("key_id"),
        correlation_id=string("correlation_id"),
        status=Status(string("status")),
        params=Img2ImgParams(**json.loads(string("params"))),
        metadata=json.loads(string("metadata")),
        backend=string("backend"),
        backend_reason=string("backend_reason"),
        source=Source(**json.loads(string("source"))) if "source" in item else None,
        created_ms=integer("created_ms") or 0,
        started_ms=integer("started_ms"),
        completed_ms=integer("completed_ms"),
        due_at=integer("due_at"),
        deadline_at=integer("deadline_at") or 0,
        attempts=integer("attempts") or 0,
        failures={int(index): count for index, count in json.loads(string("failures") or "{}").items()},
        lease=string("lease") or None,
        outputs=tuple(
            Output(**{**output, "status": OutputStatus(output["status"])})
            for output in json.loads(string("outputs") or "[]")
        ),
        pending={int(index): Pending(**sample) for index, sample in json.loads(string("pending") or "{}").items()},
        waits_for=Wait(string("waits_for")) if string("waits_for") else None,
        error_code=string("error_code"),
        error_detail=string("error_detail"),
        credits=Receipt(
            reserved=integer("reserved") or 0,
            charged=integer("charged") or 0,
            released=integer("released") or 0,
            price_version=string("price_version"),
        ),
    )
