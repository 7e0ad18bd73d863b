"""Loading a model, its texts and schedulers, and compiling it."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel

from endpoint.engine import Engine
from endpoint.lane import Lane
from endpoint.model import DECODE_ROWS, SCHEDULERS, UNET_ROWS, Model, bucket, save_tiny
from endpoint.plan import _ExactLMS, scheduler_for
from endpoint.samples import Texts, tokens_of
from tests.endpoint.asked import Watched, assert_equal, picture, request
from tests.endpoint.compilers import needs_compiler, torch_warns


def with_scheduler(tiny, folder, **changes):
    """Copy the tiny model, with other entries in its scheduler's file; None takes one out."""
    shutil.copytree(tiny, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(OSError, match=r"model_index\.json"):
        Model.load(tmp_path)


def test_a_safety_checker_that_is_not_there_is_not_left_out_silently(tiny):
    with pytest.raises(ValueError, match="no safety checker"):
        Model.load(tiny, safety_checker=True)


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("kind", ["PNDMScheduler", "DDIMScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("entry", [None, True], ids=["absent", "set"])
def test_no_scheduler_clips(tiny, tmp_path, kind, entry):
    model = Model.load(with_scheduler(tiny, tmp_path / "model", _class_name=kind, clip_sample=entry))
    assert [name for name in SCHEDULERS if model.planner._schedulers[name].config.get("clip_sample")] == []


def test_a_scheduler_that_clips_is_refused(tiny, tmp_path):
    folder = with_scheduler(tiny, tmp_path / "model", _class_name="DDIMScheduler", thresholding=True)
    with pytest.raises(ValueError, match="clips samples"):
        Model.load(folder)


def test_the_coefficients_of_lms_are_diffusers_own(model):
    exact, integrated = _ExactLMS.from_config(config := model.pipeline.scheduler.config), scheduler_for("LMS", config)
    for scheduler in (exact, integrated):
        scheduler.set_timesteps(25)
    for step in range(25):
        for order in range(1, min(step + 1, 4) + 1):
            for current in range(order):
                expected = integrated.get_lms_coefficient(order, step, current)
                assert exact.get_lms_coefficient(order, step, current) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_a_plan_is_made_once(model):
    # 20 * 0.31 and 20 * 0.34 are both six steps.
    assert model.plan("LMS", 20, 0.31) is model.plan("LMS", 20, 0.34)
    assert model.plan("LMS", 20, 0.31) is not model.plan("LMS", 20, 0.36)


def test_a_long_prompt_is_cut_as_the_pipeline_cuts_it_and_stays_out_of_the_logs(model, reference, caplog):
    asked = request(prompt="secret " * 100, negative_prompt="hidden" * 50, strength=0.1)
    engine = Engine(model)
    with caplog.at_level(logging.DEBUG):
        made = engine.submit(asked).result(60).pixels
    engine.stop()
    assert "secret" not in caplog.text
    assert_equal(made, reference(asked))
    assert "secret" not in repr(asked)


def test_texts_are_encoded_once_and_the_oldest_forgotten(model):
    encoded: list[int] = []

    def encoder(tokens):
        encoded.append(len(tokens))
        return model.pipeline.text_encoder(tokens)

    counted = replace(model, pipeline=Parts(model.pipeline, text_encoder=encoder))
    texts = Texts(counted, Lane(), kept=3)

    def encode(*words):
        return list(texts.encode(tokens_of(model, words)).values())

    with torch.inference_mode():
        first = encode("a", "b", "a")
        assert encoded == [2]
        again = encode("a", "c")
        assert encoded == [2, 1]
        assert torch.equal(dict(zip("ab", first, strict=True))["a"], again[0])
        encode("d")
        assert len(texts) == 3
        encode("a", "c", "d")
        assert encoded == [2, 1, 1]
        encode("b")
        assert encoded == [2, 1, 1, 1]
        # More at once than are kept.
        assert len(encode("e", "f", "g", "h", "i")) == 5
        assert len(texts) == 3


def test_texts_become_tokens_in_the_threads_that_prepare(model):
    threads: set[str] = set()
    busy = threading.Lock()

    def tokenizer(*given, **options):
        # One at a time: it is not made for more.
        assert busy.acquire(blocking=False)
        threads.add(threading.current_thread().name.rpartition("_")[0])
        found = model.pipeline.tokenizer(*given, **options)
        busy.release()
        return found

    tokenizer.model_max_length = model.pipeline.tokenizer.model_max_length
    engine = Engine(replace(model, pipeline=Parts(model.pipeline, tokenizer=tokenizer)))
    futures = [engine.submit(request(prompt=f"castle {seed}", strength=0.1)) for seed in range(20)]
    for future in futures:
        future.result(60)
    engine.stop()
    assert threads == {"engine-prepare"}


class Parts:
    """A pipeline with other parts."""

    def __init__(self, pipeline, **parts):
        self._pipeline = pipeline
        vars(self).update(parts)

    def __getattr__(self, name):
        return getattr(self._pipeline, name)


def test_a_call_that_is_filled_up_gives_the_same(model):
    filled = Watched(replace(model, unet_rows=(1, 2, 4, 8), decode_rows=(4,)))
    latents, steps, embeds = torch.randn(3, 4, 8, 8), torch.tensor([1.0, 500.0, 999.0]), torch.randn(3, 77, 32)
    with torch.inference_mode():
        noise = filled.model.noise(latents, steps, embeds)
        assert [shape[0] for shape in filled.calls] == [4]
        assert noise.shape == latents.shape
        torch.testing.assert_close(noise, model.noise(latents, steps, embeds), rtol=0, atol=1e-5)
        torch.testing.assert_close(filled.model.decode(latents), model.decode(latents), rtol=0, atol=1e-5)


def test_buckets():
    assert [bucket(rows, (1, 2, 4)) for rows in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 5]
    assert bucket(3, ()) == 3


@pytest.fixture(scope="module")
def small(model):
    """A pipeline with a UNet of one level: the tiny one takes half a minute to compile, and each batch again."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return StableDiffusionImg2ImgPipeline(
        **{**model.pipeline.components, "unet": unet.eval()}, requires_safety_checker=False
    )


class Compiler:
    """Takes programs as they are, and remembers what it was told."""

    def __init__(self) -> None:
        self.options: list[dict[str, bool]] = []

    def __call__(self, program, inputs, options=None):
        self.options.append(dict(options or {}))
        return program.forward


@torch_warns
def test_every_size_and_batch_is_compiled_in_another_thread_than_the_loading_one(small):
    compiler = Compiler()
    compiled = Model.of(small, compile="max-autotune", backend=compiler)
    engine = Engine(compiled)
    engine.warm_up([(64, 64), (96, 64)])
    assert len(compiler.options) == 2 * (len(UNET_ROWS) + len(DECODE_ROWS))
    tuning = {
        "max_autotune": True,
        "conv_1x1_as_mm": True,
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
        "epilogue_fusion": False,
    }
    graphs = [told.pop("triton.cudagraphs", False) for told in compiler.options]
    assert graphs == [*[True] * len(UNET_ROWS), *[False] * len(DECODE_ROWS)] * 2
    assert all(told == tuning for told in compiler.options)
    # Sizes that were not warmed up run as they are: a request must not wait for a compiler.
    other = request(image=picture(0, 64, 96), strength=0.3)
    made = engine.submit(other).result(60).pixels
    assert len(compiler.options) == 2 * (len(UNET_ROWS) + len(DECODE_ROWS))
    engine.stop()
    plain = Engine(Model.of(small))
    assert_equal(made, plain.submit(other).result(60).pixels)
    plain.stop()


@torch_warns
def test_batches_that_cannot_come_are_not_compiled(small):
    compiler = Compiler()
    engine = Engine(Model.of(small, compile="default", backend=compiler), max_batch=2)
    engine.warm_up([(64, 64)])
    # One to four rows, and one or two pictures.
    assert len(compiler.options) == 3 + 2
    for future in [engine.submit(request(seed=seed, strength=0.1)) for seed in range(5)]:
        future.result(60)
    assert len(compiler.options) == 3 + 2
    engine.stop()


def test_the_compiler_knows_its_options(small):
    # Torch refuses those that it has not, in this call already.
    assert Model.of(small, compile="max-autotune").unet is not small.unet


@needs_compiler
@torch_warns
def test_compiled_it_gives_the_same(small):
    made = []
    for how in ("off", "default"):
        model = Model.of(small, compile=how)
        engine = Engine(replace(model, unet_rows=model.unet_rows[1:2], decode_rows=(), decoder=small.vae.decode))
        engine.warm_up([(64, 64)])
        made.append(engine.submit(request(strength=0.3)).result(120).pixels)
        engine.stop()
    assert model.unet is not small.unet
    assert_equal(made[1], made[0])


def test_the_tiny_model_is_the_same_each_time(model, tmp_path):
    save_tiny(tmp_path / "again")
    again = Model.load(tmp_path / "again")
    for name, tensor in model.pipeline.unet.state_dict().items():
        assert np.array_equal(tensor.numpy(), again.pipeline.unet.state_dict()[name].numpy())
