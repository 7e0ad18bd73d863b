"""Presets: named parameter sets of a team, to be the defaults of its requests and of its inbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from img2img.dynamo import Item, integer_in, number, string_in, text
from img2img.errors import InvalidRequest, PresetUnknown
from img2img.params import PRESET_NAME
from img2img.requests import Presets, parse_preset
from img2img.values import WrongValue, checked_fields, parse_limit

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient


@dataclass(frozen=True)
class Preset:
    """A named parameter set; `fields` are request fields, checked when they were saved."""

    name: str
    fields: Mapping[str, Any]
    updated_ms: int


@dataclass(frozen=True)
class PresetFilter:
    """Which presets are wanted: so many, those after `cursor`."""

    limit: int = 50
    cursor: str | None = None


def _cursor(value: str) -> str:
    if PRESET_NAME.fullmatch(value):
        return value
    raise WrongValue("must be the cursor of an earlier answer")


def parse_preset_page(query: Mapping[str, str]) -> PresetFilter:
    """Check query parameters. Raises `InvalidRequest` naming every wrong and unknown one."""
    return PresetFilter(**checked_fields(query, {"limit": parse_limit, "cursor": _cursor}))


@dataclass(frozen=True)
class PresetPage:
    """Presets by name; `cursor` continues after the last one."""

    presets: list[Preset]
    cursor: str | None


def _to_preset(item: Item) -> Preset:
    return Preset(
        name=str(item["sk"]["S"]).removeprefix("PRESET#"),
        fields=json.loads(string_in(item, "fields") or "{}"),
        updated_ms=integer_in(item, "updated_ms"),
    )


class PresetStore:
    """The presets of all teams. `clock` returns epoch seconds."""

    def __init__(self, client: DynamoDBClient, table: str, *, clock: Callable[[], float]) -> None:
        self._client = client
        self._table = table
        self._clock = clock

    @staticmethod
    def _key(team: str, name: str) -> dict[str, Any]:
        return {"pk": text(f"TEAM#{team}"), "sk": text(f"PRESET#{name}")}

    def save(self, team: str, name: str, body: Any) -> tuple[Preset, bool]:
        """Check and save a preset. Returns it, and whether its name is a new one. Raises `InvalidRequest`."""
        if not PRESET_NAME.fullmatch(name):
            raise InvalidRequest.of_field("name", "must have 1 to 64 letters, digits, dots, - and _")
        preset = Preset(name, parse_preset(body), int(self._clock() * 1000))
        answer = self._client.put_item(
            TableName=self._table,
            Item={
                **self._key(team, name),
                "fields": text(json.dumps(preset.fields)),
                "updated_ms": number(preset.updated_ms),
            },
            ReturnValues="ALL_OLD",
        )
        return preset, "Attributes" not in answer

    def get(self, team: str, name: str) -> Preset:
        """Return a preset. Raises `PresetUnknown`, also for another team's."""
        answer = self._client.get_item(TableName=self._table, Key=self._key(team, name), ConsistentRead=True)
        if "Item" not in answer:
            raise PresetUnknown(f"There is no preset {name}")
        return _to_preset(answer["Item"])

    def fields_of(self, team: str) -> Presets:
        """Return what finds the fields of a team's presets by their names."""
        return lambda name: self.get(team, name).fields

    def list(self, team: str, wanted: PresetFilter) -> PresetPage:
        """Return a team's presets by name, in one read."""
        answer = self._client.query(
            TableName=self._table,
            KeyConditionExpression="pk = :pk AND sk BETWEEN :after AND :last",
            ExpressionAttributeValues={
                ":pk": text(f"TEAM#{team}"),
                # The smallest name after the cursor.
                ":after": text(f"PRESET#{wanted.cursor}\x00" if wanted.cursor else "PRESET#"),
                ":last": text("PRESET#~"),
            },
            ConsistentRead=True,
            Limit=wanted.limit,
        )
        presets = [_to_preset(item) for item in answer["Items"]]
        more = "LastEvaluatedKey" in answer
        return PresetPage(presets, presets[-1].name if more else None)

    def delete(self, team: str, name: str) -> None:
        """Delete a preset; deleting it twice is no error."""
        self._client.delete_item(TableName=self._table, Key=self._key(team, name))
