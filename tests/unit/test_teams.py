"""Teams and their keys: who is let in, for how long that is remembered, and what a name may be."""

from __future__ import annotations

from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from hypothesis import example, given
from hypothesis import strategies as st

from img2img.errors import AlreadyExists, Forbidden, InvalidRequest, KeyDisabled, KeyUnknown, NotFound
from img2img.teams.store import CACHE_SECONDS, Team, check_label
from tests.books import START, Books, Stores
from tests.system import fresh_aws

FORMULA_STARTS = "=+-@\t\r\n"
NO_LABELS = [
    "",
    " x",
    "=1+1",
    "+1",
    "-1",
    "@x",
    "\tx",
    "\rx",
    "_x",
    "'=1",
    '"',
    "a\n",
    "a\r",
    "a\tb",
    "a;b",
    "a=b",
    "x" * 65,
]


@pytest.fixture(scope="module", autouse=True)
def _aws() -> None:
    fresh_aws()


@pytest.fixture
def books() -> Books:
    return Books()


def code(caught: pytest.ExceptionInfo[Forbidden]) -> tuple[int, str]:
    return caught.value.status, caught.value.code


# Teams


def test_a_team_is_read_as_it_was_created(books):
    made = books.teams.create("blue_team-7", name="The blue team (7)")
    assert made == books.teams.get("blue_team-7")
    assert made == Team(id="blue_team-7", name="The blue team (7)", enabled=True, created_ms=START * 1000)
    assert books.teams.create("green").name == "green"


def test_a_team_is_created_once(books):
    books.credits.add("default", 1000)
    before = books.everything()
    with pytest.raises(AlreadyExists):
        books.teams.create("default", name="another")
    assert books.everything() == before


@pytest.mark.parametrize("team", ["", "A", "a b", "a#b", "a/b", "a.b", "-a", "_a", "ä", "٣", "a\n", "a" * 33])
def test_a_teams_id_fits_into_the_keys_of_items_and_objects(books, team):
    before = books.everything()
    with pytest.raises(InvalidRequest) as refused:
        books.teams.create(team)
    assert [error.field for error in refused.value.errors] == ["team"]
    assert books.everything() == before


@pytest.mark.parametrize("name", NO_LABELS[1:])
def test_a_teams_name_is_one_that_a_spreadsheet_may_show(books, name):
    with pytest.raises(InvalidRequest) as refused:
        books.teams.create("blue", name=name)
    assert [error.field for error in refused.value.errors] == ["name"]
    with pytest.raises(NotFound):
        books.teams.get("blue")


def test_a_team_is_disabled_and_enabled_again(books):
    for enabled in (False, False, True):
        books.teams.enable("default", enabled=enabled)
        assert books.teams.get("default").enabled is enabled
    with pytest.raises(NotFound):
        books.teams.enable("nobody", enabled=True)
    with pytest.raises(NotFound):
        books.teams.get("nobody")


def test_every_team_is_listed_once_with_its_account(books):
    ids = sorted(f"team-{number}" for number in range(101))
    for team in ids:
        books.teams.create(team)
    books.credits.add("team-7", 7000)
    books.teams.enable("team-8", enabled=False)
    books.teams.add_key("k", "team-9", label="k")
    with books.calls() as calls:
        listed = list(books.teams.all())
    assert calls == {"Query": 1, "BatchGetItem": 2}
    assert [team.id for team in listed] == ["default", *ids]
    assert [team.id for team in listed if team.account.balance] == ["team-7"]
    assert [team.id for team in listed if not team.enabled] == ["team-8"]


def test_teams_that_a_batch_left_out_are_asked_for_again(books):
    for team in ("a", "b", "c"):
        books.teams.create(team)
    asked: list[int] = []

    def leave_out(model: Any, params: Any, **_: Any) -> tuple[AWSResponse, Any] | None:
        asked.append(1)
        if len(asked) > 2:
            return None
        answer = {"Responses": {"jobs": []}, "UnprocessedKeys": {"jobs": {"Keys": keys}}}
        return AWSResponse("https://dynamodb", 200, {}, None), answer | {"ResponseMetadata": {"HTTPStatusCode": 200}}

    keys = [{"pk": {"S": f"TEAM#{team}"}, "sk": {"S": "TEAM"}} for team in ("a", "b", "c", "default")]
    with books.hooked("before-call.dynamodb.BatchGetItem", leave_out):
        assert [team.id for team in books.teams.all()] == ["a", "b", "c", "default"]
    assert len(asked) == 3


# Keys


def test_a_team_has_several_keys_that_live_at_once(books):
    for number, label in enumerate(("web", "batch, nightly", "Öl (7)")):
        books.clock.now = START + number
        books.teams.add_key(f"key{3 - number}", "default", label=label)
    keys = books.teams.keys("default")
    assert [(key.id, key.label) for key in keys] == [("key3", "web"), ("key2", "batch, nightly"), ("key1", "Öl (7)")]
    assert [key.created_ms for key in keys] == [(START + second) * 1000 for second in range(3)]
    assert [books.teams.key(key.id) for key in keys] == keys
    assert {books.teams.team_of(key.id) for key in keys} == {"default"}


def test_a_rotated_key_leaves_the_other_one_working(books):
    books.teams.add_key("old", "default", label="web")
    books.teams.add_key("new", "default", label="web")
    assert books.teams.enable_key("old", enabled=False).enabled is False
    with pytest.raises(KeyDisabled) as refused:
        books.teams.team_of("old")
    assert code(refused) == (403, "key_disabled")
    assert books.teams.team_of("new") == "default"
    assert {key.id: key.enabled for key in books.teams.keys("default")} == {"old": False, "new": True}


def test_a_key_belongs_to_one_team(books):
    books.teams.create("other")
    books.teams.add_key("k", "default", label="web")
    before = books.everything()
    for team in ("default", "other"):
        with pytest.raises(AlreadyExists):
            books.teams.add_key("k", team, label="mine")
    assert books.everything() == before
    assert books.teams.keys("other") == []
    assert books.teams.team_of("k") == "default"


def test_a_key_is_given_to_a_team_that_exists(books):
    before = books.everything()
    with pytest.raises(NotFound):
        books.teams.add_key("k", "nobody", label="web")
    with pytest.raises(KeyUnknown):
        books.teams.enable_key("k", enabled=True)
    assert books.everything() == before


@pytest.mark.parametrize("label", NO_LABELS)
def test_a_label_is_one_that_a_spreadsheet_may_show(books, label):
    before = books.everything()
    with pytest.raises(InvalidRequest) as refused:
        books.teams.add_key("k", "default", label=label)
    [error] = refused.value.errors
    assert error.field == "label"
    assert "1 to 64 letters, digits" in error.detail
    assert books.everything() == before


@given(st.text(max_size=70) | st.text(FORMULA_STARTS + "aß7 _,", max_size=5))
@example("x" * 64)
@example("7 of 9")
def test_no_label_is_taken_for_a_formula(label):
    try:
        check_label(label)
    except InvalidRequest:
        return
    assert 1 <= len(label) <= 64
    assert label[0].isalnum()
    assert label.isprintable()


# Looking a key up


def test_a_key_is_looked_up_once_a_minute(books):
    books.teams.add_key("k", "default", label="web")
    with books.calls() as calls:
        for ahead in (0, 30, 59.9):
            books.clock.now = START + ahead
            assert books.teams.team_of("k") == "default"
        assert calls == {"GetItem": 2}
        books.clock.now = START + 60
        assert books.teams.team_of("k") == "default"
        assert calls == {"GetItem": 4}
    assert CACHE_SECONDS == 60


def test_each_key_is_looked_up_by_itself(books):
    books.teams.create("other")
    books.teams.add_key("k", "default", label="web")
    books.teams.add_key("l", "other", label="web")
    for _ in range(2):
        assert [books.teams.team_of(key) for key in ("k", "l")] == ["default", "other"]


def test_an_unknown_key_is_not_remembered(books):
    with books.calls() as calls:
        for _ in range(3):
            with pytest.raises(KeyUnknown) as refused:
                books.teams.team_of("k")
            assert code(refused) == (403, "key_unknown")
        assert calls == {"GetItem": 3}
    books.teams.add_key("k", "default", label="web")
    assert books.teams.team_of("k") == "default"


def test_a_request_without_a_key_belongs_to_nobody(books):
    with pytest.raises(KeyUnknown):
        books.teams.team_of("")


def disable_the_key(stores: Stores) -> None:
    stores.teams.enable_key("k", enabled=False)


def disable_the_team(stores: Stores) -> None:
    stores.teams.enable("default", enabled=False)


DISABLED = [(disable_the_key, (403, "key_disabled")), (disable_the_team, (403, "team_disabled"))]


@pytest.mark.parametrize(("disable", "expected"), DISABLED)
def test_what_is_disabled_is_kept_out_within_a_minute(books, disable, expected):
    books.teams.add_key("k", "default", label="web")
    assert books.teams.team_of("k") == "default"
    disable(Stores(books.clock))
    books.clock.now += CACHE_SECONDS
    with pytest.raises(Forbidden) as refused:
        books.teams.team_of("k")
    assert code(refused) == expected


def test_the_minute_begins_before_anything_is_read(books):
    """The reads may take seconds: a key that is disabled between them is kept out as soon as any other."""
    books.teams.add_key("k", "default", label="web")
    disabled: list[object] = []

    def slow(**_: Any) -> None:
        if not disabled:
            disabled.append(disable_the_key(Stores(books.clock)))
        books.clock.now += 4

    with books.hooked("after-call.dynamodb.GetItem", slow):
        assert books.teams.team_of("k") == "default"
    books.clock.now = START + CACHE_SECONDS
    with pytest.raises(KeyDisabled):
        books.teams.team_of("k")


@pytest.mark.parametrize("again", ["key", "team"])
def test_what_is_enabled_again_is_let_in_within_a_minute(books, again):
    books.teams.add_key("k", "default", label="web")
    (disable_the_key if again == "key" else disable_the_team)(books)
    with pytest.raises(Forbidden):
        books.teams.team_of("k")
    if again == "key":
        books.teams.enable_key("k", enabled=True)
    else:
        books.teams.enable("default", enabled=True)
    books.clock.now += CACHE_SECONDS
    assert books.teams.team_of("k") == "default"


def test_a_disabled_key_of_a_disabled_team_is_a_disabled_key(books):
    books.teams.add_key("k", "default", label="web")
    disable_the_key(books)
    disable_the_team(books)
    with pytest.raises(KeyDisabled):
        books.teams.team_of("k")


def test_conflicts_are_waited_out(books):
    with books.conflicts(3) as tried:
        books.teams.create("blue")
    assert len(tried) == 4
    with books.conflicts(3):
        books.teams.add_key("k", "blue", label="web")
    with books.conflicts(3):
        books.teams.enable_key("k", enabled=False)
    # A team's own item is the one that its jobs write all the time.
    with books.conflicts(3):
        books.teams.enable("blue", enabled=False)
    assert not books.teams.get("blue").enabled
    assert not books.teams.key("k").enabled
