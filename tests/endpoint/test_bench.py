"""The bench measures what it says: the real networks, both sides of each comparison, and a missed goal is a failure."""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from endpoint.model import save_tiny
from tests.endpoint.bench import __main__ as bench
from tests.endpoint.bench import asks, sd15, subjects
from tests.endpoint.bench.subjects import Load, Setup


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return folder


@pytest.fixture
def setup(tiny) -> Setup:
    return Setup(
        tiny=tiny,
        model="tiny",
        device="cpu",
        dtype=torch.float32,
        compile="off",
        size=64,
        clients=(1, 3),
        window=0.0,
        rounds=1,
        threads=1,
    )


def test_the_networks_have_the_sizes_of_stable_diffusion_1_5(tiny):
    pipeline = sd15.pipeline(tiny, "meta", torch.float16)
    parameters = {
        name: sum(weights.numel() for weights in getattr(pipeline, name).parameters())
        for name in ("unet", "vae", "text_encoder")
    }
    assert parameters == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert {weights.dtype for weights in pipeline.unet.parameters()} == {torch.float16}


def test_a_run_on_the_processor_measures_every_subject(tmp_path, capsys):
    file = tmp_path / "figures.json"
    options = "--device cpu --model tiny --threads 1 --rounds 0 --window 0.2 --clients 1 4"
    assert bench.main([*options.split(), "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["problems"] == {}
    measured = {found["subject"]: found for found in figures["subjects"]}
    assert [load["clients"] for load in measured["engine"]["loads"]] == [1, 4]
    assert [load["clients"] for load in measured["diffusers"]["loads"]] == [1]
    printed = capsys.readouterr().out
    for found in measured.values():
        assert min(found["ready_seconds"], found["steps_per_second"], found["peak_memory_bytes"]) > 0
        for load in found["loads"]:
            assert load["images"] % load["clients"] == 0
            assert 0 < load["p50"] <= load["p95"] <= load["p99"]
            assert f"{load['images_per_second']:.2f}" in printed


def test_mixed_requests_run_both_ways_in_each_round(setup, monkeypatch):
    monkeypatch.setattr(asks, "MIXED", 2)
    rounds = [value for name, value in subjects.mixed(setup) if name == "round"]
    assert len(rounds) == setup.rounds
    assert min(seconds for both in rounds for seconds in both) > 0


def test_without_time_nothing_is_started_and_the_goal_is_missed(capsys):
    assert bench.main(["--device", "cpu", "--seconds", "0"]) == 1
    printed = capsys.readouterr().out
    assert "engine: no time was left" in printed
    assert "MISSED" in printed


def test_a_subject_ends_when_the_time_is_up(setup, monkeypatch):
    monkeypatch.setattr(bench, "LEAST_SECONDS", 0)
    assert bench.Bench(setup, 0.5).measure("diffusers").problem == "the time was up"


def test_a_subject_that_breaks_says_so(setup, tmp_path):
    found = bench.Bench(setup, 100).measure("diffusers", tiny=tmp_path / "none")
    assert found.problem == "it failed with status 1"


@pytest.mark.parametrize(("theirs", "reached"), [(2.0, True), (1.99, False)])
def test_mixed_requests_have_to_take_half_the_time(setup, theirs, reached):
    # The median is of the rounds' ratios: one good round is not enough, one bad one does no harm.
    mixed = bench.Found("mixed requests", rounds=[(1.0, theirs), (1.0, 9.0), (1.0, 0.1)])
    [row] = bench.goals(setup, judged=False, mixed=mixed, found={})
    assert row.ratio == theirs
    assert row.reached is reached


@pytest.mark.parametrize(
    ("rate", "eager", "steps", "reached"),
    [
        (12.0, 3.0, 105.0, [True, True, True]),
        (11.9, 2.0, 105.0, [False, True, True]),
        (12.0, 3.1, 105.0, [True, False, True]),
        (12.0, 3.0, 104.9, [True, True, False]),
        (None, 3.0, None, [False, False, False]),
    ],
    ids=["reached", "slow", "less than four times diffusers", "slow alone", "not measured"],
)
def test_goals_of_the_gpu(setup, rate, eager, steps, reached):
    found = {
        "engine": bench.Found("engine", steps=steps, loads=[Load(16, 1.0, [1.0])] if rate else []),
        "diffusers": bench.Found("diffusers", loads=[Load(1, 10.0, [1.0] * int(10 * eager))]),
    }
    if rate:
        found["engine"].loads = [Load(16, 10.0, [1.0] * int(10 * rate))]
    rows = bench.goals(replace(setup, model="sd15"), judged=True, mixed=bench.Found("mixed requests"), found=found)
    assert [row.reached for row in rows] == reached


def test_clients_are_counted_in_whole_rounds_after_the_first(setup):
    numbers: list[int] = []

    def submit(asked):
        numbers.append(asked.seed)
        future: Future[Image.Image] = Future()
        future.set_result(asked.image)
        return future

    load = subjects._closed_loop(submit, setup, clients=3)
    assert len(load.latencies) == 3
    assert load.rate > 0
    assert numbers == list(range(len(numbers)))


def test_mixed_requests_differ_in_all_they_can():
    requests = asks.mixed(64)
    first, second = next(requests), next(requests)
    assert len(first) == 8
    for name in ("prompt", "scheduler", "strength", "guidance_scale", "seed"):
        assert len({getattr(asked, name) for asked in first}) == 8
    assert [asked.seed for asked in first] == [asked.seed for asked in next(asks.mixed(64))]
    assert [asked.seed for asked in first] != [asked.seed for asked in second]
