"""A stand-in for Segmind's `POST /v1/sd1.5-img2img`: its checks, headers and errors, and pictures marked "simulated".

What it does next is told through a query on its own port; a list of all of it:

    curl -X POST 'http://127.0.0.1:PORT/control?next=429&times=2&reset_in=3'
    curl http://127.0.0.1:PORT/control

    next=BEHAVIOUR   what the next call gets; with times=N the next N calls; queued behind what is queued already
        400 401 403 404 405 406-credits 406-content-type 429 500 502 503 504    that status (405 is HTML)
        hang             no answer until release, stop or the client goes away
        cut              the connection closed in the middle of a billed answer
        cut-before       the connection closed without an answer
        html             200 with an HTML page
        json             200 with JSON, whatever `base64` says
        black            200 with a black picture
        garbage          200 image/jpeg with bytes that are no image
        empty            200 image/jpeg with no bytes
    latency=SECONDS  how long each answer takes
    reset_in=SECONDS how far ahead `x-rate-limit-reset-at-utc` lies
    credits=N        what is left of the account; a call that costs more gets a 406
    key=KEY          the only key accepted from now on
    release=1        ends every `hang`, and answers at once what waits for its latency
    reset=1          back to the start: key, credits, latency, counts and queue

GET /control answers JSON: `calls`, `calls_by_seed`, `billed` (answers with 200), `behaviours` still queued, `credits`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import json
import secrets
import select
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from PIL import Image, ImageDraw, ImageFont, ImageOps

from local.http_server import Handler, LoopbackServer

PATH = "/v1/sd1.5-img2img"
COST = 0.004
CREDITS = 100.0
MAX_BODY = 50_000_000
ERRORS = {
    "400": "Bad request: Invalid parameters",
    "401": "Unauthorized: Invalid API key",
    "403": "Forbidden: No access to this model",
    "404": "Not found: Model not found",
    "405": "Method Not Allowed",
    "406-credits": "Insufficient credits",
    "406-content-type": "Not acceptable: Content type must be application/json",
    "429": "Rate limit exceeded",
    "500": "Internal server error",
    "502": "Bad gateway",
    "503": "Service unavailable",
    "504": "Gateway timeout",
}
BEHAVIOURS = (*ERRORS, "hang", "cut", "cut-before", "html", "json", "black", "garbage", "empty")
SCHEDULERS = (
    *("DDIM", "DPM Multi", "DPM Single", "Euler a", "Euler", "Heun"),
    *("DPM2 a Karras", "DPM2 Karras", "LMS", "PNDM", "DDPM", "UniPC"),
)
DEFAULTS: dict[str, Any] = {
    "negative_prompt": "",
    "samples": 1,
    "scheduler": "DDIM",
    "num_inference_steps": 20,
    "guidance_scale": 7.5,
    "strength": 1,
    "seed": -1,
    "img_width": 512,
    "img_height": 512,
    "base64": False,
}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _is_integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "image": (_is_text, "must be a string"),
    "prompt": (lambda value: isinstance(value, str) and bool(value.strip()), "must be a string that is not empty"),
    "negative_prompt": (_is_text, "must be a string"),
    "samples": (_is_integer(1, 4), "must be an integer from 1 to 4"),
    "scheduler": (lambda value: value in SCHEDULERS, f"must be one of {', '.join(SCHEDULERS)}"),
    "num_inference_steps": (_is_integer(20, 100), "must be an integer from 20 to 100"),
    "guidance_scale": (_is_number(0.1, 25), "must be a number from 0.1 to 25"),
    "strength": (_is_number(0.1, 1), "must be a number from 0.1 to 1"),
    "seed": (_is_integer(-1, 999_999_999_999_999), "must be an integer from -1 to 999999999999999"),
    "img_width": (lambda value: type(value) is int and value in (512, 768), "must be 512 or 768"),
    "img_height": (lambda value: type(value) is int and value in (512, 768), "must be 512 or 768"),
    "base64": (lambda value: isinstance(value, bool), "must be true or false"),
}


class _Wrong(ValueError):
    """The request is not accepted; the text says why."""


class SegmindStandIn:
    """The server and what it is told. `calls` records every request to the API: all fields but the image itself."""

    def __init__(self, key: str, port: int = 0, latency: float = 0.0) -> None:
        self.port = port
        self._initial = (key, latency)
        self._lock = threading.Condition()
        self._server: LoopbackServer | None = None
        self.released = threading.Event()
        self._stopped = threading.Event()
        self.reset()

    def reset(self) -> None:
        """Go back to how it was made, after a `release`."""
        self.release()
        with self._lock:
            self.key, self.latency = self._initial
            self.credits = CREDITS
            self.reset_in = 1.0
            self.billed = 0
            self.calls: list[dict[str, Any]] = []
            self._queue: deque[str] = deque()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def control_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/control"

    def start(self) -> SegmindStandIn:
        """Listen, on the same port again after a `stop`."""
        self._stopped.clear()
        stand_in = self

        class Bound(_Handler):
            owner = stand_in

        self._server = LoopbackServer(Bound, self.port)
        self.port = int(self._server.server_address[1])
        self._server.start()
        return self

    def stop(self) -> None:
        self._stopped.set()
        self.release()
        if self._server is not None:
            self._server.stop()
            self._server = None

    def __enter__(self) -> SegmindStandIn:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def behave(self, behaviour: str, times: int = 1) -> None:
        """Queue what the next `times` calls get."""
        if behaviour not in BEHAVIOURS:
            raise ValueError(f"next must be one of {', '.join(BEHAVIOURS)}")
        with self._lock:
            self._queue.extend([behaviour] * times)

    def rotate(self, key: str) -> None:
        """Accept only `key` from now on."""
        self.key = key

    def release(self) -> None:
        """End every `hang` and latency that is waiting."""
        released, self.released = self.released, threading.Event()
        released.set()

    def summary(self) -> dict[str, Any]:
        """Return the counts, without keys or prompts."""
        with self._lock:
            seeds = Counter(str(call["body"]["seed"]) for call in self.calls if "seed" in call["body"])
            return {
                "calls": len(self.calls),
                "calls_by_seed": dict(seeds),
                "billed": self.billed,
                "behaviours": list(self._queue),
                "credits": self.credits,
            }

    def control(self, query: str) -> None:
        """Do what a control query says, all of it or, when any of it is wrong, nothing."""
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
        given = dict(pairs)
        if len(given) < len(pairs):
            raise ValueError("each name may be given once")
        known = ("next", "times", "latency", "reset_in", "credits", "key", "release", "reset")
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{', '.join(unknown)}: not known; the names are {', '.join(known)}")
        numbers = {name: float(given[name]) for name in ("latency", "reset_in", "credits") if name in given}
        if not all(0 <= number <= 1_000_000 for number in numbers.values()):
            raise ValueError(f"{', '.join(numbers)} must be numbers from 0 to 1000000")
        times = int(given.get("times", "1"))
        if not 1 <= times <= 1000 or ("times" in given and "next" not in given):
            raise ValueError("times must be from 1 to 1000, and goes with next")
        if given.get("next", "hang") not in BEHAVIOURS:
            raise ValueError(f"next must be one of {', '.join(BEHAVIOURS)}")
        if given.get("key") == "" or {given.get("reset", "1"), given.get("release", "1")} != {"1"}:
            raise ValueError("key must not be empty; reset and release must be 1")
        if "reset" in given:
            self.reset()
        if "release" in given:
            self.release()
        for name, number in numbers.items():
            setattr(self, name, number)
        if "key" in given:
            self.rotate(given["key"])
        if "next" in given:
            self.behave(given["next"], times)

    def record(self, call: dict[str, Any]) -> str | None:
        """Count a call and return what it was told to get, if anything."""
        with self._lock:
            self.calls.append(call)
            self._lock.notify_all()
            return self._queue.popleft() if self._queue else None

    def wait_for_calls(self, count: int, timeout: float = 5.0) -> bool:
        """Wait until at least `count` calls have arrived; False when they have not."""
        with self._lock:
            return self._lock.wait_for(lambda: len(self.calls) >= count, timeout)

    def bill(self) -> float | None:
        """Take the price of a call and return what is left, or None when the account does not have it."""
        with self._lock:
            if self.credits < COST:
                return None
            self.credits = round(self.credits - COST, 6)
            self.billed += 1
            return self.credits

    def rest(self, released: threading.Event) -> None:
        """Take as long as an answer takes, or until the release."""
        if self.latency:
            released.wait(self.latency)

    def hang(self, released: threading.Event, connection: socket.socket) -> None:
        """Wait for the release, or for the client to go away."""
        while not self._stopped.is_set() and not released.wait(0.05):
            # No client sends another request before this one is answered: what can be read is its end.
            if select.select([connection], [], [], 0)[0]:
                return


class _Handler(Handler):
    owner: SegmindStandIn

    def do_GET(self) -> None:
        if urlsplit(self.path).path == "/control":
            self._json(200, self.owner.summary())
        elif urlsplit(self.path).path == PATH:
            self._error("405")
        else:
            self._error("404")

    def do_POST(self) -> None:
        body = self.read_body(MAX_BODY)
        if body is None:
            self.reply_and_drop_body(413, [("Content-Type", "application/json")], b'{"error": "Payload too large"}')
            return
        parts = urlsplit(self.path)
        if parts.path == "/control":
            try:
                self.owner.control(parts.query)
            except ValueError as error:
                self._json(400, {"error": str(error)})
            else:
                self._json(200, self.owner.summary())
        elif parts.path == PATH:
            self._generate(body)
        else:
            self._error("404")

    def _generate(self, body: bytes) -> None:
        started = time.monotonic()
        fields = _fields(body)
        call = self._described(fields)
        released = self.owner.released
        behaviour = self.owner.record(call)
        if behaviour == "hang":
            self.owner.hang(released, self.connection)
        if behaviour in ("hang", "cut-before"):
            self.close_connection = True
            return
        self.owner.rest(released)
        if behaviour in ERRORS:
            self._error(behaviour)
        elif not call["key_accepted"]:
            self._error("401")
        elif call["headers"].get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            self._error("406-content-type")
        else:
            try:
                values, image = _checked(fields)
            except _Wrong as wrong:
                self._json(400, {"error": f"Bad request: {wrong}"})
                return
            self._answer(behaviour, values, image, started)

    def _described(self, fields: Any) -> dict[str, Any]:
        sent = fields if isinstance(fields, dict) else {}
        call: dict[str, Any] = {
            "body": {name: value for name, value in sent.items() if name != "image"},
            "key_accepted": self.headers.get("x-api-key") == self.owner.key,
            "headers": {name.lower(): value for name, value in self.headers.items() if name.lower() != "x-api-key"},
            "connection": self.client_address[1],
            "image_size": None,
            "image_sha256": None,
        }
        try:
            data, image = _decoded(sent.get("image"))
        except _Wrong:
            return call
        return call | {"image_size": image.size, "image_sha256": hashlib.sha256(data).hexdigest()}

    def _answer(self, behaviour: str | None, values: dict[str, Any], image: Image.Image, started: float) -> None:
        credits_left = self.owner.bill()
        if credits_left is None:
            self._error("406-credits")
            return
        seed = values["seed"] if values["seed"] != -1 else secrets.randbelow(2**32)
        size = (values["img_width"], values["img_height"])
        pictures = [
            _jpeg(Image.new("RGB", size))
            if behaviour == "black"
            else simulate(image, size, seed + n, values["strength"])
            for n in range(values["samples"])
        ]
        kind, body = "image/jpeg", pictures[0]
        if behaviour == "json" or (values["base64"] and behaviour is None):
            encoded = [base64.b64encode(picture).decode() for picture in pictures]
            kind, body = "application/json", json.dumps({"image": encoded if len(encoded) > 1 else encoded[0]}).encode()
        elif behaviour == "html":
            kind, body = "text/html", b"<!DOCTYPE html><html><body><h1>Welcome</h1></body></html>"
        elif behaviour == "garbage":
            body = b"these bytes are no picture"
        elif behaviour == "empty":
            body = b""
        headers = [
            ("Content-Type", kind),
            ("x-remaining-credits", str(credits_left)),
            ("x-generation-time", f"{max(time.monotonic() - started, 0.001):.3f}"),
            ("x-cost", str(COST)),
            ("x-seed-value", str(seed)),
            *self._limits(remaining=49),
        ]
        if behaviour == "cut":
            self.close_connection = True
            lines = [
                "HTTP/1.1 200 OK",
                *(f"{name}: {value}" for name, value in headers),
                f"Content-Length: {len(body)}",
            ]
            self.wfile.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body[: len(body) // 2])
            return
        self.reply(200, headers, body)

    def _limits(self, remaining: int) -> list[tuple[str, str]]:
        reset = datetime.now(UTC) + timedelta(seconds=self.owner.reset_in)
        return [
            ("x-request-id", secrets.token_hex(16)),
            ("x-rate-limit-remaining", str(remaining)),
            ("x-rate-limit-reset-at-utc", reset.isoformat(timespec="milliseconds").replace("+00:00", "Z")),
        ]

    def _error(self, behaviour: str) -> None:
        status, text = int(behaviour[:3]), ERRORS[behaviour]
        if status == 405:
            page = f"<html><head><title>405 {text}</title></head><body><h1>405 {text}</h1></body></html>"
            self.reply(405, [("Content-Type", "text/html")], page.encode())
        else:
            self._json(status, {"error": text, "status_code": status})

    def _json(self, status: int, value: Any) -> None:
        limits = self._limits(remaining=0 if status == 429 else 49)
        self.reply(status, [("Content-Type", "application/json"), *limits], json.dumps(value).encode())


def simulate(image: Image.Image, size: tuple[int, int], seed: int, strength: float) -> bytes:
    """Return a JPEG that shows `image` in `seed`'s colours, the more so the higher `strength`, and says what it is."""
    image = image.convert("RGB").resize(size)
    digest = hashlib.sha256(str(seed).encode()).digest()
    hue, saturation, value = ImageOps.posterize(image, 2 + digest[0] % 3).convert("HSV").split()
    hue = hue.point([(level + digest[1]) % 256 for level in range(256)])
    saturation = saturation.point([min(255, 60 + level) for level in range(256)])
    changed = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    result = Image.blend(image, changed, strength)
    draw = ImageDraw.Draw(result)
    draw.rectangle((0, size[1] - 32, size[0], size[1]), fill="black")
    draw.text((10, size[1] - 24), f"simulated, seed {seed}", fill="white", font=ImageFont.load_default(16))
    return _jpeg(result)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _fields(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _checked(fields: Any) -> tuple[dict[str, Any], Image.Image]:
    if not isinstance(fields, dict):
        raise _Wrong("the body must be a JSON object")
    if unknown := [name for name in fields if name not in CHECKS]:
        raise _Wrong(f"{', '.join(unknown)}: unknown parameter")
    if missing := [name for name in ("image", "prompt") if name not in fields]:
        raise _Wrong(f"{', '.join(missing)}: required")
    for name, value in fields.items():
        accepts, text = CHECKS[name]
        if not accepts(value):
            raise _Wrong(f"{name} {text}")
    return DEFAULTS | fields, _decoded(fields["image"])[1]


def _decoded(value: Any) -> tuple[bytes, Image.Image]:
    if not isinstance(value, str):
        raise _Wrong("image must be a string")
    if value.startswith("data:"):
        raise _Wrong("image must be bare base64, without a data: prefix")
    try:
        data = base64.b64decode(value, validate=True)
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise _Wrong("image must be base64 of an image") from None
    return data, image


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for Segmind's sd1.5-img2img")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--key", default="local")
    parser.add_argument("--latency", type=float, default=0.0)
    options = parser.parse_args()
    with SegmindStandIn(options.key, options.port, options.latency) as stand_in:
        print(f"{stand_in.url}/sd1.5-img2img, control: {stand_in.control_url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
