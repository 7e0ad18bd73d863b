"""Image work: CPU time of fitting a photo, and peak memory of a job's preparation. Child of `__main__`.

python -m tests.bench.pictures FOLDER fit               12 megapixels against libvips, by turns
python -m tests.bench.pictures FOLDER memory FORMAT     48 megapixels in a fresh API function
"""

from __future__ import annotations

import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable

from tests.bench.setting import LARGE_FILES, MAX_PIXELS, MEDIUM_FILE, report, silence

ROUNDS = 15


def _difference(ours: bytes, floor: bytes) -> float:
    """Return how far apart two pictures are: the mean over all samples, in levels of 255."""
    from io import BytesIO

    from PIL import Image, ImageChops, ImageStat

    pictures = [Image.open(BytesIO(data)).convert("RGB") for data in (ours, floor)]
    return statistics.mean(ImageStat.Stat(ImageChops.difference(*pictures)).mean)


def fit(folder: pathlib.Path) -> None:
    import pyvips

    from img2img import images

    data = (folder / MEDIUM_FILE).read_bytes()

    def ours() -> bytes:
        return images.prepare(data, width=512, height=512, fit="cover", max_pixels=MAX_PIXELS)

    def floor() -> bytes:
        picture = pyvips.Image.thumbnail_buffer(data, 512, height=512, crop="centre")
        # The fastest that makes a file of the same size.
        png: bytes = picture.pngsave_buffer(compression=2, filter="sub", keep="none")
        return png

    # Nothing of one picture may be left over for the next.
    pyvips.cache_set_max(0)
    apart = _difference(ours(), floor())
    if apart > 3:
        raise SystemExit(f"the two pictures are not the same work: {apart:.1f} levels apart")
    calls: tuple[Callable[[], bytes], ...] = (ours, floor)
    figures: tuple[list[float], ...] = ([], [])
    for number in range(ROUNDS):
        pairs = list(zip(calls, figures, strict=True))
        for call, into in pairs if number % 2 else reversed(pairs):
            started = time.process_time()
            call()
            into.append((time.process_time() - started) * 1000)
    report(
        {
            "ours": figures[0],
            "floor": figures[1],
            "bytes": [len(ours()), len(floor())],
            "apart": apart,
        }
    )


def _peak() -> float:
    """Return the most memory that this process has held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def memory(folder: pathlib.Path, kind: str) -> None:
    silence()
    from functions.api.app import make_clients
    from img2img import images

    make_clients()
    before = _peak()
    data = (folder / LARGE_FILES[kind]).read_bytes()
    images.prepare(data, width=512, height=512, fit="cover", max_pixels=MAX_PIXELS)
    report({"before": before, "peak": _peak()})


if __name__ == "__main__":
    if sys.argv[2] == "fit":
        fit(pathlib.Path(sys.argv[1]))
    else:
        memory(pathlib.Path(sys.argv[1]), sys.argv[3])
