"""Convert a model to what the endpoint serves: `python -m endpoint.weights [--safety-checker] MODEL FOLDER`.

That is diffusers' layout, in half precision and as safetensors, which a GPU loads as it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline


def convert(source: str | Path, folder: Path, *, safety_checker: bool = False) -> int:
    """Write the model of a folder or a hub name to `folder`, and return its size in bytes.

    The safety checker, a fifth of the whole, comes along when it is wanted. Raises `OSError` when there is no such
    model, `ValueError` when it is of another kind or has no safety checker.
    """
    without: dict[str, Any] = (
        {} if safety_checker else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )
    pipeline: Any = StableDiffusionImg2ImgPipeline.from_pretrained(str(source), dtype=torch.float16, **without)
    if safety_checker and pipeline.safety_checker is None:
        raise ValueError("the model has no safety checker")
    pipeline.save_pretrained(folder, safe_serialization=True)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Convert what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m endpoint.weights", description="Convert a model for the endpoint.")
    parser.add_argument("model", help="folder or hub name of a Stable Diffusion 1.5 model in diffusers' layout")
    parser.add_argument("folder", type=Path, help="where to write it")
    parser.add_argument("--safety-checker", action="store_true", help="keep the model's safety checker")
    given = parser.parse_args()
    try:
        size = convert(given.model, given.folder, safety_checker=given.safety_checker)
    except (OSError, ValueError) as error:
        sys.exit(f"{given.model} could not be converted: {str(error).strip().splitlines()[0]}")
    print(f"Converted {given.model}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
