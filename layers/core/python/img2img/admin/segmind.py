"""The command `check-segmind`: what Segmind answers to a real key, against what this service expects of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from img2img import images
from img2img.admin.commands import Options, add_command
from img2img.admin.secret import read_key
from img2img.admin.stack import Operator
from img2img.backends import SEGMIND_FIELDS, request_body
from img2img.backends.segmind_http import MODEL, json_in, root_of, said
from img2img.backends.segmind_v2 import origin_of
from img2img.errors import InvalidRequest, ServiceError
from img2img.params import Img2ImgParams
from img2img.settings import Settings

# What the model's page says of one picture, in US dollars.
PRICE = 0.004
_SECONDS = Settings.segmind_timeout
_MAX_PIXELS = Settings.max_image_pixels
_PARAMS = Img2ImgParams(prompt="A watercolour of this scene", strength=0.6, seed=42)
_POLL_SECONDS = (1, 2, 3, 5)


def add_commands(commands: Any) -> None:
    """Declare the command."""
    more = "Asks for a Segmind key, or reads it from a pipe; it is never shown. Each API named makes one picture."
    what = "send the sample photo to Segmind and look at its answers"
    command = add_command(commands, "check-segmind", run, what, more)
    command.add_argument("apis", nargs="*", metavar="API", help="v1, v2 or both (default: both)")
    command.add_argument("--image", type=Path, default=Path("events/sample.jpg"), help="(default: %(default)s)")
    command.add_argument("--out", type=Path, default=Path("out"), help="where the pictures go (default: %(default)s)")
    address = Settings.segmind_base_url
    command.add_argument("--base-url", default=address, help="address of the v1 API (default: %(default)s)")
    command.add_argument("--yes", action="store_true", help="do not ask before money is spent")


def run(_use: Operator, options: Options) -> int:
    """Ask for the key, say what it costs, and show what comes back. Returns 1 if no API named works."""
    apis = options.apis or list(APIS)
    if unknown := sorted(set(apis) - set(APIS)):
        raise InvalidRequest(f"There is no API {', '.join(unknown)}; known are {', '.join(APIS)}")
    try:
        root = root_of(options.base_url)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    picture = images.prepare(
        options.image.read_bytes(),
        width=_PARAMS.img_width,
        height=_PARAMS.img_height,
        fit=_PARAMS.fit,
        max_pixels=_MAX_PIXELS,
    )
    segmind = Segmind(root, read_key())
    print(f"{'balance':10} {segmind.balance()}")
    print(f"{len(apis)} x {MODEL} will cost about {len(apis) * PRICE:.3f} USD")
    if not (options.yes or _agreed()):
        print("Nothing was sent")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    works = []
    for name in apis:
        print(f"\n{name}")
        findings, data = _tried(APIS[name], segmind, picture)
        for finding in findings:
            print(finding)
        if data:
            path = options.out / f"segmind-{name}.{images.inspect(data, max_pixels=_MAX_PIXELS).content_type[6:]}"
            path.write_bytes(data)
            print(f"   saved as {path}")
            works.append(name)
    print(f"\nSegmindApi: {' or '.join(works) or 'none of these works'}")
    return 0 if works else 1


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise InvalidRequest("The key came from a pipe, so nobody can be asked: say --yes")
    return input("Go on? [y/N] ").strip().lower() in ("y", "yes")


@dataclass(frozen=True)
class Finding:
    """One thing that came back, and whether it is as this service expects it. What does not matter is `extra`."""

    name: str
    found: str
    expected: str
    good: bool
    extra: bool = False

    def __str__(self) -> str:
        mark = "ok" if self.good else "--" if self.extra else "!!"
        return f"{mark} {self.name:24} {self.found[:60]:60} {'' if self.good else f'expected {self.expected}'}".rstrip()


class Segmind:
    """Segmind's API by its bare answers; `root` is where its versions lie. Errors never hold the key."""

    def __init__(self, root: str, key: str) -> None:
        self._root = root
        self._key = key
        self._session = requests.Session()
        self._session.trust_env = False

    def call(self, method: str, path: str, body: Any = None) -> requests.Response:
        """Make one call below the API's root. Raises `ConnectionError`."""
        return self._send(method, self._root + path, body, {"x-api-key": self._key})

    def fetch(self, url: str) -> requests.Response:
        """Get a picture from where an answer says that it lies, without the key. Raises `ConnectionError`."""
        return self._send("GET", url, None, {})

    def _send(self, method: str, url: str, body: Any, headers: Mapping[str, str]) -> requests.Response:
        try:
            return self._session.request(
                method, url, json=body, headers=dict(headers), timeout=(5, _SECONDS), allow_redirects=False
            )
        except requests.RequestException as error:
            # Without its text: it may quote the request.
            raise ConnectionError(f"{method} {urlsplit(url).path}: {type(error).__name__}") from None

    def balance(self) -> str:
        """Return what Segmind says of the account."""
        answer = self.call("GET", "/v1/get-user-credits")
        return f"{_of(answer, 'credits')} credits" if answer.ok else self.said(answer)

    def said(self, answer: requests.Response) -> str:
        """Return an error's status and text."""
        return f"{answer.status_code}: {said(answer.content, self._key, (_PARAMS.prompt,))}"


Steps = Iterator[Finding | bytes]


def _tried(api: Callable[[Segmind, bytes], Steps], segmind: Segmind, picture: bytes) -> tuple[list[Finding], bytes]:
    findings: list[Finding] = []
    data = b""
    try:
        for step in api(segmind, picture):
            if isinstance(step, bytes):
                data = step
            else:
                findings.append(step)
    except OSError as error:
        findings.append(Finding("connection", str(error), "an answer", good=False))
    return findings, data


def _v1(segmind: Segmind, picture: bytes) -> Steps:
    answer = segmind.call("POST", f"/v1/{MODEL}", _body(picture))
    yield from _taken(segmind, answer)
    if answer.status_code != 200:
        return
    kind = answer.headers.get("content-type", "")
    yield Finding("content-type", kind, "an image's", good=kind.startswith("image/"))
    for name in ("x-generation-time", "x-remaining-credits", "x-cost", "x-seed-value", "x-request-id"):
        yield _present(name, answer.headers.get(name))
    yield from _picture(answer.content)


def _v2(segmind: Segmind, picture: bytes) -> Steps:
    submitted = segmind.call("POST", f"/v2/{MODEL}", _body(picture))
    yield from _taken(segmind, submitted)
    if submitted.status_code != 200:
        return
    request_id = str(_of(submitted, "request_id") or "")
    yield Finding("request_id", request_id, "an id", good=bool(request_id))
    for name in ("status", "poll_url", "status_url", "response_url"):
        yield _present(name, _of(submitted, name))
    if not request_id:
        return
    state: Any = None
    started = time.monotonic()
    pauses = iter(_POLL_SECONDS)
    while state not in ("COMPLETED", "FAILED") and time.monotonic() - started < _SECONDS:
        time.sleep(next(pauses, _POLL_SECONDS[-1]))
        polled = segmind.call("GET", f"/v2/requests/{request_id}/status")
        state = _of(polled, "status")
    yield _is("state in the end", state, "COMPLETED")
    result = segmind.call("GET", f"/v2/requests/{request_id}")
    yield _is("status of the result", result.status_code, 200)
    metrics = _of(result, "metrics")
    for name in ("cost", "remaining_credits", "inference_time", "queue_time", "total_time"):
        yield _present(f"metrics.{name}", metrics.get(name) if isinstance(metrics, dict) else None)
    output = _of(result, "output")
    yield Finding("output", type(output).__name__, "a URL or a list of them", good=isinstance(output, str | list))
    url = output[0] if isinstance(output, list) and output else output
    if not isinstance(url, str):
        return
    # What the setting of accepted origins has to name.
    origin = origin_of(url)
    yield Finding("origin of the output", origin, "https", good=origin.startswith("https:"))
    yield from _picture(segmind.fetch(url).content)


APIS: Mapping[str, Callable[[Segmind, bytes], Steps]] = {"v1": _v1, "v2": _v2}


def _taken(segmind: Segmind, answer: requests.Response) -> Steps:
    yield _is("status", answer.status_code, 200)
    if answer.status_code != 200:
        yield Finding("error", segmind.said(answer), "none", good=False)


def _body(picture: bytes) -> dict[str, Any]:
    return request_body(picture, _PARAMS, _PARAMS.seed, SEGMIND_FIELDS, as_json=False)


def _picture(data: bytes) -> Steps:
    try:
        info = images.inspect(data, max_pixels=_MAX_PIXELS)
    except ServiceError as error:
        yield Finding("picture", error.detail, "an image", good=False)
        return
    size = f"{info.width} x {info.height}"
    expected = f"{_PARAMS.img_width} x {_PARAMS.img_height}"
    yield Finding("picture", f"{info.content_type}, {size}, {len(data)} bytes", expected, good=size == expected)
    yield data


def _is(name: str, found: Any, expected: Any) -> Finding:
    return Finding(name, str(found), str(expected), good=found == expected)


def _present(name: str, found: Any) -> Finding:
    return Finding(name, "" if found is None else str(found), "something", good=found is not None, extra=True)


def _of(answer: requests.Response, name: str) -> Any:
    value = json_in(answer.content)
    return value.get(name) if isinstance(value, dict) else None
