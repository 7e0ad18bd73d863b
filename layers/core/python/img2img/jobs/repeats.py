"""Requests that are sent again without an idempotency key, tied to their jobs until an answer was delivered."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from img2img.aws import error_code
from img2img.dynamo import number, string_in, text
from img2img.jobs.guards import Guard
from img2img.jobs.items import expiry

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient


class RepeatStore:
    """Guards of the jobs table outside of a job's creation. `clock` returns epoch seconds."""

    def __init__(self, client: DynamoDBClient, table: str, *, clock: Callable[[], float]) -> None:
        self._client = client
        self._table = table
        self._clock = clock

    def find(self, guard: Guard) -> str | None:
        """Return the id of the job that a guard holds, None if there is none."""
        answer = self._client.get_item(TableName=self._table, Key=_key(guard), ConsistentRead=True)
        item = answer.get("Item")
        return string_in(item, "job_id") if item and expiry(item) > self._clock() else None

    def tie(self, guard: Guard, job_id: str) -> None:
        """Have a guard hold a job, whatever it held before."""
        self._client.put_item(TableName=self._table, Item=guard.item(job_id, now=int(self._clock())))

    def untie(self, guard: Guard, job_id: str) -> None:
        """Have a guard hold nothing, unless it holds another job."""
        try:
            self._client.update_item(
                TableName=self._table,
                Key=_key(guard),
                # By now, and not long ago: DynamoDB leaves alone what expired years before.
                UpdateExpression="SET expires_at = :now",
                ConditionExpression="job_id = :job",
                ExpressionAttributeValues={":job": text(job_id), ":now": number(int(self._clock()))},
            )
        except ClientError as error:
            if error_code(error) != "ConditionalCheckFailedException":
                raise


def _key(guard: Guard) -> dict[str, Any]:
    return {"pk": text(guard.pk), "sk": text("GUARD")}
