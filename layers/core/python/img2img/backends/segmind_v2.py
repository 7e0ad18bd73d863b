"""Segmind's hosted `sd1.5-img2img`, by its v2 API: submit, look, fetch.

Each submit is a new request that is billed if it succeeds, and none can be withdrawn. So a submit is repeated only
after an answer that says that there is no request; once the id of one is known it is looked for with GETs, which are
safe to repeat, until there is a picture or word that there is none.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from img2img.backends import SEGMIND_FIELDS, GeneratedImage, Notice, Pending, Wait, request_body
from img2img.backends.segmind_http import MODEL, NAME, Answer, Http, KeySource, decoded, json_in, number, root_of
from img2img.errors import (
    BackendBroken,
    BackendFailed,
    BackendGatewayTimeout,
    BackendRateLimited,
    BackendTimeout,
    BackendUnreachable,
    JobError,
)
from img2img.params import Img2ImgParams

if TYPE_CHECKING:
    import requests

# Each look, in seconds after the submit; then one every 5 s.
_LOOKS = (1.0, 3.0, 6.0)
_EVERY = 5.0
_LOOK_SECONDS = 10.0
_FETCH_SECONDS = 30.0
# So long a request that is not found may just not be known everywhere yet.
_NEW_SECONDS = 10.0
# What may be different at the next look.
_PASSING = (BackendFailed, BackendGatewayTimeout, BackendRateLimited, BackendTimeout, BackendUnreachable)


def origin_of(url: str) -> str:
    """Return scheme and host of a URL, with the port where it is not the scheme's own; "" for what is no URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return ""
    if parts.scheme not in ("https", "http") or not parts.hostname or parts.username or parts.password:
        return ""
    usual = {"https": 443, "http": 80}[parts.scheme]
    return f"{parts.scheme}://{parts.hostname}" + (f":{port}" if port not in (None, usual) else "")


class SegmindQueue:
    """Generates through Segmind's queue. Safe to share between threads; keeps its connections between calls.

    `base_url` may be that of v1. `origins` are those that a picture may be fetched from. `timeout` is how long a call
    may take, `patience` how long a picture of these parameters. `session` and `clock` as in `Http`.
    """

    def __init__(
        self,
        *,
        base_url: str,
        origins: Collection[str],
        key: KeySource,
        timeout: float,
        patience: Callable[[Img2ImgParams], float] = lambda _: math.inf,
        session: requests.Session | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._url = f"{root_of(base_url)}/v2"
        self._origins = frozenset(map(origin_of, origins)) - {""}
        self._timeout = timeout
        self._patience = patience
        self._clock = clock
        self._http = Http(key=key, timeout=timeout, session=session, clock=clock)

    def generate(
        self,
        image: bytes,
        params: Img2ImgParams,
        seed: int,
        *,
        name: str = "",  # noqa: ARG002 (Segmind knows no such thing)
        until: float = math.inf,  # noqa: ARG002
    ) -> Pending:
        """Submit one picture, which will be billed once. Raises what `SegmindBackend.generate` raises."""
        patience = self._patience(params)
        answer = self._http.call(
            "POST",
            f"{self._url}/{MODEL}",
            request_body(image, params, seed, SEGMIND_FIELDS, as_json=False),
            accept="application/json",
            timeout=min(self._timeout, patience),
            secrets=(params.prompt, params.negative_prompt),
        )
        fields = _fields(answer)
        if not 200 <= answer.status < 300:
            if fields.get("status") == "FAILED" or (answer.status >= 500 and answer.status != 504):
                raise _failed(answer)
            raise self._http.error(answer)
        request_id = fields.get("request_id")
        # It becomes part of an address.
        if not isinstance(request_id, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", request_id):
            raise BackendBroken("Segmind took the request and named no request_id")
        now = self._clock()
        notes = {"request_id": request_id, "asked_at": f"{now:.3f}"}
        if patience < math.inf:
            notes["until"] = f"{now + patience:.3f}"
        return Pending(backend=NAME, notes=notes)

    def answer(self, pending: Pending | None, notice: Notice | None) -> GeneratedImage | None:  # noqa: ARG002 (none come)
        """Return the picture of a submitted request, None while there is none.

        Raises `BackendFailed` of a run that failed, which is not billed, and of what will bring no picture any more
        `BackendBroken` (its record is gone, or the picture), `BackendTimeout` (patience is at an end), `BackendGone`,
        `BackendUnauthorized`, `BackendOutOfCredits` and `BackendRefused`.
        """
        if pending is None:
            return None
        try:
            found = self._look(pending)
        except _NotNow:
            found = None
        if found is None and self._clock() >= float(pending.notes.get("until", "inf")):
            raise BackendTimeout("Segmind did not answer in time")
        return found

    def look_after(self, pending: Pending) -> float:
        """Return the seconds until the next look: 1, 2, 3, then 5 after the one before, and one when patience ends."""
        asked_at = float(pending.notes.get("asked_at", "0"))
        age = max(self._clock() - asked_at, 0.0)
        later = _LOOKS[-1] + _EVERY * (max(age - _LOOKS[-1], 0.0) // _EVERY + 1)
        # A look that comes a moment early is that look all the same.
        wait = next((look for look in _LOOKS if look > age + 0.2), later) - age
        left = float(pending.notes.get("until", "inf")) - self._clock()
        return min(wait, left) if left > 0 else wait

    def waits_for(self, *, answering: bool) -> Wait:  # noqa: ARG002 (it is asked)
        """Return what a pending sample waits for."""
        return Wait.BACKEND_BUSY

    def _look(self, pending: Pending) -> GeneratedImage | None:
        address = f"{self._url}/requests/{pending.notes.get('request_id', '')}"
        status, answer = self._ask(f"{address}/status", pending)
        if status == "COMPLETED":
            status, answer = self._ask(address, pending)
        if status == "FAILED":
            raise _failed(answer)
        if status != "COMPLETED":
            # QUEUED or PROCESSING; what is none of them may be the page of a proxy.
            return None
        fields = _fields(answer)
        metrics = fields.get("metrics")
        metrics = metrics if isinstance(metrics, dict) else {}
        asked_at = float(pending.notes.get("asked_at", "inf"))
        return GeneratedImage(
            data=self._picture(fields.get("output")),
            seconds=number(metrics.get("inference_time")) or max(self._clock() - asked_at, 0.0),
            backend=NAME,
            remaining_credits=number(metrics.get("remaining_credits")),
        )

    def _ask(self, url: str, pending: Pending) -> tuple[Any, Answer]:
        """Return the status that a request has, and the answer that says so. Raises `_NotNow`."""
        seconds = self._patient(_LOOK_SECONDS)
        answer = self._get(lambda: self._http.call("GET", url, accept="application/json", timeout=seconds))
        status = _fields(answer).get("status")
        # FAILED comes with 422, and may come with any other.
        if 200 <= answer.status < 300 or status == "FAILED":
            return status, answer
        if answer.status == 404:
            if self._clock() - float(pending.notes.get("asked_at", "0")) < _NEW_SECONDS:
                raise _NotNow
            raise BackendBroken("Segmind's record of the request is gone, and its picture with it")
        raise self._lasting(self._http.error(answer))

    def _picture(self, output: Any) -> bytes:
        """Return the picture that `output` holds or leads to. Raises `_NotNow`."""
        if isinstance(output, list):
            output = output[0] if output else None
        if not isinstance(output, str) or not output.strip():
            raise BackendBroken("Segmind was done and named no picture")
        output = output.strip()
        if not re.match(r"[a-z][a-z0-9+.-]*://", output, re.IGNORECASE):
            return decoded(output)
        origin = origin_of(output)
        if origin not in self._origins:
            where = f": {origin}" if re.fullmatch(r"https?://[a-z0-9.:-]{1,100}", origin) else ""
            raise BackendBroken(f"Segmind's picture lies where none may be fetched from{where}")
        answer = self._get(lambda: self._http.get_open(output, timeout=self._patient(_FETCH_SECONDS)))
        if answer.status == 200:
            return answer.body
        if answer.status == 429 or answer.status >= 500:
            raise _NotNow
        raise BackendBroken(f"Segmind's picture could not be fetched: {answer.status}")

    def _patient(self, seconds: float) -> float:
        return min(seconds, self._timeout)

    def _get(self, get: Callable[[], Answer]) -> Answer:
        """Make a call that is safe to repeat. Raises `_NotNow` when no whole answer came."""
        try:
            return get()
        except (BackendBroken, BackendTimeout, BackendUnreachable):
            raise _NotNow from None

    def _lasting(self, error: JobError) -> Exception:
        """Return an error that ends a request, `_NotNow` for one that may be over by the next look."""
        return _NotNow() if isinstance(error, (*_PASSING, BackendBroken)) else error


class _NotNow(Exception):
    """A look that failed, or came too early: there will be another."""


def _fields(answer: Answer) -> dict[str, Any]:
    value = json_in(answer.body)
    return value if isinstance(value, dict) else {}


def _failed(answer: Answer) -> BackendFailed:
    """Return the error of a request that there is not, or not any more; nothing was billed."""
    return BackendFailed(f"Segmind answered {answer.status}: {answer.said()}".removesuffix(": "))
