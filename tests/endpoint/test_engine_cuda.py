"""What only a GPU shows: half precision, a loop without waiting, and CUDA graphs."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest
import torch

from endpoint.engine import Engine
from endpoint.lane import lane_for
from endpoint.model import SCHEDULERS, Model
from endpoint.samples import Pool, Sample, Texts
from tests.endpoint.asked import picture, request

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
    for pixels, asked in zip(pictures(model), mixed(), strict=True):
        pipeline = model.pipeline
        pipeline.scheduler = model.scheduler(asked.scheduler)
        expected = pipeline(
            asked.prompt,
            image=asked.image,
            strength=asked.strength,
            num_inference_steps=asked.num_inference_steps,
            guidance_scale=asked.guidance_scale,
            negative_prompt=asked.negative_prompt,
            generator=torch.Generator().manual_seed(asked.seed),
            output_type="np",
        ).images[0]
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
    compiled = Model.load(tiny, device="cuda", dtype=torch.float16, compile="max-autotune")
    engine = Engine(compiled, max_batch=2)
    engine.warm_up([(64, 64)])
    engine.stop()
    eager = pictures(Model.load(tiny, device="cuda", dtype=torch.float16))
    for pixels, expected in zip(pictures(compiled, max_batch=4), eager, strict=True):
        assert np.abs(pixels - expected).mean() < 0.02


def test_many_pictures_decoded_beside_the_steps_stay_apart(half):
    engine = Engine(half, max_batch=4)
    asked = [request(image=picture(seed % 7), seed=seed, strength=0.1) for seed in range(60)]
    together = [future.result(120).pixels for future in [engine.submit(one) for one in asked]]
    for pixels, one in zip(together[::6], asked[::6], strict=True):
        assert np.abs(pixels - engine.submit(one).result(60).pixels).mean() < 0.01
    engine.stop()
