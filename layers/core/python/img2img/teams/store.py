"""Teams and their API keys.

A key's value is API Gateway's business; here stands which team a key's id belongs to. A key has two items: one under
its id, to look it up, one under its team, to list it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from img2img.dynamo import Item, Write, number, put_once, text, transact
from img2img.errors import AlreadyExists, InvalidRequest, KeyDisabled, KeyUnknown, NotFound, TeamDisabled
from img2img.money.credits import Account, account_of, team_key

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

# A part of object keys and of items' keys, which `/` and `#` divide.
TEAM_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
KEY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# Printable, and nothing that a spreadsheet would take for a formula.
LABEL = re.compile(r"[^\W_][\w .,()/-]{0,63}")
# How long a disabled key or team may still be let in.
CACHE_SECONDS = 60
_CACHE_SIZE = 1000
_BATCH = 100


@dataclass(frozen=True, kw_only=True)
class Team:
    """A team, and where it stands. Times are epoch milliseconds."""

    id: str
    name: str
    enabled: bool = True
    created_ms: int
    account: Account = field(default_factory=Account)


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """What is known of an API key; `id` is API Gateway's."""

    id: str
    team: str
    label: str
    enabled: bool = True
    created_ms: int


def _new_team(team: Team) -> dict[str, Any]:
    return {
        **team_key(team.id),
        "name": text(team.name),
        "enabled": {"BOOL": team.enabled},
        "created_ms": number(team.created_ms),
        **{name: number(amount) for name, amount in asdict(Account()).items()},
    }


def _to_team(item: Item) -> Team:
    return Team(
        id=str(item["pk"]["S"]).removeprefix("TEAM#"),
        name=str(item["name"]["S"]),
        enabled=bool(item["enabled"]["BOOL"]),
        created_ms=int(item["created_ms"]["N"]),
        account=account_of(item),
    )


def _places(key_id: str, team: str) -> list[dict[str, Any]]:
    return [
        {"pk": text(f"KEY#{key_id}"), "sk": text("KEY")},
        {"pk": text(f"TEAM#{team}"), "sk": text(f"KEY#{key_id}")},
    ]


def _new_key(key: ApiKey) -> dict[str, Any]:
    return {
        "key_id": text(key.id),
        "team": text(key.team),
        "label": text(key.label),
        "enabled": {"BOOL": key.enabled},
        "created_ms": number(key.created_ms),
    }


def _to_key(item: Item) -> ApiKey:
    return ApiKey(
        id=str(item["key_id"]["S"]),
        team=str(item["team"]["S"]),
        label=str(item["label"]["S"]),
        enabled=bool(item["enabled"]["BOOL"]),
        created_ms=int(item["created_ms"]["N"]),
    )


class TeamStore:
    """The teams and keys of a deployment. `clock` returns epoch seconds."""

    def __init__(self, client: DynamoDBClient, table: str, *, clock: Callable[[], float]) -> None:
        self._client = client
        self._table = table
        self._clock = clock
        self._seen: dict[str, tuple[float, ApiKey, bool]] = {}

    def team_of(self, key_id: str) -> str:
        """Return the id of the team that may be served through a key: two reads, then none for a minute.

        Raises `KeyUnknown`, `KeyDisabled` and `TeamDisabled`.
        """
        found = self._seen.get(key_id)
        if found is None or self._clock() >= found[0]:
            # Before anything is read: however long that takes, a minute is a minute.
            until = self._clock() + CACHE_SECONDS
            key = self.key(key_id)
            try:
                found = (until, key, self.get(key.team).enabled)
            except NotFound:
                raise KeyUnknown("The team of this API key does not exist") from None
            if len(self._seen) >= _CACHE_SIZE:
                self._seen.clear()
            self._seen[key_id] = found
        _, key, team_enabled = found
        if not key.enabled:
            raise KeyDisabled("This API key is disabled")
        if not team_enabled:
            raise TeamDisabled("The team is disabled")
        return key.team

    def create(self, team_id: str, *, name: str = "") -> Team:
        """Create a team without credits. Raises `InvalidRequest` and `AlreadyExists`."""
        if not TEAM_ID.fullmatch(team_id):
            raise InvalidRequest.of_field("team", "must have 1 to 32 lower-case letters, digits, - and _")
        name = name or team_id
        if not LABEL.fullmatch(name):
            raise InvalidRequest.of_field("name", _LABEL_RULE)
        team = Team(id=team_id, name=name, created_ms=int(self._clock() * 1000))
        listed = {"pk": text("TEAMS"), "sk": text(f"TEAM#{team_id}")}
        exists = AlreadyExists(f"There is a team {team_id} already")
        transact(self._client, [put_once(self._table, item, exists) for item in (_new_team(team), listed)])
        return team

    def get(self, team_id: str) -> Team:
        """Return a team. Raises `NotFound`."""
        answer = self._client.get_item(TableName=self._table, Key=team_key(team_id), ConsistentRead=True)
        if "Item" not in answer:
            raise NotFound(f"There is no team {team_id}")
        return _to_team(answer["Item"])

    def all(self) -> Iterator[Team]:
        """Yield every team, by id: one query, and a read for each hundred of them."""
        ids = [str(item["sk"]["S"]).removeprefix("TEAM#") for item in self._query("TEAMS", "TEAM#")]
        for start in range(0, len(ids), _BATCH):
            wanted: dict[str, Any] = {self._table: {"Keys": [team_key(team) for team in ids[start : start + _BATCH]]}}
            found: list[Team] = []
            while wanted:
                answer = self._client.batch_get_item(RequestItems=wanted)
                found += [_to_team(item) for item in answer["Responses"][self._table]]
                wanted = dict(answer["UnprocessedKeys"])
            yield from sorted(found, key=lambda team: team.id)

    def enable(self, team_id: str, *, enabled: bool) -> None:
        """Let a team in, or keep it out. Raises `NotFound`."""
        missing = NotFound(f"There is no team {team_id}")
        transact(self._client, [self._set_enabled(team_key(team_id), enabled, missing)])

    def add_key(self, key_id: str, team_id: str, *, label: str) -> ApiKey:
        """Give a key of the gateway's to a team. Raises `InvalidRequest`, `NotFound` and `AlreadyExists`."""
        check_label(label)
        if not KEY_ID.fullmatch(key_id):
            raise InvalidRequest.of_field("key", "must have 1 to 64 letters, digits, - and _")
        key = ApiKey(id=key_id, team=team_id, label=label, created_ms=int(self._clock() * 1000))
        self.get(team_id)
        taken = AlreadyExists(f"The key {key_id} has a team already")
        items = [{**place, **_new_key(key)} for place in _places(key_id, team_id)]
        transact(self._client, [put_once(self._table, item, taken) for item in items])
        return key

    def key(self, key_id: str) -> ApiKey:
        """Return a key. Raises `KeyUnknown`."""
        place = {"pk": text(f"KEY#{key_id}"), "sk": text("KEY")}
        answer = self._client.get_item(TableName=self._table, Key=place, ConsistentRead=True)
        if "Item" not in answer:
            raise KeyUnknown("This API key belongs to no team")
        return _to_key(answer["Item"])

    def keys(self, team_id: str) -> list[ApiKey]:
        """Return a team's keys, also the disabled ones, oldest first."""
        found = [_to_key(item) for item in self._query(f"TEAM#{team_id}", "KEY#")]
        return sorted(found, key=lambda key: (key.created_ms, key.id))

    def enable_key(self, key_id: str, *, enabled: bool) -> ApiKey:
        """Let a key in, or keep it out. Raises `KeyUnknown`."""
        key = self.key(key_id)
        missing = KeyUnknown(f"There is no key {key_id}")
        transact(self._client, [self._set_enabled(place, enabled, missing) for place in _places(key_id, key.team)])
        return replace(key, enabled=enabled)

    def _set_enabled(self, place: Item, enabled: bool, missing: Exception) -> Write:
        there_is_one = "attribute_exists(pk)"
        return Write(
            {
                "Update": {
                    "TableName": self._table,
                    "Key": place,
                    "UpdateExpression": "SET enabled = :enabled",
                    "ConditionExpression": there_is_one,
                    "ExpressionAttributeValues": {":enabled": {"BOOL": enabled}},
                }
            },
            missing,
        )

    def _query(self, pk: str, prefix: str) -> Iterator[Item]:
        pages = self._client.get_paginator("query").paginate(
            TableName=self._table,
            KeyConditionExpression="pk = :pk AND begins_with(sk, :prefix)",
            ExpressionAttributeValues={":pk": text(pk), ":prefix": text(prefix)},
        )
        for page in pages:
            yield from page["Items"]


_LABEL_RULE = "must have 1 to 64 letters, digits, spaces and .,()/_- and begin with a letter or digit"


def check_label(label: str) -> None:
    """Raise `InvalidRequest` unless `label` may name a key."""
    if not LABEL.fullmatch(label):
        raise InvalidRequest.of_field("label", _LABEL_RULE)
