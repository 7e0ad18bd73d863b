"""Segmind's hosted `sd1.5-img2img`, by its v1 API: one call waits for the picture. Only a 200 is billed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from img2img.backends import SEGMIND_FIELDS, GeneratedImage, request_body
from img2img.backends.segmind_http import MODEL, NAME, Http, KeySource, checked_address, image_in, number
from img2img.errors import BackendBroken
from img2img.params import Img2ImgParams

if TYPE_CHECKING:
    import requests


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
        self._url = f"{checked_address(base_url)}/{MODEL}"
        self._timeout = timeout
        self._patience = patience
        self._http = Http(key=key, timeout=timeout, session=session, clock=clock)

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

        Raises `BackendUnauthorized`, `BackendOutOfCredits`, `BackendGone`, `BackendRefused`, `BackendRateLimited` (with
        `retry_after`), `BackendFailed`, `BackendGatewayTimeout`, `BackendUnreachable`, `BackendTimeout` and
        `BackendBroken`.
        """
        answer = self._http.call(
            "POST",
            self._url,
            request_body(image, params, seed, SEGMIND_FIELDS, as_json=False),
            accept="image/*, application/json",
            timeout=min(self._timeout, self._patience(params)),
            secrets=(params.prompt, params.negative_prompt),
        )
        if answer.status != 200:
            raise self._http.error(answer)
        data = image_in(answer)
        if not data:
            raise BackendBroken("Segmind answered 200 with no image in it")
        return GeneratedImage(
            data=data,
            seconds=number(answer.headers.get("x-generation-time")) or answer.seconds,
            backend=NAME,
            remaining_credits=number(answer.headers.get("x-remaining-credits")),
        )
