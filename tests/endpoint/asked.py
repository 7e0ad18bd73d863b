"""Requests, what the pipeline itself makes of them, and a UNet that is watched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import PNDMScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image

from endpoint.engine import Request
from endpoint.model import SCHEDULERS, Model

STRENGTHS = (0.1, 0.3, 0.75, 1)
STEPS = (20, 25, 100)


@cache
def picture(number: int, width: int = 64, height: int = 64) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def request(**values: object) -> Request:
    return Request(**{"image": picture(0), "prompt": "a castle on a hill", "seed": 7, **values})


class Reference:
    """`StableDiffusionImg2ImgPipeline` on its own copy of the model, one request after the other, each made once."""

    def __init__(self, folder: Path) -> None:
        self._pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(
            str(folder), safety_checker=None, requires_safety_checker=False
        )
        self._pipeline.set_progress_bar_config(disable=True)
        self._config = PNDMScheduler.from_pretrained(folder / "scheduler").config
        self._made: dict[tuple[object, ...], np.ndarray] = {}

    def __call__(self, asked: Request) -> np.ndarray:
        key = (asked.image.tobytes(), *(getattr(asked, field.name) for field in fields(asked) if field.name != "image"))
        if key not in self._made:
            kind, options = SCHEDULERS[asked.scheduler]
            self._pipeline.scheduler = kind.from_config(self._config, **options)
            self._made[key] = through(self._pipeline, asked, output_type="np")
        return self._made[key]


def through(pipeline: Any, asked: Request, **options: Any) -> Any:
    """Return what a pipeline, which has the scheduler already, makes of a request."""
    return pipeline(
        asked.prompt,
        image=asked.image,
        negative_prompt=asked.negative_prompt,
        strength=asked.strength,
        num_inference_steps=asked.num_inference_steps,
        guidance_scale=asked.guidance_scale,
        generator=torch.Generator().manual_seed(asked.seed),
        **options,
    ).images[0]


def assert_equal(pixels: np.ndarray | None, expected: np.ndarray) -> None:
    assert pixels is not None
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).max() <= 1e-4


def grid() -> list[Request]:
    """All schedulers, strengths and step counts of the promise; the rest differs from one to the next."""
    guidances = (0.5, 7.5, 1, 10.5)
    combinations = [(name, strength, steps) for name in SCHEDULERS for strength in STRENGTHS for steps in STEPS]
    return [
        request(
            image=picture(number % 5),
            prompt=f"castle number {number}",
            negative_prompt="fog" if number % 3 else "",
            scheduler=scheduler,
            strength=strength,
            num_inference_steps=steps,
            guidance_scale=guidances[number % 4],
            seed=1000 + number,
        )
        for number, (scheduler, strength, steps) in enumerate(combinations)
    ]


class Watched:
    """A model whose UNet calls are seen, and may be held or made to fail."""

    def __init__(self, model: Model, *, before: Callable[[torch.Tensor, torch.Tensor], None] | None = None) -> None:
        self.calls: list[tuple[int, ...]] = []  # the latents' shapes
        self.model = replace(model, unet=self)
        self._unet = model.unet
        self._before = before
        self._holding = False
        self._held = threading.Semaphore(0)
        self._steps = threading.Semaphore(0)

    def __call__(self, latents: torch.Tensor, steps: torch.Tensor, **options: object) -> object:
        self.calls.append(tuple(latents.shape))
        if self._holding:
            self._held.release()
            assert self._steps.acquire(timeout=60)
        if self._before:
            self._before(latents, options["encoder_hidden_states"])
        return self._unet(latents, steps, **options)

    def hold(self) -> None:
        """From now on a call waits until it is let go."""
        self._holding = True

    def wait_for_call(self) -> None:
        """Return when a call waits."""
        assert self._held.acquire(timeout=60)

    def let_go(self) -> None:
        """Let the call that waits go on."""
        self._steps.release()

    def go_on(self) -> None:
        """Hold no more calls."""
        self._holding = False
        self._steps.release()
