"""Download the image behind a user's URL without reaching a private network.

The host is resolved once, every address it resolves to must be public, and the connection goes to one of those checked
addresses, so an answer that changes between the check and the connection changes nothing. A redirect is a new URL under
the same rules. One deadline covers everything from the first DNS question to the last byte.
"""

from __future__ import annotations

import io
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from img2img.errors import ImageUnreachable, ServiceError, TooLarge

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CHUNK = 65_536
# One TLS record holds the whole request, so that sending it is one wait.
_LONGEST_TARGET = 8192
_LONGEST_HOST = 253
_LONGEST_HEAD = 1_000_000
_ADDRESSES_TRIED = 3
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f\\]")
_NETLOC = re.compile(
    r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*)\.?(?::(?P<port>[0-9]{0,5}))?",
    re.ASCII | re.IGNORECASE,
)
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
# Special ranges inside the public ones; how much of them `is_global` knows depends on the Python version.
_SPECIAL = (
    ipaddress.ip_network("192.0.0.0/24"),  # IETF protocol assignments
    ipaddress.ip_network("192.88.99.0/24"),  # 6to4 relays
    ipaddress.ip_network("2001::/23"),  # IETF protocol assignments, among them Teredo
    ipaddress.ip_network("2002::/16"),  # 6to4, which embeds an IPv4 address
    ipaddress.ip_network("3fff::/20"),  # documentation
)


def is_public(address: IPAddress) -> bool:
    """Tell whether an address belongs to a host on the public internet.

    Addresses that embed an IPv4 address (mapped, NAT64, 6to4, Teredo) never do: what they lead to is not visible here.
    """
    if address.version == 6 and address not in _GLOBAL_UNICAST:
        return False
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(address in network for network in _SPECIAL)
    )


class Fetcher:
    """Downloads images over https. Safe to share and to reuse."""

    def __init__(
        self,
        *,
        max_bytes: int,
        timeout: float = 10.0,
        max_redirects: int = 3,
        ports: Collection[int] = (443,),
        resolve: Callable[..., list[tuple[Any, ...]]] = socket.getaddrinfo,
        is_public: Callable[[IPAddress], bool] = is_public,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._max_redirects = max_redirects
        self._ports = frozenset(ports)
        self._resolve = resolve
        self._is_public = is_public
        self._ssl_context = ssl_context

    def fetch(self, url: str) -> bytes:
        """Return what the URL holds.

        Raises `TooLarge` over the size cap and `ImageUnreachable` for whatever else keeps the image from arriving.
        """
        deadline = _Deadline(self._timeout)
        # `from None` throughout: the original error may quote the URL, and a URL may hold a signature.
        try:
            for _ in range(self._max_redirects + 1):
                place = _parse(url, self._ports)
                addresses = self._checked_addresses(place, deadline)
                with (
                    _connect(addresses, place.port, deadline) as raw,
                    self._context().wrap_socket(raw, server_hostname=place.host, suppress_ragged_eofs=False) as sock,
                    self._get(sock, place, deadline) as response,
                ):
                    response.begin()
                    location = response.headers.get("Location")
                    if response.status not in _REDIRECTS or not location:
                        return self._body(response)
                    url = _join(url, location)
            raise _unreachable(f"is redirected more than {self._max_redirects} times")
        except TimeoutError:
            raise _unreachable(f"did not arrive within {self._timeout:g} s") from None
        except ssl.SSLCertVerificationError:
            raise _unreachable("the host has no valid certificate for its name") from None
        except (HTTPException, ssl.SSLEOFError, ConnectionResetError, BrokenPipeError):
            raise _unreachable("the answer broke off or is not HTTP") from None
        except ssl.SSLError:
            raise _unreachable("no TLS connection to the host could be made") from None
        except OSError:
            raise _unreachable("the host could not be reached") from None

    def _context(self) -> ssl.SSLContext:
        # Made on first use: loading the certificate authorities takes tens of milliseconds of a cold start.
        if self._ssl_context is None:
            context = ssl.create_default_context()
            context.set_alpn_protocols(["http/1.1"])
            self._ssl_context = context
        return self._ssl_context

    def _checked_addresses(self, place: _Place, deadline: _Deadline) -> list[IPAddress]:
        answers: queue.SimpleQueue[list[tuple[Any, ...]]] = queue.SimpleQueue()

        def resolve() -> None:
            try:
                answers.put(self._resolve(place.host, place.port, type=socket.SOCK_STREAM))
            except (OSError, UnicodeError):
                answers.put([])

        # getaddrinfo cannot be interrupted, so a thread that may outlive this call waits for it.
        threading.Thread(target=resolve, name="resolve", daemon=True).start()
        try:
            answer = answers.get(timeout=deadline.left())
        except queue.Empty:
            raise TimeoutError from None
        if not answer:
            raise _unreachable("the host name does not resolve")
        addresses = [ipaddress.ip_address(entry[4][0]) for entry in answer]
        if not all(self._is_public(address) for address in addresses):
            raise _unreachable("the host is not on the public internet")
        # IPv4 first: a function outside a VPC has no route to IPv6.
        return sorted(addresses, key=lambda address: address.version)[:_ADDRESSES_TRIED]

    def _get(self, sock: ssl.SSLSocket, place: _Place, deadline: _Deadline) -> HTTPResponse:
        head = (
            f"GET {place.target} HTTP/1.1\r\nHost: {place.authority}\r\nUser-Agent: img2img\r\n"
            "Accept: */*\r\nAccept-Encoding: identity\r\nConnection: close\r\n\r\n"
        )
        sock.settimeout(deadline.left())
        sock.sendall(head.encode("ascii"))
        reader = _BoundedReader(sock, deadline, 2 * self._max_bytes + _LONGEST_HEAD)
        return HTTPResponse(reader, method="GET")  # type: ignore[arg-type]

    def _body(self, response: HTTPResponse) -> bytes:
        if response.status != 200:
            raise _unreachable(f"the host answered with status {response.status}")
        if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise _unreachable("the host sent it with a Content-Encoding that was not asked for")
        too_large = TooLarge.of_field("image", f"is larger than {self._max_bytes} bytes")
        if (response.length or 0) > self._max_bytes:
            raise too_large
        body = bytearray()
        while chunk := response.read(_CHUNK):
            body += chunk
            if len(body) > self._max_bytes:
                raise too_large
        if response.length:
            raise _unreachable("the answer broke off or is not HTTP")
        return bytes(body)


class _Place(NamedTuple):
    host: str
    port: int
    authority: str
    target: str


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _BoundedReader(io.RawIOBase):
    """The reading side of a socket, within the deadline.

    The limit on raw bytes is for what the size cap cannot see: heads, trailers, and the chunk size of -1, which
    http.client takes for "everything".
    """

    def __init__(self, sock: socket.socket, deadline: _Deadline, limit: int) -> None:
        self._sock = sock
        self._deadline = deadline
        self._limit = limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(self._deadline.left())
        count = self._sock.recv_into(buffer)
        self._limit -= count
        if self._limit < 0:
            raise HTTPException
        return count

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return itself as a file: the one thing that `HTTPResponse` asks of a socket."""
        return io.BufferedReader(self)


def _unreachable(detail: str) -> ServiceError:
    return ImageUnreachable.of_field("image", detail)


def _parse(url: str, ports: Collection[int]) -> _Place:
    # Parsers disagree about these characters, and urlsplit drops some of them without a word.
    if _FORBIDDEN.search(url):
        raise _unreachable("the URL holds blanks, control characters or backslashes")
    try:
        parts = urlsplit(url)
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
        if parts.query:
            target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?[]")
    except ValueError:
        raise _unreachable("is not a URL") from None
    if parts.scheme != "https":
        raise _unreachable("the URL, and each one it redirects to, must begin with https://")
    if len(target) > _LONGEST_TARGET:
        raise _unreachable("the URL is too long")
    match = _NETLOC.fullmatch(parts.netloc)
    if match is None or len(match["host"]) > _LONGEST_HOST:
        raise _unreachable("the URL must name a host in ASCII letters (xn-- form), without user name or password")
    port = int(match["port"] or 443)
    if port not in ports:
        raise _unreachable("the URL's port is not allowed")
    host = match["host"].lower()
    return _Place(host.strip("[]"), port, host if port == 443 else f"{host}:{port}", target)


def _join(url: str, location: str) -> str:
    try:
        # http.client reads headers as Latin-1; servers mean UTF-8.
        return urljoin(url, location.encode("latin-1").decode())
    except ValueError:
        raise _unreachable("is redirected to what is not a URL") from None


def _connect(addresses: list[IPAddress], port: int, deadline: _Deadline) -> socket.socket:
    """Connect to the first address that answers; each gets its share of the time left."""
    failure = OSError()
    for tried, address in enumerate(addresses):
        sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
        try:
            sock.settimeout(deadline.left() / (len(addresses) - tried))
            sock.connect((str(address), port))
            sock.settimeout(deadline.left())
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure
