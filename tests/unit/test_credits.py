"""The books of a team: what each step of a job does to them, and what it never does twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError

from img2img.errors import AlreadyExists, InsufficientCredits, InvalidRequest, NotFound, TeamDisabled
from img2img.jobs.guards import Guard
from img2img.jobs.job import Job, Status
from img2img.money.credits import MAX_AMOUNT, MAX_NOTE, Account, Entry, Phase
from tests.books import START, Books, earlier, with_outcomes
from tests.system import fresh_aws


@pytest.fixture(scope="module", autouse=True)
def _aws() -> None:
    fresh_aws()


@pytest.fixture
def books() -> Books:
    return Books()


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """What would have been slept between two tries."""
    slept: list[float] = []
    monkeypatch.setattr("img2img.dynamo.time", SimpleNamespace(sleep=slept.append))
    return slept


def entries(books: Books, team: str = "default", **which: Any) -> list[Entry]:
    return list(books.credits.ledger(team, **which))


def standing(books: Books) -> dict[str, int]:
    return asdict(books.credits.account("default"))


# Top-ups


def test_a_new_team_has_nothing(books):
    assert books.credits.account("default") == Account(balance=0, reserved=0, charged=0, added=0, entries=0)
    assert entries(books) == []


def test_top_ups_add_up_and_stand_in_the_ledger(books):
    books.credits.add("default", 2500, note="invoice 17")
    books.clock.now += 60
    books.credits.add("default", 1)
    assert standing(books) == {"balance": 2501, "reserved": 0, "charged": 0, "added": 2501, "entries": 2}
    first, second = entries(books)
    assert (first.phase, first.added, first.note, first.at_ms) == (Phase.TOP_UP, 2500, "invoice 17", START * 1000)
    assert (second.phase, second.added, second.note) == (Phase.TOP_UP, 1, "")


def test_a_top_up_is_taken_back_as_far_as_it_is_left(books):
    books.credits.add("default", 2500)
    before = books.everything()
    with pytest.raises(InsufficientCredits) as refused:
        books.credits.add("default", -2501)
    assert (refused.value.price, refused.value.balance) == (2501, 2500)
    assert "2.5 credits" in refused.value.detail
    assert books.everything() == before
    books.clock.now += 1
    books.credits.add("default", -2500, note="a mistake")
    assert standing(books) == {"balance": 0, "reserved": 0, "charged": 0, "added": 0, "entries": 2}
    assert [(entry.added, entry.note) for entry in entries(books)] == [(2500, ""), (-2500, "a mistake")]


def test_what_is_reserved_cannot_be_taken_back(books):
    books.credits.add("default", 1000)
    books.job(price=600)
    with pytest.raises(InsufficientCredits):
        books.credits.add("default", -401)
    books.credits.add("default", -400)
    assert books.credits.account("default") == Account(balance=0, reserved=600, charged=0, added=600, entries=3)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"amount": 0}, "amount"),
        ({"amount": MAX_AMOUNT + 1}, "amount"),
        ({"amount": -MAX_AMOUNT - 1}, "amount"),
        ({"reference": "a b"}, "reference"),
        ({"reference": "#1"}, "reference"),
        ({"reference": "x" * 65}, "reference"),
        ({"reference": "a\n"}, "reference"),
        ({"note": "x" * (MAX_NOTE + 1)}, "note"),
    ],
)
def test_a_wrong_top_up_changes_nothing_and_names_what_is_wrong(books, wrong, field):
    before = books.everything()
    with pytest.raises(InvalidRequest) as refused:
        books.credits.add("default", **{"amount": 1000, **wrong})
    assert [error.field for error in refused.value.errors] == [field]
    assert books.everything() == before


@pytest.mark.parametrize("reference", ["", "invoice-17"])
@pytest.mark.parametrize("amount", [1000, -1000])
def test_there_is_no_account_without_a_team(books, amount, reference):
    before = books.everything()
    with pytest.raises(NotFound):
        books.credits.add("nobody", amount, reference=reference)
    with pytest.raises(NotFound):
        books.credits.account("nobody")
    assert books.everything() == before


def test_a_reference_is_booked_once(books):
    books.credits.add("default", 1000, reference="invoice-17")
    before = books.everything()
    for amount in (1000, 5, -1, -5000):
        with pytest.raises(AlreadyExists):
            books.credits.add("default", amount, reference="invoice-17")
    assert books.everything() == before
    books.credits.add("default", 1000, reference="invoice-18", note="by card")
    books.teams.create("other")
    books.credits.add("other", 1000, reference="invoice-17")
    assert standing(books)["added"] == 2000
    assert {entry.note for entry in entries(books)} == {"invoice-17", "by card"}


def test_a_refused_top_up_leaves_its_reference_free(books):
    with pytest.raises(InsufficientCredits):
        books.credits.add("default", -1, reference="invoice-17")
    books.credits.add("default", 1000, reference="invoice-17")
    assert standing(books)["balance"] == 1000


# The way of a job


def test_a_new_job_reserves_its_price(books):
    books.credits.add("default", 5000)
    job = books.job(price=1500)
    assert standing(books) == {"balance": 3500, "reserved": 1500, "charged": 0, "added": 5000, "entries": 2}
    [entry] = entries(books, about=job.id)
    assert entry == Entry(about=job.id, phase=Phase.RESERVE, at_ms=START * 1000, reserved=1500)


@pytest.mark.parametrize(
    ("outcomes", "status", "charged"),
    [
        (["succeeded"], Status.SUCCEEDED, 1),
        (["blocked"], Status.FAILED, 0),
        (["failed"], Status.FAILED, 0),
        (["succeeded"] * 4, Status.SUCCEEDED, 4),
        (["blocked", "succeeded", "failed", "succeeded"], Status.SUCCEEDED, 2),
        (["failed", "blocked", "blocked"], Status.FAILED, 0),
        (["blocked", "failed", "succeeded"], Status.SUCCEEDED, 1),
    ],
)
def test_what_was_delivered_is_charged_and_the_rest_released(books, outcomes, status, charged):
    samples = len(outcomes)
    books.credits.add("default", 20_000)
    job = books.job(samples=samples, price=1001 * samples)
    books.clock.now += 8
    ended = books.finish(job, *outcomes)
    assert ended == books.jobs.get("default", job.id)
    charged, released = 1001 * charged, 1001 * (samples - charged)
    assert ended.status is status
    assert (ended.credits.reserved, ended.credits.charged, ended.credits.released) == (
        1001 * samples,
        charged,
        released,
    )
    assert standing(books) == {
        "balance": 20_000 - charged,
        "reserved": 0,
        "charged": charged,
        "added": 20_000,
        "entries": 3,
    }
    [_, entry] = entries(books, about=job.id)
    settled = {"charged": charged, "released": released}
    assert entry == Entry(about=job.id, phase=Phase.SETTLE, at_ms=(START + 8) * 1000, **settled)


@pytest.mark.parametrize("claimed", [False, True])
def test_a_canceled_job_costs_nothing(books, claimed):
    books.credits.add("default", 2000)
    job = books.job(price=1500)
    if claimed:
        books.jobs.claim("default", job.id, lease_seconds=130)
    _, canceled = books.jobs.cancel("default", job.id)
    assert canceled == books.jobs.get("default", job.id)
    assert (canceled.credits.charged, canceled.credits.released) == (0, 1500)
    assert standing(books) == {"balance": 2000, "reserved": 0, "charged": 0, "added": 2000, "entries": 3}


def test_what_was_delivered_of_a_job_canceled_on_its_way_is_released_too(books):
    books.credits.add("default", 2000)
    job = books.job(price=2000, samples=2)
    _, claimed = books.jobs.claim("default", job.id, lease_seconds=130)
    assert books.jobs.release(with_outcomes(claimed, "succeeded"), due_at=START + 60, counts=True)
    assert books.jobs.cancel("default", job.id)[1].credits.released == 2000
    assert standing(books)["balance"] == 2000


def test_the_price_of_today_does_not_change_the_jobs_of_yesterday(books):
    books.credits.add("default", 10_000)
    job = books.job(price=999, samples=3)
    receipt = books.finish(job, "succeeded", "blocked", "succeeded").credits
    assert (receipt.charged, receipt.released, receipt.price_version) == (666, 333, "1:1000")


def test_a_team_can_spend_its_last_thousandth_and_not_one_more(books):
    books.credits.add("default", 1500)
    before = books.everything()
    with pytest.raises(InsufficientCredits) as refused:
        books.job(price=1501)
    assert (refused.value.price, refused.value.balance) == (1501, 1500)
    assert "1.501 credits" in refused.value.detail
    assert refused.value.detail.endswith("balance is 1.5")
    assert books.everything() == before
    books.job(price=1500)
    with pytest.raises(InsufficientCredits):
        books.job(price=1)
    assert standing(books)["balance"] == 0


def test_a_refused_job_leaves_its_guard_free(books):
    guard = Guard("default", "k", "f")
    with pytest.raises(InsufficientCredits):
        books.jobs.create(books.fresh(), guard)
    books.credits.add("default", 1000)
    assert books.jobs.create(books.fresh(), guard) is None


def test_a_repeat_finds_its_job_when_the_balance_is_gone(books):
    guard = Guard("default", "k", "f")
    books.credits.add("default", 1000)
    first = books.fresh()
    assert books.jobs.create(first, guard) is None
    assert earlier(books.jobs, books.fresh(), guard) == (first.id, "f")
    assert standing(books) == {"balance": 0, "reserved": 1000, "charged": 0, "added": 1000, "entries": 2}


def test_a_disabled_team_creates_nothing_and_its_jobs_end_as_others_do(books):
    books.credits.add("default", 5000)
    done, canceled = books.job(), books.job()
    books.teams.enable("default", enabled=False)
    before = books.everything()
    with pytest.raises(TeamDisabled):
        books.job()
    assert books.everything() == before
    books.finish(done)
    books.jobs.cancel("default", canceled.id)
    assert standing(books) == {"balance": 4000, "reserved": 0, "charged": 1000, "added": 5000, "entries": 5}
    books.teams.enable("default", enabled=True)
    books.job()


def test_no_team_no_job(books):
    before = books.everything()
    with pytest.raises(TeamDisabled):
        books.job("nobody")
    assert books.everything() == before


# Once


def create_again(books: Books, job: Job) -> None:
    with pytest.raises(ClientError, match="ConditionalCheckFailed"):
        books.jobs.create(job)


def finish_again(books: Books, job: Job) -> None:
    assert books.jobs.finish(with_outcomes(job)) is None


def cancel_again(books: Books, job: Job) -> None:
    assert books.jobs.cancel("default", job.id)[1].status.is_terminal


@pytest.mark.parametrize("again", [create_again, finish_again, cancel_again], ids=lambda again: again.__name__)
@pytest.mark.parametrize("end", ["succeeded", "failed", "canceled"])
def test_nothing_is_booked_twice(books, end, again):
    books.credits.add("default", 5000)
    job = books.job()
    _, claimed = books.jobs.claim("default", job.id, lease_seconds=130)
    if end == "canceled":
        books.jobs.cancel("default", job.id)
    else:
        assert books.jobs.finish(with_outcomes(claimed, end))
    before = books.everything()
    again(books, job if again is create_again else claimed)
    assert books.everything() == before
    assert [entry.phase for entry in entries(books, about=job.id)] == [Phase.RESERVE, Phase.SETTLE]


def test_an_entry_that_stands_is_never_written_over(books):
    """Whatever becomes of the job's own item: each phase has one place in the ledger."""
    books.credits.add("default", 5000)
    job = books.job()
    books.finish(job)
    books.jobs.delete("default", job.id)
    before = books.everything()
    with pytest.raises(ClientError, match="ConditionalCheckFailed"):
        books.jobs.create(job)
    assert books.everything() == before


# The ledger


def test_the_ledger_is_read_by_age_in_pages(books):
    books.credits.add("default", 50_000)
    jobs = []
    for second in range(1, 8):
        books.clock.now = START + second
        jobs.append(books.job())
    books.teams.create("other")
    books.credits.add("other", 1)
    books.clock.now += 100
    books.finish(jobs[2])
    with books.small_pages(2):
        found = entries(books)
        late = entries(books, since_ms=(START + 3) * 1000)
    assert found[0].phase is Phase.TOP_UP
    assert [entry.about for entry in found[1:]] == [job.id for job in (*jobs[:3], jobs[2], *jobs[3:])]
    assert late == found[3:]


def test_no_amount_is_a_fraction(books):
    books.credits.add("default", 50_000)
    books.finish(books.job(samples=3, price=1001 * 3), "succeeded", "failed", "blocked")
    numbers = [value["N"] for item in books.everything() for value in item.values() if "N" in value]
    assert len(numbers) > 20
    assert all(number.lstrip("-").isdigit() for number in numbers)


# Other transactions


def a_new_job(books: Books, _job: Job) -> object:
    return books.job()


def a_guarded_job(books: Books, _job: Job) -> object:
    return books.jobs.create(books.fresh(), Guard("default", "k", "f")) is None


def an_end(books: Books, job: Job) -> object:
    return books.finish(job)


def a_cancel(books: Books, job: Job) -> object:
    return books.jobs.cancel("default", job.id)[1].status is Status.CANCELED


def a_top_up(books: Books, _job: Job) -> object:
    books.credits.add("default", 1, reference="once")
    return True


WRITES: list[Callable[[Books, Job], object]] = [a_new_job, a_guarded_job, an_end, a_cancel, a_top_up]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("times", [1, 15])
def test_conflicts_are_waited_out(books, pauses, write, times):
    books.credits.add("default", 5000)
    job = books.job()
    before = standing(books)["entries"]
    with books.conflicts(times) as tried:
        assert write(books, job)
    assert len(tried) == times + 1
    assert len(pauses) == times
    assert standing(books)["entries"] == before + 1


def test_pauses_grow_and_no_two_writers_pause_alike(books, pauses):
    books.credits.add("default", 5000)
    for _ in range(2):
        with books.conflicts(15):
            books.job()
    one, other = pauses[:15], pauses[15:]
    assert all(mine != theirs for mine, theirs in zip(one, other, strict=True))
    assert max(*one[:3], *other[:3]) < 0.1
    assert max(pauses) <= 0.5
    assert sum(one) < 8


def test_a_conflict_does_not_hide_that_credits_are_short(books, pauses):
    with books.conflicts(3) as tried, pytest.raises(InsufficientCredits):
        books.job()
    assert len(tried) == 4
    assert entries(books) == []
