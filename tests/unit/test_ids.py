"""ULIDs: they sort by time, and bound what a millisecond holds."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img2img.ids import ULID, first_id_at, id_before, ms_of, new_id

MAX_MS = 2**48 - 1
FIRST, LAST = "0" * 26, "7" + "Z" * 25
quick = settings(deadline=None, database=None, derandomize=True)
milliseconds = st.integers(0, MAX_MS)


@pytest.mark.parametrize(
    ("ms", "expected"),
    [
        (0, "0000000000"),
        (1, "0000000001"),
        (1_469_918_176_385, "01ARYZ6S41"),  # the specification's own example
        (MAX_MS, "7ZZZZZZZZZ"),
    ],
)
def test_the_first_ten_characters_are_the_time(ms, expected):
    assert new_id(ms)[:10] == expected
    assert first_id_at(ms) == expected + "0" * 16


@quick
@given(milliseconds)
def test_an_id_is_26_characters_of_crockfords_alphabet(ms):
    made = new_id(ms)
    assert ULID.fullmatch(made)
    assert not set("ILOU") & set(made)
    assert re.fullmatch(r"[0-7].{25}", made)


@quick
@given(milliseconds)
def test_an_id_tells_its_millisecond(ms):
    assert ms_of(new_id(ms)) == ms_of(first_id_at(ms)) == ms
    if ms:
        assert ms_of(id_before(first_id_at(ms))) == ms - 1


def test_the_specifications_example_was_made_in_its_millisecond():
    assert ms_of("01ARYZ6S41TSV4RRFFQ69G5FAV") == 1_469_918_176_385
    assert (ms_of(FIRST), ms_of(LAST)) == (0, MAX_MS)


@quick
@given(milliseconds, milliseconds)
def test_ids_sort_by_their_time(one, other):
    if one != other:
        assert (new_id(one) < new_id(other)) == (one < other)


@quick
@given(milliseconds)
def test_an_id_lies_between_the_bounds_of_its_millisecond(ms):
    made = new_id(ms)
    assert first_id_at(ms) <= made
    if ms < MAX_MS:
        assert made <= id_before(first_id_at(ms + 1)) < first_id_at(ms + 1)


@quick
@given(st.integers(1, 2**128 - 1))
def test_nothing_lies_between_an_id_and_the_one_before(number):
    def encoded(value: int) -> str:
        alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
        return "".join(alphabet[value >> shift & 31] for shift in range(125, -1, -5))

    assert id_before(encoded(number)) == encoded(number - 1)


def test_bounds_are_clamped_to_what_an_id_can_hold():
    assert first_id_at(-1) == first_id_at(0) == FIRST
    assert first_id_at(2**60) == first_id_at(MAX_MS)
    assert id_before(FIRST) == FIRST
    assert id_before(LAST) == LAST[:-1] + "Y"


def test_ids_of_one_millisecond_differ():
    assert len({new_id(1_700_000_000_000) for _ in range(2000)}) == 2000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "01ARYZ6S41",
        "01ARZ3NDEKTSV4RRFFQ69G5FA",
        "01ARZ3NDEKTSV4RRFFQ69G5FAVX",
        "81ARZ3NDEKTSV4RRFFQ69G5FAV",  # does not fit into 128 bits
        "01ARZ3NDEKTSV4RRFFQ69G5FAI",
        "01ARZ3NDEKTSV4RRFFQ69G5FAU",
        "01arz3ndektsv4rrffq69g5fav",
        "01ARZ3NDEKTSV4RRFFQ69G5FA\n",
        "01ARZ3NDEKTSV4RRFFQ69G5FA\u0665",
        "../../01ARZ3NDEKTSV4RRFFQ6",
    ],
)
def test_what_is_no_id_is_told_apart(text):
    assert not ULID.fullmatch(text)
