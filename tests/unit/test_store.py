"""Jobs in a table: which write is refused when, whoever comes late, twice or at the same time, and who pays."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ClientError

from img2img.admin.audit import audit
from img2img.backends import Pending, Wait
from img2img.errors import DeadlineExceeded, InsufficientCredits, NotFound, PresetUnknown, TeamDisabled
from img2img.ids import new_id
from img2img.jobs.guards import GUARD_TTL, OBJECT_GUARD_TTL, Guard
from img2img.jobs.job import NEXT, Job, Output, OutputStatus, Source, Status, ended, given_up
from img2img.jobs.listing import JobFilter
from img2img.jobs.store import JobStore
from img2img.money.credits import Account, Credits, Entry, Phase
from img2img.money.prices import Receipt
from img2img.money.usage import Counts, Row, UsageStore
from img2img.params import Img2ImgParams
from img2img.teams.store import TeamStore
from tests.books import earlier
from tests.system import fresh_aws

START = 1_790_000_000
LEASE = 130
SOURCE = Source(bucket="uploads", key="inbox/default/p/a.png", version="e:1", preset="p")
DAY = 86_400
RETENTION_DAYS = 30
SAMPLES = 4
EACH = 1250
PRICE = SAMPLES * EACH
FUNDS = 1_000 * PRICE
OPEN = [status for status in Status if not status.is_terminal]


class Clock:
    """A clock that stands until a test moves it."""

    def __init__(self) -> None:
        self.now = float(START)

    def __call__(self) -> float:
        return self.now


@dataclass
class Table:
    """The stores over moto, their clock, and the client that they speak through."""

    client: Any
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.store = JobStore(self.client, "jobs", retention_days=RETENTION_DAYS, clock=self.clock)
        self.teams = TeamStore(self.client, "jobs", clock=self.clock)
        self.credits = Credits(self.client, "jobs", clock=self.clock)
        self.usage = UsageStore(self.client, "jobs")
        for team in ("default", "other"):
            self.teams.create(team)
            self.credits.add(team, FUNDS)

    def job(self, *, guard: Guard | None = None, **others: Any) -> Job:
        """Create a job now, of the last second if not told otherwise."""
        made = self.fresh(**others)
        assert self.store.create(made, guard) is None
        return made

    def fresh(self, **others: Any) -> Job:
        created_ms = others.pop("created_ms", int(self.clock.now * 1000))
        fields = {
            "id": new_id(created_ms),
            "team": "default",
            "key_id": "key",
            "correlation_id": "request",
            "status": Status.QUEUED,
            "params": Img2ImgParams(prompt="a castle", seed=7, guidance_scale=10.5, samples=SAMPLES),
            "metadata": {"order": "17"},
            "backend": "segmind",
            "credits": Receipt(reserved=PRICE, price_version="1:1250"),
            "created_ms": created_ms,
            "due_at": created_ms // 1000 + 60,
            "deadline_at": created_ms // 1000 + 1800,
        }
        return Job(**{**fields, **others})

    def claim(self, job: Job) -> Job:
        claimed, now = self.store.claim(job.team, job.id, lease_seconds=LEASE)
        assert claimed
        assert now is not None
        return now

    def now(self, job: Job) -> Job:
        return self.store.get(job.team, job.id)

    def item(self, job: Job) -> dict[str, Any]:
        key = {"pk": {"S": f"TEAM#{job.team}"}, "sk": {"S": f"JOB#{job.id}"}}
        found: dict[str, Any] = self.client.get_item(TableName="jobs", Key=key)["Item"]
        return found

    def in_status(self, status: Status) -> Job:
        """Return a job that has come to `status`, as it is now."""
        made = self.job(status=status if status is Status.AWAITING_UPLOAD else Status.QUEUED)
        if status is Status.PROCESSING:
            self.claim(made)
        elif status is Status.CANCELED:
            self.store.cancel(made.team, made.id)
        elif status.is_terminal:
            delivered = 1 if status is Status.SUCCEEDED else 0
            assert self.store.finish(over(self.claim(made), delivered))
        return self.now(made)

    def everything(self) -> list[dict[str, Any]]:
        """Return every item of the table."""
        pages = self.client.get_paginator("scan").paginate(TableName="jobs")
        return sorted((item for page in pages for item in page["Items"]), key=lambda item: (str(item["pk"]), str(item)))

    def leave(self, balance: int) -> None:
        """Leave the team so much."""
        self.credits.add("default", balance - self.credits.account("default").balance)

    def entries(self, job: Job) -> list[Entry]:
        """Return what the ledger says of a job."""
        return list(self.credits.ledger(job.team, about=job.id))

    def used(self) -> list[Row]:
        """Return the counters of the team's usage."""
        return self.usage.rows("default", date(2000, 1, 1), date(2099, 12, 31))

    @contextmanager
    def refusing(self, operation: str, times: int, reasons: str | tuple[str, ...]) -> Iterator[list[str]]:
        """Answer the next calls of an operation with an error of DynamoDB's; the list grows with every call.

        `reasons` are the error's code or, for a transaction, what is said of each of its writes.
        """
        calls: list[str] = []
        parsed: dict[str, Any] = {
            "Error": {"Code": reasons, "Message": "refused"},
            "ResponseMetadata": {"HTTPStatusCode": 400, "HTTPHeaders": {}, "RequestId": "id"},
        }
        if isinstance(reasons, tuple):
            parsed["Error"]["Code"] = "TransactionCanceledException"
            parsed["CancellationReasons"] = [{"Code": code} for code in reasons]

        def answer(model: Any, params: Any, **_: Any) -> tuple[AWSResponse, Any] | None:
            calls.append(model.name)
            if len(calls) > times:
                return None
            if isinstance(reasons, tuple):
                assert len(json.loads(params["body"])["TransactItems"]) == len(reasons)
            return AWSResponse("https://dynamodb", 400, {}, None), parsed

        event = f"before-call.dynamodb.{operation}"
        self.client.meta.events.register(event, answer)
        try:
            yield calls
        finally:
            self.client.meta.events.unregister(event, answer)

    @contextmanager
    def between(self, operation: str, happens: Callable[[], object]) -> Iterator[None]:
        """Have something happen just before the next call of an operation."""
        event = f"before-call.dynamodb.{operation}"

        def step(**_: Any) -> None:
            self.client.meta.events.unregister(event, step)
            happens()

        self.client.meta.events.register(event, step)
        yield
        self.client.meta.events.unregister(event, step)


@pytest.fixture(scope="module")
def client() -> Any:
    fresh_aws()
    return boto3.client("dynamodb")


@pytest.fixture
def table(client) -> Table:
    pages = client.get_paginator("scan").paginate(TableName="jobs", ProjectionExpression="pk, sk")
    write(client, [{"DeleteRequest": {"Key": key}} for page in list(pages) for key in page["Items"]])
    return Table(client)


def write(client: Any, requests: list[dict[str, Any]]) -> None:
    for start in range(0, len(requests), 25):
        client.batch_write_item(RequestItems={"jobs": requests[start : start + 25]})


def picture(index: int) -> Output:
    return Output(
        index=index,
        status=OutputStatus.SUCCEEDED,
        seed=7 + index,
        key=f"results/default/x/{index}.png",
        content_type="image/png",
        width=512,
        height=512,
        bytes=9,
        sha256="ab",
        seconds=1.25,
    )


def guard(team: str = "default", key: str = "k", fingerprint: str = "f") -> Guard:
    return Guard(team, key, fingerprint)


def of_object(key: str = "inbox/default/p/a.png#e:1") -> Guard:
    return Guard("default", key, "", kind="OBJECT", ttl=OBJECT_GUARD_TTL)


def failed_at_once(table: Table, **others: Any) -> Job:
    """Return a job that could not be run, and is not yet in the table."""
    made = replace(table.fresh(**others), source=SOURCE, credits=Receipt(reserved=0, price_version="1:1250"))
    return ended(made, Status.FAILED, at_ms=made.created_ms, error=PresetUnknown("There is no preset p"))


def over(job: Job, delivered: int) -> Job:
    """Return the job with all samples ended, the first ones with a picture."""
    return given_up(replace(job, outputs=tuple(map(picture, range(delivered)))), DeadlineExceeded("too late"))


# A job and its item


def test_a_job_is_read_as_it_was_written(table):
    made = table.job()
    assert table.now(made) == made


@pytest.mark.parametrize("status", [Status.QUEUED, Status.AWAITING_UPLOAD])
def test_a_job_knows_the_object_that_it_was_made_of(table, status):
    made = table.job(source=SOURCE, status=status)
    assert table.now(made).source == made.source == SOURCE


def test_an_ended_job_keeps_all_that_is_known_of_it(table):
    failed = Output(index=1, status=OutputStatus.FAILED, seed=8, error_code="backend_refused", error_detail="no")
    blocked = Output(index=2, status=OutputStatus.BLOCKED, seed=9, error_code="output_blocked")
    claimed = table.claim(table.job())
    ended = table.store.finish(replace(claimed, outputs=(picture(0), failed, blocked, picture(3))))
    assert ended == table.now(claimed)
    assert ended.outputs == (picture(0), failed, blocked, picture(3))
    assert ended.credits == Receipt(reserved=PRICE, charged=2 * EACH, released=PRICE - 2 * EACH, price_version="1:1250")
    assert ended.started_ms == ended.completed_ms == START * 1000
    assert (ended.lease, ended.due_at) == (None, None)


def test_only_unfinished_jobs_stand_in_the_open_index(table):
    jobs = [table.in_status(status) for status in Status]
    found = table.client.scan(TableName="jobs", IndexName="open")["Items"]
    assert {item["sk"]["S"] for item in found} == {f"JOB#{job.id}" for job in jobs if not job.status.is_terminal}


def test_a_failed_job_keeps_why(table):
    failed = table.in_status(Status.FAILED)
    assert (failed.error_code, failed.error_detail) == ("deadline_exceeded", "too late")
    assert [output.error_code for output in failed.outputs] == ["deadline_exceeded"] * SAMPLES


def test_no_item_holds_a_float(table):
    table.job(guard=guard())
    table.in_status(Status.SUCCEEDED)
    numbers = [value["N"] for item in table.everything() for value in item.values() if "N" in value]
    assert len(numbers) > 30
    assert all(number.lstrip("-").isdigit() for number in numbers)


def test_another_teams_job_does_not_exist(table):
    made = table.job()
    for call in (table.store.get, table.store.cancel):
        with pytest.raises(NotFound):
            call("other", made.id)
    assert table.store.claim("other", made.id, lease_seconds=LEASE) == (False, None)
    table.store.delete("other", made.id)
    assert table.now(made) == made


def test_an_open_job_never_expires_for_it_holds_credits(table):
    made = table.job()
    assert "expires_at" not in table.item(made)
    table.clock.now = START + 10 * RETENTION_DAYS * DAY
    assert table.now(made).id == made.id
    assert ids(table.store.list("default", JobFilter(limit=10)).jobs) == [made.id]
    assert table.store.cancel("default", made.id)[1].status is Status.CANCELED
    assert table.item(made)["expires_at"] == {"N": str(int(table.clock.now) + RETENTION_DAYS * DAY)}


def test_an_expired_job_is_gone_before_the_table_deletes_it(table):
    made = table.job()
    table.store.cancel("default", made.id)
    table.clock.now = START + RETENTION_DAYS * DAY - 1
    assert table.now(made).id == made.id
    table.clock.now += 1
    for call in (table.store.get, table.store.cancel):
        with pytest.raises(NotFound):
            call("default", made.id)
    assert table.store.list("default", JobFilter(limit=10)).jobs == []


# Every operation on every status


def claim(table: Table, job: Job) -> object:
    return table.store.claim(job.team, job.id, lease_seconds=LEASE)[0] or None


def claim_after_the_lease(table: Table, job: Job) -> object:
    table.clock.now += LEASE
    return table.store.claim(job.team, job.id, lease_seconds=LEASE)[0] or None


def release(table: Table, job: Job) -> object:
    return table.store.release(job, due_at=START + 90, counts=True)


def succeed(table: Table, job: Job) -> object:
    return table.store.finish(over(job, 1))


def fail(table: Table, job: Job) -> object:
    return table.store.finish(over(job, 0))


def cancel(table: Table, job: Job) -> object:
    return table.store.cancel(job.team, job.id)[1].status is Status.CANCELED and not job.status.is_terminal


def postpone(table: Table, job: Job) -> object:
    return table.store.postpone(job, due_at=START + 300)


def start(table: Table, job: Job) -> object:
    return table.store.start(job, due_at=START + 60, deadline_at=START + 1800)


def expire(table: Table, job: Job) -> object:
    return table.store.expire(job)


WRITES: dict[Callable[[Table, Job], object], dict[Status, Status]] = {
    claim: {Status.QUEUED: Status.PROCESSING},
    claim_after_the_lease: {Status.QUEUED: Status.PROCESSING, Status.PROCESSING: Status.PROCESSING},
    release: {Status.PROCESSING: Status.QUEUED},
    # From queued: the deadline passed while some samples waited, and others had been delivered.
    succeed: {Status.QUEUED: Status.SUCCEEDED, Status.PROCESSING: Status.SUCCEEDED},
    # From awaiting an upload: one came that is no image.
    fail: dict.fromkeys(OPEN, Status.FAILED),
    cancel: dict.fromkeys(OPEN, Status.CANCELED),
    postpone: {Status.QUEUED: Status.QUEUED},
    start: {Status.AWAITING_UPLOAD: Status.QUEUED},
    expire: {Status.AWAITING_UPLOAD: Status.CANCELED},
}


@pytest.mark.parametrize("status", Status)
@pytest.mark.parametrize("operation", WRITES, ids=lambda operation: operation.__name__)
def test_what_an_operation_makes_of_a_status(table, operation, status):
    job = table.in_status(status)
    before = table.everything()
    done = operation(table, job)
    expected = WRITES[operation].get(status)
    assert bool(done) == (expected is not None)
    assert table.now(job).status is (expected or status)
    if expected is None:
        assert table.everything() == before


@pytest.mark.parametrize("operation", WRITES, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("status", OPEN)
def test_no_operation_brings_a_deleted_job_back(table, operation, status):
    job = table.in_status(status)
    table.store.delete(job.team, job.id)
    table.store.delete(job.team, job.id)
    before = table.everything()
    if operation is cancel:
        with pytest.raises(NotFound):
            cancel(table, job)
    else:
        assert not operation(table, job)
    assert table.everything() == before
    assert list(table.store.overdue()) == []


# Leases


@pytest.mark.parametrize("operation", [release, succeed, fail], ids=lambda operation: operation.__name__)
def test_a_worker_whose_lease_ran_out_writes_nothing(table, operation):
    late = table.claim(table.job())
    table.clock.now += LEASE
    held = table.claim(late)
    assert held.lease != late.lease
    before = table.everything()
    assert not operation(table, late)
    assert table.now(late) == held
    assert table.everything() == before


def test_a_lease_holds_until_its_last_second(table):
    claimed = table.claim(table.job())
    assert claimed.due_at == START + LEASE
    table.clock.now += LEASE - 1
    assert claim(table, claimed) is None
    table.clock.now += 1
    assert claim(table, claimed) is not None


def test_claims_count_and_the_first_one_started_the_job(table):
    first = table.claim(table.job())
    table.clock.now += LEASE
    second = table.claim(first)
    assert (first.attempts, second.attempts) == (1, 2)
    assert second.started_ms == first.started_ms == START * 1000


@pytest.mark.parametrize(("counts", "attempts"), [(True, 1), (False, 0)])
def test_a_release_keeps_what_ended_and_counts_when_told(table, counts, attempts):
    claimed = replace(table.claim(table.job()), outputs=(picture(1),))
    assert table.store.release(claimed, due_at=START + 62, counts=counts)
    found = table.now(claimed)
    assert (found.status, found.attempts, found.due_at, found.lease) == (Status.QUEUED, attempts, START + 62, None)
    assert found.outputs == (picture(1),)


# What is under way is written down at once


def test_a_claimed_job_notes_what_is_under_way_and_nothing_else(table):
    claimed = table.claim(table.job())
    assert table.store.note(replace(claimed, pending={0: call(0)}, outputs=(picture(1),)))
    found = table.now(claimed)
    assert (found.pending, found.outputs, found.lease) == ({0: call(0)}, (), claimed.lease)
    assert found.due_at == claimed.due_at


@pytest.mark.parametrize("end", ["canceled", "claimed by another"])
def test_whoever_lost_a_job_notes_nothing(table, end):
    claimed = table.claim(table.job())
    if end == "canceled":
        table.store.cancel(claimed.team, claimed.id)
    else:
        table.clock.now += LEASE
        table.claim(claimed)
    assert not table.store.note(replace(claimed, pending={0: call(0)}))
    assert table.now(claimed).pending == {}


def test_when_a_message_comes_to_look_is_kept_until_the_end(table):
    claimed = replace(table.claim(table.job()), pending={0: call(0)}, look_ms=START * 1000 + 3000)
    assert table.store.release(claimed, due_at=START + 63, counts=False)
    assert table.now(claimed).look_ms == START * 1000 + 3000
    table.store.cancel(claimed.team, claimed.id)
    assert table.now(claimed).look_ms is None


def test_until_when_a_caller_waits_is_kept(table):
    assert table.now(table.job(waited_until=START + 25)).waited_until == START + 25
    assert table.now(table.job()).waited_until is None


# At a backend that works by itself


def call(index: int) -> Pending:
    notes = {"inference_id": f"x-1-{index}", "output": f"s3://uploads/answers/{index}.out"}
    return Pending(backend="sagemaker", reason="backend_failed", notes=notes)


def at_a_backend(table: Table, *, due_at: int = START + 60) -> Job:
    """Return a job of which one sample has ended and two are on their way."""
    claimed = replace(
        table.claim(table.job()),
        backend="sagemaker",
        backend_reason="backend_failed",
        outputs=(picture(1),),
        pending={0: call(0), 3: call(3)},
        waits_for=Wait.ENDPOINT_STARTING,
    )
    assert table.store.release(claimed, due_at=due_at, counts=True)
    return claimed


def test_a_job_at_a_backend_belongs_to_no_worker_and_keeps_what_it_waits_for(table):
    claimed = at_a_backend(table)
    assert table.now(claimed) == replace(claimed, lease=None, due_at=START + 60)
    assert table.now(claimed).status is Status.PROCESSING


def test_a_job_at_a_backend_can_be_claimed_at_once_by_one(table):
    claimed = at_a_backend(table)
    found = table.claim(claimed)
    assert found.lease not in (None, claimed.lease)
    assert (found.attempts, found.started_ms) == (2, claimed.started_ms)
    assert (found.pending, found.outputs, found.waits_for) == (claimed.pending, claimed.outputs, claimed.waits_for)
    assert claim(table, claimed) is None


def test_a_job_goes_back_from_its_backend_to_the_queue(table):
    claimed = table.claim(at_a_backend(table))
    waiting = replace(claimed, pending={}, waits_for=None)
    assert table.store.release(waiting, due_at=START + 62, counts=False)
    found = table.now(claimed)
    assert (found.status, found.pending, found.waits_for) == (Status.QUEUED, {}, None)
    assert (found.attempts, found.backend, found.backend_reason) == (1, "sagemaker", "backend_failed")


def test_a_job_at_a_backend_is_looked_at_in_its_time_and_put_off_by_one_of_two_sweeps(table):
    job = table.now(at_a_backend(table))
    assert list(table.store.overdue()) == []
    table.clock.now = START + 60
    assert list(table.store.overdue()) == [job]
    assert table.store.postpone(job, due_at=START + 180)
    assert not table.store.postpone(job, due_at=START + 180)
    assert table.now(job) == replace(job, due_at=START + 180)


def test_a_job_that_a_notice_has_claimed_is_not_put_off(table):
    job = table.now(at_a_backend(table))
    table.claim(job)
    assert not table.store.postpone(job, due_at=START + 180)


@pytest.mark.parametrize("delivered", [0, 1])
def test_a_job_at_a_backend_ends_as_last_seen_and_nothing_of_the_backend_stays(table, delivered):
    job = table.now(at_a_backend(table))
    assert table.store.finish(over(job, delivered))
    found = table.now(job)
    assert found.status is (Status.SUCCEEDED if delivered else Status.FAILED)
    assert (found.pending, found.waits_for, found.backend_reason) == ({}, None, "backend_failed")
    assert not {"pending", "waits_for", "due_at", "open_shard"} & set(table.item(job))
    assert list(table.store.overdue()) == []


def test_a_job_at_a_backend_that_was_claimed_since_does_not_end_as_last_seen(table):
    job = table.now(at_a_backend(table))
    held = table.claim(job)
    assert table.store.finish(over(job, 0)) is None
    assert table.now(job) == held


def test_a_job_at_a_backend_can_be_canceled(table):
    job = at_a_backend(table)
    assert table.store.cancel(job.team, job.id)[1].status is Status.CANCELED
    assert claim(table, job) is None
    assert (table.now(job).pending, table.now(job).outputs) == ({}, ())


def test_a_release_whose_answer_was_lost_has_happened(table):
    claimed = at_a_backend(table)
    assert table.store.release(claimed, due_at=START + 60, counts=True)
    assert not table.store.release(claimed, due_at=START + 61, counts=True)
    table.claim(claimed)
    assert not table.store.release(claimed, due_at=START + 60, counts=True)


def test_usage_is_counted_under_the_backend_that_served(table):
    table.store.finish(over(table.claim(at_a_backend(table)), 1))
    assert [row.backend for row in table.used()] == ["sagemaker"]


def test_finish_as_last_seen_loses_to_a_claim(table):
    seen = table.job()
    table.claim(seen)
    assert not fail(table, seen)
    assert table.now(seen).status is Status.PROCESSING


def test_finish_as_last_seen_loses_to_a_run_that_came_between(table):
    """A sweep may have read the job long before: pictures that were delivered meanwhile must not be lost."""
    seen = table.job()
    run = replace(table.claim(seen), outputs=(picture(0),))
    assert table.store.release(run, due_at=START + 64, counts=True)
    assert not fail(table, seen)
    assert table.now(seen).outputs == (picture(0),)


def test_a_job_is_finished_once(table):
    claimed = table.claim(table.job())
    assert succeed(table, claimed)
    before = table.everything()
    assert not fail(table, claimed)
    assert not succeed(table, claimed)
    assert table.now(claimed).status is Status.SUCCEEDED
    assert table.everything() == before


def test_postpone_is_refused_to_the_second_of_two_sweeps(table):
    seen = table.job()
    assert table.store.postpone(seen, due_at=START + 120)
    assert not table.store.postpone(seen, due_at=START + 130)
    assert table.now(seen).due_at == START + 120


def test_overdue_finds_what_is_due_in_every_shard(table):
    jobs = [table.job() for _ in range(12)]
    later = [table.job(due_at=START + 61) for _ in range(4)]
    table.clock.now = START + 59
    assert list(table.store.overdue()) == []
    table.clock.now = START + 60
    assert {job.id for job in table.store.overdue()} == {job.id for job in jobs}
    table.clock.now = START + 61
    assert {job.id for job in table.store.overdue()} == {job.id for job in (*jobs, *later)}
    shards = {table.item(job)["open_shard"]["S"] for job in (*jobs, *later)}
    assert len(shards) > 1


# The guard of an idempotency key


def test_a_guard_admits_one_job(table):
    first = table.job(guard=guard())
    before = table.everything()
    assert earlier(table.store, table.fresh(), guard(fingerprint="g")) == (first.id, "f")
    assert table.everything() == before


@pytest.mark.parametrize("other", [guard(team="other"), guard(key="K"), guard(key="k ")])
def test_guards_of_another_team_or_key_are_separate(table, other):
    table.job(guard=guard())
    assert table.store.create(table.fresh(team=other.team), other) is None


def test_a_guard_ends_after_a_day_whether_or_not_the_table_has_deleted_it(table):
    first = table.job(guard=guard())
    table.clock.now = START + GUARD_TTL - 1
    assert earlier(table.store, table.fresh(), guard()) == (first.id, "f")
    table.clock.now += 1
    second = table.job(guard=guard(fingerprint="g"))
    assert earlier(table.store, table.fresh(), guard()) == (second.id, "g")


def test_a_job_is_never_overwritten(table):
    claimed = table.claim(table.job())
    before = table.everything()
    for held_by in (None, guard()):
        with pytest.raises(ClientError, match="ConditionalCheckFailed"):
            table.store.create(replace(claimed, status=Status.QUEUED), held_by)
    assert table.everything() == before


def test_the_guard_of_an_object_holds_for_a_month(table):
    first = table.job(guard=of_object())
    table.clock.now = START + OBJECT_GUARD_TTL - 1
    before = table.everything()
    assert earlier(table.store, table.fresh(), of_object()) == (first.id, "")
    assert table.everything() == before
    table.clock.now += 1
    assert table.store.create(table.fresh(), of_object()) is None


def test_an_idempotency_key_that_reads_like_an_object_is_none(table):
    table.job(guard=of_object())
    assert table.store.create(table.fresh(), guard(key=of_object().key, fingerprint="")) is None


# Jobs that could not be run


def test_a_job_that_failed_at_once_is_written_with_its_end(table):
    table.leave(0)
    account = table.credits.account("default")
    made = failed_at_once(table)
    assert table.store.create(made, of_object()) is None
    assert table.now(made) == replace(made, due_at=None)
    assert table.now(made).error_code == "preset_unknown"
    assert [(e.phase, e.charged, e.released) for e in table.entries(made)] == [(Phase.SETTLE, 0, 0)]
    assert table.credits.account("default") == replace(account, entries=account.entries + 1)
    assert table.used() == [Row("default", "2026-09-21", "key", "segmind", Counts(jobs=1, failed=1))]
    assert list(table.store.overdue()) == []
    assert audit(table.credits, table.store, "default").differences == ()


@pytest.mark.parametrize("operation", WRITES, ids=lambda operation: operation.__name__)
def test_a_job_that_failed_at_once_stays_as_it_is(table, operation):
    made = failed_at_once(table)
    table.store.create(made, of_object())
    before = table.everything()
    assert not operation(table, table.now(made))
    assert table.everything() == before


def test_a_job_that_failed_at_once_is_made_once(table):
    first = failed_at_once(table)
    table.store.create(first, of_object())
    before = table.everything()
    for again in (failed_at_once(table), table.fresh()):
        assert earlier(table.store, again, of_object()) == (first.id, "")
        assert table.everything() == before


def test_a_job_of_a_disabled_team_can_be_written_as_failed(table):
    table.teams.enable("default", enabled=False)
    made = failed_at_once(table)
    assert table.store.create(made, of_object()) is None
    assert table.now(made).status is Status.FAILED


# Jobs that wait for an upload


def test_a_started_job_has_its_deadline_from_then_on(table):
    made = table.job(status=Status.AWAITING_UPLOAD, due_at=START + 1500, deadline_at=START + 1500)
    table.clock.now = START + 1000
    assert table.store.start(made, due_at=START + 1060, deadline_at=START + 2800)
    now = table.now(made)
    assert (now.status, now.due_at, now.deadline_at) == (Status.QUEUED, START + 1060, START + 2800)
    assert table.credits.account("default").reserved == PRICE
    assert table.claim(now).attempts == 1


def test_a_job_whose_upload_did_not_come_is_canceled_and_says_so(table):
    made = table.job(status=Status.AWAITING_UPLOAD)
    table.clock.now += 60
    expired = table.store.expire(made)
    assert expired == table.now(made)
    assert (expired.status, expired.error_code) == (Status.CANCELED, "upload_missing")
    assert (expired.credits.charged, expired.credits.released) == (0, PRICE)
    assert table.credits.account("default") == Account(balance=FUNDS, added=FUNDS, entries=3)
    assert [row.counts for row in table.used()] == [Counts(jobs=1, canceled=1)]


def test_an_upload_and_a_sweep_at_once_end_in_one_of_the_two(table):
    made = table.job(status=Status.AWAITING_UPLOAD)
    with table.between("TransactWriteItems", lambda: start(table, made)):
        assert table.store.expire(made) is None
    assert table.now(made).status is Status.QUEUED
    other = table.job(status=Status.AWAITING_UPLOAD)
    with table.between("UpdateItem", lambda: table.store.expire(other)):
        assert not start(table, other)
    assert table.now(other).status is Status.CANCELED
    assert audit(table.credits, table.store, "default").differences == ()


# Credits


def test_a_new_job_reserves_its_price(table):
    table.clock.now += 5
    made = table.job(guard=guard())
    assert table.entries(made) == [Entry(about=made.id, phase=Phase.RESERVE, at_ms=made.created_ms, reserved=PRICE)]
    assert table.credits.account("default") == Account(balance=FUNDS - PRICE, reserved=PRICE, added=FUNDS, entries=2)
    assert table.credits.account("other") == Account(balance=FUNDS, added=FUNDS, entries=1)
    assert table.used() == []


def test_the_last_credits_can_be_spent(table):
    table.leave(PRICE)
    table.job()
    assert table.credits.account("default").balance == 0


@pytest.mark.parametrize("held_by", [None, guard()], ids=["no guard", "guard"])
@pytest.mark.parametrize("balance", [PRICE - 1, 0])
def test_a_job_that_the_team_cannot_pay_leaves_nothing(table, balance, held_by):
    table.leave(balance)
    before = table.everything()
    with pytest.raises(InsufficientCredits) as refused:
        table.store.create(table.fresh(), held_by)
    assert (refused.value.price, refused.value.balance) == (PRICE, balance)
    assert table.everything() == before
    table.leave(PRICE)
    assert table.store.create(table.fresh(), held_by) is None


@pytest.mark.parametrize("held_by", [None, guard()], ids=["no guard", "guard"])
@pytest.mark.parametrize("balance", [FUNDS, 0])
def test_a_disabled_team_creates_nothing(table, balance, held_by):
    if balance != FUNDS:
        table.leave(balance)
    table.teams.enable("default", enabled=False)
    before = table.everything()
    with pytest.raises(TeamDisabled):
        table.store.create(table.fresh(), held_by)
    assert table.everything() == before


def test_a_team_that_is_none_creates_nothing(table):
    before = table.everything()
    with pytest.raises(TeamDisabled):
        table.store.create(table.fresh(team="nobody"), guard(team="nobody"))
    assert table.everything() == before


@pytest.mark.parametrize("enabled", [True, False])
def test_a_guard_finds_its_job_whatever_the_team_has_left(table, enabled):
    table.leave(PRICE)
    first = table.job(guard=guard())
    table.teams.enable("default", enabled=enabled)
    before = table.everything()
    assert earlier(table.store, table.fresh(), guard()) == (first.id, "f")
    assert table.everything() == before


def test_a_guard_that_has_ended_saves_nobody_from_paying(table):
    table.leave(PRICE)
    table.job(guard=guard())
    table.clock.now = START + GUARD_TTL
    before = table.everything()
    with pytest.raises(InsufficientCredits):
        table.store.create(table.fresh(), guard())
    assert table.everything() == before


@pytest.mark.parametrize("delivered", range(SAMPLES + 1))
@pytest.mark.parametrize("status", [Status.QUEUED, Status.PROCESSING])
def test_a_finished_job_is_charged_for_what_it_delivered(table, status, delivered):
    job = table.in_status(status)
    table.clock.now += 7
    ended = table.store.finish(over(job, delivered))
    charged = delivered * EACH
    assert (ended.status is Status.SUCCEEDED) == (delivered > 0)
    assert (ended.credits.charged, ended.credits.released) == (charged, PRICE - charged)
    assert table.now(job) == ended
    at_ms = (START + 7) * 1000
    assert table.entries(job)[1:] == [
        Entry(about=job.id, phase=Phase.SETTLE, at_ms=at_ms, charged=charged, released=PRICE - charged)
    ]
    assert table.credits.account("default") == Account(balance=FUNDS - charged, charged=charged, added=FUNDS, entries=3)
    succeeded = int(delivered > 0)
    counts = Counts(jobs=1, succeeded=succeeded, failed=1 - succeeded, images=delivered, charged=charged)
    assert table.used() == [Row("default", "2026-09-21", "key", "segmind", counts)]


def test_a_job_that_delivered_only_black_pictures_costs_nothing(table):
    blocked = [Output(index=index, status=OutputStatus.BLOCKED, seed=7) for index in range(SAMPLES)]
    ended = table.store.finish(replace(table.claim(table.job()), outputs=tuple(blocked)))
    assert (ended.status, ended.error_code) == (Status.FAILED, "output_blocked")
    assert table.credits.account("default").balance == FUNDS


@pytest.mark.parametrize("status", [Status.QUEUED, Status.PROCESSING])
def test_a_canceled_job_costs_nothing_even_if_some_of_it_was_delivered(table, status):
    held = replace(table.claim(table.job()), outputs=(picture(0), picture(2)))
    assert table.store.release(held, due_at=START + 62, counts=True)
    if status is Status.PROCESSING:
        table.claim(held)
    _, canceled = table.store.cancel("default", held.id)
    assert canceled == table.now(held)
    assert (canceled.status, canceled.outputs) == (Status.CANCELED, ())
    assert (canceled.credits.charged, canceled.credits.released) == (0, PRICE)
    assert table.entries(held)[1:] == [Entry(about=held.id, phase=Phase.SETTLE, at_ms=START * 1000, released=PRICE)]
    assert table.credits.account("default") == Account(balance=FUNDS, added=FUNDS, entries=3)
    assert table.used() == [Row("default", "2026-09-21", "key", "segmind", Counts(jobs=1, canceled=1))]


def test_usage_is_counted_by_the_day_of_the_end_the_key_and_the_backend(table):
    others = [{}, {}, {"key_id": "key2"}, {"backend": "sagemaker"}, {"team": "other"}]
    jobs = [table.claim(table.job(**other)) for other in others]
    late = table.claim(table.job())
    for job in jobs:
        succeed(table, job)
    table.clock.now += DAY
    fail(table, late)
    one = Counts(jobs=1, succeeded=1, images=1, charged=EACH)
    assert table.used() == [
        Row("default", "2026-09-21", "key", "sagemaker", one),
        Row("default", "2026-09-21", "key", "segmind", one + one),
        Row("default", "2026-09-21", "key2", "segmind", one),
        Row("default", "2026-09-22", "key", "segmind", Counts(jobs=1, failed=1)),
    ]


def test_the_jobs_of_a_team_that_was_disabled_meanwhile_are_settled(table):
    finished, canceled = table.claim(table.job()), table.job()
    table.teams.enable("default", enabled=False)
    assert succeed(table, finished)
    assert cancel(table, canceled)
    account = table.credits.account("default")
    assert (account.reserved, account.charged) == (0, EACH)


def test_deleting_an_ended_job_changes_no_books(table):
    job = table.in_status(Status.SUCCEEDED)
    account, entries, used = table.credits.account("default"), table.entries(job), table.used()
    table.store.delete(job.team, job.id)
    assert (table.credits.account("default"), table.entries(job), table.used()) == (account, entries, used)
    assert audit(table.credits, table.store, "default").differences == ()


# Two at once

ENDS = {succeed: (Status.SUCCEEDED, EACH), fail: (Status.FAILED, 0), cancel: (Status.CANCELED, 0)}
ENDS_OF_THE_AWAITED = {fail: Status.FAILED, cancel: Status.CANCELED, expire: Status.CANCELED}


@pytest.mark.parametrize("first", ENDS_OF_THE_AWAITED, ids=lambda end: end.__name__)
@pytest.mark.parametrize("late", ENDS_OF_THE_AWAITED, ids=lambda end: end.__name__)
def test_of_two_that_end_an_awaiting_job_at_once_one_settles_it(table, late, first):
    job = table.in_status(Status.AWAITING_UPLOAD)
    with table.between("TransactWriteItems", lambda: first(table, job)):
        late(table, job)
    assert table.now(job).status is ENDS_OF_THE_AWAITED[first]
    assert [entry.phase for entry in table.entries(job)] == [Phase.RESERVE, Phase.SETTLE]
    assert table.credits.account("default") == Account(balance=FUNDS, added=FUNDS, entries=3)
    assert [row.counts.jobs for row in table.used()] == [1]


@pytest.mark.parametrize("status", [Status.QUEUED, Status.PROCESSING])
@pytest.mark.parametrize("first", ENDS, ids=lambda end: end.__name__)
@pytest.mark.parametrize("late", ENDS, ids=lambda end: end.__name__)
def test_of_two_that_end_a_job_at_once_one_settles_it(table, late, first, status):
    job = table.in_status(status)
    with table.between("TransactWriteItems", lambda: first(table, job)):
        late(table, job)
    end, charged = ENDS[first]
    ended = table.now(job)
    assert (ended.status, ended.credits.charged) == (end, charged)
    assert [entry.phase for entry in table.entries(job)] == [Phase.RESERVE, Phase.SETTLE]
    assert table.credits.account("default") == Account(balance=FUNDS - charged, charged=charged, added=FUNDS, entries=3)
    assert [row.counts.jobs for row in table.used()] == [1]
    assert audit(table.credits, table.store, "default").differences == ()


def test_a_cancel_tells_how_a_job_ended_just_before(table):
    job = table.claim(table.job())
    with table.between("TransactWriteItems", lambda: succeed(table, job)):
        _, found = table.store.cancel(job.team, job.id)
    assert found == table.now(job)
    assert found.status is Status.SUCCEEDED


def test_a_job_that_is_claimed_while_it_is_canceled_is_canceled(table):
    job = table.job()
    claims: list[Job] = []
    with table.between("TransactWriteItems", lambda: claims.append(table.claim(job))):
        assert table.store.cancel(job.team, job.id)[1].status is Status.CANCELED
    assert not succeed(table, claims[0])
    assert [entry.phase for entry in table.entries(job)] == [Phase.RESERVE, Phase.SETTLE]
    assert table.credits.account("default").balance == FUNDS


def test_a_job_that_is_released_while_it_is_canceled_is_canceled(table):
    held = replace(table.claim(table.job()), outputs=(picture(0),))
    with table.between("TransactWriteItems", lambda: release(table, held)):
        assert table.store.cancel(held.team, held.id)[1].outputs == ()
    assert table.now(held).outputs == ()
    assert table.credits.account("default").balance == FUNDS


def test_a_job_that_is_deleted_while_it_is_canceled_is_gone(table):
    job = table.in_status(Status.QUEUED)

    def deleted() -> None:
        cancel(table, job)
        table.store.delete(job.team, job.id)

    with table.between("TransactWriteItems", deleted), pytest.raises(NotFound):
        table.store.cancel(job.team, job.id)
    assert table.credits.account("default") == Account(balance=FUNDS, added=FUNDS, entries=3)


# Conflicts with other transactions


def create(table: Table, _: Job) -> object:
    return table.job()


def create_guarded(table: Table, _: Job) -> object:
    return table.job(guard=guard())


def finish(table: Table, job: Job) -> object:
    return succeed(table, table.claim(job))


def delete(table: Table, job: Job) -> object:
    return table.store.delete(job.team, job.id) is None


IN_USE = "TransactionConflict"
# How many writes the transaction of each has.
TRANSACTIONS = {create: 3, create_guarded: 4, finish: 4, cancel: 4}
SINGLE = {claim: "UpdateItem", postpone: "UpdateItem", delete: "DeleteItem"}
CONFLICTS: list[tuple[Callable[[Table, Job], object], str, str | tuple[str, ...]]] = [
    *(
        (call, "TransactWriteItems", tuple(IN_USE if at == place else "None" for at in range(writes)))
        for call, writes in TRANSACTIONS.items()
        for place in range(writes)
    ),
    *((call, operation, f"{IN_USE}Exception") for call, operation in SINGLE.items()),
]


def name(value: object) -> str | None:
    if isinstance(value, tuple):
        return f"write {value.index(IN_USE)}"
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("call", "operation", "reasons"), CONFLICTS, ids=name)
def test_a_conflict_is_waited_out(table, call, operation, reasons):
    job = table.job()
    with table.refusing(operation, 3, reasons) as calls:
        assert call(table, job)
    assert len(calls) == 4
    account = table.credits.account("default")
    assert account.balance + account.reserved + account.charged == account.added
    assert account.entries == len(list(table.credits.ledger("default")))


# What moves while a transaction holds an item: the balance while the guard is in use, the job while the balance is.
UNSURE = {
    create: ("None", "ConditionalCheckFailed", IN_USE),
    create_guarded: ("None", "ConditionalCheckFailed", "None", IN_USE),
    finish: ("ConditionalCheckFailed", IN_USE, "None", "None"),
    cancel: ("ConditionalCheckFailed", "None", "None", IN_USE),
}


@pytest.mark.parametrize("call", UNSURE, ids=name)
def test_what_failed_beside_a_conflict_is_asked_again(table, call):
    job = table.job()
    with table.refusing("TransactWriteItems", 1, UNSURE[call]) as calls:
        assert call(table, job)
    assert len(calls) == 2


@pytest.mark.parametrize(("call", "operation", "reasons"), CONFLICTS, ids=name)
def test_conflicts_that_last_are_raised(table, call, operation, reasons, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr("img2img.dynamo.time.sleep", pauses.append)
    job = table.job()
    account = table.credits.account("default")
    with table.refusing(operation, 100, reasons) as calls, pytest.raises(ClientError, match=r"Conflict|Canceled"):
        call(table, job)
    assert len(calls) == 16
    assert 0 < sum(pauses) < 6, "a caller waits no longer than API Gateway does"
    assert table.credits.account("default") == account
    assert not table.now(job).status.is_terminal


@pytest.mark.parametrize("call", [*TRANSACTIONS, *SINGLE], ids=name)
def test_other_errors_are_raised_at_once(table, call):
    job = table.job()
    operation = SINGLE.get(call, "TransactWriteItems")
    with (
        table.refusing(operation, 100, "ResourceNotFoundException") as calls,
        pytest.raises(ClientError, match="ResourceNotFound"),
    ):
        call(table, job)
    assert len(calls) == 1


# Lists


def ids(jobs: list[Job]) -> list[str]:
    return [job.id for job in jobs]


@pytest.fixture
def ten(table) -> list[Job]:
    """Ten jobs a second apart, newest first, among another team's."""
    made = []
    for second in range(10):
        created_ms = (START + second) * 1000
        made.append(table.job(created_ms=created_ms))
        table.job(created_ms=created_ms, team="other")
    table.clock.now = START + 10
    return made[::-1]


def test_a_list_is_the_teams_newest_first(table, ten):
    page = table.store.list("default", JobFilter(limit=100))
    assert ids(page.jobs) == ids(ten)
    assert page.cursor is None


@pytest.mark.parametrize("limit", [1, 3, 5, 9, 10])
def test_cursors_lead_through_all_of_a_list_once(table, ten, limit):
    found, cursor, pages = [], None, 0
    while cursor or not pages:
        page = table.store.list("default", JobFilter(limit=limit, cursor=cursor))
        assert 1 <= len(page.jobs) <= limit
        found += ids(page.jobs)
        cursor, pages = page.cursor, pages + 1
    assert found == ids(ten)
    assert pages == -(-10 // limit)


def test_a_cursor_stays_good_when_its_job_is_deleted_and_new_jobs_come(table, ten):
    page = table.store.list("default", JobFilter(limit=4))
    table.store.delete("default", page.cursor)
    table.job()
    assert ids(table.store.list("default", JobFilter(limit=100, cursor=page.cursor)).jobs) == ids(ten[4:])


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_a_list_by_status(table, ten, limit):
    canceled = [ten[index] for index in (1, 2, 7)]
    for job in canceled:
        table.store.cancel(job.team, job.id)
    found, cursor, more = [], None, True
    while more:
        page = table.store.list("default", JobFilter(limit=limit, cursor=cursor, status=Status.CANCELED))
        found += ids(page.jobs)
        cursor = page.cursor
        more = cursor is not None
    assert found == ids(canceled)
    assert table.store.list("default", JobFilter(limit=5, status=Status.FAILED)).jobs == []


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"created_after": (START + 7) * 1000}, slice(0, 2)),
        ({"created_after": (START + 7) * 1000 - 1}, slice(0, 3)),
        ({"created_before": (START + 2) * 1000}, slice(8, 10)),
        ({"created_before": (START + 2) * 1000 + 1}, slice(7, 10)),
        ({"created_after": (START + 1) * 1000, "created_before": (START + 4) * 1000}, slice(6, 8)),
        ({"created_after": (START + 4) * 1000, "created_before": (START + 4) * 1000}, slice(0, 0)),
        ({"created_after": (START + 9) * 1000}, slice(0, 0)),
        ({"created_after": -(10**15), "created_before": 10**17}, slice(0, 10)),
        ({"created_after": 10**17}, slice(0, 0)),
        ({"created_before": -1}, slice(0, 0)),
    ],
)
def test_both_bounds_of_a_list_are_exclusive(table, ten, bounds, expected):
    page = table.store.list("default", JobFilter(limit=100, **bounds))
    assert ids(page.jobs) == ids(ten[expected])
    assert page.cursor is None


def test_a_page_ends_where_the_list_does(table, ten):
    page = table.store.list("default", JobFilter(limit=2, created_after=(START + 7) * 1000))
    assert (len(page.jobs), page.cursor) == (2, None)


def test_expired_jobs_among_others_shorten_no_list(table):
    table.clock.now = START - RETENTION_DAYS * DAY
    old = [table.job(created_ms=(START - RETENTION_DAYS * DAY - n) * 1000) for n in range(5)]
    for job in old:
        table.store.cancel("default", job.id)
    table.clock.now = START
    new = [table.job(created_ms=(START - n) * 1000) for n in range(3)]
    found, cursor, more = [], None, True
    while more:
        page = table.store.list("default", JobFilter(limit=2, cursor=cursor))
        found += ids(page.jobs)
        cursor, more = page.cursor, page.cursor is not None
    assert found == ids(new)
    assert old


def test_a_rare_status_is_found_page_by_page(table):
    """Among more jobs than one call reads, an answer may be empty, but its cursor leads on."""
    rare = table.in_status(Status.FAILED)
    item = table.item(table.job())
    copies = [{**item, "sk": {"S": f"JOB#{new_id((START + 1 + n) * 1000)}"}} for n in range(1050)]
    write(table.client, [{"PutRequest": {"Item": copy}} for copy in copies])
    first = table.store.list("default", JobFilter(limit=10, status=Status.FAILED))
    assert first.jobs == []
    assert first.cursor
    second = table.store.list("default", JobFilter(limit=10, status=Status.FAILED, cursor=first.cursor))
    assert ids(second.jobs) == [rare.id]
    assert second.cursor is None


# Any order of calls


class Anyone:
    """Uploads, workers, callers and sweeps that act on one job in any order, each on what it saw last."""

    def __init__(self, table: Table, seed: int) -> None:
        self.table = table
        self.choose = random.Random(seed)
        self.before = table.credits.account("default")
        self.job = table.job(status=self.choose.choice([Status.QUEUED, Status.AWAITING_UPLOAD]))
        self.seen = [self.job]
        self.ways: set[tuple[Status, Status]] = set()

    def becomes(self, status: Status, **others: Any) -> None:
        """Note what has to be in the table from now on."""
        self.ways.add((self.job.status, status))
        self.job = replace(self.job, status=status, **others)

    def wait(self) -> None:
        self.table.clock.now += self.choose.choice([1, 30, LEASE, 600])

    def start(self) -> None:
        due = int(self.table.clock.now) + 60
        awaited = self.job.status is Status.AWAITING_UPLOAD
        assert self.table.store.start(self.job, due_at=due, deadline_at=due + 1740) == awaited
        if awaited:
            self.becomes(Status.QUEUED, due_at=due, deadline_at=due + 1740)

    def expire(self) -> None:
        expired = self.table.store.expire(self.choose.choice(self.seen))
        assert (expired is not None) == (self.job.status is Status.AWAITING_UPLOAD)
        if expired:
            self.becomes(expired.status)
            self.job = expired

    def claim(self) -> None:
        was, now = self.job, int(self.table.clock.now)
        at_a_backend = was.status is Status.PROCESSING and was.lease is None
        lease_ran_out = was.status is Status.PROCESSING and (was.due_at or 0) <= now
        free = was.status is Status.QUEUED or at_a_backend or lease_ran_out
        claimed, now_is = self.table.store.claim(was.team, was.id, lease_seconds=LEASE)
        assert claimed == free
        if claimed:
            assert now_is is not None
            assert now_is.lease not in (None, was.lease)
            self.becomes(
                Status.PROCESSING,
                due_at=now + LEASE,
                attempts=was.attempts + 1,
                lease=now_is.lease,
                started_ms=was.started_ms or now * 1000,
            )

    def release(self) -> None:
        worker = self.choose.choice([job for job in self.seen if job.lease] or [None])
        if worker is None:
            return
        due, counts = int(self.table.clock.now) + 64 + len(self.seen), self.choose.random() < 0.5
        outputs = (picture(self.choose.randrange(4)),)
        pending = self.choose.choice([{}, {3: call(3)}])
        put_down = replace(worker, outputs=outputs, pending=pending)
        released = self.table.store.release(put_down, due_at=due, counts=counts)
        assert released == (worker.lease == self.job.lease)
        if released:
            attempts = self.job.attempts - (not counts)
            status = Status.PROCESSING if pending else Status.QUEUED
            self.becomes(status, due_at=due, attempts=attempts, lease=None, outputs=outputs, pending=pending)

    def finish(self) -> None:
        # Nobody finishes what he saw ended.
        someone = self.choose.choice([job for job in self.seen if not job.status.is_terminal])
        delivered = self.choose.choice([0, self.choose.randint(1, SAMPLES)])
        ended = self.table.store.finish(over(someone, delivered))
        # Its time says whether a queued job is queued still or once more.
        as_seen = (someone.status, someone.lease, someone.due_at) == (self.job.status, self.job.lease, self.job.due_at)
        possible = (Status.SUCCEEDED if delivered else Status.FAILED) in NEXT[someone.status]
        assert (ended is not None) == (as_seen and possible)
        if ended:
            assert ended.credits.charged == delivered * EACH
            self.becomes(ended.status)
            self.job = ended

    def cancel(self) -> None:
        _, found = self.table.store.cancel(self.job.team, self.job.id)
        if not self.job.status.is_terminal:
            completed_ms = int(self.table.clock.now * 1000)
            released = replace(self.job.credits, released=PRICE)
            self.becomes(
                Status.CANCELED,
                due_at=None,
                lease=None,
                completed_ms=completed_ms,
                outputs=(),
                pending={},
                credits=released,
            )
        assert found == self.job

    def postpone(self) -> None:
        sweep, due = self.choose.choice(self.seen), int(self.table.clock.now) + 120
        waits = self.job.status in (Status.QUEUED, Status.PROCESSING) and self.job.lease is None
        as_seen = waits and sweep.due_at == self.job.due_at
        assert self.table.store.postpone(sweep, due_at=due) == as_seen
        if as_seen:
            self.job = replace(self.job, due_at=due)

    def act(self) -> None:
        """Do one thing, and compare the table with what it should hold."""
        often = (self.wait, self.start, self.claim, self.claim, self.release, self.postpone)
        seldom = (self.finish, self.cancel, self.expire)
        self.choose.choice([*often, *often, *seldom])()
        now = self.table.now(self.job)
        assert now == self.job
        assert now.lease is None or now.status is Status.PROCESSING
        assert now.status is not Status.PROCESSING or now.lease or now.pending
        due = not now.status.is_terminal and (now.due_at or 0) <= self.table.clock.now
        assert (now.id in {job.id for job in self.table.store.overdue()}) == due
        if now not in self.seen:
            self.seen.append(now)
        self.check_books()

    def check_books(self) -> None:
        """Compare the team's books with what the job has cost until now."""
        ended = self.job.status.is_terminal
        charged, reserved = self.job.credits.charged, 0 if ended else PRICE
        assert self.table.credits.account("default") == Account(
            balance=self.before.balance - reserved - charged,
            reserved=reserved,
            charged=self.before.charged + charged,
            added=FUNDS,
            entries=self.before.entries + (2 if ended else 1),
        )


def test_no_order_of_calls_breaks_the_life_of_a_job(table):
    """Late and doubled calls change nothing, and every way that a job takes is a legal one."""
    ways: set[tuple[Status, Status]] = set()
    for seed in range(30):
        anyone, after_the_end = Anyone(table, seed), 0
        while after_the_end < 8 and len(anyone.seen) < 40:
            anyone.act()
            after_the_end += anyone.job.status.is_terminal
        ways |= anyone.ways
        table.store.delete("default", anyone.job.id)
    assert ways == {(old, new) for old in Status for new in NEXT[old]} | {(Status.PROCESSING, Status.PROCESSING)}
    assert audit(table.credits, table.store, "default").differences == ()
