"""The request: what is accepted, what is not, and what the error then says."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from img2img.errors import InvalidRequest, PresetUnknown
from img2img.params import (
    FIELDS,
    FITS,
    MAX_PROMPT,
    MAX_SEED,
    OUTPUT_FORMATS,
    PARAMETERS,
    REQUIRED,
    SCHEDULERS,
    Img2ImgParams,
)
from img2img.requests import Img2ImgRequest, parse_preset, parse_request
from img2img.values import ImageUrl, InlineImage, UploadId, parser_of
from tests.long import examples

PICTURE = base64.b64encode(b"some picture").decode()
UPLOAD = "upl_01ARZ3NDEKTSV4RRFFQ69G5FAV"
LEAST = {"image": PICTURE, "prompt": "a lighthouse"}
NUMBERS = ("samples", "num_inference_steps", "guidance_scale", "strength", "seed", "img_width", "img_height")


PRESETS: dict[str, dict[str, Any]] = {
    "watercolour": {"prompt": "a watercolour", "strength": 0.4, "samples": 2, "seed": -1},
    "empty": {},
}


def presets(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise PresetUnknown(f"There is no preset {name}")
    return PRESETS[name]


def read(body: Any) -> Img2ImgRequest:
    return parse_request(body, presets)


def read_params(body: Any) -> Img2ImgParams:
    return parse_request(body, presets, required=()).params


def parsed(**body: Any) -> Img2ImgRequest:
    return read({**LEAST, **body})


def wrong(**body: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        parsed(**body)
    return {error.field: error.detail for error in caught.value.errors}


def test_defaults_are_segminds() -> None:
    request = read(LEAST)
    assert request == Img2ImgRequest(
        params=Img2ImgParams(prompt="a lighthouse"),
        image=InlineImage(b"some picture"),
        base64=False,
        metadata={},
        own={"prompt": "a lighthouse"},
    )
    assert request.params.as_dict() == {
        "prompt": "a lighthouse",
        "negative_prompt": "",
        "samples": 1,
        "scheduler": "DDIM",
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "strength": 1.0,
        "seed": -1,
        "img_width": 512,
        "img_height": 512,
        "fit": "cover",
        "output_format": None,
    }


def test_documented_example_is_read() -> None:
    body = {
        "image": PICTURE,
        "prompt": "A fantasy landscape, trending on artstation, mystical sky",
        "negative_prompt": "nude, disfigured, blurry",
        "scheduler": "DDIM",
        "num_inference_steps": 25,
        "guidance_scale": 10.5,
        "strength": 0.75,
        "seed": 98877465625,
        "img_width": 512,
        "img_height": 512,
        "samples": 1,
        "base64": False,
    }
    params = read(body).params.as_dict()
    assert {name: params[name] for name in body if name in params} == {
        name: value for name, value in body.items() if name not in ("image", "base64")
    }


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("samples", 1, 1),
        ("samples", 4, 4),
        ("samples", 2.0, 2),
        ("samples", "3", 3),
        ("samples", " 3 ", 3),
        ("samples", "3.0", 3),
        ("num_inference_steps", 20, 20),
        ("num_inference_steps", 100, 100),
        ("num_inference_steps", "1e2", 100),
        ("guidance_scale", 0.1, 0.1),
        ("guidance_scale", 25, 25.0),
        ("guidance_scale", "7.5", 7.5),
        ("guidance_scale", "0.1", 0.1),
        ("strength", 0.1, 0.1),
        ("strength", 1, 1.0),
        ("strength", "0.75", 0.75),
        ("seed", -1, -1),
        ("seed", "-1", -1),
        ("seed", 0, 0),
        ("seed", MAX_SEED, MAX_SEED),
        ("seed", str(MAX_SEED), MAX_SEED),
        ("img_width", 512, 512),
        ("img_width", 768, 768),
        ("img_height", "768", 768),
        ("img_height", 512.0, 512),
        ("prompt", "x", "x"),
        ("prompt", "é" * MAX_PROMPT, "é" * MAX_PROMPT),
        ("prompt", " kept as sent ", " kept as sent "),
        ("negative_prompt", "", ""),
        ("negative_prompt", "x" * MAX_PROMPT, "x" * MAX_PROMPT),
        *(("scheduler", name, name) for name in SCHEDULERS),
        *(("fit", name, name) for name in FITS),
        *(("output_format", name, name) for name in OUTPUT_FORMATS),
    ],
)
def test_value_within_its_range_is_read(field: str, value: Any, expected: Any) -> None:
    read = parsed(**{field: value}).params.as_dict()[field]
    assert read == expected
    assert type(read) is type(expected)


def test_there_are_segminds_twelve_schedulers() -> None:
    assert len(set(SCHEDULERS)) == 12


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", 0),
        ("samples", 5),
        ("samples", -1),
        ("samples", 1.5),
        ("samples", "5"),
        ("samples", "1.5"),
        ("num_inference_steps", 19),
        ("num_inference_steps", 101),
        ("num_inference_steps", 20.5),
        ("guidance_scale", 0.09),
        ("guidance_scale", 25.01),
        ("guidance_scale", 0),
        ("strength", 0.09),
        ("strength", 1.01),
        ("strength", -0.5),
        ("strength", "0"),
        ("seed", -2),
        ("seed", MAX_SEED + 1),
        ("seed", 10**400),
        ("seed", 0.5),
        ("seed", -0.5),
        ("img_width", 511),
        ("img_width", 640),
        ("img_width", 1024),
        ("img_height", 0),
        ("img_height", -512),
        ("img_height", "513"),
        *((field, value) for field in NUMBERS for value in (True, False, [], {}, [1], math.nan, math.inf, -math.inf)),
        *((field, value) for field in NUMBERS for value in ("", " ", "x", "1x", "nan", "inf", "0x1", "1_0", "٣")),
        *((field, "1e999") for field in NUMBERS),
        ("prompt", ""),
        ("prompt", " \n\t "),
        ("prompt", 5),
        ("prompt", ["x"]),
        ("prompt", "x" * (MAX_PROMPT + 1)),
        ("prompt", "\ud800"),
        ("negative_prompt", 5),
        ("negative_prompt", {}),
        ("negative_prompt", "x" * (MAX_PROMPT + 1)),
        ("negative_prompt", "\udfff"),
        ("scheduler", "ddim"),
        ("scheduler", "DDIM "),
        ("scheduler", ""),
        ("scheduler", 1),
        ("scheduler", ["DDIM"]),
        ("fit", "fill"),
        ("fit", False),
        ("output_format", "jpg"),
        ("output_format", "PNG"),
        ("output_format", {}),
        ("base64", 0),
        ("base64", 1),
        ("base64", "yes"),
        ("base64", ""),
        ("base64", []),
        ("metadata", "x"),
        ("metadata", []),
        ("metadata", {"a": 1}),
        ("metadata", {"a": None}),
        ("metadata", {"a": {"b": "c"}}),
        ("metadata", {"k" * 41: "v"}),
        ("metadata", {"k": "v" * 501}),
        ("metadata", {"k": "\ud800"}),
        ("metadata", {"\ud800": "v"}),
        ("metadata", {str(n): "v" for n in range(16 + 1)}),
    ],
)  # fmt: skip
def test_value_outside_is_refused_by_name(field: str, value: Any) -> None:
    errors = wrong(**{field: value})
    assert list(errors) == [field]
    assert errors[field].startswith("must ")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("samples", 9, "must be an integer from 1 to 4"),
        ("num_inference_steps", 9, "must be an integer from 20 to 100"),
        ("guidance_scale", 90, "must be a number from 0.1 to 25"),
        ("strength", 9, "must be a number from 0.1 to 1"),
        ("seed", -9, f"must be -1 (random) or an integer from 0 to {MAX_SEED}"),
        ("img_width", 9, "must be 512 or 768"),
        ("img_height", 9, "must be 512 or 768"),
        ("fit", 9, "must be one of cover, contain, stretch"),
        ("output_format", 9, "must be one of png, jpeg, webp"),
        ("scheduler", 9, f"must be one of {', '.join(SCHEDULERS)}"),
        ("base64", 9, "must be true or false"),
    ],
)
def test_error_says_what_is_accepted(field: str, value: Any, said: str) -> None:
    assert wrong(**{field: value}) == {field: said}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, True), (False, False), ("true", True), ("True", True), (" FALSE ", False), (None, False)],
)
def test_booleans_are_read_from_strings(value: Any, expected: bool) -> None:
    assert parsed(base64=value).base64 is expected


def test_null_means_not_set_except_where_a_value_is_required() -> None:
    nulls = {name: None for name in FIELDS if name not in LEAST}
    assert parsed(**nulls) == read(LEAST)
    assert wrong(image=None, prompt=None) == {"image": "is required", "prompt": "is required"}


def test_metadata_is_kept() -> None:
    full = {f"{n:040}": "é" * 500 for n in range(16)}
    assert parsed(metadata=full).metadata == full
    assert parsed(metadata={}).metadata == {}


# --- the image ---


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (UPLOAD, UploadId(UPLOAD)),
        (f" {UPLOAD}\n", UploadId(UPLOAD)),
        ("https://example.com/a.jpg?b=c", ImageUrl("https://example.com/a.jpg?b=c")),
        ("HTTPS://EXAMPLE.COM/A", ImageUrl("HTTPS://EXAMPLE.COM/A")),
        ("https://e/" + "a" * 4086, ImageUrl("https://e/" + "a" * 4086)),
        (PICTURE, InlineImage(b"some picture")),
        (f"{PICTURE[:7]}\r\n {PICTURE[7:]}\n", InlineImage(b"some picture")),
        (f"data:image/png;base64,{PICTURE}", InlineImage(b"some picture")),
        (f"DATA:image/png;name=x.png;BASE64,{PICTURE}", InlineImage(b"some picture")),
        (f"data:;base64,{PICTURE}", InlineImage(b"some picture")),
        ("QQ==", InlineImage(b"A")),
        ("+/+/", InlineImage(b"\xfb\xff\xbf")),
    ],
)
def test_image_is_told_apart(value: str, expected: Any) -> None:
    assert parsed(image=value).image == expected


@pytest.mark.parametrize(
    "value",
    [
        "",
        "  ",
        5,
        True,
        [],
        {},
        [PICTURE],
        "http://example.com/a.jpg",
        "HTTP://example.com/a.jpg",
        "ftp://example.com/a.jpg",
        "file:///etc/passwd",
        "s3://bucket/key",
        "https://e/" + "a" * 4087,
        "https://e/\ud800",
        "not base64!",
        "QQ=",
        "QQ",
        "QQ==QQ==",
        "é",
        "\ud800",
        "-_-_",
        "upl_short",
        UPLOAD.lower(),
        UPLOAD + "0",
        UPLOAD.replace("A", "U"),
        "data:image/png;base64,",
        "data:image/png;base64",
        f"data:image/png,{PICTURE}",
        "data:image/png;base64,%41%41",
    ],
)
def test_no_image_is_refused_by_name(value: Any) -> None:
    assert list(wrong(image=value)) == ["image"]


def test_error_never_repeats_the_image() -> None:
    assert "hunter2" not in json.dumps(wrong(image="hunter2!" * 100))


# --- the whole body ---


@pytest.mark.parametrize("body", [None, [], "x", 5, True, [LEAST]])
def test_body_must_be_an_object(body: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(body)
    assert [error.field for error in caught.value.errors] == ["body"]


def test_required_fields_are_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read({})
    assert {error.field: error.detail for error in caught.value.errors} == {
        "image": "is required",
        "prompt": "is required",
    }


@pytest.mark.parametrize("name", ["Prompt", "steps", "Preset", "", "prompt ", "__class__", "é", "seed\0"])
def test_unknown_field_is_named_with_the_known_ones(name: str) -> None:
    errors = wrong(**{name: 1})
    assert list(errors) == [name]
    assert all(known in errors[name] for known in FIELDS)


def test_unknown_name_can_be_sent_back_whatever_it_holds() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parsed(**{"\ud800": 1})
    json.dumps([caught.value.detail, caught.value.errors[0].field], ensure_ascii=False).encode()


def test_unknown_names_do_not_swell_the_answer() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parsed(**{f"{n:06}" + "x" * 5000: n for n in range(500)})
    assert len(caught.value.errors) == 20
    assert len(caught.value.detail) < 10_000


def test_all_errors_are_reported_together() -> None:
    body = {
        "prompt": "",
        "negative_prompt": 1,
        "samples": 0,
        "scheduler": "x",
        "num_inference_steps": 1,
        "guidance_scale": 0,
        "strength": 2,
        "seed": -2,
        "img_width": 1,
        "img_height": 1,
        "fit": "x",
        "output_format": "x",
        "base64": "x",
        "metadata": "x",
        "preset": "x/y",
        "nonsense": 1,
    }
    with pytest.raises(InvalidRequest) as caught:
        read(body)
    assert {error.field for error in caught.value.errors} == {*body, "image"}
    assert all(f"{error.field}: {error.detail}" in caught.value.detail for error in caught.value.errors)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=30)
    | st.sampled_from([10**30, -(10**30), "1" * 30, "1e309", "-0", "data:", "https://", "data:;base64,", UPLOAD, "512"])
    | st.builds("https://e/{}".format, st.text(st.characters(), max_size=5)),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


@settings(max_examples=examples(600), deadline=None, database=None)
@given(st.sampled_from(list(FIELDS)), json_values)
@example("samples", -0.0)
@example("image", "https://e/\ud800")
@example("metadata", {"": ""})
def test_any_value_is_read_or_its_field_is_named(field: str, value: Any) -> None:
    try:
        request = parsed(**{field: value})
    except InvalidRequest as error:
        assert [item.field for item in error.errors] == [field]  # noqa: PT017 (both outcomes are right)
        error.detail.encode()
    else:
        assert len(request.fingerprint) == 64
        # What is stored with the job and sent to the backend has to be JSON.
        json.dumps([request.params.as_dict(), dict(request.metadata)], allow_nan=False).encode()
        assert read({**request.params.as_dict(), "image": PICTURE}).params == request.params


@settings(max_examples=examples(200), deadline=None, database=None)
@given(st.dictionaries(st.sampled_from(list(FIELDS)) | st.text(max_size=8), json_values, max_size=6))
def test_any_body_is_read_or_invalid(body: dict[str, Any]) -> None:
    try:
        read(body)
    except InvalidRequest as error:
        assert error.errors  # noqa: PT017
        assert {item.field for item in error.errors} <= {*body, "image", "prompt"}  # noqa: PT017


# --- the parameters alone ---


def test_parameters_alone_need_no_field() -> None:
    assert read_params({}) == Img2ImgParams(prompt="")
    assert read_params({"samples": "3", "img_width": 768}) == Img2ImgParams(prompt="", samples=3, img_width=768)
    assert read_params(dict.fromkeys(FIELDS)) == Img2ImgParams(prompt="")


def test_parameters_alone_are_those_of_the_request() -> None:
    body = {**LEAST, "samples": 2, "num_inference_steps": "50", "seed": 7, "base64": True, "metadata": {"a": "b"}}
    assert read_params(body) == read(body).params


@pytest.mark.parametrize("body", [None, [], "x", 5, True, [LEAST]])
def test_the_body_of_parameters_alone_must_be_an_object(body: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_params(body)
    assert [error.field for error in caught.value.errors] == ["body"]


def test_parameters_alone_are_checked_together() -> None:
    body = {"prompt": " ", "image": "not base64!", "samples": 5, "metadata": "x", "nonsense": 1}
    with pytest.raises(InvalidRequest) as caught:
        read_params(body)
    assert {error.field: error.detail for error in caught.value.errors} == wrong(**body)


@settings(max_examples=examples(600), deadline=None, database=None)
@given(st.sampled_from(list(FIELDS)) | st.text(max_size=8), json_values)
@example("samples", 5)
@example("image", "http://example.com/a.jpg")
@example("prompt", "")
def test_parameters_alone_are_checked_as_in_a_request(field: str, value: Any) -> None:
    def said(parse: Callable[[Any], Any], body: dict[str, Any]) -> list[tuple[str, str]]:
        try:
            parse(body)
        except InvalidRequest as error:
            return [(item.field, item.detail) for item in error.errors]
        return []

    if field in LEAST and value is None:
        assert said(read_params, {field: value}) == []
    else:
        assert said(read_params, {field: value}) == said(read, {**LEAST, field: value})


# --- presets ---


def test_a_preset_gives_the_defaults() -> None:
    params = read({"image": PICTURE, "preset": "watercolour"}).params
    assert params == Img2ImgParams(prompt="a watercolour", strength=0.4, samples=2)
    assert read_params({"preset": "watercolour"}) == params
    assert parsed(preset="empty").params == read(LEAST).params


def test_the_requests_own_fields_override_the_preset() -> None:
    request = parsed(preset="watercolour", strength="0.9", seed=7)
    assert request.params == Img2ImgParams(prompt="a lighthouse", strength=0.9, samples=2, seed=7)
    assert request.preset == "watercolour"
    # To Segmind's clients null is no value of their own.
    assert parsed(preset="watercolour", samples=None).params.samples == 2


def test_a_preset_without_a_prompt_leaves_it_required() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read({"image": PICTURE, "preset": "empty"})
    assert [(error.field, error.detail) for error in caught.value.errors] == [("prompt", "is required")]


def test_an_unknown_preset_is_named_with_all_else_that_is_wrong() -> None:
    assert wrong(preset="oil", samples=9) == {
        "preset": "There is no preset oil",
        "samples": "must be an integer from 1 to 4",
    }


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "_a", "a b", "\u00e4", "x" * 65, "a\n", 5, [], {}, True])
def test_what_is_no_name_of_a_preset(name: Any) -> None:
    assert wrong(preset=name) == {
        "preset": "must be the name of a preset: 1 to 64 letters, digits, dots, - and _",
    }


def test_a_preset_is_checked_like_a_request() -> None:
    fields = {"prompt": "a boat", "samples": "3", "strength": None, "img_width": 768.0, "output_format": "webp"}
    assert parse_preset(fields) == {"prompt": "a boat", "samples": 3, "img_width": 768, "output_format": "webp"}
    assert parse_preset({}) == parse_preset(dict.fromkeys(PARAMETERS)) == {}
    for field, value in {"samples": 5, "prompt": " ", "scheduler": "x", "strength": "0"}.items():
        with pytest.raises(InvalidRequest) as caught:
            parse_preset({field: value})
        assert {error.field: error.detail for error in caught.value.errors} == wrong(**{field: value})


@pytest.mark.parametrize("field", ["image", "base64", "metadata", "preset", "nonsense"])
def test_a_preset_holds_parameters_only(field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_preset({field: "x", "samples": 0})
    assert [error.field for error in caught.value.errors] == [field, "samples"]
    assert all(name in caught.value.errors[0].detail for name in PARAMETERS)


@pytest.mark.parametrize("body", [None, [], "x", 5, True, [{}]])
def test_a_preset_must_be_an_object(body: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_preset(body)
    assert [error.field for error in caught.value.errors] == ["body"]


@settings(max_examples=examples(300), deadline=None, database=None)
@given(st.dictionaries(st.sampled_from(list(PARAMETERS)), json_values, max_size=4))
def test_what_a_preset_keeps_is_read_again_as_the_same(body: dict[str, Any]) -> None:
    try:
        fields = parse_preset(body)
    except InvalidRequest:
        return
    kept = json.loads(json.dumps(fields, allow_nan=False))
    assert parse_preset(kept) == fields
    assert parse_request({"preset": "p"}, lambda _: kept, required=()).params == read_params(body)


# --- the table ---


@pytest.mark.parametrize("name", FIELDS)
def test_a_fields_example_and_default_are_accepted_and_it_is_described(name: str) -> None:
    field = FIELDS[name]
    read_value = parser_of(field.kind)
    read_value(field.example)
    assert field.example != field.default
    assert field.description.endswith(".")
    if field.default not in (REQUIRED, None, "", {}):
        assert read_value(field.default) == field.default
    assert field.kind.accepts.startswith("must be ")


# --- fingerprints ---


def test_fingerprint_is_of_what_was_meant_not_of_its_spelling() -> None:
    one = parsed(samples="2", guidance_scale="7.50", seed=5.0, strength=1, negative_prompt=None)
    other = parsed(samples=2, guidance_scale=7.5, seed=5, strength=1.0, negative_prompt="")
    assert one.fingerprint == other.fingerprint
    assert parsed(image=f"data:image/png;base64,{PICTURE}").fingerprint == read(LEAST).fingerprint
    assert read(dict(reversed(LEAST.items()))).fingerprint == read(LEAST).fingerprint
    assert (
        parsed(metadata={"a": "1", "b": "2"}).fingerprint == parsed(metadata={"b": "2", "a": "1"}).fingerprint
    )  # fmt: skip


def test_fingerprint_takes_the_seed_as_sent() -> None:
    assert parsed(seed=-1).fingerprint == parsed().fingerprint


def test_fingerprint_tells_every_difference() -> None:
    others = [
        parsed(**change).fingerprint
        for change in (
            {},
            {"prompt": "a lighthouse "},
            {"negative_prompt": "x"},
            {"samples": 2},
            {"scheduler": "DDPM"},
            {"num_inference_steps": 21},
            {"guidance_scale": 7.6},
            {"strength": 0.9},
            {"seed": 0},
            {"seed": 1},
            {"img_width": 768},
            {"img_height": 768},
            {"fit": "contain"},
            {"output_format": "png"},
            {"metadata": {"a": "b"}},
            {"metadata": {"a": "c"}},
            {"image": "QQ=="},
            {"image": UPLOAD},
            {"image": "https://example.com/a"},
            {"image": "https://example.com/b"},
        )
    ]
    assert len(set(others)) == len(others)


def test_the_fingerprint_of_a_request_with_a_preset_outlives_a_change_of_the_preset() -> None:
    body = {"image": PICTURE, "preset": "p", "seed": "-1", "samples": None}
    first = parse_request(body, lambda _: {"prompt": "a boat", "strength": 0.4})
    changed = parse_request({**body, "seed": -1}, lambda _: {"prompt": "an ark", "samples": 2})
    assert first.params != changed.params
    assert first.fingerprint == changed.fingerprint


def test_the_fingerprint_of_a_request_with_a_preset_tells_every_difference() -> None:
    others = [
        parsed(**change).fingerprint
        for change in (
            {},
            {"preset": "empty"},
            {"preset": "watercolour"},
            # The value that the preset has: asked for, it stays when the preset changes.
            {"preset": "watercolour", "strength": 0.4},
            {"preset": "watercolour", "prompt": "a lighthouse "},
            {"preset": "watercolour", "samples": 2, "metadata": {"a": "b"}},
            {"preset": "watercolour", "image": UPLOAD},
        )
    ]
    assert len(set(others)) == len(others)


def test_a_request_without_an_image_is_not_one_with_it() -> None:
    without = parse_request({"prompt": "a lighthouse"}, presets, required=("prompt",))
    assert without.image is None
    assert without.fingerprint != read(LEAST).fingerprint


# --- seeds ---


def test_random_seed_is_resolved_once() -> None:
    seeds = {parsed().params.resolved().seed for _ in range(20)}
    assert len(seeds) > 15
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert parsed(seed=7).params.resolved() == parsed(seed=7).params


def test_each_sample_has_a_seed_of_its_own() -> None:
    params = parsed(seed=MAX_SEED - 1, samples=4).params
    assert [params.seed_of(index) for index in range(4)] == [MAX_SEED - 1, MAX_SEED, 0, 1]
