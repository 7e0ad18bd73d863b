"""What the process makes of its settings, and what compiling leaves for the next one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from endpoint import process
from endpoint.metrics import Metrics
from endpoint.settings import Settings, WrongSetting
from tests.endpoint.compilers import needs_compiler, torch_warns


@pytest.fixture
def told(monkeypatch):
    """What `load` does, instead of doing it."""
    told = []

    class Engine:
        def __init__(self, model, **options):
            told.append(("engine", options["max_batch"]))

        def warm_up(self, sizes):
            told.append(("warm up", sizes))

    def load(source, **options):
        told.append(("model", options["device"], options["compile"]))
        return SimpleNamespace()

    monkeypatch.setattr(process, "Engine", Engine)
    monkeypatch.setattr(process.Model, "load", load)
    monkeypatch.setattr(process, "read_cache", lambda file: told.append(("read", file)))
    monkeypatch.setattr(process, "write_cache", lambda file: told.append(("write", file)))
    return told


def start(**environ):
    process.load(Settings.from_env(environ), Metrics())


def test_without_compiling_one_size_is_warmed_up(told):
    start(MODEL_DIR="name", DEVICE="cpu")
    assert told == [("model", "cpu", "off"), ("engine", 16), ("warm up", [(512, 512)])]


def test_what_is_compiled_and_kept_is_set(told, tmp_path):
    file = tmp_path / "made.bin"
    asked = {"MODEL_DIR": str(tmp_path), "DEVICE": "cpu", "COMPILE": "default", "COMPILE_CACHE": str(file)}
    start(**asked, WARM_SIZES="768x512, 512x512")
    beside = tmp_path / "compile-cache.bin"
    assert told[2:] == [("read", beside), ("warm up", [(768, 512), (512, 512)]), ("write", file)]
    told.clear()
    file.touch()
    start(**asked)
    assert told[2:] == [
        ("read", file),
        ("warm up", [(512, 512), (512, 768), (768, 512), (768, 768)]),
        ("write", file),
    ]
    told.clear()
    # What lies beside the weights is not ours to write.
    start(**{**asked, "COMPILE_CACHE": ""})
    assert [what for what, *_ in told[2:]] == ["read", "warm up"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_wanted_and_not_there_is_an_error(told):
    with pytest.raises(RuntimeError, match="no GPU"):
        start(MODEL_DIR="name", DEVICE="cuda")
    assert told == []


@pytest.mark.parametrize("sizes", ["640x640", "512x512,", "512"])
def test_only_sizes_that_may_be_asked_for_are_warmed_up(sizes):
    with pytest.raises(WrongSetting, match=r"WARM_SIZES must be a list, with commas, of 512x512, .*768x768"):
        Settings.from_env({"WARM_SIZES": sizes})


@needs_compiler
@torch_warns
def test_what_compiling_made_is_taken_by_the_next_process(tmp_path):
    file = tmp_path / "folder" / "made.bin"

    def found() -> tuple[int, int]:
        torch.compiler.reset()
        counters.clear()
        with torch.inference_mode():
            torch.compile(torch.nn.Linear(3, 5), options={})(torch.zeros(2, 3))
        return counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]

    with fresh_cache():
        assert found() == (0, 1)
        process.write_cache(file)
    with fresh_cache():
        assert found() == (0, 1)
    with fresh_cache():
        process.read_cache(file)
        assert found() == (1, 0)
    assert [path.name for path in file.parent.iterdir()] == ["made.bin"]


def test_a_cache_that_cannot_be_read_or_written_stops_nothing(tmp_path, monkeypatch, caplog):
    process.read_cache(tmp_path / "none")
    broken = tmp_path / "broken"
    broken.write_bytes(b"no cache")
    process.read_cache(broken)
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"made", None))
    process.write_cache(broken / "made.bin")
    assert "could not be written" in caplog.text
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    process.write_cache(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
