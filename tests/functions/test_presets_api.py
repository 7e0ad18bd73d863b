"""Presets over HTTP: saved, listed and deleted, and what a request makes of them."""

from __future__ import annotations

import base64
import io
from functools import cache
from typing import Any

import pytest
from PIL import Image

from img2img.params import PARAMETERS
from tests.system import Answer, System, create_team

FIELDS = {"prompt": "a watercolour", "strength": 0.4, "samples": 2}
PRICE = 1000


@cache
def picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 60, 30)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def save(system: System, name: str = "watercolour", fields: Any = FIELDS, **others: Any) -> Answer:
    return system.api("PUT", f"/presets/{name}", fields, **others)


def create(system: System, headers: Any = None, **fields: Any) -> Answer:
    """Create a job of a small picture that asks for nothing but `fields`."""
    body = {"image": picture(), **fields}
    return system.api("POST", "/sd1.5-img2img", body, {"Prefer": "respond-async", **(headers or {})})


def wrong(answer: Answer) -> dict[str, str]:
    assert (answer.status, answer.json["code"]) == (400, "invalid_request"), answer.content
    assert answer.headers["content-type"] == "application/problem+json"
    return {error["field"]: error["detail"] for error in answer.json["errors"]}


def listed(system: System, **query: str) -> list[str]:
    answer = system.api("GET", "/presets", query=query)
    assert answer.status == 200
    return [preset["name"] for preset in answer.json["presets"]]


def test_a_preset_is_saved_read_listed_and_deleted(system):
    saved = save(system)
    assert saved.status == 201
    assert saved.json["name"] == "watercolour"
    assert saved.json["fields"] == FIELDS
    assert saved.json["updated_at"].endswith("Z")
    read = system.api("GET", "/presets/watercolour")
    assert (read.status, read.json) == (200, saved.json)
    assert system.api("GET", "/presets").json == {"presets": [saved.json], "cursor": None}
    for _ in range(2):
        deleted = system.api("DELETE", "/presets/watercolour")
        assert (deleted.status, deleted.content) == (204, b"")
    assert system.api("GET", "/presets").json == {"presets": [], "cursor": None}


def test_saving_again_replaces_all_of_it(system):
    save(system)
    system.clock.advance(5)
    again = save(system, fields={"seed": "7", "fit": None})
    assert (again.status, again.json["fields"]) == (200, {"seed": 7})
    assert system.api("GET", "/presets/watercolour").json == again.json


def test_a_preset_may_hold_every_parameter_and_none(system):
    every = {
        "prompt": "a \u57ce on a hill",
        "negative_prompt": "fog",
        "samples": 4,
        "scheduler": "Euler a",
        "num_inference_steps": 30,
        "guidance_scale": 9.5,
        "strength": 0.75,
        "seed": 98877465625,
        "img_width": 768,
        "img_height": 512,
        "fit": "contain",
        "output_format": "webp",
    }
    assert set(every) == set(PARAMETERS)
    assert save(system, fields=every).json["fields"] == every
    assert create(system, preset="watercolour").json["input"] == every
    assert save(system, "empty", {}).json["fields"] == {}


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"samples": 9, "strength": 0, "fit": "x"}, {"samples", "strength", "fit"}),
        ({"prompt": " "}, {"prompt"}),
        ({"image": "x"}, {"image"}),
        ({"preset": "other", "metadata": {}, "base64": True}, {"preset", "metadata", "base64"}),
        ({"name": "x"}, {"name"}),
        ([], {"body"}),
        ("{", {"body"}),
        ("null", {"body"}),
    ],
)
def test_what_no_job_could_have_is_not_saved(system, body, fields):
    save(system, fields={"seed": 7})
    assert wrong(save(system, fields=body)).keys() == fields
    assert system.api("GET", "/presets/watercolour").json["fields"] == {"seed": 7}


def test_a_body_that_is_no_json_is_refused_by_its_type(system):
    refused = save(system, fields="prompt=x", headers={"Content-Type": "text/plain"})
    assert (refused.status, refused.json["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("name", ["-x", ".x", "a b", "x" * 65, "a%2Fb", "caf\u00e9"])
def test_a_name_that_is_none_cannot_be_saved_and_is_not_there(system, name):
    assert wrong(save(system, name)).keys() == {"name"}
    read = system.api("GET", f"/presets/{name}")
    assert (read.status, read.json["code"]) == (404, "preset_unknown")
    assert system.api("DELETE", f"/presets/{name}").status == 204
    assert listed(system) == []


def test_an_unknown_preset_is_not_found(system):
    read = system.api("GET", "/presets/oil")
    assert (read.status, read.json["code"], read.json["detail"]) == (404, "preset_unknown", "There is no preset oil")
    assert read.headers["content-type"] == "application/problem+json"


def test_presets_are_listed_by_name_page_by_page(system):
    for name in ("b", "a", "B", "c-1"):
        save(system, name, {})
    assert listed(system) == ["B", "a", "b", "c-1"]
    found: list[str] = []
    query = {"limit": "3"}
    while True:
        page = system.api("GET", "/presets", query=query).json
        found += [preset["name"] for preset in page["presets"]]
        if page["cursor"] is None:
            break
        query["cursor"] = page["cursor"]
    assert found == ["B", "a", "b", "c-1"]
    for query in ({"limit": "0"}, {"limit": "x"}, {"cursor": "a/b"}, {"page": "2"}):
        assert wrong(system.api("GET", "/presets", query=query)).keys() == query.keys()


# In a request


def test_a_preset_gives_the_defaults_of_a_job(system):
    save(system)
    created = create(system, preset="watercolour")
    assert created.status == 202
    job = created.json["input"]
    assert (job["prompt"], job["strength"], job["samples"], job["img_width"]) == ("a watercolour", 0.4, 2, 512)
    assert created.json["credits"]["reserved"] == system.books().reserved == 2 * PRICE
    assert system.deliver() == 1
    assert [call["body"]["prompt"] for call in system.segmind.calls] == ["a watercolour"] * 2
    assert system.books().charged == 2 * PRICE


def test_a_requests_own_fields_override_the_preset(system):
    save(system)
    job = create(system, preset="watercolour", prompt="an oil painting", samples="1", strength=None).json["input"]
    assert (job["prompt"], job["samples"], job["strength"]) == ("an oil painting", 1, 0.4)


def test_cost_knows_presets(system):
    save(system)
    quoted = system.api("POST", "/cost", {"preset": "watercolour"}).json
    assert (quoted["price"], quoted["input"]["samples"], quoted["input"]["strength"]) == (2 * PRICE, 2, 0.4)
    assert system.api("POST", "/cost", {"preset": "watercolour", "samples": 4}).json["price"] == 4 * PRICE
    assert system.books().reserved == 0


def test_an_unknown_preset_is_an_error_of_that_field(system):
    for answer in (
        create(system, preset="oil"),
        system.api("POST", "/cost", {"preset": "oil"}),
    ):
        assert wrong(answer)["preset"] == "There is no preset oil"
    assert wrong(create(system, preset="oil", samples=9)).keys() == {"preset", "samples", "prompt"}
    assert wrong(create(system, preset="a/b", prompt="p")).keys() == {"preset"}
    assert system.api("GET", "/jobs").json["jobs"] == []
    assert system.books().entries == 1


def test_another_teams_preset_is_as_if_it_had_never_been(system):
    create_team(system.services, "other", "key-of-the-other")
    save(system, key_id="key-of-the-other")
    assert wrong(create(system, preset="watercolour", prompt="p")) == {"preset": "There is no preset watercolour"}
    assert system.api("GET", "/presets/watercolour").status == 404
    assert listed(system) == []
    system.api("DELETE", "/presets/watercolour")
    assert system.api("GET", "/presets/watercolour", key_id="key-of-the-other").json["fields"] == FIELDS


def test_a_job_stays_as_it_is_when_its_preset_changes_or_goes(system):
    save(system)
    created = create(system, preset="watercolour").json
    save(system, fields={"prompt": "an oil painting"})
    system.api("DELETE", "/presets/watercolour")
    assert system.job(created["id"])["input"] == created["input"]
    assert system.deliver() == 1
    assert {call["body"]["prompt"] for call in system.segmind.calls} == {"a watercolour"}


def test_a_repeated_request_is_the_same_although_the_preset_has_changed(system):
    key = {"Idempotency-Key": "order-17"}
    save(system)
    first = create(system, key, preset="watercolour")
    save(system, fields={"prompt": "an oil painting", "samples": 4})
    again = create(system, key, preset="watercolour", negative_prompt=None)
    assert (again.status, again.json["id"], again.json["input"]) == (202, first.json["id"], first.json["input"])
    assert system.books().reserved == 2 * PRICE


@pytest.mark.parametrize(
    "other",
    [
        {"preset": "oil"},
        {"preset": "watercolour", "strength": 0.4},
        {"preset": "watercolour", "samples": 1},
        {"prompt": "a watercolour", "strength": 0.4, "samples": 2},
    ],
    ids=str,
)
def test_another_preset_or_field_is_another_request(system, other):
    key = {"Idempotency-Key": "order-17"}
    save(system)
    save(system, "oil", FIELDS)
    assert create(system, key, preset="watercolour").status == 202
    refused = create(system, key, **other)
    assert (refused.status, refused.json["code"]) == (422, "idempotency_key_reused")
    assert system.books().reserved == 2 * PRICE
