"""The engine's pictures are the pipeline's, whatever else it works on."""

from __future__ import annotations

import random
from concurrent.futures import CancelledError, wait
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from endpoint.engine import Engine, to_image
from endpoint.model import SCHEDULERS
from tests.endpoint.asked import Watched, assert_equal, grid, picture, request
from tests.long import examples


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_alone_it_equals_the_pipeline(engine, reference, scheduler):
    chosen = [asked for asked in grid() if asked.scheduler == scheduler]
    assert len(chosen) == 12
    for asked in chosen:
        assert_equal(engine.submit(asked).result(120).pixels, reference(asked))


def test_all_of_them_together_equal_the_pipeline(model, reference):
    watched = Watched(model)
    engine = Engine(watched.model)
    asked = grid()
    random.Random(5).shuffle(asked)
    # Of different lengths and more than run at once: they join and leave all the time.
    futures = [engine.submit(one) for one in asked]
    for future, one in zip(futures, asked, strict=True):
        assert_equal(future.result(300).pixels, reference(one))
    engine.stop()
    assert max(shape[0] for shape in watched.calls) > 16


@st.composite
def requests(draw):
    return request(
        image=picture(draw(st.integers(0, 3)), *draw(st.sampled_from([(64, 64), (96, 64), (64, 96)]))),
        prompt=draw(st.sampled_from(["", "a castle", "fog over the sea, in oil"])),
        negative_prompt=draw(st.sampled_from(["", "a castle"])),
        scheduler=draw(st.sampled_from(list(SCHEDULERS))),
        strength=draw(st.floats(0.1, 1)),
        num_inference_steps=draw(st.integers(20, 30)),
        guidance_scale=draw(st.floats(0.1, 25)),
        seed=draw(st.integers(0, 2**50)),
    )


@settings(
    max_examples=examples(12),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    asked=st.lists(requests(), min_size=2, max_size=8),
    chance=st.randoms(use_true_random=False),
    max_batch=st.sampled_from([1, 3, 16]),
    max_running=st.sampled_from([2, 64]),
    buckets=st.sampled_from([(), (1, 2, 4, 8, 16, 32)]),
)
def test_joining_and_leaving_at_any_step_changes_nothing(
    model, reference, asked, chance, max_batch, max_running, buckets
):
    engine = Engine(
        replace(model, unet_rows=buckets, decode_rows=buckets), max_batch=max_batch, max_running=max_running
    )
    try:
        futures = []
        for one in asked:
            futures.append(engine.submit(one))
            if chance.random() < 0.3:
                wait([chance.choice(futures)], timeout=120)
            if chance.random() < 0.2:
                chance.choice(futures).cancel()
        for one, future in zip(asked, futures, strict=True):
            if future.cancelled():
                with pytest.raises(CancelledError):
                    future.result(0)
            else:
                assert_equal(future.result(120).pixels, reference(one))
        assert (engine.waiting, engine.running) == (0, 0)
    finally:
        engine.stop(now=True)


@pytest.mark.parametrize("guidance", [0.1, 1, 1.01, 25])
def test_guidance(engine, reference, guidance):
    asked = request(guidance_scale=guidance, negative_prompt="fog", strength=0.3)
    assert_equal(engine.submit(asked).result(60).pixels, reference(asked))


def test_equal_seeds_give_equal_pictures_and_others_do_not(engine):
    seeds = (2**50 - 1, 0, 2**50 - 2, 2**50 - 1)
    futures = [engine.submit(request(seed=seed, strength=0.3, scheduler="Euler a")) for seed in seeds]
    first, second, third, again = (future.result(60).pixels for future in futures)
    assert_equal(first, again)
    assert np.abs(first - second).max() > 0.01
    assert np.abs(first - third).max() > 0.01


def test_rounding_is_the_pipeline_s(engine, reference):
    asked = request(strength=0.3)
    made = np.asarray(to_image(engine.submit(asked).result(60))).astype(int)
    # Where the pipeline's value lies on the edge between two bytes, 1e-6 decides.
    expected = (reference(asked) * 255).round().astype(int)
    assert np.abs(made - expected).max() <= 1
    assert np.mean(made != expected) < 0.001
