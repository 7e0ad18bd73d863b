"""The uploads queue: S3 says that an object was created; start its job."""

from __future__ import annotations

from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.metrics import MetricUnit
from aws_lambda_powertools.utilities.typing import LambdaContext

from img2img import observe
from img2img.bootstrap import services
from img2img.errors import IdempotencyInFlight, InsufficientCredits
from img2img.flows.ingest import ingest
from img2img.jobs.inbox import NewObject, NotAttributable, read_notices
from img2img.jobs.queues import after_trouble

logger = Logger()


def _take_in(new: NewObject, correlation_id: str, context: LambdaContext) -> None:
    submission = ingest(services(), new, correlation_id=correlation_id, context=context)
    if submission is None or submission.replayed:
        logger.info("nothing to do")
        return
    job = submission.job
    logger.info("taken in", job_id=job.id, team=job.team, status=job.status)
    observe.describe(correlation_id=correlation_id, job_id=job.id)
    observe.metrics.add_metric("ObjectsTakenIn", MetricUnit.Count, 1)
    if job.error_code == InsufficientCredits.code:
        observe.metrics.add_metric("InsufficientCredits", MetricUnit.Count, 1)


def _handle(record: dict[str, Any], context: LambdaContext) -> bool:
    """Act on one message. Returns whether it is done with."""
    logger.append_keys(correlation_id=record["messageId"])
    receives = int(record["attributes"].get("ApproximateReceiveCount", 1))
    try:
        for new in read_notices(record["body"]):
            _take_in(new, record["messageId"], context)
        return True
    except NotAttributable as error:
        # Not the key, which may be as private as a prompt. The message itself keeps it, in the dead-letter queue.
        logger.error("belongs to no team", detail=str(error))
        retry_after = 1
    except IdempotencyInFlight:
        logger.info("being taken in already")
        retry_after = after_trouble(receives)
    except Exception as error:  # noqa: BLE001 (a message must never be lost to a bug)
        observe.log_unexpected(error)
        retry_after = after_trouble(receives)
    services().uploads_queue.redeliver(record["receiptHandle"], retry_after)
    return False


@logger.inject_lambda_context(clear_state=True)
@observe.flushed()
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Act on a batch; a message that is not done with is reported, and comes back after its own time."""
    failures = [{"itemIdentifier": r["messageId"]} for r in event["Records"] if not _handle(r, context)]
    return {"batchItemFailures": failures}
