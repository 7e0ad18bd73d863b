"""What Prometheus reads at `/metrics`. The engine reports to it as its observer, from a thread of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = CONTENT_TYPE_LATEST
_STEP = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
_SECONDS = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 30, 60, 120, 300)


class Metrics:
    """The process's own counts, in a registry that nothing else writes to."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter("endpoint_requests", "Invocations by how they ended", ["outcome"], registry=registry)
        self._samples = Histogram(
            "endpoint_batch_samples",
            "Requests that shared a denoising step",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self._step = Histogram("endpoint_step_seconds", "Time of a denoising step", buckets=_STEP, registry=registry)
        self._queue = Histogram(
            "endpoint_queue_seconds", "Time from a request's arrival to its start", buckets=_SECONDS, registry=registry
        )
        self._run = Histogram(
            "endpoint_run_seconds",
            "Time from a request's start to its end",
            ["outcome"],
            buckets=_SECONDS,
            registry=registry,
        )

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Show what `read` returns whenever the page is asked for."""
        Gauge(f"endpoint_{name}", text, registry=self._registry).set_function(read)

    def answered(self, outcome: str) -> None:
        """Count an invocation."""
        self._requests.labels(outcome).inc()

    def stepped(self, samples: int, seconds: float) -> None:
        """Count a denoising step."""
        self._samples.observe(samples)
        self._step.observe(seconds)

    def started(self, queue_seconds: float) -> None:
        """Count a request that left the queue."""
        self._queue.observe(queue_seconds)

    def ended(self, outcome: str, run_seconds: float) -> None:
        """Count a request that left the engine."""
        self._run.labels(outcome).observe(run_seconds)

    def page(self) -> bytes:
        """Return the page in Prometheus' text format."""
        return generate_latest(self._registry)
