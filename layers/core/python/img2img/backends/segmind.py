"""Segmind's hosted `sd1.5-img2img`.

Segmind bills a 200 only and knows no idempotency key. So what was never sent, or answered with an error that is not
billed, is `retryable`; what broke or timed out after it was sent may have been billed and is not.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Protocol

import requests
from urllib3.exceptions import ConnectTimeoutError, HTTPError, MaxRetryError, ProtocolError, ReadTimeoutError

from img2img.backends import SEGMIND_FIELDS, GeneratedImage, request_body
from img2img.backends.transport import Transport
from img2img.errors import (
    BackendBroken,
    BackendFailed,
    BackendGatewayTimeout,
    BackendOutOfCredits,
    BackendRateLimited,
    BackendRefused,
    BackendTimeout,
    BackendUnauthorized,
    BackendUnreachable,
    JobError,
)
from img2img.params import Img2ImgParams

NAME = "segmind"
UNSET_KEY = "unset"  # what a deployment stores until the operator fills in the real key
CONNECT_SECONDS = 5.0
MAX_ANSWER = 30_000_000
MAX_TEXT = 300
_RUN = 12
_SIGNATURES = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8|RIFF....WEBP|....ftyp", re.DOTALL)


class KeySource(Protocol):
    """Gives the Segmind key; `refresh` asks for the stored one instead of a cached one."""

    def __call__(self, *, refresh: bool) -> str: ...


class SegmindBackend:
    """Generates through Segmind. Safe to share between threads; keeps its connections between calls.

    `timeout` is how long a call may take, `patience` how long one for these parameters may where that is less.
    `session` may bring TLS settings (`verify`, `cert`); its transport is replaced. `clock` tells Unix time.
    """

    def __init__(
        self,
        *,
        base_url: str,
        key: KeySource,
        timeout: float,
        patience: Callable[[Img2ImgParams], float] = lambda _: math.inf,
        session: requests.Session | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not base_url.startswith(("https://", "http://")):
            raise ValueError("base_url must be an http(s) address")
        self._url = base_url.rstrip("/") + "/sd1.5-img2img"
        self._key = key
        self._timeout = timeout
        self._patience = patience
        self._clock = clock
        self._session = session or requests.Session()
        # A proxy or ~/.netrc of the environment must see neither the key nor the images.
        self._session.trust_env = False
        for scheme in ("https://", "http://"):
            self._session.mount(scheme, Transport(limit=timeout, clock=clock))

    def generate(
        self,
        image: bytes,
        params: Img2ImgParams,
        seed: int,
        *,
        name: str = "",  # noqa: ARG002 (Segmind knows no such thing)
        until: float = math.inf,  # noqa: ARG002
    ) -> GeneratedImage:
        """Return one picture, for one billed call at most.

        Raises `BackendUnauthorized`, `BackendOutOfCredits`, `BackendRefused`, `BackendRateLimited` (with
        `retry_after`), `BackendFailed`, `BackendGatewayTimeout`, `BackendUnreachable`, `BackendTimeout` and
        `BackendBroken`.
        """
        body = request_body(image, params, seed, SEGMIND_FIELDS, as_json=False)
        key = self._key(refresh=False).strip()
        if key in ("", UNSET_KEY):
            # The cache may be older than the operator's first key.
            key = self._key(refresh=True).strip()
        timeout = min(self._timeout, self._patience(params))
        answer = self._post(body, key, timeout)
        if answer.status == 401:
            fresh = self._key(refresh=True).strip()
            if fresh != key:
                key = fresh
                answer = self._post(body, key, timeout)
        said = partial(_said, answer.body, key, (params.prompt, params.negative_prompt))
        if answer.status != 200:
            raise _error(answer, said, self._clock())
        data = _image(answer, said)
        if not data:
            raise BackendBroken("Segmind answered 200 with no image in it")
        return GeneratedImage(
            data=data,
            seconds=_number(answer.headers.get("x-generation-time")) or answer.seconds,
            backend=NAME,
            remaining_credits=_number(answer.headers.get("x-remaining-credits")),
        )

    def _post(self, body: Mapping[str, Any], key: str, timeout: float) -> _Answer:
        if key in ("", UNSET_KEY):
            raise BackendUnauthorized("The Segmind key is not set")
        if not re.fullmatch(r"[!-~]+", key):
            raise BackendUnauthorized("The Segmind key holds characters that no key has")
        started = time.monotonic()
        try:
            with self._session.post(
                self._url,
                json=body,
                headers={"x-api-key": key, "Accept": "image/*, application/json", "Accept-Encoding": "identity"},
                timeout=(min(CONNECT_SECONDS, timeout), timeout),
                allow_redirects=False,  # the key would travel along
                stream=True,
            ) as response:
                data = _read(response)
                return _Answer(response.status_code, response.headers, data, time.monotonic() - started)
        except (requests.RequestException, HTTPError) as error:
            # Without its cause: requests' errors carry the request, key and image included.
            raise _unanswered(error) from None


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float


def _read(response: requests.Response) -> bytes:
    data = bytearray()
    is_error = response.status_code >= 300
    try:
        for chunk in response.iter_content(65_536):
            data += chunk
            if len(data) > MAX_ANSWER:
                if is_error:
                    break
                raise BackendBroken(f"Segmind's answer is larger than {MAX_ANSWER} bytes")
    except (requests.RequestException, HTTPError):
        # Only a 200 is billed: an error whose text broke off is that error still.
        if not is_error:
            raise
    return bytes(data)


def _unanswered(error: Exception) -> JobError:
    """Tell apart what was never sent, what took too long and what broke off.

    Not by `__context__`: a caller that repeats inside an `except` would have its old error read as the new one.
    """
    inner = error.args[0] if error.args else None
    if isinstance(inner, MaxRetryError):
        inner = inner.reason
    if isinstance(inner, ConnectTimeoutError):  # the base of NewConnectionError
        return BackendUnreachable("No connection to Segmind could be made")
    if isinstance(inner, ReadTimeoutError) or (
        isinstance(inner, ProtocolError) and isinstance(inner.args[-1], TimeoutError)
    ):
        return BackendTimeout("Segmind did not answer in time")
    return BackendBroken(
        f"The exchange with Segmind broke off ({type(inner if isinstance(inner, Exception) else error).__name__})"
    )


def _error(answer: _Answer, said: Callable[[], str], now: float) -> JobError:
    status, text = answer.status, said()
    detail = f"Segmind answered {status}" + (f": {text}" if text else "")
    match status:
        case 401 | 403:
            return BackendUnauthorized(detail)
        case 406 if "credit" in text.lower():  # also a refused value is a 406
            return BackendOutOfCredits(detail)
        case 429:
            return BackendRateLimited(detail, retry_after=_wait(answer.headers, now))
        case 500 | 502 | 503:
            return BackendFailed(detail)
        case 504:
            return BackendGatewayTimeout(detail)
        case _ if 300 <= status < 500:
            return BackendRefused(detail)
    # Nothing says whether these are billed.
    return BackendBroken(detail)


def _wait(headers: Mapping[str, str], now: float) -> float:
    """Return the seconds to wait after a 429, which carries no `Retry-After` today."""
    after = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}", after):
        wait = float(after)
    else:
        moment = _moment(after) or _moment(headers.get("x-rate-limit-reset-at-utc", "").strip())
        wait = 5.0 if moment is None else moment - now
    return min(max(wait, 1.0), 300.0)


def _moment(text: str) -> float | None:
    """Return the Unix time of ISO 8601, an HTTP date, or epoch seconds or milliseconds; the form is not documented."""
    if re.fullmatch(r"\d{9,13}(\.\d+)?", text):
        number = float(text)
        return number / 1000 if number > 1e11 else number
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            moment = parse(text.removesuffix("UTC").strip())
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            continue
    return None


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _image(answer: _Answer, said: Callable[[], str]) -> bytes:
    """Return the image bytes of a 200, whatever `base64` asked for: the sample calls of Segmind read JSON always."""
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    untyped = kind in ("", "application/octet-stream", "binary/octet-stream")
    if kind.startswith("image/") or (untyped and _SIGNATURES.match(answer.body)):
        return answer.body
    if "json" not in kind and not (untyped and answer.body.lstrip()[:1] == b"{"):
        raise BackendBroken(f"Segmind answered 200 with no image: {said()}".removesuffix(": "))
    value = _json(answer.body)
    fields = value if isinstance(value, dict) else {}
    value = next((fields[name] for name in ("image", "output", "data") if fields.get(name)), None)
    if isinstance(value, list):
        value = value[0] if value else None
    if not isinstance(value, str):
        raise BackendBroken(f"Segmind answered JSON with no image: {said()}".removesuffix(": "))
    if re.match(r"\s*https?:", value, re.IGNORECASE):
        raise BackendBroken("Segmind answered with a URL in place of an image")
    if re.match(r"\s*data:", value, re.IGNORECASE):
        value = value.partition(",")[2]
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except ValueError:
        raise BackendBroken("Segmind answered JSON whose image is no base64") from None


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _said(body: bytes, key: str, prompts: Iterable[str]) -> str:
    """Return the text of an error, short and without the key, the prompts or an image echoed back."""
    parsed = _json(body) if len(body) < 100_000 else None
    found = []
    for name in ("error", "message", "error_description"):
        value = parsed.get(name) if isinstance(parsed, dict) else None
        value = value.get("message") if isinstance(value, dict) else value
        if isinstance(value, str) and value not in found:
            found.append(value)
    text = ": ".join(found) or body[:20_000].decode("utf-8", "replace")
    text = re.sub(r"(?is)<(script|style|title)\b.*?</\1\s*>|<[^>]*>", " ", text)
    text = html.unescape(text)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split()).replace(key, "***")
    text = re.sub(r"[A-Za-z0-9+/=_-]{40,}", "***", text)[:1000]
    for prompt in prompts:
        for form in (prompt, json.dumps(prompt)[1:-1]):
            text = _masked(text, " ".join(form.split()))
    return text[:MAX_TEXT]


def _masked(text: str, secret: str) -> str:
    """Hide `secret` in `text`: a short one where it stands as words, a long one also in parts."""
    if len(secret) < _RUN:
        return re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text) if secret else text
    hidden: set[int] = set()
    for start in range(len(text) - _RUN + 1):
        if text[start : start + _RUN] in secret:
            hidden.update(range(start, start + _RUN))
    return re.sub("\0+", "***", "".join("\0" if i in hidden else c for i, c in enumerate(text)))
