"""The request's JSON: Segmind's names, ranges and defaults for `sd1.5-img2img`, one sample a request.

They are those of the API in front (a test compares the two), which has fitted the image to its size already.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from endpoint.engine import Request
from endpoint.errors import FieldError, InvalidRequest
from endpoint.model import SCHEDULERS

SIZES = (512, 768)
MAX_SEED = 999_999_999_999_999
MAX_PROMPT = 10_000
# An answer names so many wrong fields: a body may have millions.
MAX_ERRORS = 20

# The size is compared with the one asked for before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class Asked:
    """A checked request: what to make, the seed resolved, and whether the answer is JSON."""

    request: Request
    base64: bool

    @property
    def summary(self) -> dict[str, Any]:
        """What a log may say about it: no prompt, no image."""
        request = self.request
        width, height = request.image.size
        return {
            "width": width,
            "height": height,
            "scheduler": request.scheduler,
            "steps": request.num_inference_steps,
            "strength": request.strength,
            "guidance_scale": request.guidance_scale,
        }


class _WrongValue(ValueError):
    """A field's value is not accepted; the text says what would be."""


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_PROMPT:
        raise _WrongValue(f"must be a string of at most {MAX_PROMPT} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _WrongValue("must be valid Unicode text") from None
    return value


def _prompt(value: Any) -> str:
    text = _text(value)
    if not text.strip():
        raise _WrongValue("must not be empty")
    return text


def _number(value: Any) -> float | int | None:
    """Return the number that `value` is or, as Segmind's own client sends them, spells; None if it is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        if not re.fullmatch(r"\s*-?\d{1,20}(\.\d{1,20})?([eE][+-]?\d{1,3})?\s*", value, re.ASCII):
            return None
        value = float(value) if set(value) & set(".eE") else int(value)
    if isinstance(value, int):
        return value
    return value if isinstance(value, float) and math.isfinite(value) else None


def _integer(low: int, high: int, accepted: str = "") -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        number = _number(value)
        if number is None or not low <= number <= high or number != int(number):
            raise _WrongValue(accepted or f"must be an integer from {low} to {high}")
        return int(number)

    return parse


def _decimal(low: float, high: float) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        number = _number(value)
        if number is None or not low <= number <= high:
            raise _WrongValue(f"must be a number from {low:g} to {high:g}")
        return float(number)

    return parse


def _size(value: Any) -> int:
    number = _number(value)
    if number not in SIZES:
        raise _WrongValue(f"must be {' or '.join(map(str, SIZES))}")
    return int(number)


def _one_sample(value: Any) -> int:
    if _number(value) != 1:
        raise _WrongValue("must be 1: each sample is a request of its own")
    return 1


def _scheduler(value: Any) -> str:
    if not isinstance(value, str) or value not in SCHEDULERS:
        raise _WrongValue(f"must be one of {', '.join(SCHEDULERS)}")
    return value


def _boolean(value: Any) -> bool:
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower())
    if not isinstance(value, bool):
        raise _WrongValue("must be true or false")
    return value


def _image(value: Any) -> Image.Image:
    """Return the image, its header read and nothing decoded."""
    if not isinstance(value, str) or not value:
        raise _WrongValue("must be the base64 of a PNG or JPEG image")
    try:
        return Image.open(BytesIO(base64.b64decode(value, validate=True)), formats=("PNG", "JPEG"))
    except (binascii.Error, ValueError):
        raise _WrongValue("must be the base64 of a PNG or JPEG image; this is no valid base64") from None
    # All of them: on hostile bytes, decoders raise almost anything.
    except Exception:  # noqa: BLE001
        raise _WrongValue("must be a PNG or JPEG image") from None


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "image": _image,
    "prompt": _prompt,
    "negative_prompt": _text,
    "samples": _one_sample,
    "scheduler": _scheduler,
    "num_inference_steps": _integer(20, 100),
    "guidance_scale": _decimal(0.1, 25),
    "strength": _decimal(0.1, 1),
    "seed": _integer(-1, MAX_SEED, f"must be -1 (random) or an integer from 0 to {MAX_SEED}"),
    "img_width": _size,
    "img_height": _size,
    "base64": _boolean,
}
FIELDS = tuple(_PARSERS)
DEFAULTS: Mapping[str, Any] = {
    "negative_prompt": "",
    "samples": 1,
    "scheduler": "DDIM",
    "num_inference_steps": 20,
    "guidance_scale": 7.5,
    "strength": 1.0,
    "seed": -1,
    "img_width": SIZES[0],
    "img_height": SIZES[0],
    "base64": False,
}


def parse_field(name: str, value: Any) -> Any:
    """Return the parsed value of one field. Raises `ValueError` that says what is accepted."""
    return _PARSERS[name](value)


def parse(body: bytes) -> Asked:
    """Check a body and decode its image. Raises `InvalidRequest` naming wrong, missing and unknown fields."""
    given = _decoded(body)
    values, errors = _values(given)
    errors += [FieldError(name, "is required") for name in ("image", "prompt") if given.get(name) is None]
    wrong_fields = {error.field for error in errors}
    values = {**DEFAULTS, **values}
    if not wrong_fields & {"image", "img_width", "img_height"}:
        try:
            values["image"] = _pixels(values["image"], (values["img_width"], values["img_height"]))
        except _WrongValue as wrong:
            errors.append(FieldError("image", str(wrong)))
    if errors:
        raise InvalidRequest.of_fields(errors)
    return Asked(
        Request(
            image=values["image"],
            prompt=values["prompt"],
            negative_prompt=values["negative_prompt"],
            scheduler=values["scheduler"],
            num_inference_steps=values["num_inference_steps"],
            guidance_scale=values["guidance_scale"],
            strength=values["strength"],
            seed=secrets.randbelow(2**32) if values["seed"] == -1 else values["seed"],
        ),
        base64=values["base64"],
    )


def _values(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[FieldError]]:
    """Parse the fields. Raises `InvalidRequest` where too many are wrong."""
    values: dict[str, Any] = {}
    errors: list[FieldError] = []
    known = f"; known are {', '.join(FIELDS)}"
    for name, value in given.items():
        if len(errors) == MAX_ERRORS:
            raise InvalidRequest.of_fields(errors)
        if name not in _PARSERS:
            # The start of a name only: it may be of any length, and no text.
            shown = name[:100].encode(errors="replace").decode()
            errors.append(FieldError(shown, f"is not known{known}"))
            known = ""
        # Segmind's clients send null for "not set".
        elif value is not None:
            try:
                values[name] = parse_field(name, value)
            except _WrongValue as wrong:
                errors.append(FieldError(name, str(wrong)))
    return values, errors


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body)
    # Also bytes that are no text, numbers of thousands of digits, and brackets nested without end.
    except (ValueError, RecursionError):
        raise InvalidRequest.of_fields([FieldError("body", "must be JSON")]) from None
    if not isinstance(given, dict):
        raise InvalidRequest.of_fields([FieldError("body", "must be a JSON object")])
    return given


def _pixels(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.size != size:
        asked, found = (f"{width} x {height}" for width, height in (size, image.size))
        raise _WrongValue(f"must have {asked} pixels, as img_width and img_height say; it has {found}")
    try:
        return image.convert("RGB")
    # As above.
    except Exception:  # noqa: BLE001
        raise _WrongValue("must be a PNG or JPEG image that is whole") from None
