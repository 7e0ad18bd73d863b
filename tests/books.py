"""Teams, jobs, ledger and counters in moto's table, with a clock that stands until a test moves it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSResponse

from img2img.ids import new_id
from img2img.jobs.guards import EarlierJob, Guard
from img2img.jobs.job import Job, Output, OutputStatus, Status
from img2img.jobs.store import JobStore
from img2img.money.credits import Credits
from img2img.money.prices import Receipt
from img2img.money.usage import UsageStore
from img2img.params import Img2ImgParams
from img2img.teams.store import TeamStore

START = 1_790_000_000
TABLE = "jobs"
CONFLICT = {
    "Error": {"Code": "TransactionCanceledException", "Message": "canceled"},
    "CancellationReasons": [{"Code": "None"}, {"Code": "TransactionConflict"}],
    "ResponseMetadata": {"HTTPStatusCode": 400, "HTTPHeaders": {}, "RequestId": "id"},
}


def earlier(store: JobStore, job: Job, guard: Guard) -> tuple[str, str]:
    """Try to create a job, and return the id and the fingerprint that its guard holds already."""
    with pytest.raises(EarlierJob) as caught:
        store.create(job, guard)
    return caught.value.job_id, caught.value.fingerprint


class Clock:
    """A clock that stands until a test moves it."""

    def __init__(self) -> None:
        self.now = float(START)

    def __call__(self) -> float:
        return self.now


class Stores:
    """All that reads and writes the table, through a client of its own."""

    def __init__(self, clock: Clock) -> None:
        self.client: Any = boto3.client("dynamodb")
        self.clock = clock
        self.teams = TeamStore(self.client, TABLE, clock=clock)
        self.credits = Credits(self.client, TABLE, clock=clock)
        self.jobs = JobStore(self.client, TABLE, retention_days=30, clock=clock)
        self.usage = UsageStore(self.client, TABLE)

    def fresh(
        self, team: str = "default", *, price: int = 1000, samples: int = 1, key: str = "key", backend: str = "segmind"
    ) -> Job:
        """Return a job of now that is not yet in the table."""
        now_ms = int(self.clock.now * 1000)
        return Job(
            id=new_id(now_ms),
            team=team,
            key_id=key,
            correlation_id="request",
            status=Status.QUEUED,
            params=Img2ImgParams(prompt="a castle", seed=7, samples=samples),
            backend=backend,
            credits=Receipt(reserved=price, price_version="1:1000"),
            created_ms=now_ms,
            due_at=now_ms // 1000 + 60,
            deadline_at=now_ms // 1000 + 1800,
        )

    def job(self, team: str = "default", **others: Any) -> Job:
        """Create a job now."""
        made = self.fresh(team, **others)
        assert self.jobs.create(made) is None
        return made

    def finish(self, job: Job, *outcomes: str) -> Job:
        """Claim a job and end it; `outcomes` are those of its samples, delivered if not told otherwise."""
        claimed, held = self.jobs.claim(job.team, job.id, lease_seconds=130)
        assert claimed
        assert held
        ended = self.jobs.finish(with_outcomes(held, *outcomes))
        assert ended
        return ended

    def item(self, sk: str, team: str = "default") -> dict[str, Any]:
        """Return one of a team's items."""
        key = {"pk": {"S": f"TEAM#{team}"}, "sk": {"S": sk}}
        found: dict[str, Any] = self.client.get_item(TableName=TABLE, Key=key)["Item"]
        return found

    def items(self, prefix: str, team: str = "default") -> dict[str, Any]:
        """Return those of a team's items whose sort key begins so, by that key."""
        found = self.client.query(
            TableName=TABLE,
            KeyConditionExpression="pk = :pk AND begins_with(sk, :prefix)",
            ExpressionAttributeValues={":pk": {"S": f"TEAM#{team}"}, ":prefix": {"S": prefix}},
        )
        return {item["sk"]["S"]: item for item in found["Items"]}

    def everything(self) -> list[Any]:
        """Return every item of the table."""
        found: list[Any] = self.client.scan(TableName=TABLE)["Items"]
        return sorted(found, key=lambda item: (item["pk"]["S"], item["sk"]["S"]))


class Books(Stores):
    """The table, emptied, with one new team, and what happens to the calls of these stores."""

    def __init__(self, balance: int = 0) -> None:
        super().__init__(Clock())
        for item in self.everything():
            self.client.delete_item(TableName=TABLE, Key={"pk": item["pk"], "sk": item["sk"]})
        self.teams.create("default")
        if balance:
            self.credits.add("default", balance)

    @contextmanager
    def hooked(self, event: str, hook: Callable[..., Any]) -> Iterator[None]:
        """Call `hook` at one of botocore's events of these stores' client."""
        self.client.meta.events.register(event, hook)
        try:
            yield
        finally:
            self.client.meta.events.unregister(event, hook)

    @contextmanager
    def calls(self) -> Iterator[Counter[str]]:
        """Count the calls by operation."""
        made: Counter[str] = Counter()

        def count(model: Any, **_: Any) -> None:
            made[model.name] += 1

        with self.hooked("before-call.dynamodb", count):
            yield made

    @contextmanager
    def conflicts(self, times: int) -> Iterator[list[str]]:
        """Have the next transactions meet others; the list grows with every transaction that is tried."""
        tried: list[str] = []

        def answer(model: Any, **_: Any) -> tuple[AWSResponse, Any] | None:
            tried.append(model.name)
            return (AWSResponse("https://dynamodb", 400, {}, None), CONFLICT) if len(tried) <= times else None

        with self.hooked("before-call.dynamodb.TransactWriteItems", answer):
            yield tried

    @contextmanager
    def small_pages(self, size: int) -> Iterator[None]:
        """Have every query answer with pages of so many items."""

        def limit(params: dict[str, Any], **_: Any) -> None:
            params["Limit"] = size

        with self.hooked("before-parameter-build.dynamodb.Query", limit):
            yield


def with_outcomes(job: Job, *outcomes: str) -> Job:
    """Return a job whose samples have ended: `succeeded`, `blocked` or `failed`."""
    outputs = tuple(
        Output(
            index=index,
            status=OutputStatus(outcome),
            seed=job.params.seed_of(index),
            error_code="backend_refused" if outcome == "failed" else "",
        )
        for index, outcome in enumerate(outcomes or ["succeeded"] * job.params.samples)
    )
    return replace(job, outputs=outputs)
