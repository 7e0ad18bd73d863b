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


def photo(width: int, height: int) -> Image.Image:
    """Return the sample photo at a size, with the grain that enlarging has smoothed away."""
    with Image.open(ROOT / "events" / "sample.jpg") as sample:
        enlarged = ImageOps.fit(sample.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    tile = 1024
    grain = Image.frombytes("L", (tile, tile), random.Random(0).randbytes(tile * tile))
    noise = Image.new("L", enlarged.size)
    for left in range(0, width, tile):
        for top in range(0, height, tile):
            noise.paste(grain, (left, top))
    return Image.blend(enlarged, Image.merge("RGB", (noise, noise, noise)), 0.04)


def small(folder: pathlib.Path) -> None:
    photo(512, 512).save(folder / "small.jpg", quality=85)
    photo(512, 512).save(folder / INPUT_FILE, compress_level=1)
    photo(512, 512).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / OUTPUT_FILE, quality=90)
    image = base64.b64encode((folder / "small.jpg").read_bytes()).decode()
    body = {"image": image, "prompt": PROMPT, "samples": 1, "strength": 0.75, "seed": SEED}
    event = rest_event("POST", "/sd1.5-img2img", body, Prefer="respond-async")
    (folder / CREATE_FILE).write_text(json.dumps(event))


def large(folder: pathlib.Path) -> None:
    photo(4000, 3000).save(folder / MEDIUM_FILE, quality=90)
    pillow_heif.register_heif_opener()
    picture = photo(8000, 6000)
    picture.save(folder / LARGE_FILES["JPEG"], quality=90)
    # Two bits less, or the file would be larger than what the API accepts.
    ImageOps.posterize(picture, 6).save(folder / LARGE_FILES["PNG"], compress_level=1)
    picture.save(folder / LARGE_FILES["HEIC"], quality=30, enc_params={"preset": "ultrafast"})


if __name__ == "__main__":
    {"small": small, "large": large}[sys.argv[2]](pathlib.Path(sys.argv[1]))
