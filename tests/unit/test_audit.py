"""The audit: whatever is wrong with the books is named, and nothing else is, whatever happens meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable, Container
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest

from img2img.admin.audit import Audit, audit
from img2img.errors import InsufficientCredits, NotFound
from img2img.jobs.job import Job, OutputStatus, Status
from tests.books import TABLE, Books, Stores, with_outcomes
from tests.system import fresh_aws

AMOUNTS = ("added", "reserved", "charged", "released")


@dataclass
class Kept:
    """Books with something of everything, and jobs at every stage."""

    books: Books
    jobs: dict[str, Job] = field(default_factory=dict)
    good: list[dict[str, Any]] = field(default_factory=list)
    made_at: float = 0

    def restore(self) -> None:
        """Undo what was done to the items since they were made."""
        now = self.books.everything()
        for item in now:
            if item not in self.good:
                self.delete(item)
        for item in self.good:
            if item not in now:
                self.put(item)
        self.books.clock.now = self.made_at

    def audit(self) -> Audit:
        return audit(self.books.credits, self.books.jobs, "default")

    def differences(self) -> str:
        found = self.audit()
        assert found.still
        return "\n".join(found.differences)

    def entry(self, name: str) -> dict[str, Any]:
        """Return the ledger's item of a top-up, or of a phase of a job: `partly settle`."""
        job, _, phase = name.partition(" ")
        prefix = f"LEDGER#{self.jobs[job].id}#{phase}" if phase else "LEDGER#"
        found = self.books.items(prefix).values()
        return next(item for item in found if phase or item["sk"]["S"].endswith("#top_up"))

    def put(self, item: dict[str, Any]) -> None:
        self.books.client.put_item(TableName=TABLE, Item=item)

    def delete(self, item: dict[str, Any]) -> None:
        self.books.client.delete_item(TableName=TABLE, Key={"pk": item["pk"], "sk": item["sk"]})

    def job_item(self, name: str) -> dict[str, Any]:
        return self.books.item(f"JOB#{self.jobs[name].id}")


@pytest.fixture(scope="module", autouse=True)
def _aws() -> None:
    fresh_aws()


@pytest.fixture(scope="module")
def made() -> Kept:
    books = Books()
    books.credits.add("default", 100_000, note="invoice 17")
    books.teams.create("other")
    books.credits.add("other", 5000)
    books.job("other")
    kept = Kept(books)
    for name in ("queued", "processing", "delivered", "partly", "failed", "canceled"):
        # Further apart than clocks differ.
        books.clock.now += 400
        kept.jobs[name] = books.job(samples=2, price=2002)
    books.jobs.claim("default", kept.jobs["processing"].id, lease_seconds=130)
    books.finish(kept.jobs["delivered"])
    books.finish(kept.jobs["partly"], "succeeded", "blocked")
    books.finish(kept.jobs["failed"], "failed", "blocked")
    books.jobs.cancel("default", kept.jobs["canceled"].id)
    kept.good = books.everything()
    kept.made_at = books.clock.now
    return kept


@pytest.fixture
def kept(made) -> Kept:
    """The same good books for each test."""
    made.restore()
    return made


ENTRIES = ["topup"] + [
    f"{job} reserve" for job in ("queued", "processing", "delivered", "partly", "failed", "canceled")
]
ENTRIES += [f"{job} settle" for job in ("delivered", "partly", "failed", "canceled")]


# Nothing is wrong


def test_good_books_are_found_good_without_a_write(kept):
    before = kept.books.everything()
    with kept.books.calls() as calls:
        found = kept.audit()
    assert (found.team, found.differences, found.still) == ("default", (), True)
    assert found.account == kept.books.credits.account("default")
    assert set(calls) == {"GetItem", "Query"}
    assert kept.books.everything() == before


def test_the_books_of_a_new_team_are_good(kept):
    kept.books.teams.create("empty")
    assert audit(kept.books.credits, kept.books.jobs, "empty").differences == ()


def test_a_deleted_job_leaves_good_books(kept):
    for name, job in kept.jobs.items():
        if name not in ("queued", "processing"):
            kept.books.jobs.delete("default", job.id)
    assert kept.differences() == ""


def test_there_is_nothing_to_audit_without_a_team(kept):
    with pytest.raises(NotFound):
        audit(kept.books.credits, kept.books.jobs, "nobody")


@pytest.mark.parametrize("seed", range(2))
def test_whatever_happens_to_its_jobs_a_teams_books_are_good(seed):
    """A model of the account beside the books, and a ledger that only grows."""
    chance = random.Random(seed)
    books = Books(balance=6000)
    added, charged = 6000, 0
    open_jobs: list[Job] = []
    written: dict[str, Any] = {}
    for _ in range(60):
        books.clock.now += chance.choice([0, 0.001, 1, 200])
        step = chance.choice(["create", "create", "create", "finish", "finish", "cancel", "add", "late", "delete"])
        if step == "add":
            amount = chance.choice([-500, 1500, 1])
            try:
                books.credits.add("default", amount)
                added += amount
            except InsufficientCredits:
                assert books.credits.account("default").balance < 500
        elif step == "create":
            samples = chance.randint(1, 4)
            price = samples * chance.randint(1, 900)
            reserved = sum(job.credits.reserved for job in open_jobs)
            if price <= added - charged - reserved:
                open_jobs.append(books.job(samples=samples, price=price))
            else:
                with pytest.raises(InsufficientCredits):
                    books.job(samples=samples, price=price)
        elif open_jobs:
            job = open_jobs.pop(chance.randrange(len(open_jobs)))
            if step == "finish":
                charged += books.finish(job, *chance.choices(list(OutputStatus), k=job.params.samples)).credits.charged
            else:
                _, claimed = books.jobs.claim("default", job.id, lease_seconds=130)
                books.jobs.cancel("default", job.id)
                if step == "late":
                    assert books.jobs.finish(with_outcomes(claimed)) is None
                elif step == "delete":
                    books.jobs.delete("default", job.id)
        account = books.credits.account("default")
        reserved = sum(job.credits.reserved for job in open_jobs)
        assert (account.added, account.charged, account.reserved) == (added, charged, reserved)
        assert account.balance == added - charged - reserved >= 0
        ledger = books.items("LEDGER#")
        assert ledger.items() >= written.items()
        written = ledger
    assert len(written) > 30
    assert audit(books.credits, books.jobs, "default") == Audit("default", account)


# Something is wrong


@pytest.mark.parametrize("by", [1, -1, 1_000_000])
@pytest.mark.parametrize("name", ["balance", "reserved", "charged", "added"])
def test_a_wrong_amount_of_the_account_is_named_with_what_it_should_be(kept, name, by):
    item = kept.books.item("TEAM")
    right = int(item[name]["N"])
    kept.put({**item, name: {"N": str(right + by)}})
    [difference] = kept.audit().differences
    assert difference.startswith(f"{name} is ")
    kept.put(item)
    assert kept.differences() == ""


@pytest.mark.parametrize("by", [1, -1])
def test_a_wrong_number_of_entries_is_named(kept, by):
    item = kept.books.item("TEAM")
    kept.put({**item, "entries": {"N": str(int(item["entries"]["N"]) + by)}})
    [difference] = kept.audit().differences
    assert difference.startswith("the ledger has 11 entries")


def test_a_difference_says_how_much_in_credits(kept):
    item = kept.books.item("TEAM")
    kept.put({**item, "balance": {"N": "1500"}})
    # 100 credits, less 4.004 reserved, less 3.003 charged.
    assert kept.differences() == "balance is 1.5, by the ledger 92.993"


def test_several_wrong_amounts_are_all_named(kept):
    item = kept.books.item("TEAM")
    kept.put({**item, **{name: {"N": "7"} for name in ("balance", "reserved", "charged", "added", "entries")}})
    found = kept.audit().differences
    assert len(found) == 5
    assert all(any(name in difference for difference in found) for name in ("balance", "reserved", "charged", "added"))


@pytest.mark.parametrize("name", ENTRIES)
def test_a_lost_entry_is_noticed(kept, name):
    kept.delete(kept.entry(name))
    found = kept.differences()
    assert "the ledger has 10 entries, 11 were counted" in found
    if name != "topup":
        job = kept.jobs[name.split()[0]]
        # Of an open job nothing but the sums is left to tell.
        assert job.id in found or name in ("queued reserve", "processing reserve")
    assert "by the ledger" in found


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize("name", ENTRIES)
def test_an_altered_entry_is_noticed(kept, name, by):
    item = kept.entry(name)
    for amount in AMOUNTS:
        held = int(item.get(amount, {"N": "0"})["N"])
        kept.put({**item, amount: {"N": str(held + by)}})
        found = kept.differences()
        assert "by the ledger" in found
        if name.endswith("settle") and amount in ("charged", "released"):
            assert f"job {kept.jobs[name.split()[0]].id} was settled for" in found


@pytest.mark.parametrize("name", ENTRIES)
def test_a_copied_entry_is_noticed(kept, name):
    item = kept.entry(name)
    other = kept.books.fresh().id
    _, _, phase = item["sk"]["S"].split("#")
    kept.put({**item, "sk": {"S": f"LEDGER#{other}#{phase}"}})
    found = kept.differences()
    assert "the ledger has 12 entries, 11 were counted" in found
    if phase != "top_up":
        assert other in found


def test_amounts_that_were_moved_from_one_job_to_another_are_noticed(kept):
    """The sums are right, and two jobs are not."""
    for job, by in (("delivered", 1), ("partly", -1)):
        item = kept.entry(f"{job} settle")
        kept.put({**item, "charged": {"N": str(int(item["charged"]["N"]) + by)}})
    found = kept.audit().differences
    assert len(found) == 2
    for job in ("delivered", "partly"):
        assert any(kept.jobs[job].id in difference for difference in found)


def test_an_amount_that_was_charged_for_less_than_nothing_is_noticed(kept):
    item = kept.entry("failed settle")
    kept.put({**item, "charged": {"N": "-1001"}, "released": {"N": "3003"}})
    other = kept.entry("delivered settle")
    kept.put({**other, "charged": {"N": "3003"}, "released": {"N": "-1001"}})
    found = kept.audit().differences
    assert any(kept.jobs["failed"].id in difference for difference in found)
    assert any(kept.jobs["delivered"].id in difference for difference in found)


@pytest.mark.parametrize("name", ["queued", "processing"])
def test_what_is_reserved_for_a_job_that_is_gone_is_named(kept, name):
    kept.delete(kept.job_item(name))
    [difference] = kept.audit().differences
    assert difference == f"job {kept.jobs[name].id} is over, and its credits are still reserved"


@pytest.mark.parametrize("status", [Status.SUCCEEDED, Status.FAILED, Status.CANCELED])
def test_what_is_reserved_for_a_job_that_is_over_is_named(kept, status):
    kept.put({**kept.job_item("queued"), "status": {"S": status}})
    [difference] = kept.audit().differences
    assert difference == f"job {kept.jobs['queued'].id} is over, and its credits are still reserved"


def test_a_job_that_has_not_ended_is_kept_with_what_it_holds_however_old_it_is(kept):
    kept.books.clock.now += 31 * 86_400
    assert kept.audit().differences == ()
    for name in ("queued", "processing"):
        assert not kept.books.jobs.get("default", kept.jobs[name].id).status.is_terminal
    with pytest.raises(NotFound):
        kept.books.jobs.get("default", kept.jobs["delivered"].id)


def test_the_books_of_another_team_are_another_matter(kept):
    item = kept.books.item("TEAM", "other")
    kept.put({**item, "balance": {"N": "1"}})
    assert kept.differences() == ""
    assert audit(kept.books.credits, kept.books.jobs, "other").differences != ()


# Meanwhile


def create(kept: Kept, others: Stores) -> None:
    others.job(price=7)


def create_by_a_slow_clock(kept: Kept, others: Stores) -> None:
    others.clock.now -= 240
    others.job(price=7)
    others.clock.now += 240


def create_and_end(kept: Kept, others: Stores) -> None:
    others.finish(others.job(price=7))


def create_cancel_and_delete(kept: Kept, others: Stores) -> None:
    job = others.job(price=7)
    others.jobs.cancel("default", job.id)
    others.jobs.delete("default", job.id)


def end(kept: Kept, others: Stores) -> None:
    others.finish(kept.jobs["queued"])


def cancel_and_delete(kept: Kept, others: Stores) -> None:
    for name in ("queued", "processing"):
        others.jobs.cancel("default", kept.jobs[name].id)
        others.jobs.delete("default", kept.jobs[name].id)


def top_up(kept: Kept, others: Stores) -> None:
    others.credits.add("default", 1)


MEANWHILE: list[Callable[[Kept, Stores], None]] = [
    create,
    create_by_a_slow_clock,
    create_and_end,
    create_cancel_and_delete,
    end,
    cancel_and_delete,
    top_up,
]


class Intrusion:
    """Has something happen, by another client, before those of the audit's calls that are named."""

    def __init__(self, kept: Kept, happens: Callable[[Kept, Stores], None], at: Container[int]) -> None:
        self._others = Stores(kept.books.clock)
        self._kept = kept
        self._happens = happens
        self._at = at
        self.calls = 0

    def __call__(self, **_: Any) -> None:
        self.calls += 1
        if self.calls in self._at:
            self._happens(self._kept, self._others)


@pytest.mark.parametrize("happens", MEANWHILE, ids=lambda happens: happens.__name__)
def test_what_happens_meanwhile_is_no_difference(kept, happens):
    """Before each call of the audit in turn, while a page holds few of the ledger's entries."""
    for at in count(1):
        kept.restore()
        intrusion = Intrusion(kept, happens, [at])
        with ExitStack() as stack:
            stack.enter_context(kept.books.small_pages(3))
            stack.enter_context(kept.books.hooked("before-call.dynamodb", intrusion))
            found = kept.audit()
        assert (found.differences, found.still) == ((), True), f"before call {at}"
        if intrusion.calls < at:
            break
    assert at > 8


def test_books_that_come_to_rest_are_compared_then(kept):
    intrusion = Intrusion(kept, create_and_end, range(1, 12))
    with kept.books.hooked("before-call.dynamodb", intrusion):
        found = kept.audit()
    assert (found.differences, found.still) == ((), True)
    assert found.account == kept.books.credits.account("default")
    assert found.account.entries == 11 + 2 * 11


def test_books_that_never_rest_are_not_compared(kept):
    intrusion = Intrusion(kept, top_up, range(1, 1000))
    with kept.books.hooked("before-call.dynamodb", intrusion):
        found = kept.audit()
    assert (found.differences, found.still) == ((), False)


@pytest.mark.parametrize("happens", [create, end, top_up])
def test_what_is_wrong_is_named_whatever_happens_meanwhile(kept, happens):
    item = kept.books.item("TEAM")
    kept.put({**item, "charged": {"N": "7"}})
    intrusion = Intrusion(kept, happens, [2])
    with kept.books.hooked("before-call.dynamodb", intrusion):
        found = kept.audit()
    assert [difference.partition(" ")[0] for difference in found.differences] == ["charged"]
