"""Images: what any file becomes, and that no file does harm."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pillow_heif
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageCms, ImageStat

from img2img import images
from img2img.errors import ServiceError, TooLarge, UnsupportedImage
from tests.long import examples

pillow_heif.register_heif_opener()

EVENTS = Path(__file__).parents[2] / "events"
SAMPLES = {path.name: path.read_bytes() for path in EVENTS.iterdir() if path.suffix not in {".json", ".md"}}
CONTENT_TYPES = {
    "alpha.png": "image/png",
    "cmyk.jpg": "image/jpeg",
    "gray16.png": "image/png",
    "orientation-6.jpg": "image/jpeg",
    "palette.gif": "image/gif",
    "phone.heic": "image/heic",
    "photo.avif": "image/avif",
    "photo.tiff": "image/tiff",
    "photo.webp": "image/webp",
    "sample.jpg": "image/jpeg",
}
PIXELS = 4_000_000
RED, GREEN, BLUE, YELLOW, WHITE, BLACK = (
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 0),
    (255, 255, 255),
    (0, 0, 0),
)
# What turns an upright picture into the one that a camera stores along with this orientation.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encode(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    image.load()
    return image


def prepared(data: bytes, width: int = 64, height: int = 64, fit: str = "stretch", pixels: int = PIXELS) -> Image.Image:
    png = images.prepare(data, width=width, height=height, fit=fit, max_pixels=pixels)
    image = decode(png)
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (width, height))
    return image


def near(image: Image.Image, at: tuple[int, int], colour: tuple[int, int, int], tolerance: int = 12) -> bool:
    pixel = image.getpixel(at)
    assert isinstance(pixel, tuple)
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, colour, strict=True))


def difference(one: Image.Image, other: Image.Image) -> float:
    return max(ImageStat.Stat(ImageChops.difference(one, other)).mean)


def quadrants(width: int = 96, height: int = 64) -> Image.Image:
    """Red | green over blue | yellow: no two turns of it look alike."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    image.paste(YELLOW, (width // 2, height // 2, width, height))
    return image


def assert_quadrants(image: Image.Image, tolerance: int = 12) -> None:
    across, down = image.width // 4, image.height // 4
    for (x, y), colour in {(1, 1): RED, (3, 1): GREEN, (1, 3): BLUE, (3, 3): YELLOW}.items():
        assert near(image, (x * across, y * down), colour, tolerance), (x, y, image.getpixel((x * across, y * down)))


def oriented(orientation: int) -> bytes:
    """Return EXIF bytes: given these, the HEIF and AVIF writers put the turn into the container, as phones do."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """Assemble a PNG chunk by chunk, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


# --- the sample files ---


def test_every_sample_has_a_test() -> None:
    assert set(SAMPLES) == set(CONTENT_TYPES)
    assert set(CONTENT_TYPES.values()) | {"image/heif"} == set(images.ACCEPTED_CONTENT_TYPES)


@pytest.mark.parametrize("name", sorted(CONTENT_TYPES))
def test_inspect_tells_type_and_upright_size(name: str) -> None:
    size = (600, 400) if name == "sample.jpg" else (320, 213)
    assert images.inspect(SAMPLES[name], max_pixels=PIXELS) == images.ImageInfo(CONTENT_TYPES[name], *size)


@pytest.mark.parametrize("name", sorted(set(CONTENT_TYPES) - {"alpha.png", "gray16.png"}))
def test_every_sample_shows_the_photo_upright(name: str) -> None:
    photo = decode(SAMPLES["sample.jpg"]).resize((320, 213), Image.Resampling.LANCZOS)
    # GIF's palette of 128 colours and the HEIC's compression are the worst of them.
    assert difference(prepared(SAMPLES[name], 320, 213), photo) < 6


def test_deep_grey_sample_shows_the_photo_in_grey() -> None:
    photo = decode(SAMPLES["sample.jpg"]).resize((320, 213), Image.Resampling.LANCZOS).convert("L").convert("RGB")
    assert decode(SAMPLES["gray16.png"]).mode == "I;16"
    assert difference(prepared(SAMPLES["gray16.png"], 320, 213), photo) < 2


def test_transparent_sample_lies_on_white() -> None:
    picture = prepared(SAMPLES["alpha.png"], 320, 213)
    photo = decode(SAMPLES["sample.jpg"]).resize((320, 213), Image.Resampling.LANCZOS)
    assert near(picture, (0, 0), WHITE, 0)
    assert near(picture, (319, 212), WHITE, 0)
    middle = (80, 60, 240, 150)
    assert difference(picture.crop(middle), photo.crop(middle)) < 3


def test_phone_samples_hold_what_they_claim() -> None:
    exif = decode(SAMPLES["orientation-6.jpg"]).getexif()
    assert exif[0x0112] == 6
    assert exif.get_ifd(0x8825)
    # As phones store it: on its side, with the turn both in the container (irot) and in the EXIF.
    assert b"irot\x03" in SAMPLES["phone.heic"]
    assert pillow_heif.open_heif(SAMPLES["phone.heic"]).info["exif"]


@pytest.mark.parametrize("name", ["orientation-6.jpg", "phone.heic"])
def test_no_metadata_remains(name: str) -> None:
    data = images.prepare(SAMPLES[name], width=64, height=64, fit="cover", max_pixels=PIXELS)
    assert b"Example Phone" in SAMPLES[name]
    assert b"Example Phone" not in data
    assert not decode(data).getexif()
    assert not decode(data).info
    kinds = set()
    at = 8
    while at < len(data):
        kinds.add(data[at + 4 : at + 8])
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    assert kinds == {b"IHDR", b"IDAT", b"IEND"}


def test_comments_and_text_are_dropped() -> None:
    jpeg = encode(quadrants(), "JPEG", comment=b"secret remark")
    data = images.prepare(jpeg, width=64, height=64, fit="cover", max_pixels=PIXELS)
    assert b"secret remark" in jpeg
    assert b"secret" not in data
    assert b"secret" not in images.convert(jpeg, "png")
    assert b"secret" not in images.convert(jpeg, "webp")


# --- orientation ---


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(name: str, orientation: int) -> None:
    turn = STORED[orientation]
    stored = quadrants() if turn is None else quadrants().transpose(turn)
    data = encode(stored, name, exif=oriented(orientation))
    info = images.inspect(data, max_pixels=PIXELS)
    assert (info.width, info.height) == (96, 64)
    assert_quadrants(prepared(data, 48, 32), 30)
    assert_quadrants(prepared(data, 32, 32, "cover"), 30)


@pytest.mark.parametrize("fit", ["cover", "contain", "stretch"])
@pytest.mark.parametrize("orientation", [1, 5, 6, 8])
def test_large_jpeg_is_scaled_by_its_decoder_and_still_upright(orientation: int, fit: str) -> None:
    # Turned, the target's sides swap: scaling for the wrong side would leave too few pixels.
    turn = STORED[orientation]
    upright = quadrants(1801, 1203)
    data = encode(upright if turn is None else upright.transpose(turn), "JPEG", exif=oriented(orientation))
    picture = prepared(data, 100, 300, fit)
    if fit == "contain":
        assert near(picture, (50, 110), WHITE, 0)
        picture = picture.crop((0, 117, 100, 183))
    assert_quadrants(picture)


def test_scaling_by_the_decoder_keeps_the_detail() -> None:
    wide = decode(SAMPLES["sample.jpg"]).resize((2400, 1600), Image.Resampling.BICUBIC)
    for size in ((512, 512), (768, 512), (299, 399)):
        exact = prepared(encode(wide, "PNG", compress_level=1), *size, "cover")
        assert difference(prepared(encode(wide, "JPEG", quality=98), *size, "cover"), exact) < 2


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientation_is_none(orientation: int) -> None:
    assert_quadrants(prepared(encode(quadrants(), "JPEG", exif=oriented(orientation))))


def in_a_process(program: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run a program with a file's path as its argument, with nothing but the package."""
    return subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(images.__file__).parents[1])},
    )


def test_broken_exif_is_no_broken_image_and_says_nothing(tmp_path: Path) -> None:
    """In a process of its own, as warnings are errors in this one."""
    broken = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\0\0"
    (tmp_path / "broken.jpg").write_bytes(encode(quadrants(), "JPEG", exif=broken))
    program = (
        "import sys, pathlib; from img2img import images; data = pathlib.Path(sys.argv[1]).read_bytes();"
        "print(images.inspect(data, max_pixels=10**6).width);"
        "print(len(images.prepare(data, width=8, height=8, fit='cover', max_pixels=10**6)) > 0);"
        "print('pillow_heif' in sys.modules)"
    )
    done = in_a_process(program, tmp_path / "broken.jpg")
    # The last line: what only HEIC needs is not loaded for a JPEG.
    assert (done.stdout.split(), done.stderr) == (["96", "True", "False"], "")


# --- fit ---


def test_cover_cuts_the_middle_out() -> None:
    image = Image.new("RGB", (300, 100), RED)
    image.paste(GREEN, (100, 0, 200, 100))
    picture = prepared(encode(image, "PNG"), 50, 50, "cover")
    assert all(near(picture, (x, y), GREEN) for x in (1, 25, 48) for y in (0, 25, 49))
    tall = prepared(encode(image.transpose(Image.Transpose.ROTATE_90), "PNG"), 50, 50, "cover")
    assert all(near(tall, (x, y), GREEN) for x in (0, 25, 49) for y in (1, 25, 48))


def test_contain_fills_up_with_white() -> None:
    picture = prepared(encode(Image.new("RGB", (300, 100), RED), "PNG"), 60, 60, "contain")
    assert [near(picture, (30, y), WHITE, 0) for y in (0, 19, 20, 39, 40, 59)] == [True, True, False, False, True, True]
    assert all(near(picture, (x, 30), RED) for x in (0, 59))
    tall = prepared(encode(Image.new("RGB", (100, 300), RED), "PNG"), 60, 60, "contain")
    assert [near(tall, (x, 30), WHITE, 0) for x in (0, 19, 20, 39, 40, 59)] == [True, True, False, False, True, True]


def test_stretch_shows_all_of_it() -> None:
    assert_quadrants(prepared(encode(quadrants(300, 40), "PNG"), 64, 96))


@settings(max_examples=examples(60), deadline=None, database=None)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.sampled_from([512, 768]), st.sampled_from([512, 768])),
    st.sampled_from(["cover", "contain", "stretch"]),
    st.sampled_from(["PNG", "JPEG"]),
    st.integers(1, 8),
)
@example((1, 300), (768, 512), "contain", "JPEG", 6)
@example((300, 1), (512, 768), "cover", "JPEG", 1)
def test_size_is_always_exact(
    size: tuple[int, int], target: tuple[int, int], fit: str, name: str, orientation: int
) -> None:
    data = encode(Image.new("RGB", size, BLUE), name, exif=oriented(orientation))
    picture = prepared(data, *target, fit)
    assert near(picture, (target[0] // 2, target[1] // 2), BLUE)
    if fit != "contain":
        assert near(picture, (0, 0), BLUE)
        assert near(picture, (target[0] - 1, target[1] - 1), BLUE)


def test_extreme_shapes_do_not_break() -> None:
    strip = encode(Image.new("RGB", (60_000, 1), GREEN), "PNG")
    for fit in ("cover", "contain", "stretch"):
        assert near(prepared(strip, 64, 64, fit), (32, 31), GREEN)


# --- modes ---


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("RGB", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "WEBP"),
        ("RGBA", "WEBP"),
        ("P", "GIF"),
        ("RGB", "AVIF"),
        ("RGBA", "AVIF"),
        ("RGB", "HEIF"),
        ("RGBA", "HEIF"),
        ("RGB", "TIFF"),
        ("RGBA", "TIFF"),
        ("P", "TIFF"),
        ("CMYK", "TIFF"),
        ("YCbCr", "TIFF"),
        ("LAB", "TIFF"),
    ],
)
def test_colours_survive_every_mode(mode: str, name: str) -> None:
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(quadrants(), srgb, lab, outputMode="LAB")
        assert image is not None
    elif mode == "P":
        image = quadrants().quantize(8)
    else:
        image = quadrants().convert(mode)
    options = {"quality": 95} if name in {"JPEG", "WEBP", "AVIF", "HEIF"} else {}
    assert_quadrants(prepared(encode(image, name, **options)), 30)


@pytest.mark.parametrize(
    ("mode", "name"), [("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("L", "JPEG"), ("L", "TIFF"), ("1", "TIFF")]
)
def test_grey_survives_every_mode(mode: str, name: str) -> None:
    image = Image.linear_gradient("L")
    picture = prepared(encode(image.convert(mode), name), 256, 256)
    assert near(picture, (128, 2), BLACK)
    assert near(picture, (128, 253), WHITE)
    if mode != "1":
        assert near(picture, (128, 128), (128, 128, 128))


def test_cmyk_of_adobe_is_inverted_and_of_tiff_is_not() -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    jpeg = encode(cyan, "JPEG", quality=95)
    assert b"Adobe" in jpeg
    assert near(prepared(jpeg), (8, 8), (0, 255, 255))
    assert near(prepared(encode(cyan, "TIFF")), (8, 8), (0, 255, 255))


def gradient16() -> Image.Image:
    """256 columns, each 257 times its number: scaled to 8 bits it is its number."""
    image = Image.new("I;16", (256, 4))
    image.putdata([257 * (index % 256) for index in range(1024)])
    return image


@pytest.mark.parametrize(("name", "options"), [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})])
def test_sixteen_bits_are_scaled_not_clipped(name: str, options: dict[str, Any]) -> None:
    picture = prepared(encode(gradient16(), name, **options), 256, 4)
    assert [picture.getpixel((x, 2)) for x in range(256)] == [(x, x, x) for x in range(256)]


def test_sixteen_bit_colours_and_alpha_are_scaled() -> None:
    opaque = struct.pack(">HHHH", 0x8080, 0x4040, 0xFFFF, 0xFFFF)
    clear = struct.pack(">HHHH", 0, 0, 0, 0)
    data = png(8, 8, 16, 6, (b"\0" + opaque * 4 + clear * 4) * 8)
    picture = prepared(data, 8, 8)
    assert near(picture, (1, 4), (0x80, 0x40, 0xFF), 2)
    assert near(picture, (7, 4), WHITE, 2)
    grey = png(8, 8, 16, 4, (b"\0" + struct.pack(">HH", 0x4040, 0xFFFF) * 8) * 8)
    assert near(prepared(grey, 8, 8), (4, 4), (0x40, 0x40, 0x40), 1)


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("I", (0, 32768, 65535), (0, 128, 255)),
        ("I", (0, 1 << 29, 1 << 30), (0, 128, 255)),
        ("I", (-1000, 0, 1000), (0, 128, 255)),
        ("F", (0.0, 0.5, 1.0), (0, 128, 255)),
        ("F", (0.0, 100.0, 255.0), (0, 100, 255)),
        ("F", (-5.0, 0.0, 5.0), (0, 128, 255)),
        ("F", (7e9, 7e9, 7e9), (255, 255, 255)),
        ("F", (0.0, float("nan"), 1.0), (0, None, 255)),
        ("F", (0.0, 0.0, float("inf")), (None, None, None)),
    ],
)
def test_deep_samples_are_scaled_by_their_range(
    mode: str, values: tuple[float, ...], expected: tuple[int | None, ...]
) -> None:
    image = Image.new(mode, (30, 4))
    image.putdata([values[index % 30 // 10] for index in range(120)])
    picture = prepared(encode(image, "TIFF"), 30, 4)
    for column, value in zip((4, 15, 25), expected, strict=True):
        assert value is None or near(picture, (column, 2), (value, value, value), 2), column


def test_transparency_lies_on_white_whatever_colour_it_hides() -> None:
    for hidden in (BLACK, GREEN):
        image = Image.new("RGBA", (40, 40), (*hidden, 0))
        image.paste((255, 0, 0, 255), (10, 10, 30, 30))
        for name in ("PNG", "WEBP", "TIFF"):
            options = {"lossless": True, "exact": True} if name == "WEBP" else {}
            # Enlarged: a hidden colour would bleed into the seam.
            picture = prepared(encode(image, name, **options), 160, 160)
            assert near(picture, (5, 5), WHITE, 1)
            assert near(picture, (80, 80), RED, 1)
            assert all(picture.getpixel((x, 80))[0] >= 250 for x in range(160))  # type: ignore[index]


@pytest.mark.parametrize(("mode", "transparent"), [("P", 0), ("L", 0), ("RGB", BLACK), ("1", 0)])
def test_a_colour_declared_transparent_is_white(mode: str, transparent: Any) -> None:
    image = Image.new("L", (20, 20), 0)
    image.paste(255, (10, 0, 20, 20))
    picture = prepared(encode(image.convert(mode), "PNG", transparency=transparent), 20, 20)
    assert near(picture, (2, 10), WHITE, 1)


def test_half_transparent_is_half_white() -> None:
    assert near(prepared(encode(Image.new("RGBA", (8, 8), (255, 0, 0, 128)), "PNG")), (4, 4), (255, 127, 127), 2)
    assert near(prepared(encode(Image.new("LA", (8, 8), (0, 128)), "PNG")), (4, 4), (127, 127, 127), 2)


def foreign_profile() -> bytes:
    """sRGB's profile with red and blue swapped, under another name."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = {
        profile[at : at + 4]: struct.unpack(">II", profile[at + 4 : at + 12])
        for at in range(132, 132 + 12 * struct.unpack(">I", profile[128:132])[0], 12)
    }
    swapped = bytearray(profile)
    for to, source in ((b"rXYZ", b"bXYZ"), (b"bXYZ", b"rXYZ")):
        (at, size), (start, _) = tags[to], tags[source]
        swapped[at : at + size] = profile[start : start + size]
    return bytes(swapped).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_embedded_profile_is_converted_to_srgb(name: str) -> None:
    data = encode(Image.new("RGB", (32, 32), RED), name, icc_profile=foreign_profile())
    assert near(prepared(data), (30, 30), BLUE)


@pytest.mark.parametrize("profile", [b"", b"no profile", foreign_profile()[:200], b"\0" * 5_000_000])
def test_broken_profile_is_passed_over(profile: bytes) -> None:
    data = encode(Image.new("RGB", (32, 32), RED), "TIFF", icc_profile=profile)
    assert near(prepared(data), (30, 30), RED)


def test_profile_of_another_colour_space_is_passed_over() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert near(prepared(encode(Image.new("RGB", (32, 32), RED), "PNG", icc_profile=lab)), (30, 30), RED)
    grey = prepared(encode(Image.new("L", (32, 32), 90), "PNG", icc_profile=foreign_profile()))
    assert near(grey, (30, 30), (90, 90, 90), 3)


@pytest.mark.parametrize("name", ["GIF", "TIFF", "WEBP", "AVIF", "PNG", "HEIF", "MPO"])
def test_first_frame_is_taken(name: str) -> None:
    first, *rest = (Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN, BLUE))
    data = encode(first, name, save_all=True, append_images=rest)
    if name != "HEIF":
        assert getattr(Image.open(BytesIO(data)), "n_frames", 1) == 3
    assert near(prepared(data), (30, 30), RED)
    expected = {"MPO": "image/jpeg", "HEIF": "image/heic"}.get(name, f"image/{name.lower()}")
    assert images.inspect(data, max_pixels=PIXELS).content_type == expected


def test_avif_under_the_general_brand_is_read_as_avif() -> None:
    data = SAMPLES["photo.avif"]
    assert data[8:12] == b"avif"
    general = data[:8] + b"mif1" + data[12:]
    assert images.inspect(general, max_pixels=PIXELS) == images.ImageInfo("image/avif", 320, 213)
    general = SAMPLES["phone.heic"].replace(b"ftypheic", b"ftypmif1", 1)
    assert images.inspect(general, max_pixels=PIXELS) == images.ImageInfo("image/heif", 320, 213)


# --- what is refused ---


def both(data: bytes, pixels: int = PIXELS) -> ServiceError:
    """Return the error that `inspect` and `prepare` agree on."""
    with pytest.raises(ServiceError) as inspected:
        images.inspect(data, max_pixels=pixels)
    with pytest.raises(ServiceError) as refused:
        images.prepare(data, width=64, height=64, fit="cover", max_pixels=pixels)
    assert type(inspected.value) is type(refused.value)
    assert [error.field for error in refused.value.errors] == ["image"]
    return refused.value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"II*\0",
        b"RIFF\0\0\0\0WEBP",
        b"\0\0\0\x18ftypheic",
        b"\0\0\0\x18ftypavif",
        b"\0\0\0\x18ftypmif1",
        b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
        b"This is a text file named .jpg\n",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"<!doctype html><title>404</title>",
        b"%PDF-1.7\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"8BPS\0\x01" + bytes(64),
        *(encode(quadrants(), name) for name in ("BMP", "PPM", "TGA", "ICO", "JPEG2000", "PCX", "DDS")),
    ],
    ids=lambda data: repr(data[:16]),
)
def test_what_is_no_accepted_image_is_unsupported(data: bytes) -> None:
    error = both(data)
    assert type(error) is UnsupportedImage
    assert all(name in error.detail for name in ("JPEG", "PNG", "WebP", "HEIC", "AVIF", "GIF", "TIFF"))


@pytest.mark.parametrize("name", sorted(CONTENT_TYPES))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_file_is_unsupported(name: str, share: float) -> None:
    data = SAMPLES[name]
    assert type(both(data[: int(len(data) * share)])) is UnsupportedImage


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF", "GIF"])
def test_pixel_limit_is_met_exactly(name: str) -> None:
    data = encode(quadrants(), name)
    assert images.inspect(data, max_pixels=96 * 64).width == 96
    prepared(data, pixels=96 * 64)
    error = both(data, 96 * 64 - 1)
    assert type(error) is TooLarge
    assert "96 x 64" in error.detail


def jpeg_bomb() -> bytes:
    data = bytearray(encode(quadrants(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


def gif_bomb(*, lying: bool) -> bytes:
    data = bytearray(encode(Image.new("P", (8, 8)), "GIF"))
    at = data.index(b",\0\0\0\0\x08\0\x08\0") + 5 if lying else 6
    data[at : at + 4] = struct.pack("<HH", 60_000, 60_000)
    return bytes(data)


def webp_bomb() -> bytes:
    data = bytearray(encode(quadrants().convert("RGBA"), "WEBP", lossless=False, exif=oriented(1)))
    at = data.index(b"VP8X")
    data[at + 12 : at + 18] = (16_000 - 1).to_bytes(3, "little") * 2
    return bytes(data)


def tiff_bomb(side: int = 60_000) -> bytes:
    data = bytearray(encode(quadrants(), "TIFF", compression="tiff_adobe_deflate"))
    for tag, old in ((256, 96), (257, 64)):
        at = next(
            data.index(entry)
            for kind, code in ((3, "H2x"), (4, "I"))
            if (entry := struct.pack("<HHI" + code, tag, kind, 1, old)) in data
        )
        data[at : at + 12] = struct.pack("<HHII", tag, 4, 1, side)
    return bytes(data)


def heif_bomb(name: str) -> bytes:
    data = bytearray(SAMPLES[name])
    at = data.index(b"ispe")
    data[at + 8 : at + 16] = struct.pack(">II", 60_000, 60_000)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        png(60_000, 60_000, 8, 2, b""),
        png(60_000, 60_000, 1, 0, b"\0" * 100),
        # Between Pillow's warning and its error.
        png(10_000, 10_000, 8, 2, b""),
        jpeg_bomb(),
        gif_bomb(lying=False),
        gif_bomb(lying=True),
        webp_bomb(),
        tiff_bomb(),
        tiff_bomb(9_800),
    ],
    ids=["png", "png-1-bit", "png-100-megapixels", "jpeg", "gif", "gif-frame", "webp", "tiff", "tiff-96-megapixels"],
)
def test_pixel_bomb_is_too_large(data: bytes) -> None:
    assert len(data) < 2000
    for pixels in (PIXELS, 64_000_000):
        assert type(both(data, pixels)) is TooLarge


@pytest.mark.parametrize("name", ["phone.heic", "photo.avif"])
def test_container_that_lies_about_its_size_is_refused(name: str) -> None:
    both(heif_bomb(name))


def test_limit_above_pillows_own_is_honoured() -> None:
    data = encode(Image.new("1", (10_000, 9_500)), "PNG")
    assert images.inspect(data, max_pixels=96_000_000).width == 10_000
    assert type(both(data, 94_000_000)) is TooLarge


def only_service_errors(data: bytes) -> None:
    for fit in ("cover", "contain", "stretch"):
        try:
            prepared(data, 40, 24, fit)
        except ServiceError as error:
            assert [item.field for item in error.errors] == ["image"]  # noqa: PT017 (both outcomes are right)
    for check in (lambda: images.inspect(data, max_pixels=PIXELS), lambda: images.examine(data)):
        try:
            check()
        except ServiceError as error:
            assert error.detail  # noqa: PT017


@settings(max_examples=examples(150), deadline=None, database=None)
@given(
    st.sampled_from(
        [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"MM\0*", b"RIFF\0\0\0\x40WEBP",
         b"\0\0\0\x18ftypheic", b"\0\0\0\x18ftypavif", b"\0\0\0\x18ftypmif1"]
    ),
    st.binary(max_size=400),
)  # fmt: skip
def test_random_bytes_raise_nothing_else(signature: bytes, rest: bytes) -> None:
    only_service_errors(signature + rest)


@settings(max_examples=examples(150), deadline=None, database=None)
@given(st.sampled_from(sorted(SAMPLES)), st.floats(0, 1))
def test_truncations_raise_nothing_else(name: str, share: float) -> None:
    only_service_errors(SAMPLES[name][: int(len(SAMPLES[name]) * share)])


@settings(max_examples=examples(300), deadline=None, database=None)
@given(
    st.sampled_from(sorted(SAMPLES)),
    st.lists(st.tuples(st.integers(0, 2**20), st.sampled_from([64, 1024, 2**20]), st.integers(0, 255)), min_size=1),
)
def test_flipped_bits_raise_nothing_else(name: str, flips: list[tuple[int, int, int]]) -> None:
    data = bytearray(SAMPLES[name])
    for at, within, mask in flips:
        # Most of them in the headers: that is where they hurt.
        data[at % min(within, len(data))] ^= mask
    only_service_errors(bytes(data))


def test_no_byte_of_a_heic_header_kills_the_process() -> None:
    """In a process of its own: a decoder that dies takes everything with it, and no `except` is asked."""
    program = (
        "import sys, pathlib; from img2img import errors, images\n"
        "data = pathlib.Path(sys.argv[1]).read_bytes()\n"
        "for at in range(data.index(b'mdat')):\n"
        "    for mask in (1, 128):\n"
        "        changed = data[:at] + bytes([data[at] ^ mask]) + data[at + 1:]\n"
        "        try: images.inspect(changed, max_pixels=10**6)\n"
        "        except errors.ServiceError: pass\n"
    )
    done = in_a_process(program, EVENTS / "phone.heic")
    assert (done.returncode, done.stderr) == (0, "")


def test_threads_do_not_disturb_each_other() -> None:
    expected = {name: prepared(data).tobytes() for name, data in SAMPLES.items()}
    names = sorted(SAMPLES) * 3
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda name: prepared(SAMPLES[name]).tobytes(), names))
    assert results == [expected[name] for name in names]


# --- outputs ---


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_output_is_examined(name: str) -> None:
    kind = f"image/{name.lower()}"
    assert images.examine(encode(quadrants(), name)) == images.Picture(kind, 96, 64, black=False)
    assert images.examine(encode(Image.new("RGB", (96, 64)), name)) == images.Picture(kind, 96, 64, black=True)
    assert kind in images.EXTENSIONS


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_black_is_seen_in_every_mode(mode: str) -> None:
    assert images.examine(encode(Image.new(mode, (16, 16)), "PNG")).black
    image = Image.new("L", (16, 16))
    image.putpixel((15, 15), 255)
    lit = image.convert("I").point(lambda value: value * 257).convert("I;16") if mode == "I;16" else image.convert(mode)
    assert not images.examine(encode(lit, "PNG")).black


def test_black_ignores_alpha_and_forgives_noise() -> None:
    assert images.examine(encode(Image.new("RGBA", (16, 16), (0, 0, 0, 255)), "PNG")).black
    assert images.examine(encode(Image.new("RGB", (16, 16), (3, 3, 3)), "PNG")).black
    assert not images.examine(encode(Image.new("RGB", (16, 16), (0, 4, 0)), "PNG")).black


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b'{"error": "no image"}',
        b"<html></html>",
        encode(quadrants(), "PNG")[:-40],
        encode(quadrants(), "JPEG")[:-200],
        encode(quadrants(), "WEBP")[:-100],
        encode(quadrants(), "GIF"),
        encode(quadrants(), "TIFF"),
        SAMPLES["photo.avif"],
        png(60_000, 60_000, 8, 2, b""),
    ],
    ids=["empty", "json", "html", "cut-png", "cut-jpeg", "cut-webp", "gif", "tiff", "avif", "bomb"],
)
def test_output_that_is_no_image_is_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedImage) as caught:
        images.examine(data)
    # It is the backend's doing, not a field of the caller's request.
    assert not caught.value.errors


@pytest.mark.parametrize("to", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_output_is_converted(name: str, to: str) -> None:
    data = encode(quadrants(), name, quality=95)
    converted = images.convert(data, to)
    if name.lower() == to:
        assert converted is data
    else:
        assert images.examine(converted).content_type == f"image/{to}"
        assert_quadrants(decode(converted).convert("RGB"), 40)


def test_same_format_keeps_the_backends_bytes_with_all_they_carry() -> None:
    data = encode(quadrants(), "PNG", exif=oriented(1)) + b"trailing"
    assert images.convert(data, "png") is data


def test_converted_jpeg_keeps_full_colour_resolution() -> None:
    lines = Image.new("RGB", (64, 64), RED)
    for x in range(0, 64, 2):
        lines.paste(BLUE, (x, 0, x + 1, 64))
    jpeg = decode(images.convert(encode(lines, "PNG"), "jpeg"))
    assert near(jpeg, (32, 32), BLUE, 40)
    assert near(jpeg, (33, 32), RED, 40)
    assert jpeg.mode == "RGB"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16"])
@pytest.mark.parametrize("to", ["jpeg", "webp"])
def test_any_mode_of_output_converts(mode: str, to: str) -> None:
    assert decode(images.convert(encode(Image.new(mode, (16, 16)), "PNG"), to)).mode == "RGB"
