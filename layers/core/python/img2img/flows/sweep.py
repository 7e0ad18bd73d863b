"""Look after the jobs that no message looks after any more."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from aws_lambda_powertools import Logger

from img2img import observe
from img2img.errors import DeadlineExceeded
from img2img.flows import ending
from img2img.jobs.job import DEADLINE_PASSED, Job, Status, given_up, next_look

if TYPE_CHECKING:
    from img2img.bootstrap import Services

logger = Logger(child=True)


def _look_after(services: Services, job: Job) -> str | None:
    """Return what was done: how the job ended, `resent`, or None when it had moved on."""
    now = int(services.clock())
    if not services.understands(job):
        logger.error("stored by a newer version", correlation_id=job.correlation_id, job_id=job.id, team=job.team)
        return None
    if job.status is Status.AWAITING_UPLOAD:
        return _status_of(ending.expire(services, job))
    # An attempt may have stored pictures before it crashed, and the endpoint may have answered unheard: a worker finds
    # them, and ends the job with them.
    grace = services.settings.lease_seconds if job.attempts or job.pending else 0
    if now >= job.deadline_at + grace:
        if job.source:
            # If this sweep dies before it has published, a worker does.
            services.queue.send(job)
        return _status_of(ending.finish(services, given_up(job, DeadlineExceeded(DEADLINE_PASSED))))
    # First sent, then postponed: a message too many does no harm, a lost one would.
    services.queue.send(job)
    # A claimed job stays as it is: its lease has run out, and the worker that gets the message claims it.
    if job.lease is None:
        services.jobs.postpone(job, due_at=next_look(job, now))
    logger.info("job resent", correlation_id=job.correlation_id, job_id=job.id, team=job.team)
    return "resent"


def _status_of(ended: Job | None) -> str | None:
    return ended.status if ended else None


def sweep(services: Services) -> Counter[str]:
    """Fail what is past its deadline, cancel what waits for an upload in vain, and send again what was forgotten or
    whose worker died.

    Returns how many jobs `failed`, `succeeded` in part, were `canceled`, `resent`, or `skipped` for any trouble.
    Two sweeps at once do no harm.
    """
    done: Counter[str] = Counter()
    for job in services.jobs.overdue():
        try:
            outcome = _look_after(services, job)
        except Exception as error:  # noqa: BLE001 (one job's trouble keeps no other waiting; the next sweep finds it)
            observe.log_unexpected(error)
            outcome = "skipped"
        if outcome:
            done[outcome] += 1
    return done


def low_balances(services: Services) -> list[str]:
    """Return the teams in service that have been topped up and are low on credits now."""
    low = [
        team.id
        for team in services.teams.all()
        if team.enabled and team.account.added and team.account.balance < services.settings.low_balance * 1000
    ]
    if low:
        # A warning, for whoever keeps no lower level: the alarm leads to this line.
        logger.warning("low on credits", teams=low[:100])
    return low
