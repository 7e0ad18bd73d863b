"""The request: every field's name, range and default, in one place.

Names, ranges and defaults of the first twelve are Segmind's own for `sd1.5-img2img`
(https://www.segmind.com/models/sd1.5-img2img); the rest are ours.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from img2img.errors import FieldError, InvalidRequest, NotFound

SCHEDULERS = (
    "DDIM",
    "DPM Multi",
    "DPM Single",
    "Euler a",
    "Euler",
    "Heun",
    "DPM2 a Karras",
    "DPM2 Karras",
    "LMS",
    "PNDM",
    "DDPM",
    "UniPC",
)
SIZES = (512, 768)
UNIT_OF_WORK = 20 * 512 * 512
FITS = ("cover", "contain", "stretch")
OUTPUT_FORMATS = ("png", "jpeg", "webp")
MAX_SEED = 999_999_999_999_999
MAX_PROMPT = 10_000
MAX_METADATA_ENTRIES = 16
# A part of object keys.
PRESET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
UPLOAD_ID = re.compile(r"upl_[0-9A-HJKMNP-TV-Z]{26}")


@dataclass(frozen=True, kw_only=True)
class Img2ImgParams:
    """The effective parameters of a job. `seed` is -1 only until `resolved()`."""

    prompt: str
    negative_prompt: str = ""
    samples: int = 1
    scheduler: str = "DDIM"
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    strength: float = 1.0
    seed: int = -1
    img_width: int = 512
    img_height: int = 512
    fit: str = "cover"
    output_format: str | None = None

    def resolved(self) -> Img2ImgParams:
        """Return these parameters with a random seed in place of -1.

        From the operating system: SnapStart copies the state of `random` into every clone.
        """
        return self if self.seed != -1 else replace(self, seed=secrets.randbelow(2**32))

    @property
    def work(self) -> int:
        """How much work a sample is: steps times pixels. `UNIT_OF_WORK` is that of 20 steps and 512 x 512."""
        return self.num_inference_steps * self.img_width * self.img_height

    def seed_of(self, index: int) -> int:
        """Return the seed of sample `index`: each sample is a call of its own, so a retry repeats one image."""
        return (self.seed + index) % (MAX_SEED + 1)

    def as_dict(self) -> dict[str, Any]:
        """Return the parameters under the names that a request uses."""
        return asdict(self)


@dataclass(frozen=True)
class InlineImage:
    """Image bytes that came in the request body."""

    data: bytes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the bytes."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class ImageUrl:
    """An https URL to fetch the image from."""

    url: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the URL: a repeated request fetches nothing."""
        return hashlib.sha256(self.url.encode()).hexdigest()


@dataclass(frozen=True)
class UploadId:
    """An upload of the caller's team."""

    id: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the id: a repeated request reads nothing."""
        return hashlib.sha256(self.id.encode()).hexdigest()


ImageSource = InlineImage | ImageUrl | UploadId


@dataclass(frozen=True)
class Img2ImgRequest:
    """A checked request: what to make, of which image (None where it comes another way), and how to answer."""

    params: Img2ImgParams
    image: ImageSource | None
    base64: bool
    metadata: Mapping[str, str]
    preset: str = ""
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the parsed parameters and the image's own fingerprint.

        The seed counts as sent: a repeated -1 is the same request. A preset counts by its name, with the request's own
        fields: a repeated request is the same although the preset has changed.
        """
        params = {"preset": self.preset, **self.own} if self.preset else self.params.as_dict()
        parts = [params, self.image.fingerprint if self.image else None, dict(self.metadata)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class WrongValue(ValueError):
    """A field's value is not accepted; the text says what would be."""


def _text(limit: int) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or len(value) > limit:
            raise WrongValue(f"must be a string of at most {limit} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise WrongValue("must be valid Unicode text") from None
        return value

    return parse


def _prompt(value: Any) -> str:
    text = _text(MAX_PROMPT)(value)
    if not text.strip():
        raise WrongValue("must not be empty")
    return text


def _number(value: Any) -> float | int | None:
    """Return the number that `value` is or, as Segmind's own client sends them, spells; None if it is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        if not re.fullmatch(r"\s*-?\d{1,20}(\.\d{1,20})?([eE][+-]?\d{1,3})?\s*", value, re.ASCII):
            return None
        value = float(value) if set(value) & set(".eE") else int(value)
    if isinstance(value, int) and abs(value) < 10**20:
        return value
    return value if isinstance(value, float) and math.isfinite(value) else None


def _integer(low: int, high: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        number = _number(value)
        if number is None or number != int(number) or not low <= number <= high:
            raise WrongValue(f"must be an integer from {low} to {high}")
        return int(number)

    return parse


def _decimal(low: float, high: float) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        number = _number(value)
        if number is None or not low <= number <= high:
            raise WrongValue(f"must be a number from {low:g} to {high:g}")
        return float(number)

    return parse


def one_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    """Return the parser of a field that has these values."""

    def parse(value: Any) -> str:
        if value not in choices:
            raise WrongValue(f"must be one of {', '.join(choices)}")
        return str(value)

    return parse


def _size(value: Any) -> int:
    number = _number(value)
    if number not in SIZES:
        raise WrongValue("must be 512 or 768")
    return int(number)


def _seed(value: Any) -> int:
    try:
        return _integer(-1, MAX_SEED)(value)
    except WrongValue:
        raise WrongValue(f"must be -1 (random) or an integer from 0 to {MAX_SEED}") from None


def _boolean(value: Any) -> bool:
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower())
    if not isinstance(value, bool):
        raise WrongValue("must be true or false")
    return value


def _metadata(value: Any) -> dict[str, str]:
    if (
        not isinstance(value, dict)
        or len(value) > MAX_METADATA_ENTRIES
        or not all(isinstance(v, str) and len(k) <= 40 and len(v) <= 500 for k, v in value.items())
    ):
        raise WrongValue(
            f"must be an object of at most {MAX_METADATA_ENTRIES} strings of at most 500 characters, keys at most 40"
        )
    for entry in value.items():
        for text in entry:
            _text(500)(text)
    return value


def _image(value: Any) -> ImageSource:
    if not isinstance(value, str) or not value.strip():
        raise WrongValue("must be an upload id, an https URL, a data URI or base64")
    value = _text(len(value))(value).strip()
    if UPLOAD_ID.fullmatch(value):
        return UploadId(value)
    scheme = value[:8].lower()
    if scheme == "https://":
        if len(value) > 4096:
            raise WrongValue("must be a URL of at most 4096 characters")
        return ImageUrl(value)
    if scheme.startswith("http://"):
        raise WrongValue("must be an https URL, not http")
    encoded = value
    if scheme.startswith("data:"):
        header, comma, encoded = value.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise WrongValue("must be a data URI of the form data:image/...;base64,...")
    try:
        data = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        raise WrongValue("must be an upload id, an https URL, a data URI or base64; this is no valid base64") from None
    if not data:
        raise WrongValue("holds no bytes")
    return InlineImage(data)


def _preset(value: Any) -> str:
    if isinstance(value, str) and PRESET_NAME.fullmatch(value):
        return value
    raise WrongValue("must be the name of a preset: 1 to 64 letters, digits, dots, - and _")


_PARAMS: dict[str, Callable[[Any], Any]] = {
    "prompt": _prompt,
    "negative_prompt": _text(MAX_PROMPT),
    "samples": _integer(1, 4),
    "scheduler": one_of(SCHEDULERS),
    "num_inference_steps": _integer(20, 100),
    "guidance_scale": _decimal(0.1, 25),
    "strength": _decimal(0.1, 1),
    "seed": _seed,
    "img_width": _size,
    "img_height": _size,
    "fit": one_of(FITS),
    "output_format": one_of(OUTPUT_FORMATS),
}
_FIELDS: dict[str, Callable[[Any], Any]] = {
    "image": _image,
    **_PARAMS,
    "base64": _boolean,
    "metadata": _metadata,
    "preset": _preset,
}
FIELDS = tuple(_FIELDS)
# What a preset may hold, and what an object's metadata may ask for.
PARAMETERS = tuple(_PARAMS)


def parse_fields(
    given: Mapping[str, Any], parsers: Mapping[str, Callable[[Any], Any]]
) -> tuple[dict[str, Any], list[FieldError]]:
    """Return the parsed values, and an error for each unknown name and each value that raised `WrongValue`."""
    values: dict[str, Any] = {}
    errors: list[FieldError] = []
    for name, value in given.items():
        if name not in parsers:
            # The start of a name only: it may be of any length, and no text.
            shown = name[:100].encode(errors="replace").decode()
            errors.append(FieldError(shown, f"is not known; known are {', '.join(parsers)}"))
            continue
        try:
            values[name] = parsers[name](value)
        except WrongValue as wrong:
            errors.append(FieldError(name, str(wrong)))
    return values, errors


def checked_fields(given: Mapping[str, Any], parsers: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """Return the parsed values. Raises `InvalidRequest` naming every wrong and unknown one."""
    values, errors = parse_fields(given, parsers)
    if errors:
        raise InvalidRequest.of_fields(errors)
    return values


Presets = Callable[[str], Mapping[str, Any]]


def _parse(body: Any, known: Mapping[str, Callable[[Any], Any]]) -> tuple[dict[str, Any], list[FieldError]]:
    if not isinstance(body, dict):
        raise InvalidRequest.of_field("body", "must be a JSON object")
    # Segmind's clients send null for "not set".
    return parse_fields({name: value for name, value in body.items() if value is not None or name not in known}, known)


def parse_request(body: Any, presets: Presets, *, required: tuple[str, ...] = ("image", "prompt")) -> Img2ImgRequest:
    """Check a decoded JSON body. `presets` returns the fields of the team's preset of a name, or raises `NotFound`.

    Raises `InvalidRequest` naming every wrong, missing and unknown field with what it accepts.
    """
    own, errors = _parse(body, _FIELDS)
    values = own
    if "preset" in own:
        try:
            values = {**presets(own["preset"]), **own}
        except NotFound as missing:
            errors.append(FieldError("preset", missing.detail))
    wrong = {error.field for error in errors}
    errors += [FieldError(name, "is required") for name in required if name not in values and name not in wrong]
    if errors:
        raise InvalidRequest.of_fields(errors)
    params = {name: values[name] for name in PARAMETERS if name in values}
    return Img2ImgRequest(
        params=Img2ImgParams(**{"prompt": "", **params}),
        image=values.get("image"),
        base64=values.get("base64", False),
        metadata=values.get("metadata", {}),
        preset=values.get("preset", ""),
        own={name: own[name] for name in PARAMETERS if name in own},
    )


def parse_preset(body: Any) -> dict[str, Any]:
    """Check the fields of a preset, any of the parameters, and return those that are set. Raises `InvalidRequest`."""
    values, errors = _parse(body, _PARAMS)
    if errors:
        raise InvalidRequest.of_fields(errors)
    return values
