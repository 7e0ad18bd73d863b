"""Presets in a table: what is kept of them, and whose they are."""

from __future__ import annotations

from typing import Any

import boto3
import pytest

from img2img.errors import InvalidRequest, NotFound, PresetUnknown
from img2img.teams.presets import PresetFilter, PresetStore, parse_preset_page
from tests.books import START, Clock
from tests.system import fresh_aws

FIELDS = {"prompt": "a watercolour", "strength": 0.4, "samples": 2}


@pytest.fixture(scope="module")
def client() -> Any:
    fresh_aws()
    return boto3.client("dynamodb")


@pytest.fixture
def store(client) -> PresetStore:
    for item in client.scan(TableName="jobs")["Items"]:
        client.delete_item(TableName="jobs", Key={"pk": item["pk"], "sk": item["sk"]})
    return PresetStore(client, "jobs", clock=Clock())


def names(store: PresetStore, team: str = "default", **page: Any) -> list[str]:
    return [preset.name for preset in store.list(team, PresetFilter(**page)).presets]


def test_a_preset_is_read_as_it_was_saved(store):
    saved, new = store.save("default", "watercolour", FIELDS)
    assert (saved.name, saved.fields, saved.updated_ms, new) == ("watercolour", FIELDS, START * 1000, True)
    assert store.get("default", "watercolour") == saved
    assert store.list("default", PresetFilter()).presets == [saved]


def test_only_what_is_set_is_kept(store):
    saved, _ = store.save("default", "p", {"samples": "3", "seed": None, "strength": 1})
    assert saved.fields == {"samples": 3, "strength": 1.0}
    assert store.get("default", "p").fields == saved.fields
    assert store.save("default", "empty", {})[0].fields == {}


def test_saving_again_replaces_all_of_it(store):
    store.save("default", "p", FIELDS)
    saved, new = store.save("default", "p", {"seed": 7})
    assert (saved.fields, new) == ({"seed": 7}, False)
    assert store.get("default", "p").fields == {"seed": 7}
    assert names(store) == ["p"]


@pytest.mark.parametrize("body", [{"samples": 9}, {"image": "x"}, {"preset": "q"}, [], None, "x"])
def test_a_wrong_preset_leaves_the_one_of_its_name(store, body):
    store.save("default", "p", FIELDS)
    with pytest.raises(InvalidRequest):
        store.save("default", "p", body)
    assert store.get("default", "p").fields == FIELDS


@pytest.mark.parametrize("name", ["", ".", "..", "-x", "_x", "a/b", "a b", "a#b", "\u00e4", "x" * 65, "x\n", "\u0660"])
def test_a_name_that_is_none_is_refused(store, name):
    with pytest.raises(InvalidRequest) as refused:
        store.save("default", name, FIELDS)
    assert [error.field for error in refused.value.errors] == ["name"]
    assert names(store) == []


@pytest.mark.parametrize("name", ["x", "7", "X.y-z_9", "x" * 64, "preset.json"])
def test_a_name_may_have_letters_digits_dots_and_dashes(store, name):
    store.save("default", name, FIELDS)
    assert store.get("default", name).fields == FIELDS


def test_names_are_told_apart_exactly(store):
    for name in ("a", "A", "a.", "a-"):
        store.save("default", name, {"negative_prompt": name})
    for name in ("a", "A", "a.", "a-"):
        assert store.get("default", name).fields == {"negative_prompt": name}


def test_another_teams_preset_is_none(store):
    store.save("other", "p", FIELDS)
    with pytest.raises(PresetUnknown) as unknown:
        store.get("default", "p")
    assert isinstance(unknown.value, NotFound)
    assert names(store) == []
    store.delete("default", "p")
    store.save("default", "p", {})
    assert store.get("other", "p").fields == FIELDS


def test_deleting_twice_is_no_error(store):
    store.save("default", "p", FIELDS)
    store.save("default", "q", FIELDS)
    for _ in range(2):
        store.delete("default", "p")
    assert names(store) == ["q"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100])
def test_pages_hold_every_preset_once_by_name(store, size):
    saved = ["7", "A", "B", "a", "a-b", "a.b", "ab"]
    for name in reversed(saved):
        store.save("default", name, {})
    store.save("default2", "c", {})
    store.save("defaul", "c", {})
    found: list[str] = []
    cursor, more = None, True
    while more:
        page = store.list("default", PresetFilter(limit=size, cursor=cursor))
        assert len(page.presets) <= size
        found += [preset.name for preset in page.presets]
        cursor, more = page.cursor, page.cursor is not None
    assert found == saved


def test_a_cursor_outlives_its_preset(store):
    for name in ("a", "b", "c"):
        store.save("default", name, {})
    cursor = store.list("default", PresetFilter(limit=2)).cursor
    store.delete("default", "b")
    store.save("default", "bb", {})
    assert names(store, cursor=cursor) == ["bb", "c"]


def test_a_page_is_asked_for_by_limit_and_cursor():
    assert parse_preset_page({}) == PresetFilter(limit=50, cursor=None)
    assert parse_preset_page({"limit": "1", "cursor": "a.b"}) == PresetFilter(limit=1, cursor="a.b")


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ({"limit": "0"}, ["limit"]),
        ({"limit": "101"}, ["limit"]),
        ({"limit": "ten", "cursor": "a/b"}, ["limit", "cursor"]),
        ({"cursor": ""}, ["cursor"]),
        ({"cursor": "a\x00"}, ["cursor"]),
        ({"status": "queued"}, ["status"]),
    ],
)
def test_a_page_that_is_none_is_refused_by_name(query, wrong):
    with pytest.raises(InvalidRequest) as refused:
        parse_preset_page(query)
    assert [error.field for error in refused.value.errors] == wrong
