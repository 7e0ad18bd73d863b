"""Which version of a file the outbox shows, so that an older one that ends later never replaces it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from img2img.aws import error_code
from img2img.dynamo import number, text
from img2img.jobs.job import Source

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

# S3's sequencers of one key compare as text, the shorter one padded with zeros on its right.
_ORDER_LENGTH = 64


@dataclass(frozen=True)
class Shown:
    """The job whose results are shown, and the objects that show them."""

    job_id: str
    keys: frozenset[str]


class OutboxIndex:
    """One item for each file that the outbox shows results of. `clock` returns epoch seconds."""

    def __init__(self, client: DynamoDBClient, table: str, *, retention_days: int, clock: Callable[[], float]) -> None:
        self._client = client
        self._table = table
        self._retention = retention_days * 86_400
        self._clock = clock

    def _place(self, source: Source) -> dict[str, Any]:
        # In the partition key: a sort key holds no more bytes than an object's key has.
        return {"TableName": self._table, "Key": {"pk": text(f"OUTBOX#{source.key}"), "sk": text("OUTBOX")}}

    def shown(self, source: Source) -> Shown:
        """Return what the outbox shows of a file."""
        item = self._client.get_item(**self._place(source), ConsistentRead=True)["Item"]
        return Shown(str(item["job_id"]["S"]), frozenset(item["object_keys"]["SS"]))

    def replace(self, source: Source, job_id: str, keys: Collection[str]) -> set[str] | None:
        """Note that a version of a file is shown by objects of these keys, and return those of earlier versions.

        Returns None when a later version is shown already: then this one is not to be.
        """
        not_shown_yet = "attribute_not_exists(pk)"
        no_later_one = "sequencer <= :sequencer"
        try:
            answer = self._client.update_item(
                **self._place(source),
                UpdateExpression="SET sequencer = :sequencer, job_id = :job, expires_at = :expires "
                "ADD object_keys :keys",
                ConditionExpression=f"{not_shown_yet} OR {no_later_one}",
                ExpressionAttributeValues={
                    ":sequencer": text(source.version.rpartition(":")[2].ljust(_ORDER_LENGTH, "0")),
                    ":job": text(job_id),
                    ":expires": number(int(self._clock()) + self._retention),
                    ":keys": {"SS": sorted(keys)},
                },
                ReturnValues="ALL_NEW",
            )
        except ClientError as error:
            if error_code(error) != "ConditionalCheckFailedException":
                raise
            return None
        return set(answer["Attributes"]["object_keys"]["SS"]) - set(keys)

    def forget(self, source: Source, keys: Collection[str]) -> None:
        """Note that objects of earlier versions are gone."""
        self._client.update_item(
            **self._place(source),
            UpdateExpression="DELETE object_keys :keys",
            ExpressionAttributeValues={":keys": {"SS": sorted(keys)}},
        )
