"""The sentences that keep the parts apart, checked on the source itself.

Only functions/ see `event` and `context`. Only settings.py reads the environment. Only bootstrap.py and admin/stack.py
make boto3 clients. Dependencies point one way. No file grows past what can be read in one go.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "layers/core/python/img2img"
# From the top down. A room, or a module that stands alone, may import from its own floor and from those below it.
FLOORS = [
    {"__main__"},
    {"flows", "admin"},
    {"documents"},
    {"bootstrap"},
    {"jobs", "teams"},
    {"backends", "money"},
    {"params", "values", "requests", "images", "fetch"},
    {"errors", "ids", "settings", "dynamo", "aws", "stored", "negotiation", "observe"},
]
CLIENT_MAKERS = {"bootstrap", "admin.stack"}
# Powertools' idempotency asks the context for the time that is left; the ways in pass it on.
TAKE_CONTEXT = {"flows.intake", "flows.submit", "flows.ingest", "flows.upload"}
LONGEST = 330
# A story each, told in one file: a pipeline's step, and what an emulated service or a template's reading comes to.
LONGER = {"endpoint/engine.py", "local/sagemaker.py", "local/template.py"}


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
            # None: what the package itself holds, its version.
            found |= {next((name for n in (2, 1) if (name := ".".join(parts[:n])) in MODULES), "")} - {""}
    return found


def floor_of(module: str) -> int:
    """Return the floor of a module, counted from the top."""
    floors = [number for number, rooms in enumerate(FLOORS) if module.split(".")[0] in rooms]
    assert len(floors) == 1, f"{module} stands on no floor, or on several"
    return floors[0]


def arguments(tree: ast.AST) -> set[str]:
    """Return the names of all arguments that functions take."""
    return {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


def attributes(tree: ast.AST) -> set[str]:
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_there_is_something_to_check():
    assert {"bootstrap", "settings", "flows.submit", "flows.ending", "backends.segmind"} <= set(MODULES)
    assert set(HANDLERS) == {"api", "segmind", "worker", "ingest", "collect", "sweep"}


def test_only_handlers_see_events():
    for module, tree in MODULES.items():
        assert not {"event", "record"} & arguments(tree), module
        assert "context" not in arguments(tree) or module in TAKE_CONTEXT, module
        parts = {"event_handler", "data_classes", "batch", "typing"}
        powertools = [full for full in imports(tree) if full.startswith("aws_lambda_powertools")]
        assert not [full for full in powertools if parts & set(full.split("."))], module


def test_only_settings_read_the_environment():
    for module, tree in [*MODULES.items(), *HANDLERS.items()]:
        reads = {name for name in attributes(tree) if name.startswith(("os.environ", "os.getenv"))}
        # bootstrap.py hands the environment to settings.py without looking into it.
        assert reads <= ({"os.environ"} if module == "bootstrap" else set()), module
        assert not {"os.environ", "os.getenv"} & set(imports(tree)), module


def test_clients_are_made_in_two_places():
    for module, tree in MODULES.items():
        if module not in CLIENT_MAKERS:
            assert not [full for full in imports(tree) if full.split(".")[0] == "boto3"], module
            assert not [full for full in imports(tree) if full.startswith("botocore.session")], module
    for handler, tree in HANDLERS.items():
        assert not [full for full in imports(tree) if full.split(".")[0] in ("boto3", "botocore")], handler


def test_dependencies_point_down_and_make_no_circle():
    graph = {name: own_imports(tree) - {name} for name, tree in MODULES.items() if name}
    upward = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if floor_of(other) < floor_of(module)
    ]
    assert not upward
    rooms: dict[str, set[str]] = {}
    for module, others in graph.items():
        room = module.split(".")[0]
        rooms.setdefault(room, set()).update({other.split(".")[0] for other in others} - {room})
    for arrows in (graph, rooms):
        left = dict(arrows)
        while left:
            free = {name for name, needs in left.items() if not needs & set(left)}
            assert free, f"these import each other: {sorted(left)}"
            left = {name: needs for name, needs in left.items() if name not in free}


def test_the_package_knows_nothing_of_what_uses_it():
    outer = {"functions", "local", "tests", "endpoint"}
    for module, tree in MODULES.items():
        assert not [full for full in imports(tree, at_run_time=False) if full.split(".")[0] in outer], module


def test_backends_and_money_know_no_job():
    for module, tree in MODULES.items():
        if module.split(".")[0] in ("backends", "money"):
            assert not {other.split(".")[0] for other in own_imports(tree)} & {"jobs", "teams", "flows"}, module


def test_flows_and_handlers_name_no_backend():
    for module, tree in MODULES.items():
        if module.split(".")[0] == "flows":
            assert not [other for other in own_imports(tree) if other.startswith("backends.")], module
            words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
            assert not words & {"segmind", "sagemaker", "auto"}, module
    for handler, tree in HANDLERS.items():
        assert not [other for other in own_imports(tree) if other.startswith("backends.")], handler


def test_jobs_end_in_one_place():
    """Of the use cases, only `ending` writes an end and says so."""
    for module, tree in MODULES.items():
        if module.startswith("flows.") and module != "flows.ending":
            assert not {name.rpartition(".")[2] for name in imports(tree)} & {"ended", "concluded", "publish"}, module
    ends = ("jobs.finish", "jobs.expire", "jobs.cancel", "observe.job_ended")
    for name, tree in [*MODULES.items(), *HANDLERS.items()]:
        if name.startswith("flows.") or name in HANDLERS:
            assert name == "flows.ending" or not [used for used in attributes(tree) if used.endswith(ends)], name


def test_handlers_import_no_sibling_no_local_tool_and_nothing_of_the_operators():
    for handler, tree in HANDLERS.items():
        assert not [name for name in own_imports(tree) if name.split(".")[0] == "admin"], handler
        outer = {"functions", "local", "tests", "app"}
        assert not [full for full in imports(tree) if full.split(".")[0] in outer], handler


def test_no_file_is_too_long():
    files = [path for folder in ("layers", "functions", "local", "endpoint") for path in (ROOT / folder).rglob("*.py")]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in files}
    assert {name for name, length in lengths.items() if length > LONGEST} == LONGER
    assert lengths["functions/api/app.py"] < 300
