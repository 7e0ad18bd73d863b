"""Jobs in DynamoDB: every step a conditional write, so that a second delivery changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from img2img.aws import error_code
from img2img.dynamo import Item, Write, number, put_once, text, through_conflicts, transact
from img2img.errors import NotFound, UploadMissing
from img2img.ids import new_id
from img2img.jobs.bookings import closing, opening
from img2img.jobs.guards import Guard
from img2img.jobs.items import end, expiry, job_key, outputs_json, pending_json, readable, receipt, to_item, to_job
from img2img.jobs.job import Job, Status, concluded, ended
from img2img.jobs.listing import JobFilter

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

# Spreads the sparse index `open` over partitions: one would bound all writes to 1,000 a second.
OPEN_SHARDS = 4


class _MovedOn(Exception):
    """The job is not as the caller saw it."""


@dataclass(frozen=True)
class Page:
    """Jobs, newest first; `cursor` continues after the last one."""

    jobs: list[Job]
    cursor: str | None


class JobStore:
    """The table of jobs and guards. `clock` returns epoch seconds."""

    def __init__(self, client: DynamoDBClient, table: str, *, retention_days: int, clock: Callable[[], float]) -> None:
        self._client = client
        self._table = table
        self._retention = retention_days * 86_400
        self._clock = clock

    def _new_item(self, job: Job) -> dict[str, Any]:
        # Only what has ended expires: an open job holds credits, which its end alone gives back.
        stage = (
            {"expires_at": self._expires_at(job)}
            if job.status.is_terminal
            else {"open_shard": text(f"OPEN#{sum(job.id.encode()) % OPEN_SHARDS}")}
        )
        return {**job_key(job.team, job.id), **to_item(job), **stage}

    def _expires_at(self, job: Job) -> dict[str, str]:
        return number((job.completed_ms or 0) // 1000 + self._retention)

    def create(self, job: Job, guard: Guard | None = None) -> None:
        """Write a new job, its guard and what it books in one transaction.

        Raises `EarlierJob` when the guard was used before, `InsufficientCredits` and `TeamDisabled`; then nothing was
        written.
        """
        # The guard comes first: a repeat finds its job however poor the team has become.
        guarded = [guard.write(self._table, job.id, now=job.created_ms // 1000)] if guard else []
        created = put_once(self._table, self._new_item(job))
        transact(self._client, [*guarded, created, *opening(self._table, job)])

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
        """Return a job as it is now. Raises `NotFound`, also for another team's job, and `NotUnderstood`."""
        answer = self._client.get_item(TableName=self._table, Key=job_key(team, job_id), ConsistentRead=True)
        # TTL deletes late, up to two days: an expired item counts as gone.
        if "Item" not in answer or expiry(answer["Item"]) <= self._clock():
            raise NotFound(f"There is no job {job_id}")
        return to_job(answer["Item"])

    def list(self, team: str, wanted: JobFilter) -> Page:
        """Return the team's jobs, newest first.

        Reads at most ten pages: with a rare status a page may be short and still carry a cursor.
        """
        query = wanted.query(team, now=int(self._clock()))
        if not query:
            return Page([], None)
        query["TableName"] = self._table
        jobs: list[Job] = []
        last: str | None = None
        for _ in range(10):
            answer = self._client.query(**query)
            jobs += readable(answer["Items"])
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
                    Key=job_key(team, job_id),
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
            "SET #status = :status, due_at = :due, outputs = :outputs, pending = :pending, look_ms = :look, "
            "waits_for = :waits_for, failures = :failures, backend = :backend, backend_reason = :reason "
            "REMOVE lease ADD attempts :uncounted",
            still_ours,
            {
                ":status": text(job.unclaimed_status),
                ":due": number(due_at),
                ":outputs": outputs_json(job.outputs),
                ":pending": pending_json(job.pending),
                ":look": number(job.look_ms or 0),
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

    def note(self, job: Job) -> bool:
        """Write down what a claimed job has under way, and nothing else. Returns False when it is no longer this
        worker's.
        """
        still_ours = "#status = :processing AND lease = :lease"
        values = {
            ":processing": text(Status.PROCESSING),
            ":pending": pending_json(job.pending),
            ":lease": text(job.lease or ""),
        }
        return self._update(job.team, job.id, "SET pending = :pending", still_ours, values)[0]

    def give_back(self, job: Job) -> None:
        """Undo a claim: of the job nothing else is written."""
        still_ours = "lease = :lease"
        self._update(
            job.team,
            job.id,
            "SET #status = :status REMOVE lease ADD attempts :uncounted",
            still_ours,
            {
                ":status": text(job.unclaimed_status),
                ":uncounted": number(-1),
                ":lease": text(job.lease or ""),
            },
        )

    def finish(self, job: Job) -> Job | None:
        """End a job whose samples have all ended, which the caller holds as claimed or, for `sweep`, as last seen.

        Returns the ended job, or None when it has moved on meanwhile; then nothing was written.
        """
        after = concluded(job, at_ms=int(self._clock() * 1000))
        if not job.status.may_become(after.status):
            return None
        as_seen = "#status = :seen"
        # A queued job may have been run and queued again since.
        unchanged = "lease = :held" if job.lease else "attribute_not_exists(lease) AND due_at = :held"
        held = text(job.lease) if job.lease else number(job.due_at or 0)
        return self._end(after, f"{as_seen} AND {unchanged}", {":seen": text(job.status), ":held": held})

    def _end(self, job: Job, condition: str, values: Mapping[str, Any]) -> Job | None:
        """Write a job's end and what it books in one transaction. Returns None if refused."""
        sets = {
            "status": text(job.status),
            **end(job),
            "outputs": outputs_json(job.outputs),
            "backend": text(job.backend),
            "backend_reason": text(job.backend_reason),
            "expires_at": self._expires_at(job),
            **receipt(job.credits),
        }
        update = {
            "TableName": self._table,
            "Key": job_key(job.team, job.id),
            "UpdateExpression": f"SET {', '.join(f'#{name} = :{name}' for name in sets)} "
            "REMOVE lease, due_at, open_shard, pending, look_ms, waits_for",
            "ConditionExpression": condition,
            "ExpressionAttributeNames": {f"#{name}": name for name in sets},
            "ExpressionAttributeValues": {f":{name}": value for name, value in sets.items()} | dict(values),
        }
        try:
            transact(self._client, [Write({"Update": update}, _MovedOn()), *closing(self._table, job)])
        except _MovedOn:
            return None
        return job

    def cancel(self, team: str, job_id: str) -> tuple[bool, Job]:
        """Cancel an unfinished job and forget its outputs; any other stays as it is. Raises `NotFound`.

        Returns whether it was canceled now, and the job as it is.
        """
        job = self.get(team, job_id)
        while job.status.may_become(Status.CANCELED):
            canceled = ended(replace(job, outputs=()), Status.CANCELED, at_ms=int(self._clock() * 1000))
            as_seen = "#status = :seen"
            if self._end(canceled, as_seen, {":seen": text(job.status)}):
                return True, canceled
            job = self.get(team, job_id)
        return False, job

    def expire(self, job: Job) -> Job | None:
        """Cancel a job whose upload did not come. Returns None when it has come meanwhile."""
        error = UploadMissing("The upload that this job waited for did not come in time")
        expired = ended(job, Status.CANCELED, at_ms=int(self._clock() * 1000), error=error)
        still_awaited = "#status = :seen"
        return self._end(expired, still_awaited, {":seen": text(Status.AWAITING_UPLOAD)})

    def delete(self, team: str, job_id: str) -> None:
        """Delete a job; deleting it twice is no error."""
        through_conflicts(lambda: self._client.delete_item(TableName=self._table, Key=job_key(team, job_id)))

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
                yield from readable(page["Items"])

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
