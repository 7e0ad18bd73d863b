"""The fetcher against a real TLS server that misbehaves, and its address rule against hostile addresses."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img2img.errors import ImageUnreachable, ServiceError, TooLarge
from img2img.fetch import Fetcher, IPAddress, is_public
from tests.https_server import BOUND, Behaviour, Server, answer, certificates, loopback, ok, redirect, repeat, resolver
from tests.long import examples

if TYPE_CHECKING:
    from pathlib import Path

HOST = "images.example"
IMAGE = b"\x89PNG" + bytes(range(256)) * 40
MAX_BYTES = 100_000
SLOW = 0.2


def numeric_only(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
    """Resolve as the system does what it takes for an address, and no name: nothing is asked of the network."""
    if host == "localhost":
        return resolver("::1", "127.0.0.1")(host, port)
    return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificates(tmp_path_factory.mktemp("tls"), HOST)


@pytest.fixture
def server(chain: tuple[Path, Path]) -> Iterator[Server]:
    server = Server(chain[1])
    yield server
    server.close()


@pytest.fixture
def fetcher(server: Server, chain: tuple[Path, Path]) -> Callable[..., Fetcher]:
    def make(**options: Any) -> Fetcher:
        defaults: dict[str, Any] = {
            "max_bytes": MAX_BYTES,
            "timeout": 5.0,
            "ports": {server.port},
            "resolve": resolver("127.0.0.1"),
            "is_public": loopback,
            "ssl_context": ssl.create_default_context(cafile=str(chain[0])),
        }
        return Fetcher(**defaults | options)

    return make


def refused(fetcher: Fetcher, url: str) -> ServiceError:
    """Return the error that fetching ends with, having checked what every such error has in common."""
    started = time.monotonic()
    with pytest.raises((ImageUnreachable, TooLarge)) as caught:
        fetcher.fetch(url)
    assert time.monotonic() - started < BOUND
    error = caught.value
    assert isinstance(error, ServiceError)
    assert [blamed.field for blamed in error.errors] == ["image"]
    assert "secret" not in error.detail
    return error


# What arrives


@pytest.mark.parametrize(
    "behaviour",
    [
        ok(IMAGE),
        ok(IMAGE, headers="\nContent-Encoding: identity"),
        answer("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", b"%x\r\n%s\r\n0\r\n\r\n" % (len(IMAGE), IMAGE)),
        answer("HTTP/1.1 200 OK\nConnection: close", IMAGE),
        answer(f"HTTP/1.1 100 Continue\n\nHTTP/1.1 200 OK\nContent-Length: {len(IMAGE)}", IMAGE),
    ],
    ids=["length", "identity", "chunked", "until-close", "continue"],
)
def test_fetches_a_body(server: Server, fetcher: Callable[..., Fetcher], behaviour: Behaviour) -> None:
    server.behaviours["/a.png"] = behaviour
    assert fetcher().fetch(f"https://{HOST}:{server.port}/a.png") == IMAGE


def test_sends_nothing_but_the_request(
    server: Server, fetcher: Callable[..., Fetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server.behaviours["/caf%C3%A9/a%20b.png?x=%C3%BC&sig=a%2Fb+c=="] = ok(IMAGE, headers="\nSet-Cookie: id=1")
    assert fetcher().fetch(f"HTTPS://IMAGES.example.:{server.port}/café/a%20b.png?x=ü&sig=a%2Fb+c==#part") == IMAGE
    lines = server.requests[0].splitlines()
    assert lines[0] == "GET /caf%C3%A9/a%20b.png?x=%C3%BC&sig=a%2Fb+c== HTTP/1.1"
    assert lines[1:-1] == [
        f"Host: {HOST}:{server.port}",
        "User-Agent: img2img",
        "Accept: */*",
        "Accept-Encoding: identity",
        "Connection: close",
    ]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_follows_a_redirect(server: Server, fetcher: Callable[..., Fetcher], status: int) -> None:
    server.behaviours["/"] = redirect("/größe?x=1", status)
    server.behaviours["/gr%C3%B6%C3%9Fe?x=1"] = redirect(f"https://{HOST}:{server.port}/a.png", status)
    server.behaviours["/a.png"] = ok(IMAGE, headers="\nSet-Cookie: id=1")
    assert fetcher().fetch(f"https://{HOST}:{server.port}") == IMAGE
    assert "Cookie" not in server.requests[-1]


def test_a_fetcher_is_used_again(server: Server, fetcher: Callable[..., Fetcher]) -> None:
    server.behaviours["/a.png"] = ok(IMAGE)
    server.behaviours["/cut"] = answer("HTTP/1.1 200 OK\nContent-Length: 100", b"short")
    one = fetcher()
    refused(one, f"https://{HOST}:{server.port}/cut")
    assert one.fetch(f"https://{HOST}:{server.port}/a.png") == IMAGE


def test_an_exact_fit_is_not_too_large(server: Server, fetcher: Callable[..., Fetcher]) -> None:
    server.behaviours["/a.png"] = ok(b"x" * 1000)
    url = f"https://{HOST}:{server.port}/a.png"
    assert fetcher(max_bytes=1000).fetch(url) == b"x" * 1000
    assert isinstance(refused(fetcher(max_bytes=999), url), TooLarge)


# What does not


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("behaviour", "error", "detail"),
    [
        (answer("HTTP/1.1 404 Not Found\nContent-Length: 6", b"secret"), ImageUnreachable, "status 404"),
        (answer("HTTP/1.1 500 Oops\nContent-Length: 6", b"secret"), ImageUnreachable, "status 500"),
        (answer("HTTP/1.1 206 Partial\nContent-Length: 1", b"x"), ImageUnreachable, "status 206"),
        (answer("HTTP/1.1 204 No Content"), ImageUnreachable, "status 204"),
        (answer("HTTP/1.1 302 Found\nContent-Length: 0"), ImageUnreachable, "status 302"),
        (ok(IMAGE, headers="\nContent-Encoding: gzip"), ImageUnreachable, "Content-Encoding"),
        (answer("HTTP/1.1 200 OK\nContent-Length: 99999999999"), TooLarge, "larger than 100000 bytes"),
        (repeat(HEAD + b"\r\n", b"x" * 10_000), TooLarge, "larger than 100000 bytes"),
        (
            repeat(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b"x" * 4096 + b"\r\n"),
            TooLarge,
            "larger than 100000 bytes",
        ),
        (
            repeat(HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", b"x" * 16_384),
            ImageUnreachable,
            "not HTTP",
        ),
        (repeat(HEAD, b"X-Secret: secret\r\n"), ImageUnreachable, "not HTTP"),
        (repeat(HEAD + b"X-Long: ", b"x" * 10_000), ImageUnreachable, "not HTTP"),
        (repeat(b"HTTP/1.1 ", b"2" * 10_000), ImageUnreachable, "not HTTP"),
        (answer("220 secret FTP ready"), ImageUnreachable, "not HTTP"),
        (answer("HTTP/1.1 200 OK\nContent-Length: 100", b"secret"), ImageUnreachable, "broke off"),
        (answer("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", b"64\r\nsecret"), ImageUnreachable, "broke off"),
        (lambda sock, server: None, ImageUnreachable, "broke off"),
    ],
    ids=[
        "404", "500", "206", "204", "no-location", "gzip", "huge-length", "endless-body", "endless-chunks",
        "negative-chunk", "endless-headers", "endless-header", "endless-status", "no-http",
        "short-body", "short-chunk", "silent",
    ],
)  # fmt: skip
def test_refuses_an_answer(
    server: Server, fetcher: Callable[..., Fetcher], behaviour: Behaviour, error: type[ServiceError], detail: str
) -> None:
    server.behaviours["/a.png"] = behaviour
    caught = refused(fetcher(), f"https://{HOST}:{server.port}/a.png")
    assert type(caught) is error
    assert detail in caught.detail


@pytest.mark.parametrize("start", [b"", HEAD, HEAD + b"Content-Length: 100\r\n\r\nsecret", HEAD + b"\r\nsecret"])
def test_refuses_a_connection_cut_without_notice(server: Server, fetcher: Callable[..., Fetcher], start: bytes) -> None:
    def cut(sock: ssl.SSLSocket, server: Server) -> None:
        sock.sendall(start)
        raise ConnectionAbortedError  # the server closes without a TLS goodbye

    server.behaviours["/a.png"] = cut
    assert "broke off" in refused(fetcher(), f"https://{HOST}:{server.port}/a.png").detail


@pytest.mark.parametrize(
    "behaviour",
    [
        repeat(b"", b"H", 0.02),
        repeat(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02),
        repeat(HEAD + b"X: ", b"x", 0.02),
        repeat(HEAD + b"Content-Length: 9999\r\n\r\n", b"x", 0.02),
        repeat(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", 0.02),
        repeat(HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: x\r\n", 0.0),
        lambda sock, server: server.stopping.wait(BOUND) and None,
    ],
    ids=["status", "continue", "header", "body", "chunks", "endless-trailers", "silence"],
)
def test_a_slow_answer_does_not_outlast_the_budget(
    server: Server, fetcher: Callable[..., Fetcher], behaviour: Behaviour
) -> None:
    server.behaviours["/a.png"] = behaviour
    caught = refused(fetcher(timeout=SLOW), f"https://{HOST}:{server.port}/a.png")
    assert isinstance(caught, ImageUnreachable)


def test_the_budget_covers_redirects_together(server: Server, fetcher: Callable[..., Fetcher]) -> None:
    def late(sock: ssl.SSLSocket, server: Server) -> None:
        server.stopping.wait(0.6)
        redirect("/a.png")(sock, server)

    server.behaviours["/a.png"] = late
    assert "did not arrive within 1 s" in refused(fetcher(timeout=1.0), f"https://{HOST}:{server.port}/a.png").detail
    assert len(server.requests) == 2


def test_a_slow_handshake_does_not_outlast_the_budget(fetcher: Callable[..., Fetcher]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        caught = refused(fetcher(timeout=SLOW, ports={port}), f"https://{HOST}:{port}/a.png")
    assert "did not arrive within 0.2 s" in caught.detail


def test_a_slow_resolver_does_not_outlast_the_budget(server: Server, fetcher: Callable[..., Fetcher]) -> None:
    released = threading.Event()

    def hang(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        released.wait(BOUND)
        return []

    caught = refused(fetcher(timeout=SLOW, resolve=hang), f"https://{HOST}:{server.port}/a.png")
    released.set()
    assert "did not arrive within 0.2 s" in caught.detail


@pytest.mark.parametrize(
    ("location", "detail"),
    [
        (f"http://{HOST}/a.png", "https://"),
        ("ftp://x/secret", "https://"),
        ("file:///etc/passwd", "https://"),
        ("//private.example/secret", "not on the public internet"),
        ("https://private.example:22/", "port"),
        ("https://user:secret@images.example/", "user name"),
        ("https://[bad/", "not a URL"),
        ("/a b", "blanks"),
    ],
)
def test_checks_a_redirect_like_the_first_url(
    server: Server, fetcher: Callable[..., Fetcher], location: str, detail: str
) -> None:
    def resolve(host: str, port: int, **options: Any) -> list[tuple[Any, ...]]:
        return resolver("127.0.0.1" if host == HOST else "127.0.0.2")(host, port, **options)

    server.behaviours["/a.png"] = redirect(location)
    caught = refused(fetcher(resolve=resolve, ports={server.port, 443}), f"https://{HOST}:{server.port}/a.png")
    assert isinstance(caught, ImageUnreachable)
    assert detail in caught.detail
    assert server.accepted == 1


@pytest.mark.parametrize("allowed", [0, 3])
def test_a_redirect_loop_ends(server: Server, fetcher: Callable[..., Fetcher], allowed: int) -> None:
    server.behaviours["/a.png"] = redirect("/a.png")
    caught = refused(fetcher(max_redirects=allowed), f"https://{HOST}:{server.port}/a.png")
    assert f"more than {allowed} times" in caught.detail
    assert len(server.requests) == allowed + 1


def test_refuses_a_certificate_for_another_name(server: Server, fetcher: Callable[..., Fetcher]) -> None:
    assert "certificate" in refused(fetcher(), f"https://other.example:{server.port}/a.png").detail
    assert server.requests == []


def test_refuses_an_unknown_authority(server: Server, fetcher: Callable[..., Fetcher]) -> None:
    strict = fetcher(ssl_context=None)
    assert "certificate" in refused(strict, f"https://{HOST}:{server.port}/a.png").detail
    assert server.requests == []


def test_refuses_plain_http_on_the_port(fetcher: Callable[..., Fetcher]) -> None:
    plain = Server(None)
    try:
        assert "TLS" in refused(fetcher(ports={plain.port}), f"https://{HOST}:{plain.port}/a.png").detail
    finally:
        plain.close()


def test_a_closed_port_is_unreachable(fetcher: Callable[..., Fetcher]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "could not be reached" in refused(fetcher(ports={port}), f"https://{HOST}:{port}/a.png").detail


@pytest.mark.parametrize("failure", [socket.gaierror(-2, "secret"), UnicodeError("secret"), None])
def test_a_name_that_does_not_resolve(
    server: Server, fetcher: Callable[..., Fetcher], failure: Exception | None
) -> None:
    def resolve(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        if failure:
            raise failure
        return []

    caught = refused(fetcher(resolve=resolve), f"https://{HOST}:{server.port}/a.png")
    assert "does not resolve" in caught.detail


# Which address is connected to


def on_one_port(certificate: Path) -> tuple[Server, Server]:
    """Start servers on one port of 127.0.0.1 and of 127.0.0.2, the second without TLS."""
    for _ in range(10):
        server = Server(certificate)
        try:
            return server, Server(None, "127.0.0.2", server.port)
        except OSError:  # somebody else has it there
            server.close()
    raise AssertionError("no port is free on both addresses")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS's loopback interface has no 127.0.0.2")
def test_only_the_checked_address_is_connected_to(chain: tuple[Path, Path], fetcher: Callable[..., Fetcher]) -> None:
    server, private = on_one_port(chain[1])
    answers = iter(["127.0.0.1", "127.0.0.2"])
    asked: list[str] = []

    def rebind(host: str, port: int, **options: Any) -> list[tuple[Any, ...]]:
        asked.append(host)
        return resolver(next(answers))(host, port, **options)

    try:
        server.behaviours["/a.png"] = redirect("/b.png")
        caught = refused(fetcher(resolve=rebind, ports={server.port}), f"https://{HOST}:{server.port}/a.png")
        assert "not on the public internet" in caught.detail
        assert (asked, server.accepted, private.accepted) == ([HOST, HOST], 1, 0)
    finally:
        server.close()
        private.close()


def test_one_private_address_among_public_ones_refuses_the_host(
    server: Server, fetcher: Callable[..., Fetcher]
) -> None:
    for addresses in (["127.0.0.1", "10.0.0.1"], ["::1", "127.0.0.1"]):
        caught = refused(fetcher(resolve=resolver(*addresses)), f"https://{HOST}:{server.port}/a.png")
        assert "not on the public internet" in caught.detail
    assert server.accepted == 0


def test_another_address_is_tried_when_the_first_is_dead(server: Server, fetcher: Callable[..., Fetcher]) -> None:
    server.behaviours["/a.png"] = ok(IMAGE)
    both = fetcher(resolve=resolver("::1", "127.0.0.2", "127.0.0.1"), is_public=lambda address: address.is_loopback)
    assert both.fetch(f"https://{HOST}:{server.port}/a.png") == IMAGE


# Hostile spellings: the default rule, and a resolver that opens no socket


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1", "https://127.1", "https://0x7f000001", "https://2130706433", "https://017700000001",
        "https://0x7f.0.0.1", "https://0", "https://0.0.0.0", "https://10.0.0.1", "https://10.1", "https://172.16.0.1",
        "https://192.168.0.1", "https://100.64.0.1", "https://169.254.169.254/latest/meta-data/",
        "https://169.254.169.254.", "https://0xa9fea9fe", "https://2852039166", "https://255.255.255.255",
        "https://224.0.0.1", "https://[::1]", "https://[::]", "https://[::ffff:169.254.169.254]",
        "https://[::ffff:a9fe:a9fe]", "https://[::127.0.0.1]", "https://[64:ff9b::a9fe:a9fe]",
        "https://[2002:a9fe:a9fe::]", "https://[fd00:ec2::254]", "https://[fe80::1]", "https://[ff02::1]",
        "https://localhost", "https://localhost.", "https://LOCALHOST/", "https://[::1]:443/a.png",
    ],
)  # fmt: skip
def test_refuses_the_spelling_of_a_private_address(url: str) -> None:
    fetcher = Fetcher(max_bytes=MAX_BYTES, timeout=5.0, resolve=numeric_only)
    assert "not on the public internet" in refused(fetcher, url).detail


@pytest.mark.parametrize(
    "url",
    [
        "", "secret", "https:", "https://", "https:///a.png", "https:a.png", "https:/images.example/a", "//x/a.png",
        "http://images.example/", "ftp://images.example/", "file:///etc/passwd", "data:image/png;base64,AAAA",
        "gopher://images.example", "javascript:1", "HTTP://images.example",
        "https://user@images.example", "https://user:secret@images.example", "https://@images.example",
        "https://images.example@127.0.0.1", "https://images.example#@127.0.0.1", "https://:secret@/",
        "https://images.example:22", "https://images.example:80", "https://images.example:0",
        "https://images.example:99999", "https://images.example:-1", "https://images.example:443443",
        "https://images.example:\uff14\uff14\uff13", "https://images.example:443:443", "https://images.example:x",
        "https://.", "https://..", "https://.images.example", "https://images..example", "https://images.example..",
        "https://" + "a" * 64 + ".example", "https://" + "a." * 200 + "example", "https://images.example/" + "a" * 9000,
        "https://ⓛocalhost", "https://\uff11\uff12\uff17.0.0.1", "https://127。0。0。1", "https://bücher.example",
        "https://\u212a.example", "https://xn--ü",
        "https://images.example\u200b", "https://\udcff.example", "https://images.example/\udcff",
        "https://images%2eexample", "https://%31%32%37.0.0.1", "https://[fe80::1%25lo]", "https://[::1", "https://::1",
        "https://[v1.x]", "https://[127.0.0.1]", "https://[]", "https://images.example\\@127.0.0.1/",
        "https:\\\\images.example", " https://images.example", "https://images.example ", "ht\ntps://images.example",
        "https://images.example/\r\nHost: x", "https://images.example/a b", "https://images\x00.example",
        "https://images.example/\x7f", "https://images.example/\t", "https://im\tages.example", "https://a,b.example",
        "https://images.example;x", "https://$(id).example", "https://*.example", "https://images.example?\x1f",
        "https://unknown.example", "https://xn--junk-.example",
    ],
)  # fmt: skip
def test_refuses_a_hostile_url(url: str) -> None:
    fetcher = Fetcher(max_bytes=MAX_BYTES, timeout=5.0, resolve=numeric_only)
    assert isinstance(refused(fetcher, url), ImageUnreachable)


@settings(max_examples=examples(60), deadline=None)
@given(st.text(max_size=30), st.sampled_from(["", "https://", "https://127.0.0.1/", "https://[::1]:", "//"]))
def test_any_text_is_refused_in_order(text: str, start: str) -> None:
    fetcher = Fetcher(max_bytes=MAX_BYTES, resolve=numeric_only, is_public=lambda address: False)
    with pytest.raises(ImageUnreachable):
        fetcher.fetch(start + text)


# The address rule


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "52.95.110.1", "172.32.0.1", "100.128.0.1", "2001:4860:4860::8888", "2606:4700::1111"],
)
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "network",
    [
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4", "::/8", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64",
        "2001::/32", "2001:10::/28", "2001:20::/28", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16",
        "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
    ],
)  # fmt: skip
def test_special_ranges_are_not_public(network: str) -> None:
    special = ipaddress.ip_network(network)
    middle = special.network_address + special.num_addresses // 2
    assert not any(is_public(address) for address in (special.network_address, middle, special.broadcast_address))


@settings(max_examples=examples(150), deadline=None)
@given(st.ip_addresses(v=4))
def test_an_embedded_ipv4_address_is_never_public(address: ipaddress.IPv4Address) -> None:
    value = int(address)
    embedded = [
        ipaddress.IPv6Address(value),
        ipaddress.IPv6Address((0xFFFF << 32) | value),
        ipaddress.IPv6Address((0x64FF9B << 96) | value),
        ipaddress.IPv6Address((0x2002 << 112) | (value << 80) | 1),
        ipaddress.IPv6Address((0x20010000 << 96) | (value ^ 0xFFFFFFFF)),
    ]
    assert not any(is_public(each) for each in embedded)


@settings(max_examples=examples(300), deadline=None)
@given(st.ip_addresses())
def test_a_public_address_is_nothing_else(address: IPAddress) -> None:
    if is_public(address):
        assert address.is_global
        for special in ("private", "loopback", "link_local", "multicast", "reserved", "unspecified"):
            assert not getattr(address, f"is_{special}")
