"""What the loopback HTTP servers share: keep-alive, bounded bodies, and an end that leaves no socket open."""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HOST = "127.0.0.1"
# A client that has already begun to send may only be told "too large" if somebody reads what it sends: a closed
# socket answers with a reset, which throws the answer away. So much is read and dropped, and for so long.
_DRAIN_BYTES = 256 * 2**20
_DRAIN_SECONDS = 15.0
# How long a server that ends may still wait for a client. The tests end hundreds.
_POLL_SECONDS = 0.01


class LoopbackServer(ThreadingHTTPServer):
    """A threaded HTTP server on 127.0.0.1 that `stop()` ends together with its open connections."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, handler: type[BaseHTTPRequestHandler], port: int = 0) -> None:
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._guard = threading.Lock()
        self._stopping = False
        self._loop = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": _POLL_SECONDS}, daemon=True)
        super().__init__((HOST, port), handler)

    @property
    def address(self) -> str:
        return f"{HOST}:{self.server_address[1]}"

    def server_bind(self) -> None:
        # HTTPServer asks the resolver for the host's full name, which can take seconds on a laptop without network.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, int(self.server_address[1])

    def start(self) -> None:
        self._loop.start()

    def stop(self) -> None:
        self._stopping = True
        if self._loop.is_alive():
            self.shutdown()
            self._loop.join()
        self.server_close()
        with self._guard:
            connections = dict(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in connections.values():
            thread.join(timeout=2)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self._guard:
            self._connections[request] = threading.current_thread()
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._guard:
                self._connections.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not self._stopping and not isinstance(error, ConnectionError | TimeoutError):
            logging.getLogger(__name__).error("a request failed", exc_info=error)


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with whole answers in one write."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        pass

    def reply(self, status: int, headers: Iterable[tuple[str, str]] = (), body: bytes = b"") -> None:
        reason = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
        lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers)]
        bodyless = status in (204, 304) or status < 200
        if not bodyless:
            lines.append(f"Content-Length: {len(body)}")
        if self.close_connection:
            lines.append("Connection: close")
        head = "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"
        self.wfile.write(head if bodyless or self.command == "HEAD" else head + body)

    def read_body(self, limit: int) -> bytes | None:
        """Return the request's body, or None when it is longer than `limit`.

        Raises `ValueError` for a length that is none, `ConnectionError` when the client leaves in the middle.
        """
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            return self._read_chunks(limit)
        length = int(self.headers.get("Content-Length") or 0)
        if length < 0:
            raise ValueError("negative Content-Length")
        return self._read_exactly(length) if length <= limit else None

    def _read_chunks(self, limit: int) -> bytes | None:
        chunks: list[bytes] = []
        total = 0
        while size := int(self.rfile.readline(1024).split(b";")[0], 16):
            total += size
            if size < 0 or total > limit:
                return None
            chunks.append(self._read_exactly(size))
            self.rfile.readline(1024)
        while self.rfile.readline(65536).strip():
            pass
        return b"".join(chunks)

    def _read_exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError("the client left before its body was complete")
        return data

    def reply_and_drop_body(self, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        """Answer before the request's body was read, then read and drop it and close."""
        self.close_connection = True
        self.reply(status, headers, body)
        until = time.monotonic() + _DRAIN_SECONDS
        left = _DRAIN_BYTES
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(2)
            while left > 0 and time.monotonic() < until and (data := self.rfile.read1(65536)):
                left -= len(data)
