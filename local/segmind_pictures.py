"""What Segmind's `sd1.5-img2img` accepts, and the pictures that its stand-in makes of it."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

SCHEDULERS = (
    *("DDIM", "DPM Multi", "DPM Single", "Euler a", "Euler", "Heun"),
    *("DPM2 a Karras", "DPM2 Karras", "LMS", "PNDM", "DDPM", "UniPC"),
)
DEFAULTS: dict[str, Any] = {
    "negative_prompt": "",
    "samples": 1,
    "scheduler": "DDIM",
    "num_inference_steps": 20,
    "guidance_scale": 7.5,
    "strength": 1,
    "seed": -1,
    "img_width": 512,
    "img_height": 512,
    "base64": False,
}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _is_integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "image": (_is_text, "must be a string"),
    "prompt": (lambda value: isinstance(value, str) and bool(value.strip()), "must be a string that is not empty"),
    "negative_prompt": (_is_text, "must be a string"),
    "samples": (_is_integer(1, 4), "must be an integer from 1 to 4"),
    "scheduler": (lambda value: value in SCHEDULERS, f"must be one of {', '.join(SCHEDULERS)}"),
    "num_inference_steps": (_is_integer(20, 100), "must be an integer from 20 to 100"),
    "guidance_scale": (_is_number(0.1, 25), "must be a number from 0.1 to 25"),
    "strength": (_is_number(0.1, 1), "must be a number from 0.1 to 1"),
    "seed": (_is_integer(-1, 999_999_999_999_999), "must be an integer from -1 to 999999999999999"),
    "img_width": (lambda value: type(value) is int and value in (512, 768), "must be 512 or 768"),
    "img_height": (lambda value: type(value) is int and value in (512, 768), "must be 512 or 768"),
    "base64": (lambda value: isinstance(value, bool), "must be true or false"),
}


class Wrong(ValueError):
    """The request is not accepted; the text says why."""


def checked(fields: Any) -> tuple[dict[str, Any], Image.Image]:
    """Return the fields with their defaults, and the image. Raises `Wrong`."""
    if not isinstance(fields, dict):
        raise Wrong("the body must be a JSON object")
    if unknown := [name for name in fields if name not in CHECKS]:
        raise Wrong(f"{', '.join(unknown)}: unknown parameter")
    if missing := [name for name in ("image", "prompt") if name not in fields]:
        raise Wrong(f"{', '.join(missing)}: required")
    for name, value in fields.items():
        accepts, text = CHECKS[name]
        if not accepts(value):
            raise Wrong(f"{name} {text}")
    return DEFAULTS | fields, decoded(fields["image"])[1]


def decoded(value: Any) -> tuple[bytes, Image.Image]:
    """Return the image that a field holds. Raises `Wrong`."""
    if not isinstance(value, str):
        raise Wrong("image must be a string")
    if value.startswith("data:"):
        raise Wrong("image must be bare base64, without a data: prefix")
    try:
        data = base64.b64decode(value, validate=True)
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise Wrong("image must be base64 of an image") from None
    return data, image


def simulate(image: Image.Image, size: tuple[int, int], seed: int, strength: float) -> bytes:
    """Return a JPEG that shows `image` in `seed`'s colours, the more so the higher `strength`, and says what it is."""
    image = image.convert("RGB").resize(size)
    digest = hashlib.sha256(str(seed).encode()).digest()
    hue, saturation, value = ImageOps.posterize(image, 2 + digest[0] % 3).convert("HSV").split()
    hue = hue.point([(level + digest[1]) % 256 for level in range(256)])
    saturation = saturation.point([min(255, 60 + level) for level in range(256)])
    changed = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    result = Image.blend(image, changed, strength)
    draw = ImageDraw.Draw(result)
    draw.rectangle((0, size[1] - 32, size[0], size[1]), fill="black")
    draw.text((10, size[1] - 24), f"simulated, seed {seed}", fill="white", font=ImageFont.load_default(16))
    return jpeg(result)


def jpeg(image: Image.Image) -> bytes:
    """Return a picture's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
