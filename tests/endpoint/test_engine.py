"""Who runs when, who leaves, and what a failure costs."""

from __future__ import annotations

import gc
import io
import threading
import time
import weakref
from concurrent.futures import CancelledError, wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from endpoint.engine import Busy, Engine, Stopped, to_image
from endpoint.logs import describe
from endpoint.samples import Sample
from tests.endpoint.asked import Watched, assert_equal, picture, request


class Seen:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.waits: list[float] = []
        self.ends: list[tuple[str, float]] = []

    def stepped(self, samples: int, seconds: float) -> None:
        assert seconds > 0
        self.steps.append(samples)

    def started(self, queue_seconds: float) -> None:
        self.waits.append(queue_seconds)

    def ended(self, outcome: str, run_seconds: float) -> None:
        self.ends.append((outcome, run_seconds))


@pytest.fixture
def seen():
    return Seen()


@pytest.fixture
def watched(model):
    return Watched(model)


@pytest.fixture
def run(watched):
    """Start engines that the test need not stop."""
    engines = []

    def start(model=watched.model, **options):
        engines.append(Engine(model, **options))
        return engines[-1]

    yield start
    watched.go_on()
    for engine in engines:
        engine.stop(now=True)


def eventually(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_request_joins_at_the_next_step_and_leaves_when_done(watched, run, reference):
    engine = run()
    long, short = request(num_inference_steps=20, guidance_scale=1), request(strength=0.1, guidance_scale=1, seed=3)
    watched.hold()
    first = engine.submit(long)
    watched.wait_for_call()
    second = engine.submit(short)
    # What needs no device is done while the step is held.
    eventually(lambda: all(sample.ready for group in engine._groups.values() for sample in group.waiting))
    watched.go_on()
    assert_equal(second.result(60).pixels, reference(short))
    assert_equal(first.result(60).pixels, reference(long))
    assert [shape[0] for shape in watched.calls] == [1, 2, 2, *[1] * 17]


def test_sizes_take_turns(watched, run, reference):
    engine = run()
    wide = request(image=picture(1, 96, 64), guidance_scale=1)
    square = request(guidance_scale=1)
    watched.hold()
    futures = [engine.submit(wide)]
    watched.wait_for_call()
    futures.append(engine.submit(square))
    eventually(lambda: all(sample.ready for group in engine._groups.values() for sample in group.waiting))
    watched.go_on()
    for future, asked in zip(futures, [wide, square], strict=True):
        assert_equal(future.result(60).pixels, reference(asked))
    widths = [shape[3] for shape in watched.calls]
    assert widths == [12, *[8, 12] * 19, 8]


def test_sizes_are_let_in_in_turn(watched, run):
    engine = run(max_running=1)
    watched.hold()
    order = []
    sizes = [(64, 64)] * 3 + [(96, 64)]
    futures = []
    for size in sizes:
        futures.append(engine.submit(request(image=picture(0, *size), strength=0.1)))
        futures[-1].add_done_callback(lambda _, size=size: order.append(size))
    watched.wait_for_call()
    eventually(lambda: all(sample.ready for group in engine._groups.values() for sample in group.waiting))
    watched.go_on()
    wait(futures, timeout=60)
    assert order.index((96, 64)) == 1


def test_a_full_queue_says_when_to_come_again(watched, run):
    engine = run(max_running=1, max_queue=2)
    watched.hold()
    running = engine.submit(request(strength=0.1))
    watched.wait_for_call()
    waiting = [engine.submit(request(strength=0.1, seed=seed)) for seed in range(2)]
    assert (engine.running, engine.waiting) == (1, 2)
    with pytest.raises(Busy) as busy:
        engine.submit(request())
    assert busy.value.retry_after == 1
    watched.go_on()
    wait([running, *waiting], timeout=60)
    assert engine.submit(request(strength=0.1)).result(60).pixels is not None


def test_the_time_to_come_again_is_measured(model, run):
    # 4 times 20 steps of 0.1 s.
    slow = Watched(model, before=lambda *_: time.sleep(0.1))
    engine = run(slow.model, max_batch=1, max_queue=4)
    engine.submit(request(strength=0.1)).result(60)
    futures = [engine.submit(request())]
    eventually(lambda: not engine.waiting)
    futures += [engine.submit(request()) for _ in range(4)]
    eventually(lambda: all(sample.ready for group in engine._groups.values() for sample in group.waiting))
    with pytest.raises(Busy) as busy:
        engine.submit(request())
    assert 8 <= busy.value.retry_after <= 60
    for future in futures:
        future.cancel()


def test_a_canceled_request_leaves_at_the_next_step(watched, run, reference, seen):
    engine = run(max_batch=1, observer=seen)
    watched.hold()
    gone = engine.submit(request(num_inference_steps=100))
    watched.wait_for_call()
    kept = request(seed=3, strength=0.1)
    future = engine.submit(kept)
    assert gone.cancel()
    watched.go_on()
    assert_equal(future.result(60).pixels, reference(kept))
    with pytest.raises(CancelledError):
        gone.result(0)
    assert len(watched.calls) == 1 + 2
    assert [outcome for outcome, _ in seen.ends] == ["canceled", "succeeded"]
    assert all(seconds > 0 for _, seconds in seen.ends)
    assert not future.cancel()


def test_a_request_canceled_in_the_queue_frees_its_place(watched, run, seen):
    engine = run(max_running=1, max_queue=1, observer=seen)
    watched.hold()
    first = engine.submit(request(strength=0.1))
    watched.wait_for_call()
    second = engine.submit(request())
    assert second.cancel()
    assert engine.waiting == 0
    third = engine.submit(request(strength=0.1))
    # Who waits for several futures sees that it ended.
    assert not wait([second], timeout=0).not_done
    watched.go_on()
    wait([first, third], timeout=60)
    assert [outcome for outcome, _ in seen.ends] == ["canceled", "succeeded", "succeeded"]
    assert seen.ends[0][1] == 0


def broken_image() -> Image.Image:
    stream = io.BytesIO()
    picture(0).save(stream, "PNG")
    cut = Image.open(io.BytesIO(stream.getvalue()[:2000]))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    return cut


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda: {"scheduler": "Fast"}, ValueError),
        (lambda: {"num_inference_steps": 0}, ValueError),
        (lambda: {"strength": 0.01}, ValueError),
        (lambda: {"image": Image.new("RGB", (64, 63))}, ValueError),
        (lambda: {"image": broken_image()}, OSError),
        (lambda: {"prompt": None}, (TypeError, ValueError)),
        (lambda: {"seed": "seven"}, (TypeError, RuntimeError)),
    ],
    ids=["scheduler", "steps", "strength", "size", "image", "prompt", "seed"],
)
def test_a_request_that_fails_harms_no_other(run, reference, seen, wrong, error):
    engine = run(observer=seen)
    good = [request(seed=seed, scheduler="Euler a", strength=0.3) for seed in range(3)]
    futures = [engine.submit(good[0]), engine.submit(request(**wrong())), *map(engine.submit, good[1:])]
    failed = futures.pop(1)
    with pytest.raises(error):
        failed.result(60)
    for future, asked in zip(futures, good, strict=True):
        assert_equal(future.result(60).pixels, reference(asked))
    assert sorted(outcome for outcome, _ in seen.ends) == ["failed", "succeeded", "succeeded", "succeeded"]


@pytest.mark.parametrize("part", ["unet", "encode", "decode", "text"])
def test_a_request_that_fails_mid_flight_harms_no_other(model, run, reference, part):
    good = [request(seed=seed, scheduler=name, strength=0.3) for seed, name in enumerate(["Euler a", "UniPC", "DDPM"])]
    bad = request(prompt="poison", image=Image.new("RGB", (64, 64), "red"), guidance_scale=1e30)
    poison = model.embeds(model.tokens(["poison"]))[0]
    steps = 0

    def refuse(found: bool) -> None:
        if found:
            raise RuntimeError("no such thing")

    def unet(_latents, embeds):
        nonlocal steps
        steps += 1
        refuse(steps > 3 and any(torch.allclose(one, poison, atol=1e-4) for one in embeds))

    class Vae:
        config = model.pipeline.vae.config

        def encode(self, pixels):
            refuse(bool((pixels[:, 1] == -1).all(dim=(1, 2)).any()))
            return model.pipeline.vae.encode(pixels)

    def decode(latents, **options):
        refuse(not latents.isfinite().all() or bool(latents.abs().max() > 1e20))
        return model.decoder(latents, **options)

    def encode_text(tokens):
        refuse(any(torch.equal(one, model.tokens(["poison"])[0]) for one in tokens))
        return model.pipeline.text_encoder(tokens)

    pipeline = SimpleNamespace(**{**model.pipeline.components, "vae_scale_factor": 8})
    broken = {
        "unet": lambda: Watched(model, before=unet).model,
        "encode": lambda: replace(model, pipeline=SimpleNamespace(**{**vars(pipeline), "vae": Vae()})),
        "decode": lambda: replace(model, decoder=decode),
        "text": lambda: replace(model, pipeline=SimpleNamespace(**{**vars(pipeline), "text_encoder": encode_text})),
    }[part]()
    engine = run(broken)
    # Together in one batch, from a queue that waits for nothing but its preparation.
    futures = [engine.submit(one) for one in [good[0], bad, *good[1:]]]
    failed = futures.pop(1)
    with pytest.raises(RuntimeError, match="no such thing"):
        failed.result(60)
    for future, asked in zip(futures, good, strict=True):
        assert_equal(future.result(60).pixels, reference(asked))
    assert engine.alive


def test_a_batch_too_large_for_the_memory_is_let_go_of_before_it_is_made_smaller(model, run, reference, caplog):
    called: list[tuple[int, weakref.ref[torch.Tensor]]] = []
    left: list[int] = []

    def unet(latents, _embeds):
        # What a failed call was given would still take memory.
        left.append(sum(latents() is not None for _, latents in called))
        called.append((len(latents), weakref.ref(latents)))
        if len(latents) > 4:
            raise torch.OutOfMemoryError("out of memory")

    engine = run(Watched(model, before=unet).model)
    asked = [request(seed=seed, strength=0.3) for seed in range(4)]
    for future, one in zip([engine.submit(one) for one in asked], asked, strict=True):
        assert_equal(future.result(60).pixels, reference(one))
    assert set(left) == {0}
    # After that no call is as large, so that not every step fails once.
    assert sum(rows > 4 for rows, _ in called) == 1
    assert "memory is too small" in caplog.text


def test_a_single_request_too_large_for_the_memory_is_let_go_of(model, run):
    seen: list[weakref.ref[torch.Tensor]] = []

    def unet(latents, _embeds):
        seen.append(weakref.ref(latents))
        try:
            raise torch.OutOfMemoryError("out of memory")
        except torch.OutOfMemoryError as error:
            # Errors may be each other's causes.
            other = ValueError()
            other.__cause__ = error
            raise error from other

    engine = run(Watched(model, before=unet).model)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        engine.submit(request()).result(60)
    assert seen[0]() is None
    # The log still names the place.
    assert raised.traceback[-1].path.name == "test_engine.py"


def test_what_is_no_number_stays_in_its_own_picture(run, reference):
    engine = run(max_batch=2)
    # It keeps the place of the next from being given up.
    other = engine.submit(request(num_inference_steps=100))
    # UniPC keeps the most tensors.
    engine.submit(request(guidance_scale=float("inf"), scheduler="UniPC", strength=0.3)).result(60)
    asked = request(scheduler="DDIM", strength=0.3)
    assert_equal(engine.submit(asked).result(60).pixels, reference(asked))
    assert not other.done()


def test_stopping_finishes_what_was_taken(run):
    engine = run(max_batch=2)
    futures = [engine.submit(request(seed=seed, strength=0.1)) for seed in range(5)]
    engine.stop()
    assert all(future.done() for future in futures)
    assert all(future.result(0).pixels is not None for future in futures)
    assert not engine.alive
    with pytest.raises(Stopped):
        engine.submit(request())
    with pytest.raises(Stopped):
        engine.warm_up()


def test_stopping_now_fails_what_was_taken(watched, run, seen):
    engine = run(max_batch=1, observer=seen)
    watched.hold()
    futures = [engine.submit(request(seed=seed)) for seed in range(3)]
    watched.wait_for_call()
    draining = threading.Thread(target=engine.stop)
    draining.start()
    ending = threading.Thread(target=engine.stop, kwargs={"now": True})
    ending.start()
    eventually(lambda: engine._giving_up)
    watched.go_on()
    for future in futures:
        with pytest.raises(Stopped):
            future.result(60)
    draining.join(60)
    ending.join(60)
    assert not draining.is_alive()
    assert not ending.is_alive()
    assert [outcome for outcome, _ in seen.ends] == ["failed"] * 3


class Fault(BaseException):
    """More than an error."""


@pytest.mark.parametrize("where", ["engine", "out"])
def test_a_thread_that_dies_leaves_nobody_waiting(model, run, seen, where, caplog):
    def fault(*_, **__):
        raise Fault

    broken = Watched(model, before=fault).model
    if where == "out":
        checked = SimpleNamespace(**{**model.pipeline.components, "vae_scale_factor": 8, "safety_checker": fault})
        checked.feature_extractor = fault
        broken = replace(model, pipeline=checked)
    engine = run(broken, max_batch=1, observer=seen)
    futures = [engine.submit(request(seed=seed, strength=0.1, prompt="secret")) for seed in range(3)]
    for future in futures:
        with pytest.raises(Stopped):
            future.result(60)
    eventually(lambda: not engine.alive)
    with pytest.raises(Stopped):
        engine.submit(request())
    assert "by a fault: Fault" in caplog.text
    fault = next(record for record in caplog.records if record.exc_info)
    assert describe(fault.exc_info[1])["error"] == "Fault"
    assert Path(__file__).name in describe(fault.exc_info[1])["at"]
    engine.wait()
    assert "secret" not in caplog.text
    engine.stop()


def test_a_device_that_is_broken_ends_the_engine(model, run):
    def fail(*_):
        raise RuntimeError("illegal access")

    engine = run(Watched(model, before=fail).model)
    engine._lane.check = fail
    future = engine.submit(request())
    with pytest.raises(Stopped):
        future.result(60)
    eventually(lambda: not engine.alive)


class Checker:
    """Flags pictures that are dark on average, with the interface of diffusers' checker."""

    def __init__(self, limit: float) -> None:
        self._limit = limit

    def extract(self, images, return_tensors):
        assert return_tensors == "pt"
        pixels = [torch.from_numpy(np.asarray(image) / 255.0) for image in images]
        return SimpleNamespace(pixel_values=torch.stack(pixels))

    def __call__(self, images, clip_input):
        flags = [bool(one.mean() < self._limit) for one in clip_input]
        for index, flagged in enumerate(flags):
            if flagged:
                images[index] = 0
        return images, flags


def test_a_flagged_result_has_no_pixels(model, run, reference, seen):
    asked = [request(seed=seed, strength=0.3, image=picture(seed)) for seed in range(6)]
    means = [reference(one).mean() for one in asked]
    checker = Checker(sorted(means)[2] + 1e-4)
    parts = {"safety_checker": checker, "feature_extractor": checker.extract, "vae_scale_factor": 8}
    engine = run(replace(model, pipeline=SimpleNamespace(**{**model.pipeline.components, **parts})), observer=seen)
    results = [future.result(60) for future in [engine.submit(one) for one in asked]]
    assert [result.flagged for result in results] == [mean <= sorted(means)[2] for mean in means]
    for result, one in zip(results, asked, strict=True):
        if result.flagged:
            assert result.pixels is None
            with pytest.raises(ValueError, match="no picture"):
                to_image(result)
        else:
            assert_equal(result.pixels, reference(one))
    assert sorted(outcome for outcome, _ in seen.ends) == ["flagged"] * 3 + ["succeeded"] * 3


def test_it_tells_what_happens(run, seen):
    engine = run(observer=seen, max_batch=1)
    results = [future.result(60) for future in [engine.submit(request(seed=seed, strength=0.1)) for seed in range(2)]]
    assert seen.steps == [1] * 4
    assert seen.waits == [result.queue_seconds for result in results]
    assert seen.ends == [("succeeded", result.run_seconds) for result in results]
    assert results[1].queue_seconds > results[0].queue_seconds
    assert all(result.run_seconds > 0 for result in results)


def test_warming_up_makes_the_calls_of_each_size(watched, run):
    engine = run()
    engine.warm_up([(64, 64), (96, 64)])
    assert {shape[2:] for shape in watched.calls} == {(8, 8), (8, 12)}
    assert (engine.waiting, engine.running) == (0, 0)


@pytest.mark.parametrize("kind", [RuntimeError, Fault])
def test_warming_up_raises_what_goes_wrong(model, run, caplog, kind):
    def fail(*_):
        raise kind("no compiler")

    engine = run(Watched(model, before=fail).model)
    with pytest.raises(kind, match="no compiler"):
        engine.warm_up([(64, 64)])
    assert Path(__file__).name in describe(caplog.records[0].exc_info[1])["at"]
    if kind is Fault:
        eventually(lambda: not engine.alive)


def test_batches_fill_what_is_compiled(watched, run, reference):
    engine = run(replace(watched.model, unet_rows=(1, 2, 4, 8, 16, 32), decode_rows=(1, 2, 4)))
    asked = [request(seed=seed, scheduler="Euler a", guidance_scale=1 + seed % 3) for seed in range(9)]
    for future, one in zip([engine.submit(one) for one in asked], asked, strict=True):
        assert_equal(future.result(120).pixels, reference(one))
    rows = [shape[0] for shape in watched.calls]
    assert set(rows) <= {1, 2, 4, 8, 16}
    assert 16 in rows


def used_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell how much memory is used")
def test_memory_is_steady_over_a_thousand_requests(model, run):
    engine = run(model)

    def work(first: int, last: int) -> None:
        for start in range(first, last, 50):
            futures = [
                engine.submit(request(seed=seed, prompt=f"castle {seed}", strength=0.1))
                for seed in range(start, start + 50)
            ]
            for future in futures:
                future.result(120)

    def left() -> int:
        return sum(type(one) is Sample for one in gc.get_objects())

    work(0, 300)
    gc.collect()
    before = used_memory()
    gc.disable()
    try:
        work(300, 1000)
        # None of them waits for the garbage collector, except those of the last batch.
        assert left() <= 16
    finally:
        gc.enable()
    gc.collect()
    # 700 results alone have 34 MB.
    assert used_memory() - before < 16e6
