"""Run one job: claim it, generate what is missing, store it, finish."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aws_lambda_powertools import Logger

from img2img.aws import AwsError
from img2img.backends import Backend, GeneratedImage, Notice, Pending, Wait
from img2img.errors import BackendRateLimited, DeadlineExceeded, InternalError, JobError, NotFound
from img2img.flows import ending
from img2img.flows.generate import Sample, StorageTrouble, UnderWay, ask_for, is_awaited, take_answers
from img2img.flows.intake import send
from img2img.jobs.job import (
    DEADLINE_PASSED,
    RESEND_AFTER,
    Job,
    Status,
    failed_output,
    missing,
    next_look,
    served,
    tries,
    with_outputs,
)

if TYPE_CHECKING:
    from img2img.bootstrap import Services

logger = Logger(child=True)

# An attempt ends in a crash, in an error that is safe to repeat, or in S3 not taking a picture. So a sample is asked
# for three times at most, waits for a rate limit aside.
MAX_ATTEMPTS = 3
# While a caller waits the worker looks itself, so often.
LOOK_SECONDS = 1.0
# A look that is due within this time is on its way: messages come no earlier than asked for, by any clock.
_ABOUT_NOW_MS = 500


@dataclass(frozen=True)
class Run:
    """What a run came to.

    `job` is None when there was nothing to do, or the job moved on meanwhile; `held` says that it is another worker's
    now. `retry_after` is seconds until the next try. `remaining_credits` is what Segmind last said of its account.
    """

    job: Job | None = None
    held: bool = False
    retry_after: int | None = None
    remaining_credits: float | None = None


def _is_limit(error: JobError | None) -> bool:
    # To wait for a rate limit is no failure.
    return isinstance(error, BackendRateLimited)


def _with_failures(job: Job, samples: list[Sample]) -> Job:
    failures = dict(job.failures)
    for sample in samples:
        if sample.error and sample.error.retryable and not _is_limit(sample.error):
            failures[sample.index] = failures.get(sample.index, 0) + 1
    return replace(job, failures=failures)


def _backoff(job: Job, again: Mapping[int, JobError], now: float) -> int | None:
    """Return the seconds to wait before samples are asked for again, or None when there is no time left for it."""
    if not again:
        return None
    waits = [
        (error.retry_after or 0) if _is_limit(error) else 2.0 ** tries(job, index) for index, error in again.items()
    ]
    wait = math.ceil(max(waits))
    return wait if now + wait < job.deadline_at else None


def run_job(services: Services, team: str, job_id: str, notice: Notice | None = None, *, is_look: bool = False) -> Run:
    """Run a job to its end, or to where it has to wait; `notice` is what a backend said of one of its samples, and a
    look is for those that are under way.

    A second delivery of the same message finds the job claimed or ended and changes nothing. Raises botocore's
    `ClientError` and `BotoCoreError`, with the job released for another attempt where that was possible.
    """
    claimed, job = services.jobs.claim(team, job_id, lease_seconds=services.settings.lease_seconds)
    if job is None or not claimed:
        _tidy_up(services, team, job_id, job)
        return Run(held=job is not None and not job.status.is_terminal)
    if not services.understands(job):
        # Until the version that stored it is back, whose sweep finds it.
        services.jobs.give_back(job)
        logger.error("stored by a newer version", job_id=job_id, team=team)
        return Run(held=True)
    waiting = {index: call for index, call in job.pending.items() if services.follows(call.backend)}
    job = replace(job, pending=waiting)
    under_way = UnderWay(services, job)
    with _released_on_trouble(services, job, under_way, counts=False):
        answers = take_answers(services, job, notice)
    with _released_on_trouble(services, job, under_way, counts=True):
        return _run_claimed(services, job, answers, notice, under_way, is_look=is_look)


@contextmanager
def _released_on_trouble(services: Services, job: Job, under_way: UnderWay, *, counts: bool) -> Iterator[None]:
    try:
        yield
    except AwsError:
        # Otherwise the next delivery would wait for the lease to run out.
        due_at = min(int(services.clock()) + RESEND_AFTER, job.deadline_at)
        with suppress(*AwsError):
            services.jobs.release(replace(job, pending=under_way.pending), due_at=due_at, counts=counts)
        raise


def collect(services: Services, notice: Notice) -> Run:
    """Take the answer that a notice is about into its job; raises as `run_job` does.

    A notice that comes twice, or after its job's end, changes nothing; one that comes before the worker has written
    down what it asked for finds the job `held`, and has to come again.
    """
    team, job_id, _ = notice.name.split("/", 2)
    return run_job(services, team, job_id, notice)


def _run_claimed(
    services: Services,
    job: Job,
    samples: list[Sample],
    notice: Notice | None,
    under_way: UnderWay,
    *,
    is_look: bool,
) -> Run:
    samples, instead = _served_instead(services, job, samples)
    over = {sample.index for sample in samples if sample.is_over}
    absent = [index for index in missing(job) if index not in over and index not in job.pending]
    if notice or is_look:
        # The others have messages of their own, which come when they may be asked for again.
        absent = [index for index in absent if notice and index == notice.index]
    absent = sorted({*absent, *instead})
    if absent and job.attempts > 1:
        # An earlier attempt may have crashed with pictures already paid for and stored.
        job = with_outputs(job, services.storage.stored_outputs(job))
        absent = [index for index in absent if index in missing(job)]
    if services.clock() >= job.deadline_at:
        left = [index for index in missing(job) if index not in over]
        samples += [Sample(index=index, error=DeadlineExceeded(DEADLINE_PASSED)) for index in left]
    else:
        # Only crashes lead here: who counts a failure also sees when it was the last one.
        given_up = [index for index in absent if tries(job, index) >= MAX_ATTEMPTS]
        samples += [Sample(index=index, error=InternalError("The job could not be completed")) for index in given_up]
        asked_for = [index for index in absent if index not in given_up]
        samples += ask_for(services, job, asked_for, instead, under_way)
        if not notice:
            samples = _watched(services, job, samples, under_way)
    return _conclude(services, job, samples, told=notice is not None)


def _served_instead(services: Services, job: Job, samples: list[Sample]) -> tuple[list[Sample], dict[int, Backend]]:
    """Return the samples without those that another backend serves now, and what serves these."""
    instead = {
        sample.index: backend
        for sample in samples
        if sample.error
        and (call := job.pending.get(sample.index))
        and (backend := services.instead(call, sample.error))
    }
    return [sample for sample in samples if sample.index not in instead], instead


def _watched(services: Services, job: Job, samples: list[Sample], under_way: UnderWay) -> list[Sample]:
    """Look again and again at what is under way, for as long as the job's caller waits."""
    while is_awaited(services, job):
        over = {sample.index for sample in samples if sample.is_over}
        calls = {
            index: call for index, call in under_way.pending.items() if index in missing(job) and index not in over
        }
        waits = _look_waits(services, calls)
        if not waits or None in waits:
            break
        services.sleep(LOOK_SECONDS)
        looked_at = replace(job, pending=calls)
        found, instead = _served_instead(services, looked_at, take_answers(services, looked_at, None))
        found = [sample for sample in found if sample.is_over]
        found += ask_for(services, job, sorted(instead), instead, under_way)
        seen = {sample.index for sample in found}
        samples = [*(sample for sample in samples if sample.index not in seen), *found]
    return samples


def _conclude(services: Services, job: Job, samples: list[Sample], *, told: bool) -> Run:
    """Keep what ended, wait for what is on its way or may be asked for again, or finish."""
    now = services.clock()
    job = _with_failures(job, samples)
    again = _repeatable(job, samples)
    wait = _backoff(job, again, now)
    failed = [
        failed_output(job, sample.index, sample.error)
        for sample in samples
        if sample.error and (wait is None or sample.index not in again)
    ]
    delivered = [sample.output for sample in samples if sample.output]
    job = _on_its_way(with_outputs(job, [*delivered, *failed]), samples)
    run = Run(remaining_credits=_credits_left(samples))
    if not missing(job):
        ended = ending.finish(services, job)
        return replace(run, job=ended) if ended else _moved_on(services, job, run)
    look = _look_after(services, job, now)
    if look:
        job = replace(job, look_ms=int((now + look) * 1000))
    job = replace(job, waits_for=_what_for(services, job, told=told))
    # The backend's notice, or the message that is to come, comes first; `sweep` only steps in when that is lost.
    message = max(wait or 0, look or 0, ((job.look_ms or 0) / 1000 - now if job.pending else 0))
    due_at = min(int(now + message) + RESEND_AFTER, job.deadline_at) if message > 0 else next_look(job, int(now))
    if not services.jobs.release(job, due_at=due_at, counts=False):
        return _moved_on(services, job, run)
    if look:
        # A message of its own: how often one comes back is counted.
        send(services, job, after=look, look=True)
    logger.info(
        "job waits",
        codes=sorted({error.code for error in again.values()}),
        pending=len(job.pending),
        seconds=wait,
        failures=sum(job.failures.values()),
    )
    return replace(run, job=job, retry_after=wait)


def _look_waits(services: Services, calls: Mapping[int, Pending]) -> list[float | None]:
    """Return after how many seconds each call is to be looked at, None for one whose backend gives notice."""
    return [services.async_backend(call.backend).look_after(call) for call in calls.values()]


def _look_after(services: Services, job: Job, now: float) -> int | None:
    """Return after how many seconds a message is to look at what is under way; None if none is needed, or one comes."""
    due = [wait for wait in _look_waits(services, job.pending) if wait is not None]
    is_coming = (job.look_ms or 0) > now * 1000 + _ABOUT_NOW_MS
    return math.ceil(min(due)) if due and not is_coming else None


def _moved_on(services: Services, job: Job, run: Run) -> Run:
    """Leave a job that moved on while it was run."""
    logger.info("job moved on while it was run")
    now: Job | None
    try:
        now = services.jobs.get(job.team, job.id)
    except NotFound:
        now = None
    _tidy_up(services, job.team, job.id, now)
    return run


def _tidy_up(services: Services, team: str, job_id: str, job: Job | None) -> None:
    """Leave a job that is not this worker's as it has to be. `job` is None when it was deleted.

    While another worker has it, the objects are that worker's as well and stay.
    """
    if job is None or job.status is Status.CANCELED:
        services.storage.delete_outputs(team, job_id)
    elif job.status.is_terminal:
        ending.catch_up(services, job)


def _repeatable(job: Job, samples: list[Sample]) -> dict[int, JobError]:
    """Return the errors, by sample, after which the sample may be asked for again."""
    return {
        sample.index: sample.error
        for sample in samples
        if sample.error
        and sample.error.retryable
        and (_is_limit(sample.error) or tries(job, sample.index) < MAX_ATTEMPTS)
    }


def _credits_left(samples: list[Sample]) -> float | None:
    answers = [sample.answer for sample in samples if isinstance(sample.answer, GeneratedImage)]
    return min((a.remaining_credits for a in answers if a.remaining_credits is not None), default=None)


def _what_for(services: Services, job: Job, *, told: bool) -> Wait | None:
    """Return what the samples on their way wait for: one stands for all."""
    call = next(iter(job.pending.values()), None)
    return services.async_backend(call.backend).waits_for(answering=told) if call else None


def _on_its_way(job: Job, samples: list[Sample]) -> Job:
    """Return the job with the samples that are pending now, and the backend that serves it."""
    pending = dict(job.pending)
    for sample in samples:
        if isinstance(sample.answer, Pending):
            pending[sample.index] = sample.answer
        elif sample.error and not isinstance(sample.error, StorageTrouble):
            # It has to be asked for again; what only could not be stored is still there to be fetched.
            pending.pop(sample.index, None)
        # One sample that another backend had to serve tells of all.
        if sample.answer and (sample.answer.reason or not job.backend_reason):
            job = served(job, sample.answer)
    absent = set(missing(job))
    return replace(job, pending={index: sample for index, sample in pending.items() if index in absent})
