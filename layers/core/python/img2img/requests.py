"""Reading requests: what they give for the fields of the table in `params.py`."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from img2img.errors import FieldError, InvalidRequest, NotFound, UnsupportedMediaType
from img2img.negotiation import media_type
from img2img.params import FIELDS, PARAMETERS, Field, Img2ImgParams
from img2img.values import ImageSource, Parser, parse_fields, parser_of

# Finds the fields of a team's preset by its name, or raises `NotFound`.
Presets = Callable[[str], Mapping[str, Any]]

# The parameters of the first version. An `Idempotency-Key` holds over an upgrade: a repeat must have the fingerprint
# that the version before gave it, so what came later counts only where it differs from its default.
_ALWAYS_COUNTED = frozenset(
    (
        "prompt",
        "negative_prompt",
        "samples",
        "scheduler",
        "num_inference_steps",
        "guidance_scale",
        "strength",
        "seed",
        "img_width",
        "img_height",
        "fit",
        "output_format",
    )
)


@dataclass(frozen=True)
class Img2ImgRequest:
    """A checked request: what to make, of which image (None where it comes another way), and how to answer."""

    params: Img2ImgParams
    image: ImageSource | None
    base64: bool
    metadata: Mapping[str, str]
    preset: str = ""
    own: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the parsed parameters and the image's own fingerprint.

        The seed counts as sent: a repeated -1 is the same request. A preset counts by its name, with the request's own
        fields: a repeated request is the same although the preset has changed.
        """
        params = {"preset": self.preset, **self.own} if self.preset else _counted(self.params)
        parts = [params, self.image.fingerprint if self.image else None, dict(self.metadata)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _counted(params: Img2ImgParams) -> dict[str, Any]:
    values = params.as_dict()
    return {
        item.name: values[item.name]
        for item in fields(params)
        if item.name in _ALWAYS_COUNTED or values[item.name] != item.default
    }


def _parsers(table: Iterable[Field]) -> dict[str, Parser]:
    return {item.name: parser_of(item.kind) for item in table}


_OF_FIELDS = _parsers(FIELDS.values())
_OF_PARAMETERS = _parsers(PARAMETERS.values())


def _parse(body: Any, known: Mapping[str, Parser]) -> tuple[dict[str, Any], list[FieldError]]:
    if not isinstance(body, dict):
        raise InvalidRequest.of_field("body", "must be a JSON object")
    # Segmind's clients send null for "not set".
    return parse_fields({name: value for name, value in body.items() if value is not None or name not in known}, known)


def _saved(presets: Presets, name: str, own: Mapping[str, Any]) -> tuple[dict[str, Any], list[FieldError]]:
    """Return what a preset adds to the request's own fields, as far as this version knows it: a newer one may have
    saved it.
    """
    try:
        stored = presets(name)
    except NotFound as missing:
        return {}, [FieldError("preset", missing.detail)]
    added = {key: value for key, value in stored.items() if key in PARAMETERS and key not in own}
    values, errors = parse_fields(added, _OF_PARAMETERS)
    # What is wrong counts as given all the same: it is refused once, not missed as well.
    return {**added, **values}, [
        FieldError("preset", f"{name} has a {error.field} that {error.detail}") for error in errors
    ]


def body_bytes(text: str, *, is_base64: bool | None) -> bytes:
    """Return a request's body from what API Gateway made of it."""
    return base64.b64decode(text) if is_base64 else text.encode(errors="surrogatepass")


def parse_json(body: bytes, content_type: str, *, accepted: str = "application/json") -> Any:
    """Decode a JSON body; `accepted` names the media types. Raises `UnsupportedMediaType` and `InvalidRequest`."""
    if media_type(content_type) not in ("application/json", ""):
        raise UnsupportedMediaType.of_field("Content-Type", f"must be {accepted}")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidRequest.of_field("body", "must be valid JSON") from None


def parse_request(body: Any, presets: Presets, *, required: tuple[str, ...] = ("image", "prompt")) -> Img2ImgRequest:
    """Check a decoded JSON body. `presets` returns the fields of the team's preset of a name, or raises `NotFound`.

    Raises `InvalidRequest` naming every wrong, missing and unknown field with what it accepts.
    """
    own, errors = _parse(body, _OF_FIELDS)
    values = own
    if "preset" in own:
        saved, wrong_ones = _saved(presets, own["preset"], own)
        values = {**saved, **own}
        errors += wrong_ones
    wrong = {error.field for error in errors}
    errors += [FieldError(name, "is required") for name in required if name not in values and name not in wrong]
    if errors:
        raise InvalidRequest.of_fields(errors)
    params = {name: values[name] for name in PARAMETERS if name in values}
    others = {name: values.get(name, FIELDS[name].default) for name in ("base64", "metadata", "preset")}
    return Img2ImgRequest(
        params=Img2ImgParams(**{"prompt": "", **params}),
        image=values.get("image"),
        own={name: own[name] for name in PARAMETERS if name in own},
        **others,
    )


def parse_lenient_request(body: Any, presets: Presets) -> tuple[Img2ImgRequest, tuple[str, ...]]:
    """Check a body as `parse_request` does, but for unknown fields, which are left out and returned by name.

    `negativePrompt`, which a client of Segmind's sends beside it, counts as `negative_prompt`.
    """
    if not isinstance(body, dict):
        raise InvalidRequest.of_field("body", "must be a JSON object")
    given = dict(body)
    # null is as good as a missing field.
    if given.get("negative_prompt") is None and "negativePrompt" in given:
        given["negative_prompt"] = given["negativePrompt"]
    ignored = tuple(name for name in given if name not in FIELDS and name != "negativePrompt")
    return parse_request({name: value for name, value in given.items() if name in FIELDS}, presets), ignored


def are_known(params: Img2ImgParams) -> bool:
    """Whether this version would take these parameters: a newer one may have stored them."""
    given = {name: value for name, value in params.as_dict().items() if value != PARAMETERS[name].default}
    return not parse_fields(given, _OF_PARAMETERS)[1]


def parse_preset(body: Any) -> dict[str, Any]:
    """Check the fields of a preset, any of the parameters, and return those that are set. Raises `InvalidRequest`."""
    values, errors = _parse(body, _OF_PARAMETERS)
    if errors:
        raise InvalidRequest.of_fields(errors)
    return values
