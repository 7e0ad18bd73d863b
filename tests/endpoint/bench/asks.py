"""What the bench asks for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from PIL import Image

from endpoint.engine import Request
from endpoint.plan import SCHEDULERS

PICTURES = 8
MIXED = 8


def alike(size: int, *, steps: int, strength: float) -> Iterator[Request]:
    """Yield requests of equal work without end, each with its own prompt and seed."""
    chance = np.random.default_rng(0)
    pictures = [_picture(chance, size) for _ in range(PICTURES)]
    for number in itertools.count():
        yield Request(
            image=pictures[number % PICTURES],
            prompt=f"a castle on a hill, number {number}",
            negative_prompt="fog",
            scheduler="DDIM",
            num_inference_steps=steps,
            guidance_scale=10.5,
            strength=strength,
            seed=number,
        )


def mixed(size: int) -> Iterator[list[Request]]:
    """Yield lists of requests that differ in all they can, over the whole of what clients may ask for."""
    chance = np.random.default_rng(0)
    while True:
        yield [
            Request(
                image=_picture(chance, size),
                prompt=f"castle number {number}",
                negative_prompt="fog" if number % 2 else "",
                scheduler=str(scheduler),
                num_inference_steps=int(chance.integers(20, 101)),
                guidance_scale=float(chance.uniform(0.1, 25)),
                strength=float(chance.uniform(0.1, 1)),
                seed=int(chance.integers(2**32)),
            )
            for number, scheduler in enumerate(chance.permutation(list(SCHEDULERS))[:MIXED])
        ]


def _picture(chance: np.random.Generator, size: int) -> Image.Image:
    return Image.fromarray(chance.integers(0, 256, (size, size, 3), dtype=np.uint8))
