"""What the process reads from its environment, in one place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

# Of the model's folder: what compiling made elsewhere, to be read only.
CACHE_NAME = "compile-cache.bin"
_SIZES = ("512x512", "512x768", "768x512", "768x768")


class WrongSetting(ValueError):
    """An environment variable has a value that is not accepted; the text says what would be."""


def _setting(default: Any, name: str, text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"name": name, "help": text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings; each field tells its environment variable, and what it does."""

    model: str = _setting("/opt/ml/model", "MODEL_DIR", "folder, or hub name, of the model in diffusers' layout")
    host: str = _setting("127.0.0.1", "HOST", "address to listen on; the container's is 0.0.0.0")
    port: int = _setting(8080, "PORT", "port to listen on; 0 is any free one, which the log names")
    dtype: str = _setting(
        "auto", "DTYPE", "auto is float16 on a GPU, float32 without", ("auto", "float16", "bfloat16", "float32")
    )
    device: str = _setting("auto", "DEVICE", "auto is a GPU where there is one", ("auto", "cuda", "cpu"))
    compile: str = _setting(
        "auto", "COMPILE", "auto is max-autotune on a GPU, off without", ("auto", "off", "default", "max-autotune")
    )
    warm_sizes: tuple[str, ...] = _setting(
        _SIZES, "WARM_SIZES", "what is compiled before the first request, in a list; others run uncompiled", _SIZES
    )
    compile_cache: str = _setting(
        "",
        "COMPILE_CACHE",
        f"file that keeps what compiling made; without it {CACHE_NAME} in MODEL_DIR is read where it is there",
    )
    max_batch: int = _setting(16, "MAX_BATCH", "requests that share a denoising step")
    max_running: int = _setting(64, "MAX_RUNNING", "requests that take turns")
    max_queue: int = _setting(256, "MAX_QUEUE", "requests that wait for a place; more are answered 503")
    safety_checker: str = _setting("off", "SAFETY_CHECKER", "whether the model's own looks at pictures", ("off", "on"))

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read the environment; an empty variable counts as none. Raises `WrongSetting`."""
        given = {f: environ.get(f.metadata["name"], "").strip() for f in fields(cls)}
        return cls(**{f.name: _parse(f.metadata, f.default, value) for f, value in given.items() if value})

    @classmethod
    def describe(cls) -> str:
        """Return one line on each environment variable: its name, meaning, choices and default."""
        return "\n".join(f"  {f.metadata['name']:<15} {f.metadata['help']} ({_range(f)})" for f in fields(cls))


def _range(setting: Field[Any]) -> str:
    default = setting.default
    if isinstance(default, tuple):
        return f"default: {','.join(default)}"
    choices = setting.metadata["choices"]
    return f"{'one of ' + ', '.join(choices) + '; ' if choices else ''}default: {default or 'none'}"


def _parse(metadata: Mapping[str, Any], default: Any, value: str) -> Any:
    name, choices = metadata["name"], metadata["choices"]
    if isinstance(default, int):
        low, high = (0, 65_535) if name == "PORT" else (1, 100_000)
        if not re.fullmatch(r"\d{1,9}", value, re.ASCII) or not low <= int(value) <= high:
            raise WrongSetting(f"{name} must be an integer from {low} to {high}")
        return int(value)
    if isinstance(default, tuple):
        several = tuple(part.strip() for part in value.split(","))
        if not set(several) <= set(choices):
            raise WrongSetting(f"{name} must be a list, with commas, of {', '.join(choices)}")
        return several
    if choices and value not in choices:
        raise WrongSetting(f"{name} must be one of {', '.join(choices)}")
    return value
