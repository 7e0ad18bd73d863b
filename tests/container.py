"""A container of the endpoint that no model runs in: its contract, and to do as it is told."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections import deque
from typing import Any

from PIL import Image

from local.http_server import Handler, LoopbackServer

MAX_BODY = 32 * 2**20


class FakeContainer:
    """Answers each request with a picture in a colour of its seed. `requests` are those that came, without the image.

    `next` holds what comes instead, for one request each: a status, `hang` (no answer until `release`), `flagged`, or
    `endless` (an answer without its length).
    """

    def __init__(self, port: int = 0) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.next: deque[int | str] = deque()
        self.busy = 0
        self.most_busy = 0
        self.changed = threading.Condition()
        self._released = threading.Event()
        self._server = LoopbackServer(type("ContainerHandler", (_Handler,), {"owner": self}), port)

    @property
    def url(self) -> str:
        return f"http://{self._server.address}"

    def __enter__(self) -> FakeContainer:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._server.stop()

    def reset(self) -> None:
        """Forget what came, and do nothing out of the ordinary."""
        self.release()
        with self.changed:
            self.requests.clear()
            self.headers.clear()
            self.next.clear()
            self.most_busy = 0

    def release(self) -> None:
        """Let every `hang` answer."""
        released, self._released = self._released, threading.Event()
        released.set()

    def wait_for(self, count: int, seconds: float = 10) -> None:
        """Wait until so many requests have come."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.requests) >= count, seconds), "they did not come"

    def begin(self, fields: dict[str, Any], headers: dict[str, str]) -> int | str | None:
        released = self._released
        with self.changed:
            self.requests.append({name: value for name, value in fields.items() if name != "image"})
            self.headers.append(headers)
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
            told = self.next.popleft() if self.next else None
            self.changed.notify_all()
        if told == "hang":
            released.wait()
        return told

    def end(self) -> None:
        with self.changed:
            self.busy -= 1


class _Handler(Handler):
    owner: FakeContainer

    def do_GET(self) -> None:
        self.reply(200 if self.path == "/ping" else 404)

    def do_POST(self) -> None:
        fields = json.loads(self.read_body(MAX_BODY) or b"{}")
        told = self.owner.begin(fields, {name.lower(): value for name, value in self.headers.items()})
        try:
            self._answer(fields, told)
        finally:
            self.owner.end()

    def _answer(self, fields: dict[str, Any], told: int | str | None) -> None:
        if isinstance(told, int):
            error = {
                "code": {400: "invalid_request", 503: "busy"}.get(told, "internal_error"),
                "detail": "told to fail",
                "errors": [],
            }
            self.reply(told, [("Content-Type", "application/json")], json.dumps(error).encode())
            return
        seed = int(fields.get("seed", 0))
        size = (fields.get("img_width", 512), fields.get("img_height", 512))
        picture = None if told == "flagged" else painted(size, seed)
        if picture and not fields.get("base64"):
            self.reply(200, [("Content-Type", "image/png"), ("x-seed", str(seed))], picture)
            return
        answer = {
            "image": base64.b64encode(picture).decode() if picture else None,
            "nsfw": picture is None,
            "seed": seed,
            "metrics": {"queue_ms": 1, "run_ms": 20},
        }
        body = json.dumps(answer).encode()
        attributes = self.headers.get("X-Amzn-SageMaker-Custom-Attributes")
        headers = [("Content-Type", "application/json"), ("x-seed", str(seed))]
        if attributes:
            headers.append(("X-Amzn-SageMaker-Custom-Attributes", attributes[::-1]))
        if told == "endless":
            self.close_connection = True
            head = ["HTTP/1.1 200 OK", *(f"{name}: {value}" for name, value in headers), "Connection: close", "", ""]
            self.wfile.write("\r\n".join(head).encode() + body)
        else:
            self.reply(200, headers, body)


def painted(size: tuple[int, int], seed: int) -> bytes:
    """Return a PNG of a seed's own colour, with an edge: none of it is black."""
    colour = (60 + seed % 190, 60 + seed // 190 % 190, 120)
    image = Image.new("RGB", size, colour)
    image.paste((250, 250, 250), (0, 0, size[0], 8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
