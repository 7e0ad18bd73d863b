"""Whether the thinned fault walks see as many faults as the full ones: `make mutants`.

Mutants of the modules that money depends on, drawn with a fixed seed, meet the tests of these modules, then the thinned
walks, then what the full ones have beside them (see `tests/long.py`), until one of them fails. What only the full walks
kill is what thinning lost: the program exits with 1 if there is any. A mutant of a line that no walk runs is spared the
walks. Results are kept in a file, and another run goes on where one ended.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[2]
PACKAGE = Path("layers/core/python/img2img")
MUTATED = ("money/*.py", "jobs/store.py", "flows/run.py", "flows/ending.py")
# The quickest first.
OWN_TESTS = [
    *(f"tests/unit/test_{name}.py" for name in ("prices", "jobs", "credits", "usage", "generate", "store")),
    "tests/functions/test_ends.py",
    "tests/functions/test_jobs.py",
]
WALKS = ["tests/faults"]
STAGES = (("own tests", OWN_TESTS, {}), ("thinned walks", WALKS, {}), ("full walks", WALKS, {"LONG": "rest"}))
SURVIVED = "nothing"
# Many times what the slowest stage takes: a mutant that loops is killed.
PATIENCE = 1800


@dataclass(frozen=True)
class Mutant:
    """One change of one file: the place that an operator of Cosmic Ray finds as its `occurrence`th."""

    path: str
    operator: str
    occurrence: int

    @property
    def name(self) -> str:
        return f"{self.path} {self.operator} #{self.occurrence}"

    def of(self, source: str) -> str:
        """Return the source with the change."""
        changed = mutate_code(source, get_operator(self.operator)(), self.occurrence)
        assert changed is not None, self.name
        return str(changed)


def every_mutant(root: Path) -> Iterator[Mutant]:
    """Yield every mutant of the mutated files, in an order that is always the same."""
    for path in sorted(found for pattern in MUTATED for found in (root / PACKAGE).glob(pattern)):
        nodes = list(ast_nodes(get_ast(path.read_text())))
        for name in sorted(operator_names()):
            if "Variable" in name:  # they draw by themselves
                continue
            operator = get_operator(name)()
            places = sum(len(list(operator.mutation_positions(node))) for node in nodes)
            for occurrence in range(places):
                yield Mutant(str(path.relative_to(root)), name, occurrence)


class _Effective(ast.NodeTransformer):
    """Leaves of a module what has an effect when it runs: no annotations, docstrings or imports for types only."""

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        type_checking = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if type_checking else self.generic_visit(node)


def effect(source: str) -> str | None:
    """Return what a module comes to when it runs, None where it is no Python."""
    try:
        return ast.dump(_Effective().visit(ast.parse(source)))
    except SyntaxError:
        return None


def drawn(root: Path, count: int, seed: int) -> list[Mutant]:
    """Return so many mutants that change what is done."""
    pool = list(every_mutant(root))
    random.Random(seed).shuffle(pool)
    chosen: list[Mutant] = []
    for mutant in pool:
        source = (root / mutant.path).read_text()
        if effect(mutant.of(source)) not in (None, effect(source)):
            chosen.append(mutant)
        if len(chosen) == count:
            break
    return chosen


class Copy:
    """A copy of the tree, in which files may be changed."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        subprocess.run(["tar", "cf", str(folder) + ".tar", *names.split()], cwd=ROOT, check=True)
        folder.mkdir()
        subprocess.run(["tar", "xf", str(folder) + ".tar"], cwd=folder, check=True)
        for venv in (".venv", ".venv-sam"):
            (folder / venv).symlink_to(ROOT / venv)

    def passes(self, tests: list[str], environment: dict[str, str]) -> bool:
        """Whether tests pass, in time."""
        command = [".venv/bin/python", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        kept = {name: value for name, value in os.environ.items() if name != "LONG"}
        try:
            done = subprocess.run(
                command, cwd=self.root, env=kept | environment, capture_output=True, text=True, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            return False
        assert done.returncode in (0, 1, 2), done.stdout + done.stderr
        return done.returncode == 0

    def walked(self) -> dict[str, set[int]]:
        """Return the lines that the full walks run, by file."""
        more = ["--cov", "--cov-report=json:walked.json", "-n", str(os.cpu_count()), "--dist", "loadfile"]
        assert self.passes([*more, *WALKS], {"LONG": "1"}), "the walks fail as it is"
        files = json.loads((self.root / "walked.json").read_text())["files"]
        return {name: set(found["executed_lines"]) for name, found in files.items()}

    def killer(self, mutant: Mutant, walked: dict[str, set[int]]) -> str:
        """Return the first stage that a mutant does not survive."""
        path = self.root / mutant.path
        source = path.read_text()
        path.write_text(mutant.of(source))
        stages = STAGES if statement_of(source, mutant) in walked[mutant.path] else STAGES[:1]
        try:
            return next((name for name, tests, more in stages if not self.passes(tests, more)), SURVIVED)
        finally:
            path.write_text(source)


def statement_of(source: str, mutant: Mutant) -> int:
    """Return the line where the statement begins that a mutant changes."""
    pairs = zip(source.split("\n"), mutant.of(source).split("\n"), strict=False)
    changed = next(number for number, (was, now) in enumerate(pairs, 1) if was != now)
    around = (
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt) and node.lineno <= changed <= (node.end_lineno or 0)
    )
    return max(around, default=changed)


def diff(root: Path, mutant: Mutant) -> str:
    """Return what a mutant changes."""
    source = (root / mutant.path).read_text()
    lines = difflib.unified_diff(source.split("\n"), mutant.of(source).split("\n"), lineterm="", n=0)
    return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants ARGS=", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=120, help="how many mutants (%(default)s)")
    parser.add_argument("--seed", type=int, default=11, help="which ones (%(default)s)")
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), help="how many at the same time (%(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "out/mutants.json", help="(%(default)s)")
    arguments = parser.parse_args()
    arguments.results.parent.mkdir(exist_ok=True)
    known: dict[str, str] = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(arguments.at_once):
            copies.put(Copy(Path(folder) / str(number)))
        mutants = drawn(ROOT, arguments.count, arguments.seed)

        def meet(mutant: Mutant) -> None:
            if mutant.name in known:
                return
            copy = copies.get()
            try:
                known[mutant.name] = copy.killer(mutant, walked)
            finally:
                copies.put(copy)
            arguments.results.write_text(json.dumps(known, indent=1))
            print(f"{len(known)}/{len(mutants)} {mutant.name}: killed by {known[mutant.name]}", flush=True)

        first = copies.get()
        assert first.passes(OWN_TESTS, {}), "the tests fail as it is"
        walked = first.walked()
        copies.put(first)
        with ThreadPoolExecutor(arguments.at_once) as pool:
            list(pool.map(meet, mutants))
    for mutant in mutants:
        if known[mutant.name] in (SURVIVED, STAGES[-1][0]):
            print(f"\n{mutant.name}: killed by {known[mutant.name]}\n{diff(ROOT, mutant)}")
    count = Counter(known[mutant.name] for mutant in mutants)
    print("\n" + ", ".join(f"{count[name]} killed by {name}" for name in (*(stage[0] for stage in STAGES), SURVIVED)))
    return 1 if count[STAGES[-1][0]] else 0


if __name__ == "__main__":
    sys.exit(main())
