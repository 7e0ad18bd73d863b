"""CPU time per create request and per run job: our handlers and the handwritten ones, by turns in one process.

Child of `__main__`. Process time counts all threads, and so the worker's own; the stub is another process.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import pathlib
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from tests.bench.setting import CREATE_FILE, MAX_PIXELS, Context, queue_event, report, silence

ROUNDS = 32
BLOCK = 2
WARM_UPS = 5

Call = Callable[[], Any]


def _seen() -> list[Any]:
    """Return the stub's record of calls and their sizes since the last time."""
    with urllib.request.urlopen(f"{os.environ['AWS_ENDPOINT_URL']}/seen") as answer:
        found: list[Any] = json.load(answer)
        return found


def _check_same(name: str, ours: Call, floor: Call) -> None:
    """Stop unless both make the same calls with bodies of the same size: the floor would be none."""
    asked = []
    for call in (ours, floor):
        _seen()
        call()
        asked.append(_seen())
    if asked[0] != asked[1]:
        raise SystemExit(f"{name}: the handwritten handler is no floor, its calls differ\n{asked[0]}\n{asked[1]}")


def _block(call: Call) -> float:
    # Each block starts with a clean heap and pays for the collections that its own garbage causes.
    gc.collect()
    started = time.process_time()
    for _ in range(BLOCK):
        call()
    return (time.process_time() - started) / BLOCK * 1000


def _measure(ours: Call, floor: Call) -> tuple[list[float], list[float]]:
    figures: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS):
        pairs = list(zip((ours, floor), figures, strict=True))
        for call, into in pairs if number % 2 else reversed(pairs):
            into.append(_block(call))
    return figures


def main(folder: pathlib.Path) -> None:
    silence()
    import requests

    from functions.api.app import handler as api
    from functions.worker.app import handler as worker
    from img2img import images
    from tests.bench import handwritten
    from tests.bench.clients import clients

    made = clients()
    session = requests.Session()
    # Ours reads no proxy of the environment either.
    session.trust_env = False
    jobs = handwritten.Worker(made, session, "SG_0123456789abcdef")
    create, message = json.loads((folder / CREATE_FILE).read_text()), queue_event()

    def created(answer: Any) -> None:
        if answer["statusCode"] != 202:
            raise SystemExit(f"create answered {answer}")

    def ran(answer: Any) -> None:
        if answer["batchItemFailures"]:
            raise SystemExit("run reported a failure")

    flows: dict[str, tuple[Call, Call]] = {
        "create": (lambda: created(api(create, Context())), lambda: created(handwritten.create(made, create))),
        "run": (lambda: ran(worker(message, Context())), lambda: ran(jobs.run(message))),
    }
    found = {}
    for name, pair in flows.items():
        for _ in range(WARM_UPS):
            for call in pair:
                call()
        _check_same(name, *pair)
        found[name] = _measure(*pair)
    sent = base64.b64decode(json.loads(create["body"])["image"])
    found["image"] = _measure(
        lambda: images.prepare(sent, width=512, height=512, fit="cover", max_pixels=MAX_PIXELS),
        lambda: handwritten.fitted(sent, 512, 512),
    )
    report(found)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
