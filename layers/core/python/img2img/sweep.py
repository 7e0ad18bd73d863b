"""Look after the jobs that no message looks after any more."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from img2img.errors import DeadlineExceeded
from img2img.jobs import DEADLINE_PASSED, Job, Status, given_up, verdict
from img2img.submit import RESEND_AFTER

if TYPE_CHECKING:
    from img2img.bootstrap import Services


def _next_look(job: Job, now: int) -> int:
    """Return when to send a queued job again: ever later, so that a long queue is not filled with repeats."""
    age = now - job.created_ms // 1000
    return min(now + max(RESEND_AFTER, age), max(job.deadline_at, now + RESEND_AFTER))


def sweep(services: Services) -> Counter[str]:
    """Fail what is past its deadline and send again what was forgotten or whose worker died.

    Returns how many jobs `failed`, `succeeded` in part, and were `resent`. Two sweeps at once do no harm.
    """
    done: Counter[str] = Counter()
    for job in services.jobs.overdue():
        now = int(services.clock())
        if now >= job.deadline_at:
            past = given_up(job, DeadlineExceeded(DEADLINE_PASSED))
            ended = services.jobs.finish(past, error=verdict(past))
            if ended:
                done[ended.status] += 1
        # A claimed job stays as it is: its lease has run out, and the worker that gets the message claims it.
        elif job.status is Status.PROCESSING or services.jobs.postpone(job, due_at=_next_look(job, now)):
            services.queue.send(job)
            done["resent"] += 1
    return done
