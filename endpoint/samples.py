"""What runs: requests, their tensors on the device, and the arithmetic of a step."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch

from endpoint.contract import Request, Result, Size
from endpoint.lane import Lane
from endpoint.model import Model, bucket
from endpoint.plan import RESULTS, SLOTS, Plan, Step

Tokens = tuple[int, ...]  # of one text


@dataclass(eq=False)
class Sample:
    """A request on its way."""

    request: Request
    future: Future[Result]
    queued_at: float
    started_at: float = 0.0
    ended: bool = False  # its future is set or canceled, or about to be
    ready: bool = False
    # Set when it is ready.
    plan: Plan = field(init=False)
    tokens: list[Tokens] = field(init=False, repr=False)
    pixels: torch.Tensor = field(init=False)
    # Set when it starts.
    generator: torch.Generator = field(init=False)
    embeds: torch.Tensor = field(init=False)
    row: int | None = None  # its place in the pool
    index: int = 0
    drawn: int = -1  # the step that `noise` is for
    noise: list[torch.Tensor] = field(init=False)
    # Set when it is done.
    latents: torch.Tensor = field(init=False)
    picture: np.ndarray = field(init=False)

    @property
    def rows(self) -> int:
        return 2 if self.guided else 1

    @property
    def run_seconds(self) -> float:
        return time.monotonic() - self.started_at if self.started_at else 0.0

    @property
    def base(self) -> int:
        """Where its slots begin."""
        if self.row is None:
            raise RuntimeError("the sample has no place")
        return self.row * SLOTS

    @property
    def size(self) -> Size:
        return self.request.image.size

    @property
    def guided(self) -> bool:
        return self.request.guidance_scale > 1

    @property
    def texts(self) -> list[str]:
        return [self.request.negative_prompt, self.request.prompt] if self.guided else [self.request.prompt]

    @property
    def step(self) -> Step:
        return self.plan.steps[self.index]

    @property
    def done(self) -> bool:
        return self.index == len(self.plan.steps)

    def make_ready(self, model: Model) -> None:
        """Do what needs no device and may take long. Raises `ValueError` and what a broken image raises."""
        request = self.request
        if any(side % model.pipeline.vae_scale_factor for side in self.size):
            raise ValueError(f"image: each side must be a multiple of {model.pipeline.vae_scale_factor}")
        self.plan = model.plan(request.scheduler, request.num_inference_steps, request.strength)
        self.tokens = tokens_of(model, self.texts)
        self.pixels = torch.from_numpy(np.array(request.image.convert("RGB")))


def tokens_of(model: Model, texts: Sequence[str]) -> list[Tokens]:
    """Cut texts into tokens, in any thread."""
    return [tuple(tokens) for tokens in model.tokens(texts).tolist()]


class Texts:
    """Encoded texts, by their tokens; those used last are kept on the device."""

    def __init__(self, model: Model, lane: Lane, *, kept: int = 256) -> None:
        self._model = model
        self._lane = lane
        self._limit = kept
        self._kept: OrderedDict[Tokens, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def encode(self, texts: Sequence[Tokens]) -> dict[Tokens, torch.Tensor]:
        """Return what the model sees of each text."""
        found = {tokens: self._kept[tokens] for tokens in texts if tokens in self._kept}
        if missing := sorted(set(texts) - set(found)):
            embeds = self._model.embeds(self._lane.send(torch.tensor(missing)))
            # Copies: a part would keep all of them in memory.
            found |= {tokens: embeds[index].clone() for index, tokens in enumerate(missing)}
        self._kept |= found
        for tokens in found:
            self._kept.move_to_end(tokens)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return found


class Pool:
    """The tensors of the running samples of one size: a row of slots for each."""

    def __init__(self, model: Model, lane: Lane, texts: Texts, size: Size, capacity: int) -> None:
        self._model = model
        self._lane = lane
        self._texts = texts
        width, height = size
        scale = model.pipeline.vae_scale_factor
        self.shape = (model.pipeline.vae.config.latent_channels, height // scale, width // scale)
        self._slots = torch.zeros(capacity * SLOTS, *self.shape, device=model.device)
        self._free = list(range(capacity))
        self._last: tuple[list[Sample], torch.Tensor] = ([], self._slots)

    def start(self, samples: Sequence[Sample]) -> None:
        """Give each sample a row and put its first latents there."""
        lane = self._lane
        embeds = self._texts.encode([tokens for sample in samples for tokens in sample.tokens])
        for sample in samples:
            sample.embeds = torch.stack([embeds[tokens] for tokens in sample.tokens])
            sample.generator = torch.Generator().manual_seed(sample.request.seed)
        mean, deviation = self._model.encode(lane.send(torch.stack([sample.pixels for sample in samples])))
        # In the pipeline's order: first what is drawn of the image, then what is laid over it.
        drawn = lane.send(torch.stack([self._draw(sample) for sample in samples for _ in range(2)])).float()
        image = mean + deviation * drawn[0::2]
        weights = [(sample.plan.image_weight, sample.plan.noise_weight) for sample in samples]
        image_weights, noise_weights = lane.send(torch.tensor(weights)).T.reshape(2, -1, 1, 1, 1)
        latents = image_weights * image + noise_weights * drawn[1::2]
        rows = self._free[: len(samples)]
        # All slots: what a former sample left may be no number, and 0 times that is none either.
        slots = latents.new_zeros(len(samples), SLOTS, *self.shape)
        slots[:, 0] = latents
        self._slots.unflatten(0, (-1, SLOTS)).index_copy_(0, lane.send(torch.tensor(rows)), slots)
        for sample, row in zip(samples, rows, strict=True):
            sample.row = row
        del self._free[: len(samples)]

    def step(self, samples: list[Sample]) -> None:
        """Take one step of each sample. If that raises, it may be repeated."""
        self._put_noise(samples)
        steps = [sample.step for sample in samples]
        bases = [sample.base for sample in samples]
        # Of the model's rows, one or two a sample.
        owners = [index for index, sample in enumerate(samples) for _ in sample.texts]
        last = [index for index, owner in enumerate(owners) if owners[index + 1 : index + 2] != [owner]]
        first = [index - sample.guided for index, sample in zip(last, samples, strict=True)]
        places = [
            [bases[owner] + steps[owner].source for owner in owners],
            first,
            last,
            [base + step.output for base, step in zip(bases, steps, strict=True)],
            [base // SLOTS for base in bases],
            [base + target for base, step in zip(bases, steps, strict=True) for target in step.targets],
        ]
        numbers = [
            [steps[owner].timestep for owner in owners],
            [steps[owner].scale for owner in owners],
            [sample.request.guidance_scale for sample in samples],
            [weight for step in steps for weights in step.weights for weight in weights],
        ]
        sources, first_rows, last_rows, outputs, rows, targets = self._send(places, torch.int64)
        timesteps, scales, guidance, weights = self._send(numbers, torch.float32)

        latents = self._slots.index_select(0, sources) * scales.reshape(-1, 1, 1, 1)
        noise = self._model.noise(latents, timesteps, self._embeds(samples))
        without, with_prompt = noise.index_select(0, first_rows), noise.index_select(0, last_rows)
        self._slots.index_copy_(0, outputs, without + guidance.reshape(-1, 1, 1, 1) * (with_prompt - without))
        slots = self._slots.unflatten(0, (-1, SLOTS)).index_select(0, rows)
        # Not a matrix product: where those may be rounded (TF32), these may not.
        results = (weights.reshape(-1, RESULTS, SLOTS, 1, 1, 1) * slots.unsqueeze(1)).sum(2)
        self._slots.index_copy_(0, targets, results.flatten(0, 1))
        for sample in samples:
            sample.index += 1

    def finish(self, samples: Sequence[Sample]) -> None:
        """Take the latents of finished samples out, and free their rows."""
        places = [sample.base + sample.plan.result for sample in samples]
        latents = self._slots.index_select(0, self._lane.send(torch.tensor(places)))
        for index, sample in enumerate(samples):
            sample.latents = latents[index]
        self.leave(samples)

    def leave(self, samples: Sequence[Sample]) -> None:
        """Free the rows of samples."""
        for sample in samples:
            if sample.row is not None:
                self._free.append(sample.row)
                sample.row = None

    def _draw(self, sample: Sample) -> torch.Tensor:
        # As the pipeline draws it: on the CPU, in the model's number format.
        return torch.randn(1, *self.shape, generator=sample.generator, dtype=self._model.dtype)[0]

    def _put_noise(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            # Not again where a step is repeated.
            if sample.drawn < sample.index:
                sample.noise = [self._draw(sample) for _ in sample.step.draws]
                sample.drawn = sample.index
        if noise := [noise for sample in samples for noise in sample.noise]:
            places = [sample.base + slot for sample in samples for slot in sample.step.draws]
            self._slots.index_copy_(
                0, self._lane.send(torch.tensor(places)), self._lane.send(torch.stack(noise)).float()
            )

    def _embeds(self, samples: list[Sample]) -> torch.Tensor:
        if self._last[0] != samples:
            self._last = (samples, torch.cat([sample.embeds for sample in samples]))
        return self._last[1]

    def _send(self, parts: Sequence[Sequence[float]], dtype: torch.dtype) -> Sequence[torch.Tensor]:
        """Send several lists at once."""
        together = self._lane.send(torch.tensor([number for part in parts for number in part], dtype=dtype))
        return together.split([len(part) for part in parts])


def rehearse(model: Model, lane: Lane, texts: Texts, size: Size, max_batch: int) -> None:
    """Make every call of the model that requests of a size can cause, with so many in a batch."""
    width, height = size
    shape = Pool(model, lane, texts, size, 1).shape
    model.encode(lane.send(torch.zeros(1, height, width, 3, dtype=torch.uint8)))
    [tokens] = tokens_of(model, [""])
    embeds = texts.encode([tokens])[tokens]
    # A CUDA graph is made at the second call and used from the third.
    for rows in _up_to(2 * max_batch, model.unet_rows) * 3 or (2,):
        steps = lane.send(torch.zeros(rows))
        model.noise(lane.send(torch.zeros(rows, *shape)), steps, embeds.expand(rows, -1, -1).contiguous())
    for rows in _up_to(max_batch, model.decode_rows) or (1,):
        latents = lane.send(torch.zeros(rows, *shape))
        with lane.aside(latents):
            lane.fetch(model.decode(latents))()


def _up_to(rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in sizes if size <= bucket(rows, sizes))
