"""Every minute: send again or fail the jobs that are overdue, and count the teams that are low on credits."""

from __future__ import annotations

from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.metrics import MetricUnit
from aws_lambda_powertools.utilities.typing import LambdaContext

from img2img import observe
from img2img.bootstrap import services
from img2img.flows.sweep import low_balances, sweep

logger = Logger()


@logger.inject_lambda_context(correlation_id_path="id", clear_state=True)
@observe.flushed()
def handler(event: dict[str, Any], _context: LambdaContext) -> dict[str, int]:
    """Sweep once. Raises when a job had to be skipped, so that the alarm on errors sees it."""
    use = services()
    observe.metrics.add_metadata("correlation_id", event["id"])
    done = sweep(use)
    if done:
        logger.info(
            "swept", extra={name: done[name] for name in ("failed", "succeeded", "canceled", "resent", "skipped")}
        )
    observe.metrics.add_metric("TeamsLowOnCredits", MetricUnit.Count, len(low_balances(use)))
    if done["skipped"]:
        raise RuntimeError(f"{done['skipped']} jobs were skipped")
    return dict(done)
