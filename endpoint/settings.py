"""What the process reads from its environment, in one place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


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
    compile: str = _setting(
        "auto", "COMPILE", "auto is max-autotune on a GPU, off without", ("auto", "off", "default", "max-autotune")
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
        lines = [(f.metadata["name"], f.metadata["help"], f.metadata["choices"], f.default) for f in fields(cls)]
        return "\n".join(
            f"  {name:<15} {text} ({'one of ' + ', '.join(choices) + '; ' if choices else ''}default: {default})"
            for name, text, choices, default in lines
        )


def _parse(metadata: Mapping[str, Any], default: Any, value: str) -> Any:
    name, choices = metadata["name"], metadata["choices"]
    if isinstance(default, int):
        low, high = (0, 65_535) if name == "PORT" else (1, 100_000)
        if not re.fullmatch(r"\d{1,9}", value, re.ASCII) or not low <= int(value) <= high:
            raise WrongSetting(f"{name} must be an integer from {low} to {high}")
        return int(value)
    if choices and value not in choices:
        raise WrongSetting(f"{name} must be one of {', '.join(choices)}")
    return value
