"""The files that a run works on, made from `events/sample.jpg`, always the same.

python -m tests.bench.photos FOLDER small    a request, its prepared picture, a generated one
python -m tests.bench.photos FOLDER large    photos of 12 and 48 megapixels
"""

from __future__ import annotations

import base64
import json
import pathlib
import random
import sys
from io import BytesIO

import pillow_heif
from PIL import Image, ImageOps

from tests.bench.setting import (
    CREATE_FILE,
    INPUT_FILE,
    LARGE_FILES,
    MEDIUM_FILE,
    OUTPUT_FILE,
    PROMPT,
    ROOT,
    SEED,
    rest_event,
)


def photo(width: int, height: int, grain: float = 0.08) -> Image.Image:
    """Return the sample photo at a size, with some of the grain that enlarging has smoothed away."""
    with Image.open(ROOT / "events" / "sample.jpg") as sample:
        enlarged = ImageOps.fit(sample.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    tile = 1024
    values = Image.frombytes("L", (tile, tile), random.Random(0).randbytes(tile * tile))
    noise = Image.new("L", enlarged.size)
    for left in range(0, width, tile):
        for top in range(0, height, tile):
            noise.paste(values, (left, top))
    return Image.blend(enlarged, Image.merge("RGB", (noise, noise, noise)), grain)


def small(folder: pathlib.Path) -> None:
    picture = photo(512, 512, 0)
    sent = BytesIO()
    picture.save(sent, "JPEG", quality=90)
    picture.save(folder / INPUT_FILE, compress_level=1)
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / OUTPUT_FILE, quality=90)
    body = {
        "image": base64.b64encode(sent.getvalue()).decode(),
        "prompt": PROMPT,
        "samples": 1,
        "strength": 0.75,
        "seed": SEED,
    }
    event = rest_event("POST", "/sd1.5-img2img", body, Prefer="respond-async")
    (folder / CREATE_FILE).write_text(json.dumps(event))


def large(folder: pathlib.Path) -> None:
    photo(4000, 3000).save(folder / MEDIUM_FILE, quality=90)
    pillow_heif.register_heif_opener()
    photo(8000, 6000).save(folder / LARGE_FILES["JPEG"], quality=90)
    # Without grain: the PNG would be larger than what the API accepts, the HEIC slow to make.
    smooth = photo(8000, 6000, 0)
    smooth.save(folder / LARGE_FILES["PNG"], compress_level=1)
    smooth.save(folder / LARGE_FILES["HEIC"], quality=50, enc_params={"preset": "ultrafast"})


if __name__ == "__main__":
    {"small": small, "large": large}[sys.argv[2]](pathlib.Path(sys.argv[1]))
