"""The end of a job: the one place through which every job ends, whoever ends it, and what follows from it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from img2img import observe
from img2img.errors import NotUnderstood, ServiceError
from img2img.flows.intake import Submission, create
from img2img.flows.outbox import publish
from img2img.jobs.job import Job, Status, ended

if TYPE_CHECKING:
    from img2img.bootstrap import Services
    from img2img.jobs.guards import Guard


def finish(services: Services, job: Job) -> Job | None:
    """End a job whose samples have all ended. Returns None, with nothing done, when it has moved on meanwhile."""
    return _followed(services, services.jobs.finish(job))


def expire(services: Services, job: Job) -> Job | None:
    """Cancel a job whose upload did not come. Returns None, with nothing done, when it has come meanwhile."""
    return _followed(services, services.jobs.expire(job))


def cancel(services: Services, team: str, job_id: str) -> Job:
    """Cancel an unfinished job; one that has ended stays as it is. Raises `NotFound`."""
    canceled, job = services.jobs.cancel(team, job_id)
    if canceled:
        _follow(services, job)
    return job


def delete(services: Services, team: str, job_id: str) -> None:
    """Delete a job and its pictures. Raises `NotFound` and, where it cannot be ended here, `NotUnderstood`."""
    # First canceled, so that a worker removes what it stores later; last the item, so that a crash can be repeated.
    job = cancel(services, team, job_id)
    if not job.status.is_terminal:
        raise NotUnderstood(f"The job is {job.status}, which this version of the service does not know")
    services.storage.delete_job(job)
    services.jobs.delete(team, job.id)


def create_failed(services: Services, job: Job, error: ServiceError, guard: Guard | None) -> Submission:
    """Make a job that ends as it is made, with nothing reserved; or find the one that the guard holds."""
    unpaid = replace(job, credits=replace(job.credits, reserved=0))
    made = create(services, ended(unpaid, Status.FAILED, at_ms=job.created_ms, error=error), None, guard)
    if not made.replayed:
        _follow(services, made.job)
    return made


def catch_up(services: Services, job: Job) -> None:
    """Do what whoever ended a job may have left undone when it crashed; twice does no harm."""
    publish(services, job)


def _follow(services: Services, job: Job) -> None:
    """Do what follows from a job's end, right after it: log it, count it, publish it."""
    observe.job_ended(
        correlation_id=job.correlation_id,
        job_id=job.id,
        team=job.team,
        status=job.status,
        code=job.error_code,
        backend=job.backend,
        backend_reason=job.backend_reason,
        queue_ms=job.started_ms - job.created_ms if job.started_ms else None,
        # A job may have ended before any backend saw it.
        backend_ms=job.generation_seconds * 1000 or None,
    )
    # If this fails, the job's message comes again: see `catch_up`.
    publish(services, job)


def _followed(services: Services, job: Job | None) -> Job | None:
    if job:
        _follow(services, job)
    return job
