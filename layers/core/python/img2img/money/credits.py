"""The books of each team: a balance on the team's item, and an append-only ledger that every change of it goes into.

    added == balance + reserved + charged

holds at every moment, because both sides only change together, in one transaction. A job has one `reserve` entry and,
once it has ended, one `settle` entry: the entry's key is made of the job's id and the phase, so neither can be written
twice. All amounts are thousandths of a credit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from img2img.dynamo import Item, Refusal, Write, integer_in, number, put_once, string_in, text, transact
from img2img.errors import AlreadyExists, InsufficientCredits, InvalidRequest, NotFound, ServiceError, TeamDisabled
from img2img.ids import first_id_at, new_id
from img2img.money.prices import in_credits
from img2img.stored import StoredEnum

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_NOTE = 200
# DynamoDB numbers hold far more; beyond it a typing error is likelier than a purchase.
MAX_AMOUNT = 10**12
_AMOUNTS = ("added", "reserved", "charged", "released")


class Phase(StoredEnum):
    """Why a ledger entry was written."""

    TOP_UP = "top_up"
    RESERVE = "reserve"
    SETTLE = "settle"


@dataclass(frozen=True)
class Account:
    """Where a team stands; `entries` is how many entries its ledger has."""

    balance: int = 0
    reserved: int = 0
    charged: int = 0
    added: int = 0
    entries: int = 0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the ledger. `about` is a job's id, for a top-up an id of its own."""

    about: str
    phase: Phase
    at_ms: int
    added: int = 0
    reserved: int = 0
    charged: int = 0
    released: int = 0
    note: str = ""


def team_key(team: str) -> dict[str, Any]:
    """Return the key of a team's item."""
    return {"pk": text(f"TEAM#{team}"), "sk": text("TEAM")}


def account_of(item: Item) -> Account:
    """Read the account from a team's item."""
    return Account(**{field.name: integer_in(item, field.name) for field in fields(Account)})


def _book(
    table: str,
    team: str,
    entry: Entry,
    *,
    condition: str,
    values: Mapping[str, Any],
    refusal: Refusal | None = None,
) -> list[Write]:
    """Return the two writes that change an account: the team's item, and the ledger's entry of it.

    `condition`, which names `values`, is what the team's item has to fulfil, `refusal` what it means when it does not.
    """
    changes = {
        "balance": entry.added - entry.reserved + entry.released,
        "reserved": entry.reserved - entry.charged - entry.released,
        "charged": entry.charged,
        "added": entry.added,
        "entries": 1,
    }
    account = {
        "TableName": table,
        "Key": team_key(team),
        "UpdateExpression": "ADD " + ", ".join(f"{name} :{name}" for name in changes),
        "ConditionExpression": condition,
        "ExpressionAttributeValues": {f":{name}": number(change) for name, change in changes.items()} | dict(values),
    }
    amounts = {name: getattr(entry, name) for name in _AMOUNTS}
    item = {
        "pk": text(f"TEAM#{team}"),
        "sk": text(f"LEDGER#{entry.about}#{entry.phase}"),
        "at_ms": number(entry.at_ms),
        **{name: number(amount) for name, amount in amounts.items() if amount},
        **({"note": text(entry.note)} if entry.note else {}),
    }
    return [Write({"Update": account}, refusal), put_once(table, item)]


def reserve(table: str, team: str, job_id: str, *, price: int, at_ms: int) -> list[Write]:
    """Return the writes that reserve a new job's price.

    They are refused with `TeamDisabled`, or with `InsufficientCredits` where the team is too poor.
    """
    in_service = "enabled = :true"
    can_pay = "balance >= :price"
    return _book(
        table,
        team,
        Entry(about=job_id, phase=Phase.RESERVE, at_ms=at_ms, reserved=price),
        condition=f"{in_service} AND {can_pay}",
        values={":true": {"BOOL": True}, ":price": number(price)},
        refusal=lambda held: _cannot_reserve(price, held),
    )


def settle(table: str, team: str, job_id: str, *, charged: int, released: int, at_ms: int) -> list[Write]:
    """Return the writes that charge what a job delivered and give back the rest of what was reserved."""
    entry = Entry(about=job_id, phase=Phase.SETTLE, at_ms=at_ms, charged=charged, released=released)
    there_is_a_team = "attribute_exists(pk)"
    return _book(table, team, entry, condition=there_is_a_team, values={})


def _cannot_reserve(price: int, held: Item | None) -> ServiceError:
    if not held or not held["enabled"]["BOOL"]:
        return TeamDisabled("The team is disabled")
    balance = integer_in(held, "balance")
    detail = f"This costs {in_credits(price)} credits, the team's balance is {in_credits(balance)}"
    return InsufficientCredits(detail, price=price, balance=balance)


def _cannot_add(team: str, amount: int, held: Item | None) -> ServiceError:
    if not held:
        return NotFound(f"There is no team {team}")
    left = integer_in(held, "balance")
    return InsufficientCredits(f"Only {in_credits(left)} credits are left to take back", price=-amount, balance=left)


class Credits:
    """Reads the books, and tops them up. `clock` returns epoch seconds."""

    def __init__(self, client: DynamoDBClient, table: str, *, clock: Callable[[], float]) -> None:
        self._client = client
        self._table = table
        self._clock = clock

    def account(self, team: str) -> Account:
        """Return where a team stands now. Raises `NotFound`."""
        answer = self._client.get_item(TableName=self._table, Key=team_key(team), ConsistentRead=True)
        if "Item" not in answer:
            raise NotFound(f"There is no team {team}")
        return account_of(answer["Item"])

    def add(self, team: str, amount: int, *, reference: str = "", note: str = "") -> None:
        """Top a team up or, with a negative amount, take back what was added by mistake.

        A `reference` is booked once: a repeat raises `AlreadyExists`. Raises `NotFound`, `InvalidRequest`, and
        `InsufficientCredits` when less is left than is to be taken back.
        """
        if amount == 0 or abs(amount) > MAX_AMOUNT:
            raise InvalidRequest.of_field("amount", f"must not be 0, and at most {in_credits(MAX_AMOUNT)} credits")
        if reference and not REFERENCE.fullmatch(reference):
            raise InvalidRequest.of_field("reference", "must have 1 to 64 letters, digits, dots, - and _")
        if len(note) > MAX_NOTE:
            raise InvalidRequest.of_field("note", f"must have at most {MAX_NOTE} characters")
        now_ms = int(self._clock() * 1000)
        entry = Entry(about=new_id(now_ms), phase=Phase.TOP_UP, at_ms=now_ms, added=amount, note=note or reference)
        there_is_a_team, enough_is_left = "attribute_exists(pk)", "balance >= :taken"
        book = _book(
            self._table,
            team,
            entry,
            condition=enough_is_left if amount < 0 else there_is_a_team,
            values={":taken": number(-amount)} if amount < 0 else {},
            refusal=lambda held: _cannot_add(team, amount, held),
        )
        if not reference:
            transact(self._client, book)
            return
        was_booked = AlreadyExists(f"Reference {reference} was booked before; nothing was added")
        once = {"pk": text(f"TEAM#{team}"), "sk": text(f"REFERENCE#{reference}"), "at_ms": number(now_ms)}
        # First: a repeat is told so, whatever is left by now.
        transact(self._client, [put_once(self._table, once, was_booked), *book])

    def ledger(self, team: str, *, since_ms: int = 0, about: str = "") -> Iterator[Entry]:
        """Yield a team's entries, by the age of what they are about: since then, or about one job or top-up."""
        pages = self._client.get_paginator("query").paginate(
            TableName=self._table,
            KeyConditionExpression="pk = :pk AND sk BETWEEN :first AND :last",
            ExpressionAttributeValues={
                ":pk": text(f"TEAM#{team}"),
                ":first": text(f"LEDGER#{about or first_id_at(since_ms)}"),
                ":last": text(f"LEDGER#{about}~"),
            },
            ConsistentRead=True,
        )
        for page in pages:
            for item in page["Items"]:
                _, its_about, phase = item["sk"]["S"].split("#", 2)
                yield Entry(
                    about=its_about,
                    phase=Phase(phase),
                    at_ms=integer_in(item, "at_ms"),
                    note=string_in(item, "note"),
                    **{name: integer_in(item, name) for name in _AMOUNTS},
                )
