"""The queues. A message to the worker only names a job: what it is stands in the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from img2img.jobs.job import Job
from img2img.stored import known_fields

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient


@dataclass(frozen=True)
class JobMessage:
    """Names the job to run, and the request that asked for it.

    A `look` is for what is under way, and asks for nothing that waits for its time: that has a message of its own.
    """

    team: str
    job_id: str
    correlation_id: str
    look: bool = False

    @classmethod
    def from_json(cls, body: str) -> JobMessage:
        """Read a message body. Raises `ValueError`, `TypeError` or `AttributeError` for anything else."""
        return known_fields(cls, json.loads(body))


def after_trouble(receives: int) -> int:
    """Return the seconds until the next try: short at first, for a waiting caller, then longer, for AWS to recover."""
    return int(min(5 * 4 ** (receives - 1), 900))


class Queue:
    """A queue that feeds a function."""

    def __init__(self, client: SQSClient, url: str) -> None:
        self._client = client
        self._url = url

    def put(self, message: Mapping[str, Any], *, after: int = 0) -> None:
        """Send a message, which comes after so many seconds: 900 at most."""
        delay: dict[str, Any] = {"DelaySeconds": min(after, 900)} if after else {}
        self._client.send_message(QueueUrl=self._url, MessageBody=json.dumps(message), **delay)

    def redeliver(self, receipt_handle: str, seconds: int) -> None:
        """Have a message that is reported as failed come back after `seconds`, not after the queue's default."""
        self._client.change_message_visibility(
            QueueUrl=self._url, ReceiptHandle=receipt_handle, VisibilityTimeout=seconds
        )


class JobQueue(Queue):
    """Sends jobs to the worker."""

    def send(self, job: Job, *, after: int = 0, look: bool = False) -> None:
        """Ask a worker to run the job, or to look at it, after so many seconds; asking twice is harmless."""
        self.put(asdict(JobMessage(job.team, job.id, job.correlation_id, look)), after=after)
