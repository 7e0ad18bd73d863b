"""The four sentences that keep the parts apart, checked on the source itself.

Only functions/ see `event` and `context`. Only settings.py reads the environment. Only bootstrap.py and admin/stack.py
make boto3 clients. Dependencies point one way.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "layers/core/python/img2img"
# From the outside in; a module may import its own row (below, in one direction only) and those after it.
ROWS = [
    {"__main__", "cli", "admin"},
    {"bootstrap"},
    {"create", "submit", "ingest", "run", "samples", "uploads", "sweep", "outbox", "present", "audit"},
    {
        "store",
        "presets",
        "published",
        "inbox",
        "credits",
        "teams",
        "usage",
        "dynamo",
        "listing",
        "storage",
        "queues",
        "gateway_keys",
    }
    | {"fetch", "backends", "images", "jobs"},
    {"params", "prices", "errors", "ids", "settings", "observe"},
]


def name_of(path: Path) -> str:
    """Return the dotted name of a module inside the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
HANDLERS = {path.parent.name: ast.parse(path.read_text()) for path in sorted(ROOT.glob("functions/*/app.py"))}


def imports(tree: ast.AST, *, at_run_time: bool = True) -> Iterator[str]:
    """Yield the full names that a module imports, also inside functions; those for the type checker only if asked."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if at_run_time and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            skipped |= {id(child) for statement in node.body for child in ast.walk(statement)}
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.AST) -> set[str]:
    """Return the modules of the package that are imported."""
    found = set()
    for full in imports(tree):
        if full.startswith("img2img."):
            parts = full.split(".")[1:]
            found.add(next(name for n in (2, 1) if (name := ".".join(parts[:n])) in MODULES))
    return found


def row_of(module: str) -> int:
    (row,) = [number for number, names in enumerate(ROWS) if module.split(".")[0] in names]
    return row


def arguments(tree: ast.AST) -> set[str]:
    """Return the names of all arguments that functions take."""
    return {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


def attributes(tree: ast.AST) -> set[str]:
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.fixture(params=[name for name in MODULES if name])
def module(request):
    return request.param


def test_there_is_something_to_check():
    assert {"bootstrap", "settings", "submit", "run", "backends.segmind"} <= set(MODULES)
    assert set(HANDLERS) == {"api", "worker", "ingest", "collect", "sweep"}


def test_only_handlers_see_events(module):
    taken = arguments(MODULES[module])
    assert not {"event", "record"} & taken
    # Powertools' idempotency asks the context for the time that is left; the ways in pass it on.
    assert "context" not in taken or module in ("create", "submit", "ingest", "uploads")
    parts = {"event_handler", "data_classes", "batch", "typing"}
    powertools = [full for full in imports(MODULES[module]) if full.startswith("aws_lambda_powertools")]
    assert not [full for full in powertools if parts & set(full.split("."))]


def test_only_settings_read_the_environment(module):
    # bootstrap.py hands the environment to settings.py without looking into it.
    tree = MODULES[module]
    reads = {name for name in attributes(tree) if name.startswith(("os.environ", "os.getenv"))}
    assert reads <= ({"os.environ"} if module == "bootstrap" else set())
    assert not {"os.environ", "os.getenv"} & set(imports(tree))


@pytest.mark.parametrize("handler", sorted(HANDLERS))
def test_handlers_read_no_environment(handler):
    assert not [name for name in attributes(HANDLERS[handler]) if name.startswith(("os.environ", "os.getenv"))]
    assert not {"os.environ", "os.getenv"} & set(imports(HANDLERS[handler]))


def test_only_bootstrap_and_the_operators_stack_make_clients(module):
    if module not in ("bootstrap", "admin.stack"):
        assert not [full for full in imports(MODULES[module]) if full.split(".")[0] == "boto3"]
        assert not [full for full in imports(MODULES[module]) if full.startswith("botocore.session")]


@pytest.mark.parametrize("handler", sorted(HANDLERS))
def test_handlers_make_no_clients(handler):
    assert not [full for full in imports(HANDLERS[handler]) if full.split(".")[0] in ("boto3", "botocore")]


def test_every_module_has_its_row(module):
    assert row_of(module) >= 0


def test_dependencies_point_inwards(module):
    outward = {other for other in own_imports(MODULES[module]) if row_of(other) < row_of(module)}
    assert not outward


def test_dependencies_make_no_circle():
    graph = {name: own_imports(tree) - {name} for name, tree in MODULES.items() if name}
    while graph:
        free = {name for name, needs in graph.items() if not needs & set(graph)}
        assert free, f"these import each other: {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in free}


def test_the_package_knows_nothing_of_what_uses_it(module):
    outer = {"functions", "local", "tests", "endpoint"}
    assert not [full for full in imports(MODULES[module], at_run_time=False) if full.split(".")[0] in outer]


def test_backends_know_no_job():
    for name, tree in MODULES.items():
        if name.split(".")[0] == "backends":
            known = {other.split(".")[0] for other in own_imports(tree)}
            assert known <= {"backends", "errors", "params", "images"}, name


@pytest.mark.parametrize("handler", sorted(HANDLERS))
def test_handlers_leave_the_operators_part_alone(handler):
    assert not {name for name in own_imports(HANDLERS[handler]) if name.split(".")[0] in ("admin", "cli")}


@pytest.mark.parametrize("handler", sorted(HANDLERS))
def test_handlers_import_no_sibling_and_no_local_tool(handler):
    assert not [
        full for full in imports(HANDLERS[handler]) if full.split(".")[0] in ("functions", "local", "tests", "app")
    ]
