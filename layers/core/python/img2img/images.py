"""Images: from any format that cameras and browsers make to the exact picture that a backend takes, and back.

Every function takes whole files as bytes and is thread safe.
"""

from __future__ import annotations

import importlib
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, cast

from PIL import ExifTags, Image, ImageFile

from img2img.errors import ServiceError, TooLarge, UnsupportedImage
from img2img.params import OUTPUT_FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterator

ACCEPTED_CONTENT_TYPES = tuple(
    f"image/{name}" for name in ("jpeg", "png", "webp", "heic", "heif", "avif", "gif", "tiff")
)
EXTENSIONS = {f"image/{name}": written.extension for name, written in OUTPUT_FORMATS.items()}

_SIGNATURES = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}
# Imported with the first such image: loading the codecs (libheif above all) would lengthen every cold start.
_PLUGINS = {
    "WEBP": "PIL.WebPImagePlugin",
    "AVIF": "PIL.AvifImagePlugin",
    "TIFF": "PIL.TiffImagePlugin",
    "HEIF": "pillow_heif.HeifImagePlugin",
}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ICC_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}
_MAX_ICC_BYTES = 4_000_000
_MAX_OUTPUT_PIXELS = 4096 * 4096
_NEARLY_BLACK = 3

# Pillow's remarks on odd files would end up between the log's JSON lines. Its bomb warning counts as an error.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.simplefilter("error", Image.DecompressionBombWarning)


@dataclass(frozen=True)
class ImageInfo:
    """What an image is; its size is that of the upright picture."""

    content_type: str
    width: int
    height: int


@dataclass(frozen=True)
class Picture(ImageInfo):
    """What a backend returned, and whether it is all black: how Stable Diffusion's safety checker says no."""

    black: bool


def refuse_larger(size: int, max_bytes: int, *, field: str = "image") -> None:
    """Raise `TooLarge` for an image file of more than `max_bytes`."""
    if size > max_bytes:
        raise TooLarge.of_field(field, f"must have at most {max_bytes} bytes")


def inspect(data: bytes, *, max_pixels: int) -> ImageInfo:
    """Return what an image is, having decoded it to its end.

    Raises `UnsupportedImage` or `TooLarge`.
    """
    with _reading():
        image = _open(data, max_pixels)
        size = image.size
        if _is_jpeg(image):
            # All coded bits are read, but only one grey pixel of 64 is reconstructed.
            image.draft("L", (1, 1))
            image.load()
        else:
            image.load()
            size = image.size
        width, height = reversed(size) if _orientation(image) >= 5 else size
    return ImageInfo(_content_type(data), width, height)


def prepare(data: bytes, *, width: int, height: int, fit: str, max_pixels: int) -> bytes:
    """Return the image upright, on white, in sRGB, at exactly `width` x `height`, as a PNG without metadata.

    `fit` is `cover` (centre crop), `contain` (white margins) or `stretch`. Of an animation it is the first frame.
    Raises `UnsupportedImage` or `TooLarge`.
    """
    with _reading():
        image = _open(data, max_pixels)
        jpeg = _is_jpeg(image)
        if not jpeg:
            image.load()
        orientation = _orientation(image)
        # Turning comes last, when there is little to turn: until then the target lies on its side.
        target = (height, width) if orientation >= 5 else (width, height)
        box, inner = _geometry(image.size, target, fit)
        if jpeg:
            shrink = min((box[2] - box[0]) / inner[0], (box[3] - box[1]) / inner[1])
            full = image.size
            # The decoder itself scales by 1/2, 1/4 or 1/8, to no less than what is needed.
            drafted = image.draft(None, (max(1, int(full[0] / shrink)), max(1, int(full[1] / shrink))))
            image.load()
            factor = drafted[1][2] / full[0] if drafted else 1
            box = (box[0] * factor, box[1] * factor, box[2] * factor, box[3] * factor)
        samples = _resizable(image)
    fitted = samples.resize(inner, Image.Resampling.LANCZOS, box=box, reducing_gap=2.0)
    picture = _srgb(_on_white(_eight_bits(fitted, image)), image.info.get("icc_profile"))
    if inner != target:
        canvas = Image.new("RGB", target, "white")
        canvas.paste(picture, ((target[0] - inner[0]) // 2, (target[1] - inner[1]) // 2))
        picture = canvas
    if orientation in _TURNS:
        picture = picture.transpose(_TURNS[orientation])
    return _encode(picture, "PNG", compress_level=1)


def examine(data: bytes) -> Picture:
    """Return what a backend's output is, having decoded it to its end.

    Raises `UnsupportedImage` if it is no PNG, JPEG or WebP image.
    """
    image = _output(data)
    extrema = cast("tuple[tuple[int, int], ...]", image.getextrema())
    black = all(high <= _NEARLY_BLACK for _, high in extrema)
    return Picture(_content_type(data), image.width, image.height, black)


def convert(data: bytes, output_format: str) -> bytes:
    """Return an output in one of `OUTPUT_FORMATS`: the very same bytes if it has it already.

    Raises `UnsupportedImage` if it is no image of one of them.
    """
    wanted = output_format.upper()
    if _sniff(data) == wanted:
        return data
    return _encode(_output(data), wanted, **OUTPUT_FORMATS[output_format].save_options)


@contextmanager
def _reading() -> Iterator[None]:
    """Turn what decoders raise into errors that a caller may see."""
    try:
        yield
    except ServiceError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge.of_field("image", "has too many pixels") from error
    # All of them: on hostile bytes, decoders raise almost anything (zlib.error, AssertionError, OverflowError, ...).
    except Exception as error:
        detail = "is not an image that can be read; accepted are JPEG, PNG, WebP, HEIC/HEIF, AVIF, GIF and TIFF"
        raise UnsupportedImage.of_field("image", detail) from error


def _sniff(data: bytes) -> str | None:
    """Return Pillow's name of the format that the first bytes promise."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brand, compatible = data[8:12], data[16 : min(int.from_bytes(data[:4], "big"), 256)]
        # mif1 and msf1 name the container only; pillow_heif would claim them, but decodes no AV1.
        either = brand in (b"mif1", b"msf1")
        if brand in (b"avif", b"avis") or (either and (b"avif" in compatible or b"avis" in compatible)):
            return "AVIF"
        return "HEIF" if either or brand.startswith(b"he") else None
    return next((name for name, starts in _SIGNATURES.items() if data.startswith(starts)), None)


def _content_type(data: bytes) -> str:
    name = _sniff(data)
    if name == "HEIF":
        return "image/heic" if data[8:10] == b"he" else "image/heif"
    return f"image/{name}".lower()


def _is_jpeg(image: Image.Image) -> bool:
    # MPO: a phone's JPEG with further pictures behind the first.
    return image.format in ("JPEG", "MPO")


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Read the header and check the size that it claims."""
    name = _sniff(data)
    if name is None:
        raise ValueError("unknown signature")
    _load_plugin(name)
    # Pillow's own limit guards what plugins allocate; it must only never stand below ours.
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    image = Image.open(BytesIO(data), formats=(name,))
    if image.width * image.height > max_pixels:
        detail = f"has {image.width} x {image.height} pixels; at most {max_pixels} pixels are accepted"
        raise TooLarge.of_field("image", detail)
    return image


def _load_plugin(name: str) -> None:
    if name in _PLUGINS:
        importlib.import_module(_PLUGINS[name])


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(value) if value in _TURNS else 1
    except Exception:  # noqa: BLE001 (broken EXIF of any kind makes no broken picture)
        return 1


def _geometry(
    size: tuple[int, int], target: tuple[int, int], fit: str
) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """Return which part of an image to show, and how large within the target."""
    width, height = size
    across, down = target[0] / width, target[1] / height
    if fit == "contain":
        scale = min(across, down)
        return (0, 0, width, height), (max(1, round(width * scale)), max(1, round(height * scale)))
    if fit == "cover":
        scale = max(across, down)
        left, top = max(0.0, width - target[0] / scale) / 2, max(0.0, height - target[1] / scale) / 2
        return (left, top, width - left, height - top), target
    return (0, 0, width, height), target


def _resizable(image: Image.Image) -> Image.Image:
    """Return the image in a mode that resampling handles. Alpha stays: colours are weighed by it."""
    if image.mode.startswith("I;16"):
        return image.convert("I")
    if image.has_transparency_data:
        return image.convert("LA" if image.mode in ("L", "LA", "La") else "RGBA")
    return image if image.mode in ("L", "I", "F", "CMYK", "LAB") else image.convert("RGB")


def _eight_bits(image: Image.Image, original: Image.Image) -> Image.Image:
    """Scale deep samples: from 16 bits, else from the usual range that holds the original's, else from their own."""
    if image.mode not in ("I", "F"):
        return image
    low, high = 0.0, 65535.0
    if original.mode in ("I", "F"):
        low, high = cast("tuple[float, float]", original.getextrema())
        if low >= 0:
            low, high = 0.0, next((usual for usual in (1.0, 255.0, 65535.0) if high <= usual), high)
    scale = 255 / (high - low) if high > low else 0.0
    return image.convert("F").point(lambda value: value * scale + (0.5 - low * scale)).convert("L")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode not in ("LA", "RGBA"):
        return image
    flat = Image.new(image.mode[:-1], image.size, "white")
    flat.paste(image.convert(flat.mode), mask=image.getchannel("A"))
    return flat


def _srgb(image: Image.Image, icc: Any) -> Image.Image:
    """Convert to RGB, through the embedded profile if it is of use."""
    if isinstance(icc, bytes) and len(icc) <= _MAX_ICC_BYTES:
        from PIL import ImageCms  # costs a cold start what few images need

        try:
            profile = ImageCms.ImageCmsProfile(BytesIO(icc))
            mode = _ICC_MODES.get(profile.profile.xcolor_space)
            source = image.convert("RGB") if mode == "RGB" else image
            if mode == source.mode and "sRGB" not in ImageCms.getProfileDescription(profile):
                intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
                srgb = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(source, profile, srgb, intent, outputMode="RGB", flags=flags)
                image = converted or image
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return image.convert("RGB")


def _output(data: bytes) -> Image.Image:
    """Decode a backend's output. Alpha, which diffusion models do not make, is dropped."""
    try:
        with _reading():
            if _content_type(data) not in EXTENSIONS:
                raise ValueError("not a format of outputs")
            image = _open(data, _MAX_OUTPUT_PIXELS)
            image.load()
            samples = _resizable(image)
    except ServiceError as error:
        raise UnsupportedImage("The output is not a PNG, JPEG or WebP image that can be read") from error
    return _eight_bits(samples, image).convert("RGB")


def _encode(image: Image.Image, name: str, **options: Any) -> bytes:
    _load_plugin(name)
    # Pillow would also write the profile and comment that it finds here.
    image.info = {}
    buffer = BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()
