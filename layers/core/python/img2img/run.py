"""Run one job: claim it, generate what is missing, store it, finish."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aws_lambda_powertools import Logger
from botocore.exceptions import BotoCoreError, ClientError

from img2img import images
from img2img.create import RESEND_AFTER
from img2img.errors import (
    BackendBroken,
    BackendRateLimited,
    DeadlineExceeded,
    InternalError,
    JobError,
    NotFound,
    OutputBlocked,
    UnsupportedImage,
)
from img2img.jobs import (
    DEADLINE_PASSED,
    Job,
    Output,
    OutputStatus,
    Status,
    failed_output,
    given_up,
    missing,
    with_outputs,
)
from img2img.outbox import publish

if TYPE_CHECKING:
    from img2img.backends import Backend
    from img2img.bootstrap import Services

logger = Logger(child=True)

# An attempt ends in a crash, in an error that is safe to repeat, or in S3 not taking a picture. So a sample is asked
# for three times at most, waits for a rate limit aside.
MAX_ATTEMPTS = 3


class _StorageTrouble(InternalError):
    """S3 took no picture for now: another attempt pays for it once more."""

    retryable = True


def _not_stored(error: BotoCoreError | ClientError) -> JobError:
    """Return what became of a picture that S3 did not take. A refusal would come again, and cost the picture again."""
    status = error.response["ResponseMetadata"]["HTTPStatusCode"] if isinstance(error, ClientError) else 503
    kind = _StorageTrouble if status == 429 or status >= 500 else InternalError
    return kind("The output could not be stored")


@dataclass(frozen=True)
class Run:
    """What a run came to.

    `job` is None when there was nothing to do, or the job moved on meanwhile; `retry_after` is seconds until the next
    try. `remaining_credits` is what Segmind last said of its account.
    """

    job: Job | None = None
    retry_after: int | None = None
    remaining_credits: float | None = None


@dataclass
class _Sample:
    index: int
    output: Output | None = None
    error: JobError | None = None
    remaining_credits: float | None = None


def _generate(services: Services, backend: Backend, job: Job, image: bytes, index: int) -> _Sample:
    sample = _Sample(index)
    seed = job.params.seed_of(index)
    try:
        generated = backend.generate(image, job.params, seed)
        sample.remaining_credits = generated.remaining_credits
        data = generated.data
        picture = images.examine(data)
        if picture.black:
            sample.output = Output(
                index=index,
                status=OutputStatus.BLOCKED,
                seed=seed,
                seconds=generated.seconds,
                error_code=OutputBlocked.code,
            )
            return sample
        if wanted := job.params.output_format:
            data = images.convert(data, wanted)
            picture = replace(picture, content_type=f"image/{wanted}")
        sample.output = services.storage.put_output(job, index, data, picture, generated.seconds)
    except UnsupportedImage:
        sample.error = BackendBroken("The backend's answer was no image")
    except JobError as error:
        sample.error = error
    except (BotoCoreError, ClientError) as error:
        logger.warning("output not stored", error=type(error).__name__, index=index)
        sample.error = _not_stored(error)
    return sample


def _backoff(job: Job, errors: list[JobError], now: float) -> int | None:
    """Return the seconds to wait before the next attempt, or None when there is to be none."""
    limited = [error for error in errors if isinstance(error, BackendRateLimited)]
    if len(limited) < len(errors) and job.attempts >= MAX_ATTEMPTS:
        return None
    waits = [error.retry_after or 0 for error in limited]
    if len(limited) < len(errors):
        waits.append(2.0**job.attempts)
    wait = math.ceil(max(waits))
    return wait if now + wait < job.deadline_at else None


def run_job(services: Services, team: str, job_id: str) -> Run:
    """Run a job to its end, or to where it has to wait.

    A second delivery of the same message finds the job claimed or ended and changes nothing. Raises botocore's
    `ClientError` and `BotoCoreError`, with the job released for another attempt where that was possible.
    """
    claimed, job = services.jobs.claim(team, job_id, lease_seconds=services.settings.lease_seconds)
    if job is None or not claimed:
        _tidy(services, team, job_id, job)
        return Run()
    try:
        return _run_claimed(services, job)
    except (BotoCoreError, ClientError):
        # Otherwise the next delivery would wait for the lease to run out.
        due_at = min(int(services.clock()) + RESEND_AFTER, job.deadline_at)
        with suppress(BotoCoreError, ClientError):
            services.jobs.release(job, due_at=due_at, counts=True)
        raise


def _run_claimed(services: Services, job: Job) -> Run:
    if job.attempts > 1:
        # An earlier attempt may have crashed with pictures already paid for and stored.
        job = with_outputs(job, services.storage.stored_outputs(job))
    if services.clock() >= job.deadline_at:
        job = given_up(job, DeadlineExceeded(DEADLINE_PASSED))
    elif job.attempts > MAX_ATTEMPTS:
        job = given_up(job, InternalError("The job could not be completed"))
    indexes = missing(job)
    if not indexes:
        return _finish(services, job)
    image = services.storage.get_input(job)
    # Made before there are threads: neither boto3's session nor `cached_property` makes one thing once for all of them.
    backend = services.backend
    with ThreadPoolExecutor(len(indexes)) as pool:
        samples = list(pool.map(lambda index: _generate(services, backend, job, image, index), indexes))
    return _conclude(services, job, samples)


def _conclude(services: Services, job: Job, samples: list[_Sample]) -> Run:
    """Keep what ended, wait for what may be asked for again, or finish."""
    done = [sample.output for sample in samples if sample.output]
    errors = {sample.index: sample.error for sample in samples if sample.error}
    again = [error for error in errors.values() if error.retryable]
    left = min((s.remaining_credits for s in samples if s.remaining_credits is not None), default=None)
    wait = _backoff(job, again, services.clock()) if again else None
    failed = [failed_output(job, index, e) for index, e in errors.items() if wait is None or not e.retryable]
    job = with_outputs(job, [*done, *failed])
    if wait is None:
        return replace(_finish(services, job), remaining_credits=left)
    # The message's own return comes first; `sweep` only steps in when that is lost.
    due_at = min(int(services.clock()) + wait + RESEND_AFTER, job.deadline_at)
    counts = not all(isinstance(error, BackendRateLimited) for error in again)
    if not services.jobs.release(job, due_at=due_at, counts=counts):
        return replace(_discard(services, job), remaining_credits=left)
    logger.info("job waits", codes=sorted({e.code for e in again}), seconds=wait, attempt=job.attempts)
    return Run(job, retry_after=wait, remaining_credits=left)


def _finish(services: Services, job: Job) -> Run:
    ended = services.jobs.finish(job)
    if ended is None:
        return _discard(services, job)
    # If this fails, the message comes again and finds the job ended: see `_tidy`.
    publish(services, ended)
    return Run(ended)


def _discard(services: Services, job: Job) -> Run:
    """Leave a job that moved on while it was run."""
    logger.info("job moved on while it was run")
    now: Job | None
    try:
        now = services.jobs.get(job.team, job.id)
    except NotFound:
        now = None
    _tidy(services, job.team, job.id, now)
    return Run()


def _tidy(services: Services, team: str, job_id: str, now: Job | None) -> None:
    """Do for an ended job what a worker that crashed may have left undone: publish it or, if it was canceled or deleted
    meanwhile, remove what was generated.

    When another worker took the job over, the objects are that worker's as well and stay.
    """
    if now is None or now.status is Status.CANCELED:
        services.storage.delete_outputs(team, job_id)
    elif now.status.is_terminal:
        publish(services, now)
