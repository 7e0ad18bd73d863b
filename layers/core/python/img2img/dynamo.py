"""DynamoDB's forms of values, writes and errors."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from botocore.exceptions import ClientError

from img2img.aws import error_code

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

T = TypeVar("T")
Item = Mapping[str, Any]
# What a failed condition means: an error, or what makes it of the item as it stood, None if there was none.
Refusal = Exception | Callable[[Item | None], Exception]

WRITTEN_ONCE = "attribute_not_exists(pk)"
# A conflict means that another writer holds the item for milliseconds. A team's item is written by all of its jobs: 50
# at once need some 50 rounds of 10 ms, the tries below up to 6 s.
_CONFLICT_TRIES = 16
_LONGEST_PAUSE = 0.5
# The last two are what a plain call's throttling, which botocore waits out, is called inside a transaction.
_PASSING = {"TransactionConflict", "ThrottlingError", "ProvisionedThroughputExceeded"}
# SnapStart copies the state of the `random` module's own generator into every clone.
_jitter = random.SystemRandom()


def text(value: str) -> dict[str, str]:
    """Return a DynamoDB string."""
    return {"S": value}


def number(value: int) -> dict[str, str]:
    """Return a DynamoDB number."""
    return {"N": str(value)}


def string_in(item: Item, name: str) -> str:
    """Return an item's string, or "" where it has none."""
    return str(item[name]["S"]) if name in item else ""


def integer_in(item: Item, name: str) -> int:
    """Return an item's number, or 0 where it has none."""
    return int(item[name]["N"]) if name in item else 0


def _reasons(error: ClientError) -> Sequence[Mapping[str, Any]]:
    """Return why each write of a transaction was refused, in their order; the code of a good one is "None"."""
    reasons: Sequence[Mapping[str, Any]] = error.response.get("CancellationReasons", [])
    return reasons


def _is_conflict(error: ClientError) -> bool:
    """Whether another transaction held an item; botocore retries neither form of it."""
    if error_code(error) == "TransactionCanceledException":
        return not _PASSING.isdisjoint(str(reason.get("Code")) for reason in _reasons(error))
    return error_code(error) == "TransactionConflictException"


def through_conflicts(call: Callable[[], T]) -> T:
    """Make a call again while another transaction holds one of its items."""
    for attempt in range(_CONFLICT_TRIES):
        try:
            return call()
        except ClientError as error:
            if attempt == _CONFLICT_TRIES - 1 or not _is_conflict(error):
                raise
            time.sleep(_jitter.uniform(0, min(0.01 * 2**attempt, _LONGEST_PAUSE)))
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class Write:
    """One write of a transaction: `request` is an entry of `TransactItems`.

    Without `refusal` a condition that fails means that something was written twice: then botocore's error is raised.
    """

    request: Mapping[str, Any]
    refusal: Refusal | None = None

    @property
    def item(self) -> Any:
        """The entry as it is sent: a write that can be refused asks for the item as it stands."""
        asked = {"ReturnValuesOnConditionCheckFailure": "ALL_OLD"} if self.refusal else {}
        return {kind: {**write, **asked} for kind, write in self.request.items()}


def put_once(table: str, item: Item, refusal: Refusal | None = None) -> Write:
    """Return the write of an item that is not there yet."""
    return Write({"Put": {"TableName": table, "Item": item, "ConditionExpression": WRITTEN_ONCE}}, refusal)


def transact(client: DynamoDBClient, writes: Sequence[Write]) -> None:
    """Make all of the writes or none.

    Raises the refusal of the first one, in the order given, whose condition failed and that has one; for anything else
    botocore's errors.
    """
    items = [write.item for write in writes]
    try:
        through_conflicts(lambda: client.transact_write_items(TransactItems=items))
    except ClientError as error:
        reasons = _reasons(error)
        if len(reasons) == len(writes):
            for write, reason in zip(writes, reasons, strict=True):
                if write.refusal and reason.get("Code") == "ConditionalCheckFailed":
                    raise _refused(write.refusal, reason.get("Item")) from None
        raise


def _refused(refusal: Refusal, held: Item | None) -> Exception:
    return refusal if isinstance(refusal, Exception) else refusal(held)
