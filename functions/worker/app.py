"""The jobs queue: run one job for each message."""

from __future__ import annotations

from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext

from img2img import observe
from img2img.bootstrap import services
from img2img.flows.run import run_job
from img2img.jobs.queues import JobMessage, after_trouble

logger = Logger()


def _run(record: dict[str, Any]) -> bool:
    """Run the job of one record. Returns whether the message is done with."""
    use = services()
    retry_after: int | None = after_trouble(int(record["attributes"].get("ApproximateReceiveCount", 1)))
    logger.append_keys(correlation_id=record["messageId"])
    try:
        message = JobMessage.from_json(record["body"])
        logger.append_keys(correlation_id=message.correlation_id, job_id=message.job_id, team=message.team)
        observe.describe(correlation_id=message.correlation_id, job_id=message.job_id)
        run = run_job(use, message.team, message.job_id, is_look=message.look)
        observe.job_run(retry_after=run.retry_after, remaining_credits=run.remaining_credits)
        retry_after = run.retry_after
        if message.look and run.job and retry_after is not None:
            # A look asks for nothing, so what is to be asked for again gets a message that does.
            use.queue.send(run.job, after=retry_after)
            retry_after = None
    except Exception as error:  # noqa: BLE001 (a message must never be lost to a bug)
        observe.log_unexpected(error)
    if retry_after is None:
        return True
    use.queue.redeliver(record["receiptHandle"], retry_after)
    return False


@logger.inject_lambda_context(clear_state=True)
@observe.flushed()
def handler(event: dict[str, Any], _context: LambdaContext) -> dict[str, Any]:
    """Run a batch; a message that is not done with is reported, and comes back after its own time."""
    failures = [{"itemIdentifier": record["messageId"]} for record in event["Records"] if not _run(record)]
    return {"batchItemFailures": failures}
