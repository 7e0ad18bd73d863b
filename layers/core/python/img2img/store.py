"""Jobs in DynamoDB: every step a conditional write, so that a second delivery changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from aws_lambda_powertools import Logger
from botocore.exceptions import ClientError

from img2img.credits import WRITTEN_ONCE, refusal, reserve, settle
from img2img.dynamo import (
    Item,
    cancellations,
    error_code,
    new_job,
    number,
    outputs_json,
    pending_json,
    receipt,
    text,
    through_conflicts,
    to_job,
)
from img2img.errors import NotFound, UploadMissing
from img2img.ids import first_id_at, id_before, new_id
from img2img.jobs import NEXT, Job, Status, concluded, ended
from img2img.listing import JobFilter
from img2img.usage import count

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

logger = Logger(child=True)

# Spreads the sparse index `open` over partitions: one would bound all writes to 1,000 a second.
OPEN_SHARDS = 4
GUARD_TTL = 24 * 3600
# Longer than any notice of S3's can be on its way: four days in its queue and fourteen in the dead letters.
OBJECT_GUARD_TTL = 30 * 86_400


@dataclass(frozen=True)
class Guard:
    """Ties an idempotency key, or a version of an object, to one job in the transaction that creates the job.

    `ttl` is how long it holds, in seconds.
    """

    team: str
    key: str
    fingerprint: str
    kind: Literal["GUARD", "OBJECT"] = "GUARD"
    ttl: int = GUARD_TTL

    @property
    def pk(self) -> str:
        """The guard's partition key."""
        return f"{self.kind}#{self.team}#{self.key}"


@dataclass(frozen=True)
class Guarded:
    """What an earlier request with the same guard made."""

    job_id: str
    fingerprint: str


@dataclass(frozen=True)
class Page:
    """Jobs, newest first; `cursor` continues after the last one."""

    jobs: list[Job]
    cursor: str | None


def _expiry(item: Item) -> float:
    return int(item["expires_at"]["N"]) if "expires_at" in item else float("inf")


class JobStore:
    """The table of jobs and guards. `clock` returns epoch seconds."""

    def __init__(self, client: DynamoDBClient, table: str, *, retention_days: int, clock: Callable[[], float]) -> None:
        self._client = client
        self._table = table
        self._retention = retention_days * 86_400
        self._clock = clock

    @staticmethod
    def _key(team: str, job_id: str) -> dict[str, Any]:
        return {"pk": text(f"TEAM#{team}"), "sk": text(f"JOB#{job_id}")}

    def _new_item(self, job: Job) -> dict[str, Any]:
        # Only what has ended expires: an open job holds credits, which its end alone gives back.
        stage = (
            {"expires_at": self._expires_at(job)}
            if job.status.is_terminal
            else {"open_shard": text(f"OPEN#{sum(job.id.encode()) % OPEN_SHARDS}")}
        )
        return {**self._key(job.team, job.id), **new_job(job), **stage}

    def _expires_at(self, job: Job) -> dict[str, str]:
        return number((job.completed_ms or 0) // 1000 + self._retention)

    def _guard(self, guard: Guard, job: Job) -> Any:
        now = job.created_ms // 1000
        gone_by_now = "expires_at <= :now"
        return {
            "Put": {
                "TableName": self._table,
                "Item": {
                    "pk": text(guard.pk),
                    "sk": text("GUARD"),
                    "job_id": text(job.id),
                    "fingerprint": text(guard.fingerprint),
                    "expires_at": number(now + guard.ttl),
                },
                "ConditionExpression": f"{WRITTEN_ONCE} OR {gone_by_now}",
                "ExpressionAttributeValues": {":now": number(now)},
                "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
            }
        }

    def create(self, job: Job, guard: Guard | None = None) -> Guarded | None:
        """Write a new job, its guard and the reservation of its price in one transaction.

        A job that failed before it could run reserves nothing: it is settled for nothing and counted at once. Returns
        None when written, or what the guard already holds; then nothing was written, nor when it raises
        `InsufficientCredits` or `TeamDisabled`.
        """
        writes: list[Any] = [
            {"Put": {"TableName": self._table, "Item": self._new_item(job), "ConditionExpression": WRITTEN_ONCE}}
        ]
        if job.status.is_terminal:
            writes += [*settle(self._table, job), count(self._table, job)]
        else:
            writes += reserve(self._table, job)
        if guard:
            writes.append(self._guard(guard, job))
        try:
            through_conflicts(lambda: self._client.transact_write_items(TransactItems=writes))
        except ClientError as error:
            failed = cancellations(error)
            reasons = error.response.get("CancellationReasons", [])
            if guard and failed[-1:] == ["ConditionalCheckFailed"]:
                held: Item = reasons[-1]["Item"]
                return Guarded(held["job_id"]["S"], held["fingerprint"]["S"])
            if failed[1:2] == ["ConditionalCheckFailed"]:
                raise refusal(job.credits.reserved, reasons[1].get("Item")) from None
            raise
        return None

    def start(self, job: Job, *, due_at: int, deadline_at: int) -> bool:
        """Queue a job whose upload has come. Returns False when it waits for none any more."""
        still_awaited = "#status = :awaiting"
        started, _ = self._update(
            job.team,
            job.id,
            "SET #status = :queued, due_at = :due, deadline_at = :deadline",
            still_awaited,
            {
                ":awaiting": text(Status.AWAITING_UPLOAD),
                ":queued": text(Status.QUEUED),
                ":due": number(due_at),
                ":deadline": number(deadline_at),
            },
        )
        return started

    def get(self, team: str, job_id: str) -> Job:
        """Return a job as it is now. Raises `NotFound`, also for another team's job."""
        answer = self._client.get_item(TableName=self._table, Key=self._key(team, job_id), ConsistentRead=True)
        # TTL deletes late, up to two days: an expired item counts as gone.
        if "Item" not in answer or _expiry(answer["Item"]) <= self._clock():
            raise NotFound(f"There is no job {job_id}")
        return to_job(answer["Item"])

    def list(self, team: str, wanted: JobFilter) -> Page:
        """Return the team's jobs, newest first.

        Reads at most ten pages: with a rare status a page may be short and still carry a cursor.
        """
        low = first_id_at(0 if wanted.created_after is None else wanted.created_after + 1)
        high = id_before(first_id_at(2**48 - 1 if wanted.created_before is None else wanted.created_before))
        if wanted.cursor:
            high = min(high, id_before(wanted.cursor))
        if low > high:
            return Page([], None)
        query: dict[str, Any] = {
            "TableName": self._table,
            "KeyConditionExpression": "pk = :pk AND sk BETWEEN :low AND :high",
            "FilterExpression": "(attribute_not_exists(expires_at) OR expires_at > :now)",
            "ExpressionAttributeValues": {
                ":pk": text(f"TEAM#{team}"),
                ":low": text(f"JOB#{low}"),
                ":high": text(f"JOB#{high}"),
                ":now": number(int(self._clock())),
            },
            "ScanIndexForward": False,
            "Limit": wanted.limit + 1 if wanted.status is None else 100,
        }
        if wanted.status is not None:
            query["FilterExpression"] += " AND #status = :status"
            query["ExpressionAttributeNames"] = {"#status": "status"}
            query["ExpressionAttributeValues"][":status"] = text(wanted.status)
        jobs: list[Job] = []
        last: str | None = None
        for _ in range(10):
            answer = self._client.query(**query)
            jobs += [to_job(item) for item in answer["Items"]]
            if len(jobs) > wanted.limit:
                return Page(jobs[: wanted.limit], jobs[wanted.limit - 1].id)
            if "LastEvaluatedKey" not in answer:
                return Page(jobs, None)
            query["ExclusiveStartKey"] = answer["LastEvaluatedKey"]
            last = str(answer["LastEvaluatedKey"]["sk"]["S"]).removeprefix("JOB#")
        return Page(jobs, last)

    def _update(
        self, team: str, job_id: str, update: str, condition: str, values: Mapping[str, Any]
    ) -> tuple[bool, Job | None]:
        """Return whether the condition held, and the job after the write or, if not written, as it is."""
        try:
            answer = through_conflicts(
                lambda: self._client.update_item(
                    TableName=self._table,
                    Key=self._key(team, job_id),
                    UpdateExpression=update,
                    ConditionExpression=condition,
                    ExpressionAttributeNames={"#status": "status"},
                    ExpressionAttributeValues=values,
                    ReturnValues="ALL_NEW",
                    ReturnValuesOnConditionCheckFailure="ALL_OLD",
                )
            )
        except ClientError as error:
            if error_code(error) != "ConditionalCheckFailedException":
                raise
            held: Item | None = error.response.get("Item")  # type: ignore[assignment]
            return False, to_job(held) if held else None
        return True, to_job(answer["Attributes"])

    def claim(self, team: str, job_id: str, *, lease_seconds: int) -> tuple[bool, Job | None]:
        """Take the job for one worker.

        Returns whether it was taken, and the job as it is now: ended, another worker's, or None when it is gone.
        """
        now = int(self._clock())
        lease = new_id(now * 1000)
        waiting = "#status = :queued"
        at_a_backend = "(#status = :processing AND attribute_not_exists(lease))"
        lease_ran_out = "(#status = :processing AND due_at <= :now)"
        claimed, job = self._update(
            team,
            job_id,
            "SET #status = :processing, lease = :lease, due_at = :due, "
            "started_ms = if_not_exists(started_ms, :now_ms) ADD attempts :one",
            f"{waiting} OR {at_a_backend} OR {lease_ran_out}",
            {
                ":queued": text(Status.QUEUED),
                ":processing": text(Status.PROCESSING),
                ":lease": text(lease),
                ":due": number(now + lease_seconds),
                ":now_ms": number(int(self._clock() * 1000)),
                ":now": number(now),
                ":one": number(1),
            },
        )
        # boto3 repeats a call whose answer was lost: then the claim is ours already.
        return claimed or (job is not None and job.lease == lease), job

    def release(self, job: Job, *, due_at: int, counts: bool) -> bool:
        """Give a claimed job back to the queue or, with samples pending, leave it to its backend. What ended is kept.

        `counts` says that it counts as an attempt all the same. Returns False when the job is no longer this worker's.
        """
        still_ours = "lease = :lease"
        released, held = self._update(
            job.team,
            job.id,
            "SET #status = :status, due_at = :due, outputs = :outputs, pending = :pending, waits_for = :waits_for, "
            "failures = :failures, backend = :backend, backend_reason = :reason REMOVE lease ADD attempts :uncounted",
            still_ours,
            {
                ":status": text(Status.PROCESSING if job.pending else Status.QUEUED),
                ":due": number(due_at),
                ":outputs": outputs_json(job.outputs),
                ":pending": pending_json(job.pending),
                ":backend": text(job.backend),
                ":reason": text(job.backend_reason),
                ":waits_for": text(job.waits_for or ""),
                ":failures": text(json.dumps(job.failures)),
                ":uncounted": number(0 if counts else -1),
                ":lease": text(job.lease or ""),
            },
        )
        # As with the claim, an answer may have been lost.
        return released or (
            held is not None and not held.status.is_terminal and held.lease is None and held.due_at == due_at
        )

    def finish(self, job: Job) -> Job | None:
        """End a job whose samples have all ended, which the caller holds as claimed or, for `sweep`, as last seen.

        Returns the ended job, or None when it has moved on meanwhile; then nothing was written.
        """
        after = concluded(job, at_ms=int(self._clock() * 1000))
        if after.status not in NEXT[job.status]:
            return None
        as_seen = "#status = :seen"
        # A queued job may have been run and queued again since.
        unchanged = "lease = :held" if job.lease else "attribute_not_exists(lease) AND due_at = :held"
        held = text(job.lease) if job.lease else number(job.due_at or 0)
        return self._end(after, f"{as_seen} AND {unchanged}", {":seen": text(job.status), ":held": held})

    def _end(self, job: Job, condition: str, values: Mapping[str, Any]) -> Job | None:
        """Write a job's end, settle its credits and count it, in one transaction. Returns None if refused."""
        sets = {
            "status": text(job.status),
            "completed_ms": number(job.completed_ms or 0),
            "outputs": outputs_json(job.outputs),
            "backend": text(job.backend),
            "backend_reason": text(job.backend_reason),
            "error_code": text(job.error_code),
            "error_detail": text(job.error_detail),
            "expires_at": self._expires_at(job),
            **receipt(job.credits),
        }
        update: Any = {
            "TableName": self._table,
            "Key": self._key(job.team, job.id),
            "UpdateExpression": f"SET {', '.join(f'#{name} = :{name}' for name in sets)} "
            "REMOVE lease, due_at, open_shard, pending, waits_for",
            "ConditionExpression": condition,
            "ExpressionAttributeNames": {f"#{name}": name for name in sets},
            "ExpressionAttributeValues": {f":{name}": value for name, value in sets.items()} | dict(values),
        }
        writes = [{"Update": update}, *settle(self._table, job), count(self._table, job)]
        try:
            through_conflicts(lambda: self._client.transact_write_items(TransactItems=writes))
        except ClientError as failure:
            if cancellations(failure)[:1] != ["ConditionalCheckFailed"]:
                raise
            return None
        return job

    def cancel(self, team: str, job_id: str) -> Job:
        """Cancel an unfinished job and forget its outputs; a finished one stays as it is. Raises `NotFound`."""
        job = self.get(team, job_id)
        while Status.CANCELED in NEXT[job.status]:
            canceled = ended(replace(job, outputs=()), Status.CANCELED, at_ms=int(self._clock() * 1000))
            as_seen = "#status = :seen"
            if self._end(canceled, as_seen, {":seen": text(job.status)}):
                return canceled
            job = self.get(team, job_id)
        return job

    def expire(self, job: Job) -> Job | None:
        """Cancel a job whose upload did not come. Returns None when it has come meanwhile."""
        error = UploadMissing("The upload that this job waited for did not come in time")
        expired = ended(job, Status.CANCELED, at_ms=int(self._clock() * 1000), error=error)
        still_awaited = "#status = :seen"
        return self._end(expired, still_awaited, {":seen": text(Status.AWAITING_UPLOAD)})

    def delete(self, team: str, job_id: str) -> None:
        """Delete a job; deleting it twice is no error."""
        through_conflicts(lambda: self._client.delete_item(TableName=self._table, Key=self._key(team, job_id)))

    def overdue(self) -> Iterator[Job]:
        """Yield the unfinished jobs whose `due_at` has passed. The index may lag behind the table."""
        for shard in range(OPEN_SHARDS):
            pages = self._client.get_paginator("query").paginate(
                TableName=self._table,
                IndexName="open",
                KeyConditionExpression="open_shard = :shard AND due_at <= :now",
                ExpressionAttributeValues={":shard": text(f"OPEN#{shard}"), ":now": number(int(self._clock()))},
            )
            for page in pages:
                for item in page["Items"]:
                    try:
                        job = to_job(item)
                    except (KeyError, TypeError, ValueError):
                        # Written by a newer version that was rolled back, say. It must not hide the jobs behind it.
                        logger.error("unreadable job", key=item["sk"])
                        continue
                    yield job

    def postpone(self, job: Job, *, due_at: int) -> bool:
        """Set when `sweep` looks again at a job that belongs to no worker.

        Returns False when the job has moved on or another sweep came first.
        """
        still_waiting = "#status IN (:queued, :processing) AND attribute_not_exists(lease)"
        as_seen = "due_at = :seen"
        postponed, _ = self._update(
            job.team,
            job.id,
            "SET due_at = :due",
            f"{still_waiting} AND {as_seen}",
            {
                ":queued": text(Status.QUEUED),
                ":processing": text(Status.PROCESSING),
                ":seen": number(job.due_at or 0),
                ":due": number(due_at),
            },
        )
        return postponed
