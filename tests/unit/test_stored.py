"""What version 0.1.0 stored and computed, kept in `tests/stored`, means the same to this version.

The files were written by that version's own code over moto, by a clock that stood at START: `items.json` has what lay
in the table, by the state of a job or the kind of an item, `documents.json` what the API showed of those jobs,
`fingerprints.json` requests with their fingerprints, `idempotency.json` what an `Idempotency-Key` left. They are never
made anew: the next version's go beside them, read out of its table in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from img2img.documents import job_document
from img2img.jobs.listing import JobFilter
from img2img.money.credits import Phase
from img2img.money.usage import Counts
from img2img.params import Img2ImgParams
from img2img.requests import Img2ImgRequest, parse_request
from img2img.stored import StoredEnum, known_fields
from tests.books import START
from tests.system import System, running_system

FOLDER = Path(__file__).parents[1] / "stored"


def stored(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text())


ITEMS, DOCUMENTS, FINGERPRINTS, KEYS = map(stored, ("items", "documents", "fingerprints", "idempotency"))
OPEN = ("awaiting_upload", "queued", "queued_again", "processing", "processing_pending", "processing_pending_fallback")


@pytest.fixture
def system() -> Iterator[System]:
    with running_system() as started:
        started.services.clock = lambda: START + 30.0
        for item in ITEMS.values():
            started.dynamodb.put_item(TableName="jobs", Item=item)
        yield started


def job(system: System, name: str) -> Any:
    return system.services.jobs.get("default", ITEMS[name]["sk"]["S"].removeprefix("JOB#"))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_stored_job_is_shown_as_before(system, name):
    document = json.loads(json.dumps(job_document(system.services, job(system, name), "https://api.example/v1")))
    for output in document["outputs"]:
        output.update({key: "presigned" for key in ("url", "url_expires_at") if key in output})
    before = DOCUMENTS[name]
    document["input"] = {key: document["input"][key] for key in before["input"]}
    assert {key: document[key] for key in before} == before


def test_the_list_shows_all_stored_jobs(system):
    shown = {found.id for found in system.services.jobs.list("default", JobFilter(limit=100)).jobs}
    assert shown == {document["id"] for document in DOCUMENTS.values()}


@pytest.mark.parametrize("name", OPEN)
def test_a_stored_job_can_be_ended(system, name):
    canceled, ended = system.services.jobs.cancel("default", job(system, name).id)
    assert canceled
    assert ended.credits.released == int(ITEMS[name]["reserved"]["N"])


def test_a_stored_sample_on_its_way_keeps_what_its_backend_noted(system):
    for name in ("processing_pending", "processing_pending_fallback"):
        was = json.loads(ITEMS[name]["pending"]["S"])
        for index, call in job(system, name).pending.items():
            assert {**call.notes, "backend": call.backend, "reason": call.reason} == was[str(index)]


def test_stored_teams_keys_presets_and_books_are_read(system):
    use = system.services
    assert (use.teams.get("default").name, use.teams.get("default").enabled) == ("default", True)
    assert not use.teams.get(ITEMS["team_disabled"]["pk"]["S"].removeprefix("TEAM#")).enabled
    assert [key.id for key in use.teams.keys("default")] == [ITEMS["key"]["key_id"]["S"]]
    preset = ITEMS["preset"]
    assert use.presets.get("default", preset["sk"]["S"].removeprefix("PRESET#")).fields == json.loads(
        preset["fields"]["S"]
    )
    about = ITEMS["ledger_settle"]["sk"]["S"].split("#")[1]
    entries = {entry.phase: entry for entry in use.credits.ledger("default", about=about)}
    assert entries[Phase.RESERVE].reserved == int(ITEMS["ledger_reserve"]["reserved"]["N"])
    assert entries[Phase.SETTLE].charged == int(ITEMS["ledger_settle"]["charged"]["N"])
    _, day, _, _ = ITEMS["usage"]["sk"]["S"].split("#")
    [row] = use.usage.rows("default", date.fromisoformat(day), date.fromisoformat(day))
    assert row.counts.jobs == int(ITEMS["usage"]["jobs"]["N"])
    source = job(system, "inbox_succeeded").source
    assert use.outbox_index.shown(source).job_id == ITEMS["outbox"]["job_id"]["S"]


def fingerprint(case: dict[str, Any]) -> str:
    required = {"required": tuple(case["required"])} if "required" in case else {}
    return parse_request(case["body"], case["presets"].__getitem__, **required).fingerprint


@pytest.mark.parametrize("case", FINGERPRINTS, ids=lambda case: case["case"])
def test_a_request_has_the_fingerprint_that_it_had(case):
    assert fingerprint(case) == case["fingerprint"]


@dataclass(frozen=True, kw_only=True)
class LaterParams(Img2ImgParams):
    """The parameters of a version that has one more."""

    clip_skip: int = 0


def test_a_later_field_counts_only_where_it_differs_from_its_default():
    def of(params: Img2ImgParams) -> str:
        return Img2ImgRequest(params=params, image=None, base64=False, metadata={}).fingerprint

    before = of(Img2ImgParams(prompt="a castle"))
    assert of(LaterParams(prompt="a castle")) == before
    assert of(LaterParams(prompt="a castle", clip_skip=1)) != before
    assert of(LaterParams(prompt="a castle", clip_skip=1)) != of(LaterParams(prompt="a castle", clip_skip=2))


@pytest.mark.parametrize("kept", ["record", "guard"])
def test_an_idempotency_key_from_before_an_upgrade_finds_its_job_after_it(kept):
    """Powertools' record, or after a crash the guard alone."""
    entry = KEYS["create"]
    request = entry["request"]
    with running_system() as system:
        system.services.clock = lambda: START + 30.0
        system.dynamodb.put_item(TableName="jobs", Item=entry["job"])
        if kept == "guard":
            system.dynamodb.put_item(TableName="jobs", Item=entry["guard"])
        else:
            record = entry["record"] | {"expiration": {"N": str(int(2e9))}}
            system.dynamodb.put_item(TableName="idempotency", Item=record)
        headers = {"Idempotency-Key": request["key"], "Prefer": "wait=0"}
        again = system.api("POST", "/sd1.5-img2img", request["body"], headers)
        assert (again.status, again.headers["idempotent-replayed"]) == (200, "true")
        assert f"JOB#{again.json['id']}" == entry["job"]["sk"]["S"]
        other = system.api("POST", "/sd1.5-img2img", {**request["body"], "seed": 8}, headers)
        assert (other.status, other.json["code"]) == (422, "idempotency_key_reused")


class Colour(StoredEnum):
    RED = "red"


def test_a_value_that_is_not_known_is_kept():
    assert Colour("red") is Colour.RED
    assert Colour.RED.is_known
    unknown = Colour("ultraviolet")
    assert (unknown, str(unknown), f"{unknown}", json.dumps(unknown)) == (
        "ultraviolet",
        "ultraviolet",
        "ultraviolet",
        '"ultraviolet"',
    )
    assert not unknown.is_known
    assert unknown not in list(Colour)
    # Nor one that is spelled like a member's name.
    assert not Colour("RED").is_known
    with pytest.raises(ValueError):
        Colour(5)


def test_fields_that_are_not_known_are_left_out():
    assert known_fields(Counts, {"jobs": 2, "of_the_future": 1}) == Counts(jobs=2)
