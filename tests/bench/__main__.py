"""Measures the product, each figure against a floor taken in the same run.

    python -m tests.bench              prints a table; a missed goal is shown, not an error
    python -m tests.bench --strict     exits with 1 when a goal is missed

Processes share nothing but files: what one imports or keeps in memory weighs on no other's figure. So this one stays
small, above all: a child's peak memory includes what its parent held when it started it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.bench.setting import LARGE_FILES, ROOT, environment

CPU_GOAL, START_GOAL, FIT_GOAL = 1.3, 1.25, 1.5
START_ROUNDS = 9
COSTLY_IMPORTS = 12


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ours: str
    floor: str
    ratio: float | None
    goal: str
    reached: bool

    @classmethod
    def of(cls, what: str, ours: list[float], floor: list[float], goal: float) -> Row:
        """Compare figures that were taken by turns: what disturbs a round disturbs both, so its ratio holds."""
        ratio = statistics.median(mine / least for mine, least in zip(ours, floor, strict=True))
        return cls(
            what,
            f"{statistics.median(ours):.1f} ms",
            f"{statistics.median(floor):.1f} ms",
            ratio,
            f"<= {goal}",
            ratio <= goal,
        )


class Bench:
    """A folder of inputs, a stub, and what was measured so far."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.url = ""
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:5.1f} s] {text}", file=sys.stderr, flush=True)

    def start(self, module: str, *args: str, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"tests.bench.{module}", *args]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(self.url), stdout=subprocess.PIPE, text=True, **options
        )

    def measure(self, module: str, *args: str) -> Any:
        with self.start(module, *args) as child:
            output = child.communicate()[0]
        if child.returncode:
            raise SystemExit(f"bench: {module} {' '.join(args)} failed")
        return json.loads(output) if output else None

    @contextmanager
    def stub(self) -> Iterator[None]:
        with self.start("stub", str(self.folder), stdin=subprocess.PIPE) as child:
            assert child.stdout
            self.url = f"http://127.0.0.1:{child.stdout.readline().strip()}"
            try:
                yield
            finally:
                self.url = ""
                child.communicate()


def measure_handlers(bench: Bench) -> None:
    bench.say("CPU of a create and of a run, against handwritten handlers")
    found = bench.measure("handlers", str(bench.folder))
    bench.rows.append(Row.of("CPU, create request", *found["create"], CPU_GOAL))
    bench.rows.append(Row.of("CPU, run job", *found["run"], CPU_GOAL))
    create, image = ([statistics.median(figures) for figures in found[name]] for name in ("create", "image"))
    ours, floor = (whole - part for whole, part in zip(create, image, strict=True))
    bench.notes.append(f"a create without its image work: {ours:.1f} ms, floor {floor:.1f} ms, {ours / floor:.2f}")


def measure_start(bench: Bench) -> None:
    bench.say(f"import to first answer, {START_ROUNDS} times each")
    kinds = ("clients", "health", "handwritten-create", "create")
    figures: dict[tuple[str, str], list[float]] = {}
    for number in range(START_ROUNDS + 1):
        for kind in kinds if number % 2 else reversed(kinds):
            found = bench.measure("start", kind, str(bench.folder))
            if number:  # the first round may have compiled modules
                for clock, value in found.items():
                    figures.setdefault((kind, clock), []).append(value)
    for ours, floor, text in (
        ("health", "clients", "first answer, GET /health"),
        ("create", "handwritten-create", "first answer, create"),
    ):
        for clock in ("wall", "cpu"):
            row = Row.of(f"{text}, {clock}", figures[ours, clock], figures[floor, clock], START_GOAL)
            bench.rows.append(row)
    if any(not row.reached for row in bench.rows if row.what.startswith("first answer")):
        bench.notes.append(import_costs(bench, "health"))


def import_costs(bench: Bench, kind: str) -> str:
    """Return what the API function imports and the floor does not, the costliest first."""
    costs: list[dict[str, float]] = []
    for what in ("clients", kind):
        command = [sys.executable, "-X", "importtime", "-m", "tests.bench.start", what, str(bench.folder)]
        done = subprocess.run(command, cwd=ROOT, env=environment(bench.url), capture_output=True, text=True, check=True)
        lines = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", done.stderr)
        costs.append({name: int(own) / 1000 for own, name in lines})
    floor, ours = costs
    extra = {name: cost for name, cost in ours.items() if name not in floor}
    packages: dict[str, float] = {}
    for name, cost in extra.items():
        packages[_package(name)] = packages.get(_package(name), 0) + cost
    top = sorted(packages.items(), key=lambda item: -item[1])[:COSTLY_IMPORTS]
    lines = [f"  {cost:6.1f} ms  {name}" for name, cost in top]
    head = f"imports that the floor does not make: {sum(extra.values()):.1f} ms under -X importtime, by package"
    return "\n".join([head, *lines])


def _package(name: str) -> str:
    depth = {"aws_lambda_powertools": 3, "img2img": 2, "PIL": 2}.get(name.partition(".")[0], 1)
    return ".".join(name.split(".")[:depth])


def measure_calls(bench: Bench) -> None:
    bench.say("AWS calls of each flow")
    made = bench.measure("calls")
    for flow, (ours, allowed) in made.items():
        same = ours == allowed
        row = Row(f"AWS calls, {flow}", str(sum(ours.values())), str(sum(allowed.values())), None, "the same", same)
        bench.rows.append(row)
        if not same:
            bench.notes.append(f"{flow}: {_listed(ours)}; allowed are {_listed(allowed)}")


def _listed(calls: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(calls.items()))


def measure_fit(bench: Bench) -> None:
    bench.say("fitting 12 megapixels, against libvips")
    found = bench.measure("pictures", str(bench.folder), "fit")
    bench.rows.append(Row.of("CPU, 12-megapixel JPEG to 512 x 512", found["ours"], found["floor"], FIT_GOAL))
    ours, floor = (size / 1000 for size in found["bytes"])
    bench.notes.append(
        f"the fitted PNG has {ours:.0f} kB, libvips's {floor:.0f} kB; {found['apart']:.2f} levels of 255 apart"
    )


def measure_memory(bench: Bench) -> None:
    text = (ROOT / "template.yaml").read_text()
    size = re.search(r"^  ApiFunction:\n(?:    .*\n|\n)*?      MemorySize: (\d+)$", text, re.MULTILINE)
    if not size:
        raise SystemExit("bench: template.yaml has no MemorySize of ApiFunction")
    for kind in LARGE_FILES:
        bench.say(f"memory of a 48-megapixel {kind}")
        found = bench.measure("pictures", str(bench.folder), "memory", kind)
        before, peak, limit = found["before"], found["peak"], int(size[1])
        bench.rows.append(
            Row(
                f"peak memory, 48-megapixel {kind}",
                f"{peak:.0f} MiB",
                f"{before:.0f} MiB",
                None,
                f"< {limit} MiB",
                peak < limit,
            )
        )


def table(rows: list[Row]) -> str:
    """Return the rows under their heads, in columns."""
    heads = ("what", "ours", "floor", "ratio", "goal", "")
    cells = [heads] + [
        (
            row.what,
            row.ours,
            row.floor,
            "" if row.ratio is None else f"{row.ratio:.2f}",
            row.goal,
            "ok" if row.reached else "MISSED",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    aligned = ("<", ">", ">", ">", "<", "<")
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, aligned, widths, strict=True)).rstrip()
        for line in cells
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure against floors")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a goal is missed")
    strict = parser.parse_args().strict
    with tempfile.TemporaryDirectory(prefix="img2img-bench-") as name:
        bench = Bench(pathlib.Path(name))
        bench.say("making the photos")
        bench.measure("photos", name, "small")
        with bench.start("photos", name, "large") as photos:
            # Counts need no quiet machine.
            measure_calls(bench)
            if photos.wait():
                raise SystemExit("bench: the photos could not be made")
        with bench.stub():
            measure_handlers(bench)
            measure_start(bench)
        measure_fit(bench)
        measure_memory(bench)
        bench.say("done")
    print(table(bench.rows))
    for note in bench.notes:
        print(f"\n{note}")
    missed = [row.what for row in bench.rows if not row.reached]
    return 1 if strict and missed else 0


if __name__ == "__main__":
    sys.exit(main())
