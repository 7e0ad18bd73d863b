"""Log lines and metrics, as every function writes them."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from aws_lambda_powertools import Logger, Metrics, single_metric
from aws_lambda_powertools.metrics import EphemeralMetrics, MetricUnit

from img2img.errors import InsufficientCredits, ServiceError

logger = Logger(child=True)
# All of a process's `Metrics` share what they hold.
metrics = Metrics()


def log_unexpected(error: Exception) -> None:
    """Log an error that nothing foresaw: its type and place, for its message may hold a prompt."""
    logger.error("unexpected", error=type(error).__name__, stack=traceback.format_tb(error.__traceback__))


def describe(*, correlation_id: str, job_id: str) -> None:
    """Tie the metrics of this invocation to a request and a job."""
    metrics.add_metadata("correlation_id", correlation_id)
    metrics.add_metadata("job_id", job_id)


def job_created(*, correlation_id: str, job_id: str, samples: int, replayed: bool) -> None:
    """Log and count a job that a request created, or found again."""
    logger.info("job replayed" if replayed else "job created", samples=samples)
    if not replayed:
        metrics.add_metric("JobsCreated", MetricUnit.Count, 1)
        describe(correlation_id=correlation_id, job_id=job_id)


def refused(error: ServiceError, *, correlation_id: str) -> None:
    """Log a request that was refused, and count one that its team cannot pay."""
    logger.info("refused", code=error.code)
    if isinstance(error, InsufficientCredits):
        # A warning, for whoever keeps no lower level: the alarm leads to this line.
        logger.warning("too few credits", price=error.price, balance=error.balance)
        metrics.add_metadata("correlation_id", correlation_id)
        metrics.add_metric("InsufficientCredits", MetricUnit.Count, 1)


def job_ended(
    *,
    correlation_id: str,
    job_id: str,
    team: str,
    status: str,
    code: str,
    backend: str,
    backend_reason: str,
    queue_ms: float | None,
    backend_ms: float | None,
) -> None:
    """Log and count how a job ended, a failure also under its code."""
    logger.info(
        "job ended",
        correlation_id=correlation_id,
        job_id=job_id,
        team=team,
        status=status,
        code=code or None,
        backend=backend,
        backend_reason=backend_reason or None,
    )
    # A line of its own: whatever else is measured meanwhile, of other jobs too, it names its job.
    ended = EphemeralMetrics()
    ended.add_metadata("correlation_id", correlation_id)
    ended.add_metadata("job_id", job_id)
    ended.add_metric("JobsSucceeded", MetricUnit.Count, int(status == "succeeded"))
    ended.add_metric("JobsFailed", MetricUnit.Count, int(status == "failed"))
    ended.add_metric("JobsCanceled", MetricUnit.Count, int(status == "canceled"))
    ended.add_metric("BackendFallbacks", MetricUnit.Count, int(bool(backend_reason)))
    if queue_ms is not None:
        ended.add_metric("QueueTime", MetricUnit.Milliseconds, queue_ms)
    if backend_ms is not None:
        ended.add_metric("BackendTime", MetricUnit.Milliseconds, backend_ms)
    if "backend_gone" in (code, backend_reason):
        # Also where another backend serves in its place: somebody has to know.
        ended.add_metric("BackendGone", MetricUnit.Count, 1)
    ended.flush_metrics()
    if code:
        with single_metric("FailuresByCode", MetricUnit.Count, 1) as failures:
            failures.add_dimension("code", code)
            failures.add_metadata("correlation_id", correlation_id)
            failures.add_metadata("job_id", job_id)


def job_run(*, retry_after: int | None, remaining_credits: float | None) -> None:
    """Measure one run of a job: whether it has to be run again, and what Segmind said of its account."""
    if remaining_credits is not None:
        metrics.add_metric("SegmindRemainingCredits", MetricUnit.Count, remaining_credits)
    if retry_after is not None:
        metrics.add_metric("BackendRetries", MetricUnit.Count, 1)


@contextmanager
def flushed() -> Iterator[None]:
    """Write what was measured at the end. Powertools' own decorator warns, outside JSON, when that is nothing."""
    try:
        yield
    finally:
        if metrics.metric_set:
            metrics.flush_metrics()
        metrics.clear_metrics()
