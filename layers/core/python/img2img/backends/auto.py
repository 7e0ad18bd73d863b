"""One backend first, and another when that one cannot serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from img2img.backends import Backend, GeneratedImage, Pending
from img2img.errors import (
    BackendFailed,
    BackendGatewayTimeout,
    BackendGone,
    BackendOutOfCredits,
    BackendRateLimited,
    BackendTimeout,
    BackendUnauthorized,
    BackendUnreachable,
    JobError,
)
from img2img.params import Img2ImgParams

# What says nothing about the request: the other backend may well serve it.
_UNABLE = (
    BackendOutOfCredits,
    BackendUnauthorized,
    BackendGone,
    BackendFailed,
    BackendUnreachable,
    BackendTimeout,
    BackendGatewayTimeout,
)
# So long the first backend is left alone: else every sample of an outage would wait for it to fail.
PAUSE_SECONDS = 30.0


@dataclass(frozen=True)
class _Outage:
    reason: str
    until: float


class AutoBackend:
    """Asks `first`, and `second` when the first is out of credits, unauthorised, gone, down, or rate limited for too
    long.

    Too long is when fewer than `reserve` seconds would be left for the second. What it gives back carries the code of
    the first one's error as `reason`. `clock` tells epoch seconds.
    """

    def __init__(self, first: Backend, second: Backend, *, reserve: float, clock: Callable[[], float]) -> None:
        self._first = first
        self._second = second
        self._reserve = reserve
        self._clock = clock
        self._outage: _Outage | None = None

    def generate(
        self, image: bytes, params: Img2ImgParams, seed: int, *, name: str, until: float
    ) -> GeneratedImage | Pending:
        """Return what one of the two gives. Raises what the second raises, and what the request is to blame for."""
        outage = self._outage
        if outage is None or self._clock() >= outage.until:
            try:
                return self._first.generate(image, params, seed, name=name, until=until)
            except _UNABLE as error:
                outage = self._outage = self._pause(error)
            except BackendRateLimited as error:
                if self._clock() + (error.retry_after or 0) < until - self._reserve:
                    raise
                # Of this job alone: another may have the time to wait.
                outage = self._pause(error)
        return self._instead(outage.reason).generate(image, params, seed, name=name, until=until)

    def instead(self, error: JobError) -> Backend | None:
        """Return what serves a sample whose call of the first backend, pending until now, came to this error.

        None when the second would do no better.
        """
        if not isinstance(error, _UNABLE):
            return None
        self._outage = self._pause(error)
        return self._instead(error.code)

    def _instead(self, reason: str) -> Backend:
        return _Instead(self._second, reason)

    def _pause(self, error: JobError) -> _Outage:
        return _Outage(error.code, self._clock() + PAUSE_SECONDS)


@dataclass(frozen=True)
class _Instead:
    """A backend that serves what another one could not, which its answers say."""

    backend: Backend
    reason: str

    def generate(
        self, image: bytes, params: Img2ImgParams, seed: int, *, name: str, until: float
    ) -> GeneratedImage | Pending:
        return replace(self.backend.generate(image, params, seed, name=name, until=until), reason=self.reason)
