"""What a job books when it is made and when it ends, in the transaction that writes its own item."""

from __future__ import annotations

from img2img.dynamo import Write
from img2img.jobs.job import Job
from img2img.money.credits import reserve, settle
from img2img.money.usage import count


def opening(table: str, job: Job) -> list[Write]:
    """Return the writes of a job that was just made; refused with `InsufficientCredits` and `TeamDisabled`.

    One that failed before it could run reserves nothing: it is settled for nothing and counted at once.
    """
    if job.status.is_terminal:
        return closing(table, job)
    return reserve(table, job.team, job.id, price=job.credits.reserved, at_ms=job.created_ms)


def closing(table: str, job: Job) -> list[Write]:
    """Return the writes of a job that ended."""
    at_ms = job.completed_ms or 0
    credits = job.credits  # noqa: A001 (what they are called)
    return [
        *settle(table, job.team, job.id, charged=credits.charged, released=credits.released, at_ms=at_ms),
        count(
            table,
            job.team,
            key_id=job.key_id,
            backend=job.backend,
            at_ms=at_ms,
            status=job.status,
            delivered=len(job.delivered),
            charged=credits.charged,
        ),
    ]
