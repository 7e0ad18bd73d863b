"""The HTTP side of the Segmind stand-in: v1, which answers with the picture, and v2, which answers with a request."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from PIL import Image

from local.http_server import Handler
from local.segmind_pictures import Wrong, checked, decoded, jpeg, simulate

if TYPE_CHECKING:
    from local.segmind import SegmindStandIn, Submitted

V1, V2 = "/v1/sd1.5-img2img", "/v2/sd1.5-img2img"
COST = 0.004
MAX_BODY = 50_000_000
ERRORS = {
    "400": "Bad request: Invalid parameters",
    "401": "Unauthorized: Invalid API key",
    "403": "Forbidden: No access to this model",
    "404": "Not found: Model not found",
    "405": "Method Not Allowed",
    "406-credits": "Insufficient credits",
    "406-content-type": "Not acceptable: Content type must be application/json",
    "410": "Gone: The model was retired",
    "429": "Rate limit exceeded",
    "500": "Internal server error",
    "502": "Bad gateway",
    "503": "Service unavailable",
    "504": "Gateway timeout",
}
PAGE = b"<!DOCTYPE html><html><body><h1>Welcome</h1></body></html>"


class SegmindHandler(Handler):
    """Answers as Segmind does, or as the stand-in was told."""

    owner: SegmindStandIn

    def do_GET(self) -> None:
        if urlsplit(self.path).path == "/control":
            self._json(200, self.owner.summary())
        elif urlsplit(self.path).path in (V1, V2):
            self._error("405")
        else:
            self._follow(urlsplit(self.path).path.strip("/").split("/"))

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
        elif parts.path in (V1, V2):
            self._generate(body, queued=parts.path == V2)
        else:
            self._error("404")

    def _generate(self, body: bytes, *, queued: bool) -> None:
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
        if not queued:
            self.owner.rest(released)
        if behaviour in ERRORS:
            self._error(behaviour)
        elif not call["key_accepted"]:
            self._error("401")
        elif call["headers"].get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            self._error("406-content-type")
        else:
            try:
                values, image = checked(fields)
            except Wrong as wrong:
                self._json(400, {"error": f"Bad request: {wrong}"})
                return
            if queued:
                self._submit(behaviour, values, image)
            else:
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
            data, image = decoded(sent.get("image"))
        except Wrong:
            return call
        return call | {"image_size": image.size, "image_sha256": hashlib.sha256(data).hexdigest()}

    def _answer(self, behaviour: str | None, values: dict[str, Any], image: Image.Image, started: float) -> None:
        credits_left = self.owner.bill()
        if credits_left is None:
            self._error("406-credits")
            return
        seed, pictures = _pictures(behaviour, values, image)
        kind, body = "image/jpeg", pictures[0]
        if behaviour == "json" or (values["base64"] and behaviour is None):
            encoded = [base64.b64encode(picture).decode() for picture in pictures]
            kind, body = "application/json", json.dumps({"image": encoded if len(encoded) > 1 else encoded[0]}).encode()
        elif behaviour == "html":
            kind, body = "text/html", PAGE
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
        self._send(behaviour, headers, body)

    def _submit(self, behaviour: str | None, values: dict[str, Any], image: Image.Image) -> None:
        failed = behaviour == "failed"
        # What fails is not billed.
        credits_left = self.owner.credits if failed else self.owner.bill()
        if credits_left is None:
            self._error("406-credits")
            return
        _, pictures = _pictures(behaviour, values, image)
        if behaviour in ("garbage", "empty"):
            pictures = [b"these bytes are no picture" if behaviour == "garbage" else b""] * len(pictures)
        request = self.owner.submit(pictures, credits_left, failed=failed)
        body = PAGE if behaviour == "html" else json.dumps({**self._named(request), "status": "QUEUED"}).encode()
        self._send(behaviour, [("Content-Type", "text/html" if behaviour == "html" else "application/json")], body)

    def _named(self, request: Submitted) -> dict[str, str]:
        origin = self.owner.origin
        return {
            "request_id": request.id,
            "poll_url": f"{origin}/v1/requests/{request.id}",
            "status_url": f"{origin}/v2/requests/{request.id}/status",
            "response_url": f"{origin}/v2/requests/{request.id}",
        }

    def _follow(self, path: list[str]) -> None:
        """Answer a look at a request, or get its picture."""
        match path:
            case ["v2", "requests", request_id, "status"]:
                step = "status"
            case ["v2" | "v1", "requests", request_id]:
                step = "response"
            case ["outputs", request_id, _]:
                step = "output"
            case _:
                self._error("404")
                return
        released = self.owner.released
        behaviour = self.owner.look(step, "x-api-key" in self.headers)
        if behaviour == "hang":
            self.owner.hang(released, self.connection)
        request = self.owner.requests.get(request_id)
        if behaviour in ("hang", "cut-before"):
            self.close_connection = True
        elif behaviour in ERRORS:
            self._error(behaviour)
        elif behaviour == "html":
            self.reply(200, [("Content-Type", "text/html")], PAGE)
        elif step != "output" and self.headers.get("x-api-key") != self.owner.key:
            self._error("401")
        elif request is None:
            self._json(404, {"error": f"Request {request_id} not found"})
        elif step == "output":
            self._send(behaviour, [("Content-Type", "image/jpeg")], request.pictures[int(path[2][0])])
        else:
            self._tell(behaviour, step, request)

    def _tell(self, behaviour: str | None, step: str, request: Submitted) -> None:
        state = self.owner.state_of(request)
        said: dict[str, Any] = {"status": state, **self._named(request), "metrics": {}}
        if state in ("COMPLETED", "FAILED"):
            taken = round(time.monotonic() - request.at, 3)
            said["metrics"] = {"inference_time": taken, "queue_time": 0.0, "total_time": taken}
        if state == "FAILED":
            said["error"] = "The model could not make a picture of these parameters"
        elif state == "COMPLETED" and step == "response":
            said["metrics"] |= {"cost": COST, "remaining_credits": request.credits_left, "retry_count": 0}
            origin = "http://127.0.0.2:9" if behaviour == "elsewhere" else self.owner.origin
            outputs = [f"{origin}/outputs/{request.id}/{n}.jpg" for n in range(len(request.pictures))]
            said["output"] = outputs if len(outputs) > 1 or behaviour == "list" else outputs[0]
            if behaviour == "empty":
                said["output"] = None
        if behaviour == "cut":
            self._send(behaviour, [("Content-Type", "application/json")], json.dumps(said).encode())
        else:
            self._json(422 if state == "FAILED" else 200, said)

    def _send(self, behaviour: str | None, headers: list[tuple[str, str]], body: bytes) -> None:
        """Answer 200, with half a body for `cut`."""
        if behaviour != "cut":
            self.reply(200, headers, body)
            return
        self.close_connection = True
        lines = ["HTTP/1.1 200 OK", *(f"{name}: {value}" for name, value in headers), f"Content-Length: {len(body)}"]
        self.wfile.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body[: len(body) // 2])

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


def _pictures(behaviour: str | None, values: dict[str, Any], image: Image.Image) -> tuple[int, list[bytes]]:
    """Return the seed, and what is made of the image with it."""
    seed = values["seed"] if values["seed"] != -1 else secrets.randbelow(2**32)
    size = (values["img_width"], values["img_height"])
    return seed, [
        jpeg(Image.new("RGB", size)) if behaviour == "black" else simulate(image, size, seed + n, values["strength"])
        for n in range(values["samples"])
    ]


def _fields(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
