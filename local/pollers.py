"""What feeds functions besides HTTP: queues, with Lambda's batch semantics, and a clock."""

from __future__ import annotations

import json
import logging
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from local.lambda_runtime import Invoke, RequestTooLarge, Result
from local.template import ACCOUNT, REGION, Json, QueueMapping, Schedule

_LONG_POLL_SECONDS = 20
_log = logging.getLogger(__name__)


class QueuePoller:
    """Receives from one queue, and runs up to `max_concurrency` batches at once.

    A message is deleted when its function succeeded with it. Any other is left alone: it comes back when its
    visibility timeout ends, which the function may have changed, and goes to the dead letters as the queue says.
    """

    def __init__(self, mapping: QueueMapping, queue_url: str, queue_arn: str, sqs: Any, invoke: Invoke) -> None:
        self._mapping = mapping
        self._url = queue_url
        self._arn = queue_arn
        self._sqs = sqs
        self._invoke = invoke
        self._stopping = threading.Event()
        self._free = threading.Semaphore(mapping.max_concurrency)
        self._pool = ThreadPoolExecutor(mapping.max_concurrency, thread_name_prefix=f"poll-{mapping.queue}")
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Take no more messages. What is being received ends when AWS or the function does."""
        self._stopping.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        self._free.release()
        self._thread.join()
        self._pool.shutdown(wait=True)

    def _run(self) -> None:
        while not self._stopping.is_set():
            # Nothing is received that nobody is free to work on: its receives would count against it.
            self._free.acquire()
            messages = self._receive()
            if messages and not self._stopping.is_set():
                self._pool.submit(self._process, messages)
            else:
                self._free.release()

    def _receive(self) -> list[Json]:
        try:
            answer = self._sqs.receive_message(
                QueueUrl=self._url,
                MaxNumberOfMessages=min(self._mapping.batch_size, 10),
                WaitTimeSeconds=_LONG_POLL_SECONDS,
                MessageSystemAttributeNames=["All"],
                MessageAttributeNames=["All"],
            )
        except (BotoCoreError, ClientError, OSError):
            if not self._stopping.wait(1):
                _log.warning("%s could not be polled", self._mapping.queue)
            return []
        return list(answer.get("Messages", []))

    def _process(self, messages: list[Json]) -> None:
        try:
            event = {"Records": [_record(message, self._arn) for message in messages]}
            try:
                result = self._invoke(self._mapping.function, json.dumps(event).encode())
            except RequestTooLarge:
                return
            failed = failed_items(result, {m["MessageId"] for m in messages}, reports=self._mapping.reports_failures)
            for message in messages:
                if message["MessageId"] not in failed and not self._stopping.is_set():
                    self._sqs.delete_message(QueueUrl=self._url, ReceiptHandle=message["ReceiptHandle"])
        except (BotoCoreError, ClientError, OSError):
            if not self._stopping.is_set():
                _log.warning("a message of %s could not be deleted", self._mapping.queue)
        finally:
            self._free.release()


def _record(message: Json, arn: str) -> Json:
    attributes = message.get("MessageAttributes", {})
    return {
        "messageId": message["MessageId"],
        "receiptHandle": message["ReceiptHandle"],
        "body": message["Body"],
        "attributes": message.get("Attributes", {}),
        "messageAttributes": {
            name: {key[0].lower() + key[1:]: value for key, value in attribute.items()}
            for name, attribute in attributes.items()
        },
        "md5OfBody": message.get("MD5OfBody", ""),
        "eventSource": "aws:sqs",
        "eventSourceARN": arn,
        "awsRegion": REGION,
    }


def failed_items(result: Result, sent: set[str], *, reports: bool) -> set[str]:
    """Return the ids of the messages that stay in the queue.

    An answer that Lambda cannot make sense of fails the whole batch; without `ReportBatchItemFailures` only an
    error does.
    """
    if result.failed:
        return sent
    payload = result.json()
    if not reports or payload in (None, {}, ""):
        return set()
    failures = payload.get("batchItemFailures", ()) if isinstance(payload, dict) else ()
    if failures is None or failures == []:
        return set()
    if not isinstance(failures, list):
        return sent
    ids = {str(item.get("itemIdentifier")) if isinstance(item, dict) else "" for item in failures}
    understood = ids <= sent
    return ids if understood else sent


class Clock:
    """Runs the functions that have a schedule, each first after one period, as EventBridge does."""

    def __init__(self, schedules: tuple[Schedule, ...], invoke: Invoke) -> None:
        self._invoke = invoke
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(schedule,), daemon=True) for schedule in schedules]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _run(self, schedule: Schedule) -> None:
        while not self._stopping.wait(schedule.every_seconds):
            self._invoke(schedule.function, schedule_event(schedule))


def schedule_event(schedule: Schedule) -> bytes:
    """Return what EventBridge sends: the target's own input, or the event that says which rule it was."""
    if schedule.input is not None:
        return schedule.input.encode()
    event = {
        "version": "0",
        "id": str(uuid.uuid4()),
        "detail-type": "Scheduled Event",
        "source": "aws.events",
        "account": ACCOUNT,
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "region": REGION,
        "resources": [f"arn:aws:events:{REGION}:{ACCOUNT}:rule/{schedule.name}"],
        "detail": {},
    }
    return json.dumps(event).encode()
