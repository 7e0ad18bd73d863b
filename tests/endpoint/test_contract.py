"""The endpoint takes what the API in front sends: names, ranges and defaults are the same, though the code is not."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from endpoint import requests
from endpoint.model import SCHEDULERS

CORE = Path(__file__).parents[2] / "layers/core/python"


@pytest.fixture(scope="module")
def params():
    sys.path.insert(0, str(CORE))
    try:
        from img2img import params
    finally:
        sys.path.remove(str(CORE))
    return params


@pytest.fixture(scope="module")
def parsers(params):
    """What the API reads each parameter and flag with."""
    from img2img.values import parser_of

    return {name: parser_of(field.kind) for name, field in params.FIELDS.items()}


# The API makes several samples of one request, and takes images in more ways.
SHARED = sorted(set(requests.FIELDS) - {"image", "samples"})
NUMBERS = st.one_of(
    st.integers(-3, 103),
    st.integers(),
    st.floats(),
    st.floats(0, 1.1),
    st.floats(0, 26),
    st.sampled_from([512, 768, 512.0, 768.5, requests.MAX_SEED, requests.MAX_SEED + 1, -2, 1e400, math.nan]),
)
VALUES = st.one_of(
    NUMBERS,
    NUMBERS.map(str),
    st.booleans(),
    st.sampled_from(["true", " False", "yes", "", " ", "ddim", "\ud800", "1_0", "0x10", "1e999", "٣"]),
    st.sampled_from(list(SCHEDULERS)),
    st.text(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def outcome(parse, value):
    try:
        return parse(value)
    except ValueError:
        return "refused"


@given(st.sampled_from(SHARED), VALUES)
@example("prompt", "x" * 10_000)
@example("prompt", "x" * 10_001)
@example("negative_prompt", "")
@example("guidance_scale", 0.1)
@example("guidance_scale", 25)
@example("strength", 0.1)
@example("strength", 1)
@example("num_inference_steps", 19)
@example("num_inference_steps", 20.0)
@example("num_inference_steps", True)
@example("seed", -1)
def test_a_value_is_accepted_or_refused_by_both_and_read_alike(parsers, name, value):
    ours = outcome(lambda value: requests.parse_field(name, value), value)
    theirs = outcome(parsers[name], value)
    assert ours == theirs
    assert type(ours) is type(theirs)


def test_every_parameter_of_the_api_that_makes_the_picture_is_known(params):
    ours_alone = {"fit", "output_format"}
    assert {*requests.FIELDS} == {*params.PARAMETERS} - ours_alone | {"image", "base64"}


def test_schedulers_and_defaults_are_the_same(params):
    assert set(params.SCHEDULERS) == set(SCHEDULERS)
    defaults = params.Img2ImgParams(prompt="x").as_dict()
    assert {name: defaults.get(name, False) for name in requests.DEFAULTS} == dict(requests.DEFAULTS)


def test_a_request_with_the_edges_of_each_range_is_taken_by_both(parsers):
    for steps, guidance, strength, size in [(20, 0.1, 0.1, 512), (100, 25, 1, 768)]:
        asked = {"num_inference_steps": steps, "guidance_scale": guidance, "strength": strength, "img_width": size}
        for name, value in asked.items():
            assert requests.parse_field(name, value) == parsers[name](value) == value
