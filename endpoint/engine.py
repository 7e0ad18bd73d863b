"""Image to image for many requests at once: they share every denoising step.

A UNet call does not care which scheduler, step count, strength or guidance its samples have, and what a scheduler makes
of the call is a weighted sum (plan.py). So one call and one sum serve every sample of one size. A new request joins at
the next step, a finished one leaves. What comes out equals what `StableDiffusionImg2ImgPipeline` makes for the same
seed, whatever else runs.

One thread owns the model. Two others prepare what needs no device, and one hands results out, so that a device that
works on its own (lane.py) has its next step before it is done with the last.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import numpy as np
import torch

from endpoint.contract import Busy, Observer, Request, Result, Size, Stopped, Unobserved, to_image
from endpoint.lane import lane_for
from endpoint.model import Model, bucket
from endpoint.samples import Pool, Sample, Texts, rehearse

__all__ = ["SIZES", "Busy", "Engine", "Observer", "Request", "Result", "Stopped", "to_image"]

logger = logging.getLogger(__name__)

# What a product of SD 1.5 is asked for.
SIZES: tuple[Size, ...] = ((512, 512), (512, 768), (768, 512), (768, 768))
# How many pictures are encoded or decoded between two steps: running requests wait for them.
CHUNK = 4
# What a caller is told to wait at most, in seconds.
LONGEST_RETRY = 60


@dataclass(eq=False)
class _Group:
    """The requests of one size, by what they wait for: their start, their next step, their picture."""

    waiting: deque[Sample] = field(default_factory=deque)
    starting: list[Sample] = field(default_factory=list)
    running: list[Sample] = field(default_factory=list)
    finished: list[Sample] = field(default_factory=list)
    pool: Pool | None = None

    @property
    def taken(self) -> int:
        return len(self.starting) + len(self.running) + len(self.finished)

    @property
    def all(self) -> list[Sample]:
        return [*self.waiting, *self.starting, *self.running, *self.finished]


class Engine:
    """Runs requests on one model.

    `max_batch` is how many requests of one size run, and share a UNet call; `max_running` how many run in all;
    `max_queue` how many may wait. A model that compiles does so for the sizes that are warmed up, or for all.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_batch: int = 16,
        max_running: int = 64,
        max_queue: int = 256,
        observer: Observer | None = None,
    ) -> None:
        self.model = model
        # A guided sample has two rows, and past the largest batch there is no compiled one.
        self._max_batch = min(max_batch, max(model.unet_rows) // 2) if model.unet_rows else max_batch
        self._max_running = max_running
        self._max_queue = max_queue
        self._observer: Observer = observer or Unobserved()
        self._lane = lane_for(model.device)
        self._texts = Texts(model, self._lane)
        self._groups: dict[Size, _Group] = {}  # the next one to have a turn comes first
        self._warm: set[Size] = set()
        self._limits: dict[Size, int] = {}  # how many share a call, where memory is too small for all
        self._errands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._giving_up = False
        self._pace = 0.0  # seconds for a call and pixel of one sample
        self._leaving: queue.SimpleQueue[tuple[list[Sample], Callable[[], np.ndarray]] | None] = queue.SimpleQueue()
        self._preparing = ThreadPoolExecutor(2, thread_name_prefix="engine-prepare")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._out = threading.Thread(target=self._hand_out, name="engine-out", daemon=True)
        self._thread.start()
        self._out.start()

    @property
    def waiting(self) -> int:
        """How many requests wait for their start."""
        with self._changed:
            return sum(len(group.waiting) for group in self._groups.values())

    @property
    def running(self) -> int:
        """How many requests run."""
        with self._changed:
            return sum(group.taken for group in self._groups.values())

    @property
    def alive(self) -> bool:
        """Whether it works: false when it stopped, and when a fault ended it."""
        return self._thread.is_alive() and self._out.is_alive()

    def submit(self, request: Request) -> Future[Result]:
        """Queue a request. Cancel its future, at any time before it is done, when nobody waits for it any more.

        The future raises `ValueError` for a scheduler, size or strength that can't be. Raises `Busy` and `Stopped`.
        """
        sample = Sample(request, Future(), time.monotonic())
        with self._changed:
            if self._stopping:
                raise Stopped("the engine takes no more requests")
            if self.waiting >= self._max_queue:
                raise Busy(self._retry_after())
            self._groups.setdefault(sample.size, _Group()).waiting.append(sample)
            self._preparing.submit(self._make_ready, sample)
        # Weak: else future and sample, with all that they hold, would keep each other until the garbage collector runs.
        sample.future.add_done_callback(partial(self._left, weakref.ref(sample)))
        return sample.future

    def warm_up(self, sizes: Sequence[Size] | None = None) -> None:
        """Load and compile all that requests will need, and return when that is done.

        Without sizes: all of `SIZES` where the model compiles, else one. From then on other sizes run uncompiled: a
        compiler would hold all requests up for minutes. Raises what goes wrong, and `Stopped`.
        """
        sizes = sizes or (SIZES if self.model.unet_rows else SIZES[:1])
        wanted: list[Future[None]] = []
        with self._changed:
            if self._stopping:
                raise Stopped("the engine takes no more requests")
            self._warm |= set(sizes)
            for size in sizes:
                wanted.append(Future())
                work = partial(rehearse, self.model, self._lane, self._texts, size, self._max_batch)
                self._errands.append((work, wanted[-1]))
            self._changed.notify()
        for future in wanted:
            future.result()

    def stop(self, *, now: bool = False) -> None:
        """Take no more requests, and return when those that were taken are done; `now`: when they have failed."""
        with self._changed:
            self._stopping = True
            self._giving_up |= now
            self._changed.notify()
        self.wait()
        self._preparing.shutdown(cancel_futures=True)

    def wait(self) -> None:
        """Return when it has ended: because it was stopped, or by a fault."""
        self._thread.join()
        self._out.join()

    # The engine's own thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._turn():
                    pass
        except BaseException as error:
            logger.error("the engine stopped by a fault: %s", type(error).__name__, exc_info=error)
        with self._changed:
            self._stopping = True
            left = [sample for group in self._groups.values() for sample in group.all]
            errands = list(self._errands)
            self._groups.clear()
            self._errands.clear()
        for sample in left:
            self._fail(sample, Stopped("the engine stopped"))
        for _, future in errands:
            future.set_exception(Stopped("the engine stopped"))
        self._leaving.put(None)

    def _turn(self) -> bool:
        """Let requests in, make one step of one size, let finished ones out. Return whether to go on."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            if self._giving_up or self._idle:
                return False
            errand = self._errands.popleft() if self._errands else None
            fresh = self._admit()
        if errand:
            self._run_errand(*errand)
        for group in fresh:
            self._start(group)
        with self._changed:
            turn = next(((size, group) for size, group in self._groups.items() if group.taken), None)
        if turn:
            size, group = turn
            self._step(size, group)
            self._finish(group)
            with self._changed:
                # No size waits for another to be done.
                self._groups[size] = self._groups.pop(size)
        with self._changed:
            self._groups = {size: group for size, group in self._groups.items() if group.all}
        return True

    @property
    def _idle(self) -> bool:
        return not self._errands and not any(group.all for group in self._groups.values())

    def _has_work(self) -> bool:
        if self._errands or self._giving_up or (self._stopping and self._idle):
            return True
        return any(group.taken or any(sample.ready for sample in group.waiting) for group in self._groups.values())

    def _admit(self) -> list[_Group]:
        """Choose who starts: one of each size after the other, few at once."""
        room = min(CHUNK, self._max_running - sum(group.taken for group in self._groups.values()))
        chosen = True
        while room > 0 and chosen:
            chosen = False
            for group in self._groups.values():
                sample = next((sample for sample in group.waiting if sample.ready), None)
                if room > 0 and sample and group.taken < self._max_batch:
                    group.waiting.remove(sample)
                    group.starting.append(sample)
                    room -= 1
                    chosen = True
        return [group for group in self._groups.values() if group.starting]

    def _start(self, group: _Group) -> None:
        self._together(partial(self._begin, group), group.starting)
        with self._changed:
            group.running += [sample for sample in group.starting if sample.row is not None]
            group.starting.clear()

    def _begin(self, group: _Group, samples: list[Sample]) -> None:
        now = time.monotonic()
        if group.pool is None:
            size = samples[0].size
            group.pool = Pool(self._model_for(size), self._lane, self._texts, size, self._max_batch)
        group.pool.start(samples)
        for sample in samples:
            del sample.pixels
            sample.started_at = now
            self._observer.started(now - sample.queued_at)

    def _step(self, size: Size, group: _Group) -> None:
        if group.pool is None:
            return
        began = time.monotonic()
        group.pool.leave([sample for sample in group.running if sample.ended])
        samples = [sample for sample in group.running if not sample.ended]
        batch = _batch(samples[: self._limits.get(size)], self._model_for(size).unet_rows)
        if batch:
            if self._together(group.pool.step, batch):
                self._limits[size] = len(batch) // 2
                logger.warning("memory is too small for %d requests in one call", len(batch))
            self._lane.pace()
            seconds = time.monotonic() - began
            share = seconds / len(batch) / math.prod(size)
            self._pace = 0.9 * self._pace + 0.1 * share if self._pace else share
            self._observer.stepped(len(batch), seconds)
        if done := [sample for sample in batch if sample.done]:
            self._together(group.pool.finish, done)
        with self._changed:
            # Who had no place in this batch is first in the next.
            stay = [sample for sample in [*samples[len(batch) :], *batch] if sample.row is not None]
            group.running, group.finished = stay, [*group.finished, *(sample for sample in done if sample.row is None)]

    def _finish(self, group: _Group) -> None:
        samples = [sample for sample in group.finished[:CHUNK] if not sample.ended]
        if samples:
            self._together(self._decode, samples)
        with self._changed:
            del group.finished[:CHUNK]

    def _decode(self, samples: list[Sample]) -> None:
        latents = torch.stack([sample.latents for sample in samples])
        with self._lane.aside(latents):
            pictures = self._lane.fetch(self._model_for(samples[0].size).decode(latents))
        self._leaving.put((samples, pictures))

    def _run_errand(self, errand: Callable[[], None], future: Future[None]) -> None:
        try:
            errand()
        except BaseException as error:
            logger.error("warming up failed: %s", type(error).__name__, exc_info=error)
            future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            future.set_result(None)

    def _model_for(self, size: Size) -> Model:
        return self.model if not self._warm or size in self._warm else self.model.uncompiled

    # The thread that hands out.

    def _hand_out(self) -> None:
        leaving = None
        try:
            with torch.inference_mode(), self._lane.apart():
                while leaving := self._leaving.get():
                    samples, pictures = leaving
                    for sample, pixels in zip(samples, pictures(), strict=True):
                        # Copies: each would keep all of them, and on a GPU pinned memory.
                        sample.picture = pixels.copy()
                    self._together(self._tell, samples)
        except BaseException as error:
            logger.error("the engine stopped by a fault: %s", type(error).__name__, exc_info=error)
            with self._changed:
                self._stopping = self._giving_up = True
                self._changed.notify()
            while leaving:
                for sample in leaving[0]:
                    self._fail(sample, Stopped("the engine stopped"))
                leaving = self._leaving.get()

    def _tell(self, samples: list[Sample]) -> None:
        flags = self.model.flagged([sample.picture for sample in samples])
        for sample, flagged in zip(samples, flags, strict=True):
            seconds = time.monotonic() - sample.started_at
            if self._claim(sample):
                pixels = None if flagged else sample.picture
                self._observer.ended("flagged" if flagged else "succeeded", seconds)
                sample.future.set_result(Result(pixels, flagged, sample.started_at - sample.queued_at, seconds))

    # Any thread.

    def _make_ready(self, sample: Sample) -> None:
        try:
            if not sample.ended:
                sample.make_ready(self.model)
        except Exception as error:  # noqa: BLE001 (whoever waits for the sample is told)
            self._withdraw(sample)
            self._fail(sample, error)
        with self._changed:
            sample.ready = not sample.ended
            self._changed.notify()

    def _left(self, reference: weakref.ref[Sample], future: Future[Result]) -> None:
        sample = reference()
        if sample and future.cancelled():
            self._withdraw(sample)
            self._claim(sample)

    def _withdraw(self, sample: Sample) -> None:
        with self._changed:
            group = self._groups.get(sample.size)
            if group and sample in group.waiting:
                group.waiting.remove(sample)
                self._changed.notify()

    def _together(self, work: Callable[[list[Sample]], None], samples: list[Sample]) -> bool:
        """Work on samples; if that fails, on each by itself, so that only what fails alone is lost.

        Return whether they were too many for the memory.
        """
        error = _failure(work, samples)
        if error is None:
            return False
        # What they hold would be in the way of the next try.
        _clear_frames(error)
        self._lane.check()
        if len(samples) == 1:
            self._fail(samples[0], error)
            return False
        for sample in samples:
            self._together(work, [sample])
        return isinstance(error, torch.OutOfMemoryError)

    def _fail(self, sample: Sample, error: Exception) -> None:
        if self._claim(sample):
            self._observer.ended("failed", sample.run_seconds)
            sample.future.set_exception(error)

    def _claim(self, sample: Sample) -> bool:
        """Return whether the caller may set the future: once, and only while it is not canceled."""
        with self._changed:
            if sample.ended:
                return False
            sample.ended = True
            claimed = sample.future.set_running_or_notify_cancel()
        if not claimed:
            self._observer.ended("canceled", sample.run_seconds)
        return claimed

    def _retry_after(self) -> int:
        """Estimate how long the queue will take."""
        waiting = [sample for group in self._groups.values() for sample in group.waiting if sample.ready]
        calls = sum(len(sample.plan.steps) * math.prod(sample.size) for sample in waiting)
        return min(max(math.ceil(calls * self._pace), 1), LONGEST_RETRY)


def _failure(work: Callable[[list[Sample]], None], samples: list[Sample]) -> Exception | None:
    try:
        work(samples)
    except Exception as error:  # noqa: BLE001 (whoever waits for the sample is told)
        return error
    return None


def _clear_frames(error: BaseException) -> None:
    """Let go of the variables that the tracebacks of an error and its causes keep; the places stay."""
    chain = [error]
    for one in chain:
        traceback.clear_frames(one.__traceback__)
        chain += [other for other in (one.__cause__, one.__context__) if other and other not in chain]


def _batch(samples: Sequence[Sample], sizes: Sequence[int]) -> list[Sample]:
    """Choose who takes the next step: all, or as many as fill a smaller batch, where more would be mostly filling."""
    rows = sum(sample.rows for sample in samples)
    full = bucket(rows, sizes)
    if sizes and rows < 0.75 * full:
        full = max(size for size in sizes if size < rows)
    sums = accumulate(sample.rows for sample in samples)
    return [sample for sample, total in zip(samples, sums, strict=True) if total <= full]
