"""Reading single values: what a request gives for a field of each kind, and named fields together."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from img2img.errors import FieldError, InvalidRequest
from img2img.params import (
    MAX_URL,
    PRESET_NAME,
    UPLOAD_ID,
    Choice,
    Decimal,
    Flag,
    ImageInput,
    Integer,
    Kind,
    Labels,
    PresetName,
    Size,
    Text,
)

MAX_LIMIT = 100


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


class WrongValue(ValueError):
    """A field's value is not accepted; the text says what would be."""


def _text(kind: Text, value: Any) -> str:
    if not isinstance(value, str) or len(value) > kind.longest:
        raise WrongValue(kind.accepts)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise WrongValue("must be valid Unicode text") from None
    if not kind.blank and not value.strip():
        raise WrongValue("must not be empty")
    return value


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


def _integer(kind: Integer, value: Any) -> int:
    number = _number(value)
    if number is None or number != int(number) or not kind.low <= number <= kind.high:
        raise WrongValue(kind.accepts)
    return int(number)


def _decimal(kind: Decimal, value: Any) -> float:
    number = _number(value)
    if number is None or not kind.low <= number <= kind.high:
        raise WrongValue(kind.accepts)
    return float(number)


def _size(kind: Size, value: Any) -> int:
    number = _number(value)
    if number not in kind.values:
        raise WrongValue(kind.accepts)
    return int(number)


def _choice(kind: Choice, value: Any) -> str:
    if value not in kind.values:
        raise WrongValue(kind.accepts)
    return str(value)


def _flag(kind: Flag, value: Any) -> bool:
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower())
    if not isinstance(value, bool):
        raise WrongValue(kind.accepts)
    return value


def _labels(kind: Labels, value: Any) -> dict[str, str]:
    if (
        not isinstance(value, dict)
        or len(value) > kind.entries
        or not all(
            isinstance(v, str) and len(k) <= kind.longest_name and len(v) <= kind.longest_value
            for k, v in value.items()
        )
    ):
        raise WrongValue(kind.accepts)
    for entry in value.items():
        for text in entry:
            _text(Text(kind.longest_value), text)
    return value


def _image(kind: ImageInput, value: Any) -> ImageSource:
    if not isinstance(value, str) or not value.strip():
        raise WrongValue(kind.accepts)
    value = _text(Text(len(value)), value).strip()
    if UPLOAD_ID.fullmatch(value):
        return UploadId(value)
    scheme = value[:8].lower()
    if scheme == "https://":
        if len(value) > MAX_URL:
            raise WrongValue(f"must be a URL of at most {MAX_URL} characters")
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
        raise WrongValue(f"{kind.accepts}; this is no valid base64") from None
    if not data:
        raise WrongValue("holds no bytes")
    return InlineImage(data)


def _preset(kind: PresetName, value: Any) -> str:
    if isinstance(value, str) and PRESET_NAME.fullmatch(value):
        return value
    raise WrongValue(kind.accepts)


_PARSERS: Mapping[type, Callable[[Any, Any], Any]] = {
    Text: _text,
    Integer: _integer,
    Decimal: _decimal,
    Size: _size,
    Choice: _choice,
    Flag: _flag,
    Labels: _labels,
    ImageInput: _image,
    PresetName: _preset,
}
Parser = Callable[[Any], Any]


def parser_of(kind: Kind) -> Parser:
    """Return what reads a value of a field of this kind; it raises `WrongValue`."""
    return partial(_PARSERS[type(kind)], kind)


def parse_fields(given: Mapping[str, Any], parsers: Mapping[str, Parser]) -> tuple[dict[str, Any], list[FieldError]]:
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


def checked_fields(given: Mapping[str, Any], parsers: Mapping[str, Parser]) -> dict[str, Any]:
    """Return the parsed values. Raises `InvalidRequest` naming every wrong and unknown one."""
    values, errors = parse_fields(given, parsers)
    if errors:
        raise InvalidRequest.of_fields(errors)
    return values


def parse_limit(text: str) -> int:
    """Return how many items of a list are wanted. Raises `WrongValue`."""
    if re.fullmatch("[0-9]{1,3}", text) and 1 <= int(text) <= MAX_LIMIT:
        return int(text)
    raise WrongValue(f"must be an integer from 1 to {MAX_LIMIT}")
