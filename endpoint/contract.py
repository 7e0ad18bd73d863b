"""What the engine takes, gives and tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image

from endpoint.model import picture

Size = tuple[int, int]  # width, height


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sample to make. The image has the size of the result, a multiple of 8 in each direction."""

    image: Image.Image = field(repr=False)
    prompt: str = field(repr=False)
    negative_prompt: str = field(default="", repr=False)
    scheduler: str = "DDIM"
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    strength: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """A finished sample: pixels (height, width, 3) from 0 to 1, and how long it waited and ran, in seconds.

    A flagged one has no pixels.
    """

    pixels: np.ndarray | None = field(repr=False)
    flagged: bool
    queue_seconds: float
    run_seconds: float


class Busy(Exception):
    """The queue is full; `retry_after` is in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Stopped(Exception):
    """The engine takes no more requests, or gave this one up."""


def to_image(result: Result) -> Image.Image:
    """Return the picture as the pipeline's `output_type="pil"` has it. Raises `ValueError` for a flagged one."""
    if result.pixels is None:
        raise ValueError("a flagged result has no picture")
    return picture(result.pixels)


class Observer(Protocol):
    """Is told what happens, from the engine's threads: it must not wait for anything."""

    def stepped(self, samples: int, seconds: float) -> None:
        """Tell how many samples shared a step."""

    def started(self, queue_seconds: float) -> None:
        """Tell how long a request waited."""

    def ended(self, outcome: str, run_seconds: float) -> None:
        """Tell the outcome (succeeded, flagged, failed or canceled) and how long it ran, 0 if it never did."""


class Unobserved:
    """Nobody looks."""

    def stepped(self, samples: int, seconds: float) -> None: ...
    def started(self, queue_seconds: float) -> None: ...
    def ended(self, outcome: str, run_seconds: float) -> None: ...
