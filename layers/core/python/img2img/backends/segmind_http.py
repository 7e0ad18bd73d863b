"""Calls of Segmind over HTTP, and what its answers mean: what its v1 and v2 APIs share.

Segmind bills a success only and knows no idempotency key. So what was never sent, or answered with an error that is not
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

from img2img.backends.transport import Transport
from img2img.errors import (
    BackendBroken,
    BackendFailed,
    BackendGatewayTimeout,
    BackendGone,
    BackendOutOfCredits,
    BackendRateLimited,
    BackendRefused,
    BackendTimeout,
    BackendUnauthorized,
    BackendUnreachable,
    JobError,
)

NAME = "segmind"
MODEL = "sd1.5-img2img"
UNSET_KEY = "unset"  # what a deployment stores until the operator fills in the real key
CONNECT_SECONDS = 5.0
MAX_ANSWER = 30_000_000
MAX_TEXT = 300
_RUN = 12
_SIGNATURES = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8|RIFF....WEBP|....ftyp", re.DOTALL)


def checked_address(base_url: str) -> str:
    """Return the address of an API without a slash at its end. Raises `ValueError`."""
    if not base_url.startswith(("https://", "http://")):
        raise ValueError("base_url must be an http(s) address")
    return base_url.rstrip("/")


def root_of(base_url: str) -> str:
    """Return where the versions of the API lie, by the address of one. Raises `ValueError`."""
    return re.sub(r"/v\d+$", "", checked_address(base_url))


class KeySource(Protocol):
    """Gives the Segmind key; `refresh` asks for the stored one instead of a cached one."""

    def __call__(self, *, refresh: bool) -> str: ...


@dataclass(frozen=True)
class Answer:
    """What came back of one call. `said` gives its text, short and without the key and the prompts."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float
    said: Callable[[], str]


class Http:
    """The way to Segmind. Safe to share between threads; keeps its connections between calls.

    `session` may bring TLS settings (`verify`, `cert`); its transport is replaced. `clock` tells Unix time.
    """

    def __init__(
        self,
        *,
        key: KeySource,
        timeout: float,
        session: requests.Session | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._key = key
        self._clock = clock
        self._session = session or requests.Session()
        # A proxy or ~/.netrc of the environment must see neither the key nor the images.
        self._session.trust_env = False
        for scheme in ("https://", "http://"):
            self._session.mount(scheme, Transport(limit=timeout, clock=clock))

    def call(
        self, method: str, url: str, body: Any = None, *, accept: str, timeout: float, secrets: Iterable[str] = ()
    ) -> Answer:
        """Make one call with the key, once more with a fresh one when it is refused.

        `secrets` are the prompts, which no text of an answer may pass on. Raises `BackendUnauthorized`,
        `BackendUnreachable`, `BackendTimeout` and `BackendBroken`.
        """
        key = self._key(refresh=False).strip()
        if key in ("", UNSET_KEY):
            # The cache may be older than the operator's first key.
            key = self._key(refresh=True).strip()
        answer = self._send(method, url, body, key, accept, timeout, secrets)
        if answer.status == 401:
            fresh = self._key(refresh=True).strip()
            if fresh != key:
                answer = self._send(method, url, body, fresh, accept, timeout, secrets)
        return answer

    def get_open(self, url: str, *, timeout: float) -> Answer:
        """Get what lies at an address that needs no key, and must not be shown it. Raises as `call` does."""
        return self._exchange("GET", url, None, {"Accept": "image/*"}, timeout, partial(said, key="", prompts=()))

    def error(self, answer: Answer) -> JobError:
        """Return the error that an answer stands for."""
        return error_of(answer, self._clock())

    def _send(
        self, method: str, url: str, body: Any, key: str, accept: str, timeout: float, secrets: Iterable[str]
    ) -> Answer:
        if key in ("", UNSET_KEY):
            raise BackendUnauthorized("The Segmind key is not set")
        if not re.fullmatch(r"[!-~]+", key):
            raise BackendUnauthorized("The Segmind key holds characters that no key has")
        headers = {"x-api-key": key, "Accept": accept}
        return self._exchange(method, url, body, headers, timeout, partial(said, key=key, prompts=tuple(secrets)))

    def _exchange(
        self,
        method: str,
        url: str,
        body: Any,
        headers: Mapping[str, str],
        timeout: float,
        text: Callable[[bytes], str],
    ) -> Answer:
        started = time.monotonic()
        try:
            with self._session.request(
                method,
                url,
                json=body,
                headers={**headers, "Accept-Encoding": "identity"},
                timeout=(min(CONNECT_SECONDS, timeout), timeout),
                allow_redirects=False,  # the key would travel along
                stream=True,
            ) as response:
                data = _read(response)
                seconds = time.monotonic() - started
                return Answer(response.status_code, response.headers, data, seconds, partial(text, data))
        except (requests.RequestException, HTTPError) as error:
            # Without its cause: requests' errors carry the request, key and image included.
            raise _unanswered(error) from None


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


def error_of(answer: Answer, now: float) -> JobError:
    """Return the error that an answer stands for, whichever call it came to; none of them was billed."""
    status, text = answer.status, answer.said()
    detail = f"Segmind answered {status}" + (f": {text}" if text else "")
    match status:
        case 401 | 403:
            return BackendUnauthorized(detail)
        case 406 if "credit" in text.lower():  # also a refused value is a 406
            return BackendOutOfCredits(detail)
        case 410:
            return BackendGone(detail)
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


def number(text: Any) -> float | None:
    """Return a number that stands in a header or in JSON, None for anything else."""
    try:
        found = float(text or "")
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) and found >= 0 else None


def image_in(answer: Answer) -> bytes:
    """Return the image bytes of a 200, whatever `base64` asked for: the sample calls of Segmind read JSON always."""
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    untyped = kind in ("", "application/octet-stream", "binary/octet-stream")
    if kind.startswith("image/") or (untyped and _SIGNATURES.match(answer.body)):
        return answer.body
    if "json" not in kind and not (untyped and answer.body.lstrip()[:1] == b"{"):
        raise BackendBroken(f"Segmind answered 200 with no image: {answer.said()}".removesuffix(": "))
    value = json_in(answer.body)
    fields = value if isinstance(value, dict) else {}
    value = next((fields[name] for name in ("image", "output", "data") if fields.get(name)), None)
    if isinstance(value, list):
        value = value[0] if value else None
    if not isinstance(value, str):
        raise BackendBroken(f"Segmind answered JSON with no image: {answer.said()}".removesuffix(": "))
    if re.match(r"\s*https?:", value, re.IGNORECASE):
        raise BackendBroken("Segmind answered with a URL in place of an image")
    return decoded(value)


def decoded(text: str) -> bytes:
    """Return an image that stands in JSON as base64 or a data URI. Raises `BackendBroken`."""
    if re.match(r"\s*data:", text, re.IGNORECASE):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise BackendBroken("Segmind answered JSON whose image is no base64") from None


def json_in(body: bytes) -> Any:
    """Return what a body says in JSON, None when it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def said(body: bytes, key: str, prompts: Iterable[str]) -> str:
    """Return the text of an error, short and without the key, the prompts or an image echoed back."""
    parsed = json_in(body) if len(body) < 100_000 else None
    found = []
    for name in ("error", "message", "error_description"):
        value = parsed.get(name) if isinstance(parsed, dict) else None
        value = value.get("message") if isinstance(value, dict) else value
        if isinstance(value, str) and value not in found:
            found.append(value)
    text = ": ".join(found) or body[:20_000].decode("utf-8", "replace")
    text = re.sub(r"(?is)<(script|style|title)\b.*?</\1\s*>|<[^>]*>", " ", text)
    text = html.unescape(text)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = text.replace(key, "***") if key else text
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
