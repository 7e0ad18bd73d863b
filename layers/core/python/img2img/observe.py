"""Log lines and metrics, as every function writes them."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aws_lambda_powertools import Logger, Metrics, single_metric
from aws_lambda_powertools.metrics import MetricUnit

if TYPE_CHECKING:
    from img2img.jobs import Job
    from img2img.run import Run


def log_unexpected(logger: Logger, error: Exception) -> None:
    """Log an error that nothing foresaw: its type and place, for its message may hold a prompt."""
    logger.error("unexpected", error=type(error).__name__, stack=traceback.format_tb(error.__traceback__))


def describe(metrics: Metrics, *, correlation_id: str, job_id: str) -> None:
    """Tie the metrics of this invocation to a request and a job."""
    metrics.add_metadata("correlation_id", correlation_id)
    metrics.add_metadata("job_id", job_id)


def job_ended(logger: Logger, job: Job) -> None:
    """Log how a job ended, and count a failure under its code."""
    logger.info(
        "job ended",
        correlation_id=job.correlation_id,
        job_id=job.id,
        team=job.team,
        status=job.status,
        code=job.error_code or None,
        backend=job.backend,
        backend_reason=job.backend_reason or None,
    )
    if job.error_code:
        with single_metric("FailuresByCode", MetricUnit.Count, 1) as failures:
            failures.add_dimension("code", job.error_code)
            failures.add_metadata("correlation_id", job.correlation_id)
            failures.add_metadata("job_id", job.id)


def measure_run(logger: Logger, metrics: Metrics, run: Run) -> None:
    """Measure what a run came to."""
    if run.remaining_credits is not None:
        metrics.add_metric("SegmindRemainingCredits", MetricUnit.Count, run.remaining_credits)
    if run.retry_after is not None:
        metrics.add_metric("BackendRetries", MetricUnit.Count, 1)
    job = run.job
    if job is None or job.completed_ms is None:
        return
    job_ended(logger, job)
    failed = bool(job.error_code)
    metrics.add_metric("JobsSucceeded", MetricUnit.Count, int(not failed))
    metrics.add_metric("JobsFailed", MetricUnit.Count, int(failed))
    metrics.add_metric("BackendFallbacks", MetricUnit.Count, int(bool(job.backend_reason)))
    if job.started_ms:
        metrics.add_metric("QueueTime", MetricUnit.Milliseconds, job.started_ms - job.created_ms)
    if job.outputs:
        metrics.add_metric("BackendTime", MetricUnit.Milliseconds, job.generation_seconds * 1000)


@contextmanager
def flushed(metrics: Metrics) -> Iterator[None]:
    """Write what was measured at the end. Powertools' own decorator warns, outside JSON, when that is nothing."""
    try:
        yield
    finally:
        if metrics.metric_set:
            metrics.flush_metrics()
        metrics.clear_metrics()
