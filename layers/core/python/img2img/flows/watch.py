"""Look at a job until it has ended, and read what it came to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from aws_lambda_powertools import Logger

from img2img.aws import AwsError
from img2img.jobs.job import Job, Output

if TYPE_CHECKING:
    from img2img.bootstrap import Services

logger = Logger(child=True)


def watch(services: Services, job: Job, seconds: float) -> Job:
    """Return the job as soon as it has ended, else as it is after `seconds`.

    Each look is one read; they start close together, for a backend takes 3 to 8 s, and grow apart.
    """
    until = services.clock() + seconds
    pause = 0.2
    while not job.status.is_terminal and (left := until - services.clock()) > 0:
        services.sleep(min(pause, left))
        pause = min(pause * 1.25, 1.0)
        try:
            job = services.jobs.get(job.team, job.id)
        except AwsError as error:
            # The job exists: an error now would make a caller without an idempotency key create, and pay, another.
            logger.warning("job not read", error=type(error).__name__, job_id=job.id)
    return job


def pictures(services: Services, outputs: Sequence[Output]) -> list[bytes] | None:
    """Return the outputs' bytes, or None when S3 does not give them now: their URLs remain."""
    try:
        return [services.storage.get_output(output) for output in outputs]
    except AwsError as error:
        logger.warning("output not read", error=type(error).__name__)
        return None


def balance(services: Services, team: str) -> int | None:
    """Return a team's balance, or None when it cannot be read now: an answer that is paid for goes out without it."""
    try:
        return services.credits.account(team).balance
    except AwsError as error:
        logger.warning("balance not read", error=type(error).__name__)
        return None
