"""The weights that a deployment gets: half precision, safetensors, with the safety checker only where it is wanted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors import safe_open
from transformers import CLIPConfig, CLIPImageProcessor

from endpoint.model import Model
from endpoint.weights import convert

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checked(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model, with a safety checker."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(str(tiny), safety_checker=None)
    pipeline.register_modules(
        safety_checker=StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=32)),
        feature_extractor=CLIPImageProcessor(),
    )
    folder = tmp_path_factory.mktemp("checked")
    pipeline.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, set[torch.dtype]]:
    """Return, by part, the number formats of its weights."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            found[path.parent.name] = {opened.get_tensor(name).dtype for name in opened.keys()}  # noqa: SIM118 (no dict)
    return found


def test_weights_are_half_precision_and_serve(checked: Path, tmp_path: Path) -> None:
    size = convert(checked, tmp_path)
    found = weights(tmp_path)
    assert set(found) == {"unet", "vae", "text_encoder"}
    for part in found.values():
        assert torch.float16 in part
        assert not {torch.float32, torch.float64} & part
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert size == sum(path.stat().st_size for path in files)
    # No pickle, which would run whatever it holds.
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt"}
    served = Model.load(tmp_path)
    original = Model.load(checked)
    name = "conv_in.weight"
    assert torch.allclose(served.pipeline.unet.state_dict()[name], original.pipeline.unet.state_dict()[name], atol=1e-3)


def test_safety_checker_comes_along_when_it_is_wanted(checked: Path, tmp_path: Path) -> None:
    convert(checked, tmp_path / "without")
    convert(checked, tmp_path / "with", safety_checker=True)
    index = json.loads((tmp_path / "without/model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    assert "safety_checker" in weights(tmp_path / "with")
    assert Model.load(tmp_path / "with", safety_checker=True).pipeline.safety_checker is not None


def test_safety_checker_that_is_not_there_is_missed(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no safety checker"):
        convert(tiny, tmp_path, safety_checker=True)


def test_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "endpoint.weights", str(tmp_path / "nothing"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"{tmp_path / 'nothing'} could not be converted: ")
    assert "Traceback" not in done.stderr


def test_command_converts(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "endpoint.weights", str(tiny), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Converted {tiny}: 0.00 GB\n"
    assert (tmp_path / "out/model_index.json").exists()
