"""What a scheduler does to a sample, worked out before the sample runs.

Every scheduler of Stable Diffusion 1.5 is linear: the next latents are a sum of earlier latents, model outputs and
noise, with weights that depend on the step alone. So diffusers' own scheduler runs once on unit vectors, one for each
of these, and what it returns are the weights. A plan holds them; it belongs to a scheduler and its steps, not to a
picture. All samples then take their steps in one operation, whatever their schedulers, and nothing waits for a device.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch.overrides import TorchFunctionMode

# Segmind's names (https://www.segmind.com/models/sd1.5-img2img) and the diffusers class behind each.
SCHEDULERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "DDIM": (DDIMScheduler, {}),
    "DPM Multi": (DPMSolverMultistepScheduler, {}),
    "DPM Single": (DPMSolverSinglestepScheduler, {}),
    "Euler a": (EulerAncestralDiscreteScheduler, {}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Heun": (HeunDiscreteScheduler, {}),
    "DPM2 a Karras": (KDPM2AncestralDiscreteScheduler, {"use_karras_sigmas": True}),
    "DPM2 Karras": (KDPM2DiscreteScheduler, {"use_karras_sigmas": True}),
    "LMS": (LMSDiscreteScheduler, {}),
    "PNDM": (PNDMScheduler, {}),
    "DDPM": (DDPMScheduler, {}),
    "UniPC": (UniPCMultistepScheduler, {}),
}

# How many tensors a sample keeps, and how many a step makes of them: the next latents, and UniPC's corrected ones.
SLOTS = 8
RESULTS = 2


@dataclass(frozen=True)
class Step:
    """One call of the model, and what becomes of its output. Slots are places of the sample's tensors."""

    timestep: float
    source: int  # where the latents are
    scale: float  # what the model sees of them
    draws: tuple[int, ...]  # where noise goes that is drawn now, also when its weight is 0: the generator moves on
    output: int  # where the model's output goes
    # Of all slots: first for the next latents, then for what the scheduler keeps.
    weights: tuple[tuple[float, ...], ...]
    targets: tuple[int, ...]  # where those go


@dataclass(frozen=True)
class Plan:
    """The way of a sample: its first latents, in slot 0, are `image_weight * image + noise_weight * noise`."""

    image_weight: float
    noise_weight: float
    steps: tuple[Step, ...]

    @property
    def result(self) -> int:
        """The slot of the finished latents."""
        return self.steps[-1].targets[0]


def checked(name: str) -> str:
    """Return the name of a scheduler. Raises `ValueError` where there is none of that name."""
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler: must be one of {', '.join(SCHEDULERS)}")
    return name


def scheduler_for(name: str, config: Mapping[str, Any]) -> Any:
    """Return a new scheduler of Segmind's name, as a model's own configuration has it. Raises `ValueError`."""
    kind, options = SCHEDULERS[checked(name)]
    return kind.from_config(config, **options)


def steps_taken(num_inference_steps: int, strength: float) -> int:
    """Return how many of the steps are done, as `StableDiffusionImg2ImgPipeline` counts them. Raises `ValueError`."""
    taken = min(int(num_inference_steps * strength), num_inference_steps)
    if taken < 1:
        raise ValueError("strength: leaves no step to do")
    return taken


class _ExactLMS(LMSDiscreteScheduler):
    """LMS without its numerical integration of polynomials, which takes most of the time of a plan."""

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        sigmas = [float(self.sigmas[t - k]) for k in range(order)]
        others = [sigma for k, sigma in enumerate(sigmas) if k != current_order]
        start, end = sigmas[0], float(self.sigmas[t + 1])
        middle, half = (start + end) / 2, (end - start) / 2

        def derivative(tau: float) -> float:
            return math.prod((tau - other) / (sigmas[current_order] - other) for other in others)

        # Two points of Gauss are exact up to the third degree, and the order is at most four.
        return half * sum(derivative(middle + side * half / math.sqrt(3)) for side in (-1, 1))


class Planner:
    """Plans for one model's configuration. Those made last are kept: few combinations are in use. For any thread."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        # To make a scheduler takes up to a quarter of a second, to copy it a millisecond.
        self._schedulers = {name: scheduler_for(name, config) for name in SCHEDULERS}
        self._schedulers["LMS"] = _ExactLMS.from_config(config)
        self._kept = lru_cache(maxsize=1024)(self._make)

    def plan(self, name: str, num_inference_steps: int, strength: float) -> Plan:
        """Return the steps of a sample. Raises `ValueError`."""
        return self._kept(checked(name), num_inference_steps, steps_taken(num_inference_steps, strength))

    def _make(self, name: str, num_inference_steps: int, taken: int) -> Plan:
        return make_plan(deepcopy(self._schedulers[name]), num_inference_steps, taken)


def make_plan(scheduler: Any, num_inference_steps: int, taken: int) -> Plan:
    """Plan the last steps, `taken` of all, with a new scheduler. Raises `ValueError`."""
    scheduler.set_timesteps(num_inference_steps, device="cpu")
    first = (num_inference_steps - taken) * scheduler.order
    timesteps = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    image_weight, noise_weight = _first_weights(scheduler, timesteps[:1])
    return Plan(image_weight, noise_weight, _with_slots(_trace(scheduler, timesteps)))


def _first_weights(scheduler: Any, timestep: torch.Tensor) -> tuple[float, float]:
    image, noise = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    image_weight, noise_weight = scheduler.add_noise(image, noise, timestep)[0].tolist()
    return image_weight, noise_weight


@dataclass(frozen=True)
class _Traced:
    """A step before it has slots: its tensors are numbered as they appear."""

    timestep: float
    source: int
    scale: float
    draws: tuple[int, ...]
    output: int
    sums: Sequence[tuple[int, Mapping[int, float]]]


class _Draws(TorchFunctionMode):
    """Noise as unit vectors."""

    def __init__(self, draw: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self._draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._draw() if func is torch.randn else func(*args, **(kwargs or {}))


def _trace(scheduler: Any, timesteps: torch.Tensor) -> list[_Traced]:
    # A step has an output, at most one draw of noise, and its results.
    width = 1 + (2 + RESULTS) * len(timesteps)
    numbers = iter(range(width))
    draws: list[int] = []

    def unit(number: int) -> torch.Tensor:
        vector = torch.zeros(1, 1, 1, width)
        vector[..., number] = 1
        return vector

    def draw() -> torch.Tensor:
        draws.append(next(numbers))
        return unit(draws[-1])

    def named(vector: torch.Tensor) -> tuple[int, Mapping[int, float]]:
        vector = vector.flatten()
        return next(numbers), {int(number): float(vector[number]) for number in vector.nonzero()}

    options = {"generator": torch.Generator()} if "generator" in inspect.signature(scheduler.step).parameters else {}
    traced = []
    source = next(numbers)
    for timestep in timesteps:
        draws.clear()
        output = next(numbers)
        latents = unit(source)
        scale = float(scheduler.scale_model_input(latents, timestep)[..., source])
        with _Draws(draw):
            sums = [named(scheduler.step(unit(output), timestep, latents, **options, return_dict=False)[0])]
        for name, kept in vars(scheduler).items():
            # Else UniPC's corrected latents, each made of the ones before, would keep all outputs alive.
            if isinstance(kept, torch.Tensor) and kept.shape == latents.shape and kept.count_nonzero() > 2:
                sums.append(named(kept))
                setattr(scheduler, name, unit(sums[-1][0]))
        traced.append(_Traced(float(timestep), source, scale, tuple(draws), output, sums))
        source = sums[0][0]
    return traced


def _with_slots(traced: Sequence[_Traced]) -> tuple[Step, ...]:
    """Give each tensor a slot for as long as a later step needs it."""
    last_use: dict[int, int] = {}
    for index, step in enumerate(traced):
        last_use |= dict.fromkeys((step.source, *(number for _, parts in step.sums for number in parts)), index)
    slots = {traced[0].source: 0}
    steps = []
    for index, step in enumerate(traced):
        for number in (*step.draws, step.output):
            slots[number] = _free(slots)
        source, output, draws = slots[step.source], slots[step.output], tuple(slots[number] for number in step.draws)
        weights = [_row({slots[number]: weight for number, weight in parts.items()}) for _, parts in step.sums]
        slots = {number: slot for number, slot in slots.items() if last_use.get(number, -1) > index}
        for result, _ in step.sums:
            slots[result] = _free(slots)
        targets = [slots[result] for result, _ in step.sums]
        # One operation takes the steps of all samples: each has as many results, the first one again if need be.
        again = RESULTS - len(targets)
        weights, targets = weights + weights[:1] * again, targets + targets[:1] * again
        steps.append(Step(step.timestep, source, step.scale, draws, output, tuple(weights), tuple(targets)))
    return tuple(steps)


def _row(weights: Mapping[int, float]) -> tuple[float, ...]:
    return tuple(weights.get(slot, 0.0) for slot in range(SLOTS))


def _free(slots: Mapping[int, int]) -> int:
    return next(slot for slot in range(SLOTS) if slot not in slots.values())
