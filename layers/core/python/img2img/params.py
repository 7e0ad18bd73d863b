"""The fields of a request, each declared once: type, default, what it accepts, what it is for.

Validation, error texts, presets, the inbox's metadata and prices are made of this table. Names, ranges and defaults of
Segmind's own fields are those of `sd1.5-img2img` (https://www.segmind.com/models/sd1.5-img2img).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from types import MappingProxyType
from typing import Any

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
MAX_SEED = 999_999_999_999_999
MAX_PROMPT = 10_000
MAX_URL = 4096
# A part of object keys.
PRESET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
UPLOAD_ID = re.compile(r"upl_[0-9A-HJKMNP-TV-Z]{26}")


class _Required(Enum):
    """Stands for the default of a field that has none."""

    REQUIRED = "required"


REQUIRED = _Required.REQUIRED


@dataclass(frozen=True)
class OutputFormat:
    """A format that results may have: its file extension, and how Pillow is to write it."""

    extension: str
    save_options: Mapping[str, Any] = field(default_factory=dict)


OUTPUT_FORMATS = {
    "png": OutputFormat("png"),
    "jpeg": OutputFormat("jpg", {"quality": 95, "subsampling": "4:4:4"}),
    "webp": OutputFormat("webp", {"quality": 95}),
}


@dataclass(frozen=True)
class Text:
    """A string of at most `longest` characters; one that is not `blank` has more than white space."""

    longest: int
    blank: bool = True

    @property
    def accepts(self) -> str:
        """What a value must be."""
        return f"must be a string of at most {self.longest} characters"


@dataclass(frozen=True)
class Integer:
    """A whole number, both bounds included; `special` says what one outside the usual range means."""

    low: int
    high: int
    special: str = ""

    @property
    def accepts(self) -> str:
        """What a value must be."""
        if self.special:
            return f"must be {self.low} ({self.special}) or an integer from {self.low + 1} to {self.high}"
        return f"must be an integer from {self.low} to {self.high}"


@dataclass(frozen=True)
class Decimal:
    """A number, both bounds included."""

    low: float
    high: float

    @property
    def accepts(self) -> str:
        """What a value must be."""
        return f"must be a number from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Choice:
    """One of some strings."""

    values: tuple[str, ...]

    @property
    def accepts(self) -> str:
        """What a value must be."""
        return f"must be one of {', '.join(self.values)}"


@dataclass(frozen=True)
class Size:
    """One of some numbers of pixels."""

    values: tuple[int, ...]

    @property
    def accepts(self) -> str:
        """What a value must be."""
        return f"must be {' or '.join(map(str, self.values))}"


@dataclass(frozen=True)
class Flag:
    """True or false."""

    accepts: str = "must be true or false"


@dataclass(frozen=True)
class Labels:
    """Names and values of the caller's own."""

    entries: int
    longest_name: int
    longest_value: int

    @property
    def accepts(self) -> str:
        """What a value must be."""
        return (
            f"must be an object of at most {self.entries} strings of at most {self.longest_value} characters, "
            f"keys at most {self.longest_name}"
        )


@dataclass(frozen=True)
class PresetName:
    """The name of one of the team's presets."""

    accepts: str = "must be the name of a preset: 1 to 64 letters, digits, dots, - and _"


@dataclass(frozen=True)
class ImageInput:
    """A picture: what it is, or where."""

    accepts: str = "must be an upload id, an https URL, a data URI or base64"


Kind = Text | Integer | Decimal | Choice | Size | Flag | Labels | PresetName | ImageInput


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a request.

    `segmind`: Segmind has it too. `sent`: what generates is told of it, and not only the service itself.
    """

    name: str
    kind: Kind
    description: str
    example: Any
    segmind: bool = True
    sent: bool = True
    default: Any = REQUIRED


def _parameter(kind: Kind, description: str, *, example: Any, default: Any = REQUIRED, **more: bool) -> Any:
    metadata = {"kind": kind, "description": description, "example": example, "default": default, **more}
    return field(metadata=metadata, **({} if default is REQUIRED else {"default": default}))


@dataclass(frozen=True, kw_only=True)
class Img2ImgParams:
    """The effective parameters of a job. `seed` is -1 only until `resolved()`."""

    prompt: str = _parameter(
        Text(MAX_PROMPT, blank=False), "What the picture should become.", example="a castle on a hill, oil painting"
    )
    negative_prompt: str = _parameter(
        Text(MAX_PROMPT), "What the picture should not show.", default="", example="blurry, text"
    )
    samples: int = _parameter(
        Integer(1, 4), "How many pictures to make, each with a seed of its own.", default=1, example=2
    )
    scheduler: str = _parameter(
        Choice(SCHEDULERS), "How noise is taken away from step to step.", default="DDIM", example="Euler a"
    )
    num_inference_steps: int = _parameter(
        Integer(20, 100), "Steps of the scheduler; `strength` of them are taken.", default=20, example=30
    )
    guidance_scale: float = _parameter(Decimal(0.1, 25), "How closely to follow the prompt.", default=7.5, example=9.0)
    strength: float = _parameter(
        Decimal(0.1, 1), "How far to go from the image: at 1 nothing of it is left.", default=1.0, example=0.6
    )
    seed: int = _parameter(
        Integer(-1, MAX_SEED, special="random"),
        "Where the noise comes from: the same seed makes the same picture.",
        default=-1,
        example=42,
    )
    img_width: int = _parameter(Size(SIZES), "Width of the result in pixels.", default=512, example=768)
    img_height: int = _parameter(Size(SIZES), "Height of the result in pixels.", default=512, example=768)
    fit: str = _parameter(
        Choice(FITS),
        "How an image of another shape is fitted: cut, with borders, or distorted.",
        default="cover",
        example="contain",
        segmind=False,
        sent=False,
    )
    output_format: str | None = _parameter(
        Choice(tuple(OUTPUT_FORMATS)),
        "Format of the result; without it, the backend's own.",
        default=None,
        example="webp",
        segmind=False,
        sent=False,
    )

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


# What a preset may hold, and what an object's metadata may ask for.
PARAMETERS: Mapping[str, Field] = MappingProxyType(
    {item.name: Field(name=item.name, **item.metadata) for item in fields(Img2ImgParams)}
)
_IMAGE = Field(
    name="image", kind=ImageInput(), description="The image to start from.", example="https://example.com/photo.jpg"
)
_OTHERS = (
    Field(
        name="base64",
        kind=Flag(),
        default=False,
        description="Whether the answer holds the pictures themselves, beside their URLs.",
        example=True,
    ),
    Field(
        name="metadata",
        kind=Labels(entries=16, longest_name=40, longest_value=500),
        default=MappingProxyType({}),
        description="Strings of the caller's own, kept with the job.",
        example={"order": "1042"},
        segmind=False,
    ),
    Field(
        name="preset",
        kind=PresetName(),
        default="",
        description="The preset whose fields are the defaults of this request.",
        example="watercolour",
        segmind=False,
    ),
)
FIELDS: Mapping[str, Field] = MappingProxyType({"image": _IMAGE, **PARAMETERS, **{item.name: item for item in _OTHERS}})
