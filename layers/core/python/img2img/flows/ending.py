"""The end of a job: the one place through which every job ends, whoever ends it, and what follows from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from img2img import observe
from img2img.errors import NotFound, NotUnderstood
from img2img.flows.outbox import publish
from img2img.jobs.job import Job, Status

if TYPE_CHECKING:
    from img2img.bootstrap import Services


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
        follow(services, job)
    return job


def delete(services: Services, team: str, job_id: str) -> None:
    """Delete a job and its pictures. Raises `NotFound` and, where it cannot be ended here, `NotUnderstood`."""
    # First canceled, so that a worker removes what it stores later; last the item, so that a crash can be repeated.
    job = cancel(services, team, job_id)
    if not job.status.is_terminal:
        raise NotUnderstood(f"The job is {job.status}, which this version of the service does not know")
    services.storage.delete_job(job)
    services.jobs.delete(team, job.id)


def follow(services: Services, job: Job) -> None:
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
        backend_ms=job.generation_seconds * 1000 if job.outputs else None,
    )
    # If this fails, the job's message comes again: see `catch_up`.
    publish(services, job)


def _followed(services: Services, ended: Job | None) -> Job | None:
    if ended:
        follow(services, ended)
    return ended


def catch_up(services: Services, team: str, job_id: str, job: Job | None) -> None:
    """Do what a worker that crashed may have left undone after a job's end. `job` is None when it was deleted.

    It is published or, if it was canceled or deleted meanwhile, what was generated is removed. While another worker has
    the job, the objects are that worker's as well and stay.
    """
    if job is None or job.status is Status.CANCELED:
        services.storage.delete_outputs(team, job_id)
    elif job.status.is_terminal:
        publish(services, job)


def give_way(services: Services, job: Job) -> None:
    """Leave a job that moved on while it was run."""
    now: Job | None
    try:
        now = services.jobs.get(job.team, job.id)
    except NotFound:
        now = None
    catch_up(services, job.team, job.id, now)
