"""What only a GPU shows: half precision, a loop without waiting, and CUDA graphs."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from endpoint.engine import Engine
from endpoint.lane import lane_for
from endpoint.model import SCHEDULERS, Model
from endpoint.plan import scheduler_for
from endpoint.samples import Pool, Sample, Texts
from tests.endpoint.asked import Watched, picture, request, through

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def mixed():
    return [
        request(scheduler=scheduler, seed=seed, guidance_scale=1 + seed % 3, strength=0.3 + seed / 20)
        for seed, scheduler in enumerate(SCHEDULERS)
    ]


@pytest.fixture(scope="module")
def half(tiny):
    return Model.load(tiny, device="cuda", dtype=torch.float16)


def pictures(model, **options) -> list[np.ndarray]:
    engine = Engine(model, **options)
    try:
        return [future.result(120).pixels for future in [engine.submit(one) for one in mixed()]]
    finally:
        engine.stop(now=True)


def test_in_single_precision_it_equals_the_pipeline_on_the_cpu(tiny, reference):
    made = pictures(Model.load(tiny, device="cuda"))
    for pixels, asked in zip(made, mixed(), strict=True):
        assert np.abs(pixels - reference(asked)).max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_is_close(tiny, dtype):
    model = Model.load(tiny, device="cuda", dtype=dtype)
    pipeline, config = model.pipeline, model.pipeline.scheduler.config
    for pixels, asked in zip(pictures(model), mixed(), strict=True):
        pipeline.scheduler = scheduler_for(asked.scheduler, config)
        expected = through(pipeline, asked, output_type="np")
        assert np.abs(pixels - expected).mean() < 0.02


def test_no_step_waits_for_the_device(half):
    lane = lane_for(half.device)
    samples = [Sample(asked, Future(), 0.0) for asked in mixed()]
    with torch.inference_mode():
        pool = Pool(half, lane, Texts(half, lane), (64, 64), len(samples))
        for sample in samples:
            sample.make_ready(half)
        pool.start(samples)
        pool.step(samples)  # loads kernels, which waits
        torch.cuda.set_sync_debug_mode("error")
        try:
            while running := [sample for sample in samples if not sample.done]:
                pool.step(running)
                lane.pace()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiled_with_cuda_graphs_it_gives_the_same(tiny):
    torch.manual_seed(0)
    # In a thread of its own, as the process loads it: what torch is told there is not told to the engine's thread.
    options = {"device": "cuda", "dtype": torch.float16, "compile": "max-autotune"}
    with ThreadPoolExecutor(1) as loading:
        compiled = loading.submit(Model.load, tiny, **options).result()
    eager = Model.load(tiny, device="cuda", dtype=torch.float16)
    asked = mixed() + [replace(one, image=picture(5, 96, 64)) for one in mixed()]
    made = []
    for model in (compiled, eager):
        engine = Engine(model, max_batch=8)
        try:
            # More programs in all than torch compiles unless it is told to.
            engine.warm_up([(64, 64), (96, 64)])
            made.append([future.result(120).pixels for future in [engine.submit(one) for one in asked]])
        finally:
            engine.stop(now=True)
    for pixels, expected in zip(*made, strict=True):
        assert np.abs(pixels - expected).mean() < 0.02


def test_after_a_batch_too_large_for_the_memory_each_is_made_alone(half):
    def unet(latents, _embeds):
        if len(latents) > 4:
            torch.empty(2**50, device="cuda", dtype=torch.uint8)

    engine = Engine(Watched(half, before=unet).model)
    asked = [request(seed=seed, strength=0.3) for seed in range(4)]
    for future in [engine.submit(one) for one in asked]:
        assert future.result(60).pixels is not None
    engine.stop()


def test_many_pictures_decoded_beside_the_steps_stay_apart(half):
    engine = Engine(half, max_batch=4)
    asked = [request(image=picture(seed % 7), seed=seed, strength=0.1) for seed in range(60)]
    together = [future.result(120).pixels for future in [engine.submit(one) for one in asked]]
    for pixels, one in zip(together[::6], asked[::6], strict=True):
        assert np.abs(pixels - engine.submit(one).result(60).pixels).mean() < 0.01
    engine.stop()
