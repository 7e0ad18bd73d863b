"""Each subject runs in a process of its own and sends its figures as it finds them.

So none weighs on another's memory, and one that takes too long to compile can be ended with what it has found.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import transformers
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.utils import logging as diffusers_log
from PIL import Image

from endpoint.engine import Engine, Request, to_image
from endpoint.model import Compile, Model
from endpoint.plan import scheduler_for
from tests.endpoint.asked import through
from tests.endpoint.bench import asks, sd15

STEPS, STRENGTH = 25, 0.75
FEW_STEPS, MANY_STEPS = 20, 100
STEP_ROUNDS = 3

Figures = Iterator[tuple[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured, and how: `window` is in seconds for each number of clients, `threads` are torch's."""

    tiny: Path
    model: str
    device: str
    dtype: torch.dtype
    compile: Compile
    size: int
    clients: tuple[int, ...]
    window: float
    rounds: int
    threads: int | None

    def pipeline(self) -> Any:
        """Return a pipeline that nothing else has touched."""
        if self.model == "sd15":
            made = sd15.pipeline(self.tiny, self.device, self.dtype)
        else:
            made = StableDiffusionImg2ImgPipeline.from_pretrained(
                str(self.tiny), dtype=self.dtype, safety_checker=None, requires_safety_checker=False
            ).to(self.device)
        made.set_progress_bar_config(disable=True)
        if self.device == "cuda":
            # Weights are made in float32: that is no part of what running them takes.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return made


@dataclass(frozen=True)
class Load:
    """Pictures that so many clients got, each asking for the next as it got one, and how long each took."""

    clients: int
    seconds: float
    latencies: list[float]

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, percent: int) -> float:
        """Return the latency, in seconds, that this part of the requests kept to."""
        if len(self.latencies) == 1:
            return self.latencies[0]
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[percent - 1]


def run(setup: Setup, subject: str, connection: Connection) -> None:
    """Measure a subject; this is what its process runs."""
    for log in (diffusers_log, transformers.utils.logging):
        log.disable_progress_bar()
        log.set_verbosity_error()
    if setup.threads:
        torch.set_num_threads(setup.threads)
    with connection:
        for figure in SUBJECTS[subject](setup):
            connection.send(figure)


def diffusers(setup: Setup) -> Figures:
    """Measure the pipeline as its documentation has it."""
    yield from _one_by_one(setup, setup.pipeline())


def diffusers_compiled(setup: Setup) -> Figures:
    """Measure the pipeline as diffusers' page on speed has it."""
    from torch._inductor import config

    config.conv_1x1_as_mm = True
    config.coordinate_descent_tuning = True
    config.epilogue_fusion = False
    config.coordinate_descent_check_all_directions = True
    pipeline = setup.pipeline()
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.channels_last)
    options = {"mode": setup.compile, "fullgraph": True, "dynamic": False}
    pipeline.unet = torch.compile(pipeline.unet, **options)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, **options)
    yield from _one_by_one(setup, pipeline)


def engine(setup: Setup) -> Figures:
    """Measure the engine, warmed up for this size alone; the endpoint is for several before `/ping` says 200."""
    model = Model.of(setup.pipeline(), device=setup.device, compile=setup.compile)
    started = time.perf_counter()
    made = Engine(model)
    made.warm_up([(setup.size, setup.size)])
    yield "ready", time.perf_counter() - started
    yield "steps", _steps_per_second(made.submit, setup.size)
    for clients in setup.clients:
        yield "load", _closed_loop(made.submit, setup, clients)
    yield "memory", _peak_memory(setup.device)
    made.stop()


def mixed(setup: Setup) -> Figures:
    """Run different requests at once through the engine, and one after another through the pipeline."""
    pipeline = Diffusers(setup.pipeline())
    made = Engine(Model.of(setup.pipeline()))
    made.warm_up([(setup.size, setup.size)])
    for number, asked in zip(range(setup.rounds + 1), asks.mixed(setup.size), strict=False):
        spent: dict[str, float] = {}
        for kind in ("engine", "diffusers") if number % 2 else ("diffusers", "engine"):
            started = time.perf_counter()
            if kind == "engine":
                for future in [made.submit(one) for one in asked]:
                    to_image(future.result())
            else:
                for one in asked:
                    pipeline(one)
            spent[kind] = time.perf_counter() - started
        if number:  # the first round has what comes only once
            yield "round", (spent["engine"], spent["diffusers"])
    made.stop()


SUBJECTS: dict[str, Callable[[Setup], Figures]] = {
    "mixed": mixed,
    "diffusers": diffusers,
    "diffusers compiled": diffusers_compiled,
    "engine": engine,
}


class Diffusers:
    """`StableDiffusionImg2ImgPipeline`, with a new scheduler for each request as its documentation asks."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._config = pipeline.scheduler.config

    def __call__(self, asked: Request) -> Image.Image:
        """Make the picture."""
        self._pipeline.scheduler = scheduler_for(asked.scheduler, self._config)
        return through(self._pipeline, asked)


def _one_by_one(setup: Setup, pipeline: Any) -> Figures:
    run_one = Diffusers(pipeline)

    def submit(asked: Request) -> Future[Image.Image]:
        future: Future[Image.Image] = Future()
        future.set_result(run_one(asked))
        return future

    started = time.perf_counter()
    submit(next(asks.alike(setup.size, steps=STEPS, strength=STRENGTH)))
    yield "ready", time.perf_counter() - started
    yield "steps", _steps_per_second(submit, setup.size)
    yield "load", _closed_loop(submit, setup, clients=1)
    yield "memory", _peak_memory(setup.device)


def _steps_per_second(submit: Callable[[Request], Future[Any]], size: int) -> float:
    """Time long requests against short ones: what both do once, such as the VAE's work, is no step's."""
    rates = []
    for _ in range(STEP_ROUNDS):
        spent = []
        for steps in (FEW_STEPS, MANY_STEPS):
            asked = next(asks.alike(size, steps=steps, strength=1))
            started = time.perf_counter()
            submit(asked).result()
            spent.append(time.perf_counter() - started)
        rates.append((MANY_STEPS - FEW_STEPS) / (spent[1] - spent[0]))
    return statistics.median(rates)


def _closed_loop(submit: Callable[[Request], Future[Any]], setup: Setup, clients: int) -> Load:
    """Keep so many requests on their way. Whole rounds are counted, after the first: pictures come in bursts."""
    asked = asks.alike(setup.size, steps=STEPS, strength=STRENGTH)
    arrived: SimpleQueue[tuple[float, Future[Any]]] = SimpleQueue()
    underway: set[Future[Any]] = set()

    def send() -> None:
        sent = time.perf_counter()
        future = submit(next(asked))
        underway.add(future)
        future.add_done_callback(lambda done: arrived.put((sent, done)))

    for _ in range(clients):
        send()
    counted_from = now = 0.0
    latencies: list[float] = []
    number = 0
    while number <= clients or number % clients or now - counted_from < setup.window:
        sent, future = arrived.get()
        underway.remove(future)
        result = future.result()
        if not isinstance(result, Image.Image):
            to_image(result)
        now = time.perf_counter()
        number += 1
        if number > clients:
            latencies.append(now - sent)
        else:
            counted_from = now
        send()
    for future in underway:
        future.cancel()
    return Load(clients, now - counted_from, latencies)


def _peak_memory(device: str) -> int:
    """Return the most bytes held so far: on a GPU what torch took of its memory, else what the process took."""
    if device == "cuda":
        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
