"""Log lines and metrics, as every function writes them."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from aws_lambda_powertools import Logger, Metrics


def log_unexpected(logger: Logger, error: Exception) -> None:
    """Log an error that nothing foresaw: its type and place, for its message may hold a prompt."""
    logger.error("unexpected", error=type(error).__name__, stack=traceback.format_tb(error.__traceback__))


def describe(metrics: Metrics, *, correlation_id: str, job_id: str) -> None:
    """Tie the metrics of this invocation to a request and a job."""
    metrics.add_metadata("correlation_id", correlation_id)
    metrics.add_metadata("job_id", job_id)


@contextmanager
def flushed(metrics: Metrics) -> Iterator[None]:
    """Write what was measured at the end. Powertools' own decorator warns, outside JSON, when that is nothing."""
    try:
        yield
    finally:
        if metrics.metric_set:
            metrics.flush_metrics()
        metrics.clear_metrics()
