"""A tiny model, its engine, and the pipeline itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from endpoint.engine import Engine
from endpoint.model import Model, save_tiny
from tests.endpoint.asked import Reference

# diffusers' schedulers make numpy arrays of tensors in ways that numpy 2 wants changed.
NUMPY_WARNINGS = ("__array__ implementation doesn't accept a copy keyword", "__array_wrap__ must accept context")


def pytest_configure(config: pytest.Config) -> None:
    # The calls are too small to share: with more threads than idle processors they take 20 times as long.
    torch.set_num_threads(1)
    for message in NUMPY_WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}:DeprecationWarning")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def model(tiny: Path) -> Model:
    return Model.load(tiny)


@pytest.fixture
def engine(model: Model):
    started = Engine(model)
    yield started
    started.stop(now=True)


@pytest.fixture(scope="session")
def reference(tiny: Path) -> Reference:
    return Reference(tiny)
