"""HTTP connections for calls that cost money and so may not be repeated on a guess.

`requests` and urllib3 leave three things open that matter here: whether a request was sent at all, how long a whole
answer may take, and whether a pooled connection outlived a freeze of the sandbox.
"""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Callable
from functools import partial
from http.client import HTTPResponse
from typing import Any, ClassVar

from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import NewConnectionError

IDLE_SECONDS = 20.0


class Transport(HTTPAdapter):
    """One pool a host for all threads. Whatever keeps a connection from being made is a `NewConnectionError`.

    A request and its answer take at most `limit` seconds, and the read timeout of the call, however they drip. Nothing
    is repeated.
    """

    def __init__(self, *, limit: float, clock: Callable[[], float]) -> None:
        self._settings = {"limit": limit, "clock": staticmethod(clock)}
        super().__init__(pool_connections=4, pool_maxsize=16, max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Make the pool, of connections that keep the deadline."""
        super().init_poolmanager(*args, **kwargs)
        plain = type("_Plain", (_Connection,), self._settings)
        secure = type("_Secure", (_Connection, HTTPSConnection), self._settings)
        self.poolmanager.pool_classes_by_scheme = {
            "http": type("_PlainPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
            "https": type("_SecurePool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
        }


class _Connection(HTTPConnection):
    limit: ClassVar[float]
    clock: ClassVar[staticmethod[[], float]]
    _started = 0.0
    _deadline = 0.0
    _used = 0.0

    def connect(self) -> None:
        try:
            super().connect()
        except Exception as error:
            # Whatever it is, nothing was sent. urllib3 reports a TLS handshake that stalls like a read that timed out.
            raise NewConnectionError(self, type(error).__name__) from error

    @property
    def is_connected(self) -> bool:
        # Lambda freezes the sandbox between invocations. Meanwhile the other side, or a NAT on the way, drops the
        # connection unseen, and a request sent into it would fail as one that may have been billed. By the wall
        # clock: the monotonic one may stand still in a freeze.
        return 0 <= self.clock() - self._used < IDLE_SECONDS and super().is_connected

    def request(self, *args: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()
        self._deadline = self._started + self.limit
        super().request(*args, **kwargs)

    def send(self, data: Any) -> None:
        if self.sock is not None:
            self.sock.settimeout(max(self._deadline - time.monotonic(), 0.001))
        super().send(data)

    def getresponse(self) -> Any:
        # By now urllib3 has put the read timeout here.
        if isinstance(self.timeout, int | float):
            self._deadline = min(self._deadline, self._started + self.timeout)
        self.response_class = partial(_response, deadline=self._deadline)  # type: ignore[assignment]
        response = super().getresponse()
        self._used = self.clock()
        return response


def _response(sock: socket.socket, *args: Any, deadline: float, **kwargs: Any) -> HTTPResponse:
    # `makefile` is all that a response asks of its socket.
    return HTTPResponse(_TimedReader(sock, deadline), *args, **kwargs)  # type: ignore[arg-type]


class _TimedReader(io.RawIOBase):
    """Reads a socket until a deadline. The socket's own timeout would start anew with every byte."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        # Not the bare socket: the file keeps it open when the connection is closed before its answer is read.
        self._file = sock.makefile("rb", buffering=0)
        self._deadline = deadline

    def makefile(self, mode: str) -> io.BufferedReader:  # noqa: ARG002 (always "rb")
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()
