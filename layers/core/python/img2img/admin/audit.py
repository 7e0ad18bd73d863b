"""Recompute a team's balances from its ledger, and name every difference. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from img2img.errors import NotFound, NotUnderstood
from img2img.ids import ms_of
from img2img.jobs.store import JobStore
from img2img.money.credits import Account, Credits, Entry, Phase
from img2img.money.prices import in_credits

# A ledger that grows while it is read is read on from where it may have grown, a few milliseconds' work, until nothing
# was written meanwhile.
_READS = 20
# How far the clocks of two functions may differ: an entry's place in the ledger is its job's creation time.
_SKEW_MS = 5 * 60_000


@dataclass(frozen=True)
class Audit:
    """What came of it. `still` is False when the ledger never stood still: then nothing was compared."""

    team: str
    account: Account
    differences: tuple[str, ...] = ()
    still: bool = True


def _sums(entries: list[Entry]) -> Account:
    added, reserved, charged, released = (
        sum(getattr(entry, name) for entry in entries) for name in ("added", "reserved", "charged", "released")
    )
    return Account(
        balance=added - reserved + released,
        reserved=reserved - charged - released,
        charged=charged,
        added=added,
        entries=len(entries),
    )


def _unequal(account: Account, recomputed: Account) -> Iterator[str]:
    for name in ("balance", "reserved", "charged", "added"):
        held, due = getattr(account, name), getattr(recomputed, name)
        if held != due:
            yield f"{name} is {in_credits(held)}, by the ledger {in_credits(due)}"
    if account.entries != recomputed.entries:
        yield f"the ledger has {recomputed.entries} entries, {account.entries} were counted"


def _unsettled(entries: list[Entry]) -> list[Entry]:
    """Return the reserves of jobs that are not settled."""
    settled = {entry.about for entry in entries if entry.phase is Phase.SETTLE}
    return [entry for entry in entries if entry.phase is Phase.RESERVE and entry.about not in settled]


def _wrong(entries: list[Entry]) -> Iterator[str]:
    reserves = {entry.about: entry for entry in entries if entry.phase is Phase.RESERVE}
    for entry in entries:
        if entry.phase is Phase.SETTLE:
            reserved = reserves[entry.about].reserved if entry.about in reserves else 0
            settled = entry.charged + entry.released
            if settled != reserved or min(entry.charged, entry.released) < 0:
                yield f"job {entry.about} was settled for {in_credits(settled)} of {in_credits(reserved)} reserved"


def _forgotten(credits: Credits, jobs: JobStore, team: str, reserves: list[Entry]) -> Iterator[str]:  # noqa: A002
    for job_id, reserved in ((entry.about, entry.reserved) for entry in reserves):
        try:
            job = jobs.get(team, job_id)
        except NotFound:
            ended = True
        except NotUnderstood:
            yield f"job {job_id} cannot be read"
            continue
        else:
            ended = job.status.is_terminal
            if job.credits.reserved != reserved:
                own = in_credits(job.credits.reserved)
                yield f"job {job_id} has {own} reserved, by the ledger {in_credits(reserved)}"
        # It may have ended since the ledger was read, and been settled with that.
        settled = any(e.about == job_id and e.phase is Phase.SETTLE for e in credits.ledger(team, about=job_id))
        if ended and not settled:
            yield f"job {job_id} is over, and its credits are still reserved"


def _read_on(credits: Credits, team: str, found: dict[tuple[str, Phase], Entry]) -> Iterator[Entry]:  # noqa: A002
    """Yield what may have been written since: about new jobs, and about jobs that had not ended."""
    if not found:
        yield from credits.ledger(team)
        return
    # Not the top-ups' ids: an operator's clock may be anywhere.
    newest = max((ms_of(about) for about, phase in found if phase is Phase.RESERVE), default=0)
    since_ms = newest - _SKEW_MS
    for entry in _unsettled(list(found.values())):
        if ms_of(entry.about) < since_ms:
            yield from credits.ledger(team, about=entry.about)
    yield from credits.ledger(team, since_ms=since_ms)


def audit(credits: Credits, jobs: JobStore, team: str) -> Audit:  # noqa: A002 (what they are called)
    """Compare a team's account with its ledger. Raises `NotFound`."""
    found: dict[tuple[str, Phase], Entry] = {}
    for _ in range(_READS):
        read_whole = not found
        before = credits.account(team)
        found |= {(entry.about, entry.phase): entry for entry in _read_on(credits, team, found)}
        account = credits.account(team)
        if before != account:
            continue
        entries = list(found.values())
        differences = (
            *_unequal(account, _sums(entries)),
            *_wrong(entries),
            *_forgotten(credits, jobs, team, _unsettled(entries)),
        )
        if not differences or read_whole:
            return Audit(team, account, differences)
        # A top-up from a clock that is far off stands where nothing was read again: all of it once more.
        found = {}
    return Audit(team, account, still=False)
