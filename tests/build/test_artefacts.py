"""What `sam build` made: complete, for the right machine, and nothing of the machine that built it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BUILD = ROOT / ".aws-sam/build"
FUNCTIONS = (
    "ApiFunction",
    "WorkerFunction",
    "CollectFunction",
    "IngestFunction",
    "SweepFunction",
    "CompatibleFunction",
)
LAYERS = ("CoreLayer", "DependenciesLayer")
SIZE_LIMIT = 100_000_000
DEPENDENCIES = BUILD / "DependenciesLayer/python"
NOTICE_HEADING = "The layer `dependencies`"
AARCH64 = 183

# What Lambda's Python comes with.
RUNTIME_PACKAGES = ("boto3", "botocore", "s3transfer", "dateutil", "six", "jmespath", "urllib3", "snapshot_restore_py")

IMPORT_ALL = """
import json, pkgutil, sys
sys.path[:0] = sys.argv[1:]
import app, img2img
assert callable(app.handler)
for module in pkgutil.walk_packages(img2img.__path__, "img2img."):
    __import__(module.name)
print(json.dumps([m.__file__ for m in sys.modules.values() if getattr(m, "__file__", None)]))
"""

READ_PHOTOS = """
import pathlib, sys
sys.path[:0] = sys.argv[2:]
from img2img import images
for name in ("phone.heic", "photo.avif"):
    data = pathlib.Path(sys.argv[1], name).read_bytes()
    info = images.inspect(data, max_pixels=10**6)
    assert images.prepare(data, width=64, height=64, fit="cover", max_pixels=10**6)
    print(info.content_type, info.width, info.height)
"""


def files(folder):
    """Return the files in a folder that holds some."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert found, folder
    return found


@pytest.fixture(scope="session", autouse=True)
def _built():
    assert BUILD.is_dir(), "run `make build`"


@pytest.fixture(scope="session")
def runtime(tmp_path_factory):
    """The packages of the Lambda runtime, and no others of this environment."""
    folder = tmp_path_factory.mktemp("runtime")
    for name in RUNTIME_PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec, name
        assert spec.origin, name
        found = Path(spec.origin)
        found = found.parent if found.name == "__init__.py" else found
        (folder / found.name).symlink_to(found)
    return folder


@pytest.fixture(scope="session")
def host_dependencies(tmp_path_factory):
    """The dependencies layer, made by the same Makefile for this interpreter."""
    folder = tmp_path_factory.mktemp("dependencies")
    subprocess.run(
        [
            "make",
            "build-DependenciesLayer",
            f"ARTIFACTS_DIR={folder}",
            f"PYTHON={sys.executable}",
            f"PYTHON_VERSION={sys.version_info.major}.{sys.version_info.minor}",
            "PLATFORMS=",
        ],
        cwd=ROOT / "layers/dependencies",
        check=True,
        timeout=150,  # less than what ends the tests, see pyproject.toml
    )
    return folder / "python"


def isolated(program, *arguments):
    """Run a program without site-packages, and with no setting in the environment: nothing is read at import."""
    return subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-W", "error", "-c", program, *map(str, arguments)],
        env={name: value for name, value in os.environ.items() if name in ("LD_LIBRARY_PATH", "SYSTEMROOT")},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_function_imports_with_its_layers_and_the_runtime_alone(function, host_dependencies, runtime):
    paths = [BUILD / function, BUILD / "CoreLayer/python", host_dependencies, runtime]
    done = isolated(IMPORT_ALL, *paths)
    assert done.returncode == 0, done.stderr
    loaded = [Path(name) for name in json.loads(done.stdout.splitlines()[-1])]
    standard = Path(os.__file__).parent
    foreign = [
        path
        for path in loaded
        if not any(path.is_relative_to(allowed) for allowed in (*paths, standard)) or "site-packages" in path.parts
    ]
    assert not foreign


def test_layers_alone_read_the_photos_of_phones(host_dependencies, runtime):
    paths = [BUILD / "CoreLayer/python", host_dependencies, runtime]
    done = isolated(READ_PHOTOS, ROOT / "events", *paths)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["image/heic 320 213", "image/avif 320 213"]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_function_holds_its_handler_alone(function):
    assert [path.relative_to(BUILD / function) for path in files(BUILD / function)] == [Path("app.py")]


def test_template_has_no_aliases():
    # `template.yaml` has, and CloudFormation refuses them.
    tokens = list(yaml.scan((BUILD / "template.yaml").read_text()))
    assert tokens
    assert not [token for token in tokens if isinstance(token, yaml.AnchorToken | yaml.AliasToken)]


def test_core_layer_holds_the_package_alone():
    sources = ROOT / "layers/core/python"
    expected = {path.relative_to(sources) for path in files(sources / "img2img") if path.suffix == ".py"}
    built = {path.relative_to(BUILD / "CoreLayer/python") for path in files(BUILD / "CoreLayer")}
    assert built == expected | {Path("img2img/py.typed")}


def test_unzipped_size(capsys):
    sizes = {name: sum(path.stat().st_size for path in files(BUILD / name)) for name in (*FUNCTIONS, *LAYERS)}
    largest = max(sizes[name] for name in FUNCTIONS) + sum(sizes[name] for name in LAYERS)
    with capsys.disabled():
        print("\nunzipped, without boto3:")
        for name, size in sizes.items():
            print(f"  {name:<18} {size / 1e6:8.2f} MB")
        print(f"  {'function + layers':<18} {largest / 1e6:8.2f} MB of at most {SIZE_LIMIT / 1e6:.0f} MB")
    assert largest < SIZE_LIMIT


def test_libraries_are_for_the_runtime():
    libraries = {}
    for path in files(BUILD / "DependenciesLayer"):
        with path.open("rb") as opened:
            header = opened.read(20)
        if header.startswith(b"\x7fELF"):
            libraries[path] = int.from_bytes(header[18:20], "little")
    assert libraries
    assert set(libraries.values()) == {AARCH64}
    extensions = [path.name for path in libraries if ".cpython-" in path.name]
    assert extensions
    assert not [name for name in extensions if ".cpython-313-" not in name]


def test_nothing_of_the_machine_that_built_it():
    unwanted = {"__pycache__", "tests", "bin", ".venv", ".git", "boto3", "botocore", "pip", "pytest", "moto", "mypy"}
    for name in (*FUNCTIONS, *LAYERS):
        for path in files(BUILD / name):
            parts = path.relative_to(BUILD / name).parts
            assert not unwanted & set(parts), path
            assert path.suffix != ".pyc"
            assert not path.is_symlink()
            if path.suffix in ("", ".py", ".txt", ".json", ".toml", ".cfg"):
                assert os.fsencode(ROOT) not in path.read_bytes(), path


def notice():
    """Return the section of NOTICE on the layer, line by line."""
    text = (ROOT / "NOTICE").read_text()
    section = re.search(
        rf"^{re.escape(NOTICE_HEADING)}\n-+\n(.*?)(?=^\S[^\n]*\n-{{3,}}$|\Z)", text, re.DOTALL | re.MULTILINE
    )
    assert section, NOTICE_HEADING
    return section[1].splitlines()


def test_notice_lists_every_distribution():
    listed = [match.groups() for line in notice() if (match := re.match(r"([\w.-]+) (\d[\w.]*): \S", line))]
    held = [
        (re.sub(r"[-_.]+", "-", distribution.name).lower(), distribution.version)
        for distribution in importlib.metadata.distributions(path=[str(DEPENDENCIES)])
    ]
    assert held
    assert listed == sorted(held)


def test_notice_lists_every_bundled_library():
    text = "\n".join(notice())
    listed = {name for names in re.findall(r"\((lib[\w, ]+)\)", text) for name in names.split(", ")}
    held = {path.name.partition("-")[0] for path in files(DEPENDENCIES) if path.parent.name.endswith(".libs")}
    assert held
    assert listed == held
