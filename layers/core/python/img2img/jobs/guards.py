"""What keeps an idempotency key, a version of an object, or a request sent again from making a second job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from img2img.dynamo import WRITTEN_ONCE, Item, Write, number, text

GUARD_TTL = 24 * 3600
# Longer than any notice of S3's can be on its way: four days in its queue and fourteen in the dead letters.
OBJECT_GUARD_TTL = 30 * 86_400


class EarlierJob(Exception):
    """An earlier request with the same guard made a job, of the payload that `fingerprint` tells."""

    def __init__(self, job_id: str, fingerprint: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id
        self.fingerprint = fingerprint


@dataclass(frozen=True)
class Guard:
    """Ties an idempotency key, a version of an object, or a request by its content (`REPEAT`) to one job, in the
    transaction that creates the job.

    `ttl` is how long it holds, in seconds.
    """

    team: str
    key: str
    fingerprint: str
    kind: Literal["GUARD", "OBJECT", "REPEAT"] = "GUARD"
    ttl: int = GUARD_TTL

    @property
    def pk(self) -> str:
        """The guard's partition key."""
        return f"{self.kind}#{self.team}#{self.key}"

    def item(self, job_id: str, *, now: int) -> dict[str, Any]:
        """Return what ties the guard to a job from `now` on, in epoch seconds."""
        return {
            "pk": text(self.pk),
            "sk": text("GUARD"),
            "job_id": text(job_id),
            "fingerprint": text(self.fingerprint),
            "expires_at": number(now + self.ttl),
        }

    def write(self, table: str, job_id: str, *, now: int) -> Write:
        """Return the write that ties the guard to a job at `now`, in epoch seconds; refused with `EarlierJob`."""
        gone_by_now = "expires_at <= :now"
        return Write(
            {
                "Put": {
                    "TableName": table,
                    "Item": self.item(job_id, now=now),
                    "ConditionExpression": f"{WRITTEN_ONCE} OR {gone_by_now}",
                    "ExpressionAttributeValues": {":now": number(now)},
                }
            },
            _earlier_job,
        )


def _earlier_job(held: Item | None) -> Exception:
    assert held, "the condition lets a guard be written where there is none"  # noqa: S101
    return EarlierJob(held["job_id"]["S"], held["fingerprint"]["S"])
