"""The answers queue: a backend says that it is done with a sample; keep it, and end its job when that was the last."""

from __future__ import annotations

from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext

from img2img import observe
from img2img.bootstrap import services
from img2img.flows.run import collect
from img2img.jobs.queues import after_trouble

logger = Logger()


def _collect(record: dict[str, Any]) -> bool:
    """Act on one notice. Returns whether the message is done with."""
    use = services()
    receives = int(record["attributes"].get("ApproximateReceiveCount", 1))
    retry_after: int | None = after_trouble(receives)
    logger.append_keys(correlation_id=record["messageId"])
    try:
        notice = use.read_notice(record["body"])
        logger.append_keys(inference_id=notice.call)
        run = collect(use, notice)
        if run.job:
            logger.append_keys(correlation_id=run.job.correlation_id, job_id=run.job.id, team=run.job.team)
            observe.describe(correlation_id=run.job.correlation_id, job_id=run.job.id)
        observe.job_run(retry_after=run.retry_after, remaining_credits=run.remaining_credits)
        # The worker that holds the job is mostly done within a second, and at the latest when its lease ends.
        retry_after = min(2 ** (receives - 1), 900) if run.held else run.retry_after
    except Exception as error:  # noqa: BLE001 (a message must never be lost to a bug)
        observe.log_unexpected(error)
    if retry_after is None:
        return True
    use.answers_queue.redeliver(record["receiptHandle"], retry_after)
    return False


@logger.inject_lambda_context(clear_state=True)
@observe.flushed()
def handler(event: dict[str, Any], _context: LambdaContext) -> dict[str, Any]:
    """Act on a batch; a message that is not done with is reported, and comes back after its own time."""
    failures = [{"itemIdentifier": record["messageId"]} for record in event["Records"] if not _collect(record)]
    return {"batchItemFailures": failures}
