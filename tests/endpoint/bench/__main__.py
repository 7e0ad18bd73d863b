"""Measures the engine against diffusers' own pipeline, in one run.

    python -m tests.endpoint.bench                       what there is: a GPU, else the processor
    python -m tests.endpoint.bench --seconds 540         ends in time; what was not reached is left out
    python -m tests.endpoint.bench --compile off         without the minutes that compiling takes

First eight requests that differ in all they can, with the tiny model on the processor. Then clients that each ask for
the next picture as they get one: on a GPU with Stable Diffusion 1.5's networks at random weights, else the tiny model.
Until it is ready is for the one size that is measured; the endpoint compiles four unless WARM_SIZES says else.
Exits with 1 when a goal is missed; the GPU's goals are an H100's, and judged on no smaller one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from endpoint.model import save_tiny
from tests.endpoint.bench.asks import MIXED
from tests.endpoint.bench.subjects import STEPS, STRENGTH, Load, Setup, run

MIXED_GOAL = 2.0
BUSY_CLIENTS, RATE_GOAL, EAGER_GOAL, STEPS_GOAL = 16, 12.0, 4.0, 105.0
# Of one picture of Stable Diffusion 1.5 at 512 x 512 with this many steps, and what an H100 does in float16.
TFLOP, PEAK_TFLOPS = 32.6, 990.0
HOPPER = (9, 0)
# Nothing useful can be measured in less.
LEAST_SECONDS = 5
CLIENTS = {"cpu": (1, 2, 4, 8, 16), "cuda": (1, 4, 16, 64)}


@dataclass
class Found:
    """What a subject's process sent, and how it ended: no `problem` when it sent all it had."""

    subject: str
    ready: float | None = None  # seconds from a loaded model to the first picture, or to the end of the warm-up
    steps: float | None = None  # a second, one request
    memory: int | None = None  # bytes, the most
    loads: list[Load] = field(default_factory=list)
    rounds: list[tuple[float, float]] = field(default_factory=list)
    problem: str = ""

    def take(self, name: str, value: Any) -> None:
        if name in ("load", "round"):
            getattr(self, f"{name}s").append(value)
        else:
            setattr(self, name, value)

    def rate(self, clients: int) -> float | None:
        return next((load.rate for load in self.loads if load.clients == clients), None)


@dataclass(frozen=True)
class Row:
    """A figure, what it is held against, and the goal; `reached` is None where the goal is another machine's."""

    what: str
    ours: str
    diffusers: str
    ratio: float | None
    goal: str
    reached: bool | None

    def cells(self) -> tuple[str, ...]:
        verdict = "" if self.reached is None else "ok" if self.reached else "MISSED"
        return (self.what, self.ours, self.diffusers, _number(self.ratio, 2), self.goal, verdict)


class Bench:
    """Runs subjects until the time is up."""

    def __init__(self, setup: Setup, seconds: float) -> None:
        self._setup = setup
        self._started = time.monotonic()
        self._deadline = self._started + seconds

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:5.1f} s] {text}", file=sys.stderr, flush=True)

    def measure(self, subject: str, **changes: Any) -> Found:
        """Run a subject in its own process, and end it when the time is up: it may be inside a compiler."""
        found = Found(subject)
        if self._left() < LEAST_SECONDS:
            found.problem = "no time was left"
            return found
        self.say(subject)
        context = multiprocessing.get_context("spawn")
        results, sender = context.Pipe(duplex=False)
        child = context.Process(target=run, args=(replace(self._setup, **changes), subject, sender))
        child.start()
        sender.close()
        try:
            while results.poll(self._left()):
                found.take(*results.recv())
            found.problem = "the time was up"
        except EOFError:
            child.join()
            found.problem = f"it failed with status {child.exitcode}" if child.exitcode else ""
        finally:
            child.kill()
            child.join()
        return found

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())


def goals(setup: Setup, judged: bool, mixed: Found, found: dict[str, Found]) -> list[Row]:
    """Return what the goals are about."""
    rows = [_mixed_row(setup.size if setup.model == "tiny" else 64, mixed)] if mixed.rounds or mixed.problem else []
    if setup.model == "tiny":
        return rows
    ours, eager = found["engine"], found["diffusers"]
    busy, alone = ours.rate(BUSY_CLIENTS), eager.rate(1)
    for what, mine, theirs, goal, reached in (
        (f"images/s, {BUSY_CLIENTS} clients", busy, alone, f">= {RATE_GOAL:g}", busy and busy >= RATE_GOAL),
        (
            "the same, by diffusers",
            busy,
            alone,
            f"ratio >= {EAGER_GOAL:g}",
            busy and alone and busy / alone >= EAGER_GOAL,
        ),
        (
            "steps/s, one request",
            ours.steps,
            eager.steps,
            f">= {STEPS_GOAL:g}",
            ours.steps and ours.steps >= STEPS_GOAL,
        ),
    ):
        ratio = mine / theirs if mine and theirs else None
        rows.append(Row(what, _number(mine, 1), _number(theirs, 1), ratio, goal, bool(reached) if judged else None))
    return rows


def _mixed_row(size: int, mixed: Found) -> Row:
    what, goal = f"{MIXED} mixed requests, {size} x {size}, tiny model, CPU", f"ratio >= {MIXED_GOAL:g}"
    if not mixed.rounds:
        return Row(what, "-", "-", None, goal, reached=False)
    ours, theirs = (statistics.median(figures) for figures in zip(*mixed.rounds, strict=True))
    # Figures taken by turns: what disturbs a round disturbs both, so its ratio holds.
    ratio = statistics.median(theirs / ours for ours, theirs in mixed.rounds)
    return Row(what, f"{ours:.2f} s", f"{theirs:.2f} s", ratio, goal, ratio >= MIXED_GOAL)


def load_lines(setup: Setup, found: dict[str, Found]) -> list[tuple[str, ...]]:
    """Return the table of clients."""
    heads = ("", "clients", "images/s", "p50 s", "p95 s", "p99 s")
    share = setup.model == "sd15" and setup.size == 512
    lines = [(*heads, f"of {PEAK_TFLOPS:g} TFLOP/s") if share else heads]
    for one in found.values():
        for load in one.loads:
            line = (
                one.subject,
                str(load.clients),
                _number(load.rate, 2),
                *(_number(load.percentile(percent), 2) for percent in (50, 95, 99)),
            )
            lines.append((*line, f"{load.rate * TFLOP / PEAK_TFLOPS:.1%}") if share else line)
    return lines


def subject_lines(found: dict[str, Found]) -> list[tuple[str, ...]]:
    """Return the table of what does not depend on the clients."""
    lines = [("", "ready for one size after s", "steps/s", "peak memory GiB")]
    for one in found.values():
        memory = None if one.memory is None else one.memory / 2**30
        lines.append((one.subject, _number(one.ready, 1), _number(one.steps, 1), _number(memory, 2)))
    return lines


def columns(lines: list[tuple[str, ...]]) -> str:
    """Align lines under the first one."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = "<" + ">" * (len(widths) - 1)
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in lines
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _device_name(device: str) -> str:
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{os.cpu_count()} CPUs, {platform.machine()}"


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="img2img-bench-") as name:
        save_tiny(Path(name))
        setup = Setup(
            tiny=Path(name),
            model=options.model,
            device=options.device,
            dtype=getattr(torch, options.dtype),
            compile=options.compile,
            size=options.size,
            clients=tuple(options.clients),
            window=options.window,
            rounds=options.rounds,
            threads=options.threads,
        )
        bench = Bench(setup, options.seconds - (time.monotonic() - started))
        mixed = Found("mixed requests")
        if options.rounds:
            tiny = {"model": "tiny", "device": "cpu", "dtype": torch.float32, "compile": "off"}
            mixed = bench.measure("mixed", **tiny, size=options.size if options.model == "tiny" else 64)
        # What takes longest and is held against least comes last.
        subjects = ["diffusers", "engine", *(["diffusers compiled"] if options.compile != "off" else [])]
        found = {subject: bench.measure(subject) for subject in subjects}
        bench.say("done")
    name = _device_name(options.device)
    judged = options.device == "cuda" and options.size == 512 and torch.cuda.get_device_capability() >= HOPPER
    rows = goals(setup, judged, mixed, found)
    print(
        f"{name}; torch {torch.__version__}, diffusers {diffusers.__version__}; {options.model}, {options.dtype}, "
        f"{options.size} x {options.size}, {STEPS} steps, strength {STRENGTH:g}, compile {options.compile}\n"
    )
    heads = ("", "engine", "diffusers", "ratio", "goal", "")
    for lines in (load_lines(setup, found), subject_lines(found), [heads, *(row.cells() for row in rows)]):
        print(columns(lines) + "\n")
    problems = {one.subject: one.problem for one in (mixed, *found.values()) if one.problem}
    for subject, problem in problems.items():
        print(f"{subject}: {problem}")
    if options.json:
        figures = {
            "device": name,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            **{key: getattr(options, key) for key in ("model", "dtype", "size", "compile", "seconds", "threads")},
            "mixed": mixed.rounds,
            "subjects": [_figures(one) for one in found.values()],
            "goals": [asdict(row) for row in rows],
            "problems": problems,
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    failed = any("failed" in problem for problem in problems.values())
    return 1 if failed or any(row.reached is False for row in rows) else 0


def _figures(found: Found) -> dict[str, Any]:
    loads = [
        {
            "clients": load.clients,
            "images": len(load.latencies),
            "images_per_second": load.rate,
            **{f"p{percent}": load.percentile(percent) for percent in (50, 95, 99)},
        }
        for load in found.loads
    ]
    return {
        "subject": found.subject,
        "ready_seconds": found.ready,
        "steps_per_second": found.steps,
        "peak_memory_bytes": found.memory,
        "loads": loads,
    }


def _options(arguments: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m tests.endpoint.bench", description="Measure against diffusers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--model", choices=("tiny", "sd15"), help="sd15 has random weights (default: tiny on a CPU)")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="default: float32 on a CPU, else float16"
    )
    parser.add_argument(
        "--compile", choices=("off", "default", "max-autotune"), help="default: off on a CPU, else the last"
    )
    parser.add_argument("--size", type=int, help="width and height (default: 64 for tiny, 512 for sd15)")
    parser.add_argument("--clients", type=int, nargs="+", help="default: 1 2 4 8 16 on a CPU, else 1 4 16 64")
    parser.add_argument(
        "--window", type=float, default=10, help="seconds to measure each number of clients (default: 10)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="of mixed requests, 0 for none (default: 9)")
    parser.add_argument("--threads", type=int, help="of torch, for everything (default: torch's own choice)")
    parser.add_argument(
        "--seconds", type=float, default=1800, help="to end within, once all is imported (default: 1800)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    options.model = options.model or ("sd15" if gpu else "tiny")
    options.dtype = options.dtype or ("float16" if gpu else "float32")
    options.compile = options.compile or ("max-autotune" if gpu else "off")
    options.size = options.size or (512 if options.model == "sd15" else 64)
    options.clients = options.clients or CLIENTS[options.device]
    return options


if __name__ == "__main__":
    sys.exit(main())
