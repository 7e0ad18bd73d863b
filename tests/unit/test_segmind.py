"""The Segmind client against the stand-in, and against sockets that do what no HTTP server does."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedReader, BytesIO
from typing import TYPE_CHECKING, Any

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from img2img import errors
from img2img.backends import GeneratedImage
from img2img.backends.segmind import SegmindBackend
from img2img.params import Img2ImgParams
from local.segmind import SegmindStandIn

if TYPE_CHECKING:
    from pathlib import Path

KEY = "SG_0123456789abcdef"
PROMPT = "a lighthouse in heavy rain, oil painting"
NOW = 1_780_000_000.0
TIMEOUT = 0.3
PATIENCE = 30.0  # for threads that have nothing to wait for
JPEG = b"\xff\xd8\xff\xe0" + bytes(range(256))
Script = Callable[[socket.socket, "Raw"], None]


def png(size: tuple[int, int] = (512, 768)) -> bytes:
    buffer = BytesIO()
    Image.linear_gradient("L").convert("RGB").resize(size).save(buffer, "PNG")
    return buffer.getvalue()


IMAGE = png()


class Keys:
    """The secret's cache: `cached` until a refresh takes what is stored."""

    def __init__(self, cached: str = KEY, stored: str | None = None) -> None:
        self.cached, self.stored = cached, cached if stored is None else stored
        self.refreshed = 0

    def __call__(self, *, refresh: bool) -> str:
        if refresh:
            self.refreshed += 1
            self.cached = self.stored
        return self.cached


class Raw:
    """A server that reads whole requests and answers each with `script`; counts both kinds of arrival."""

    def __init__(self, script: Script, context: ssl.SSLContext | None = None) -> None:
        self.script, self.context = script, context
        self.connections = 0
        self.requests: list[bytes] = []
        self.stopped = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.threads = [threading.Thread(target=self.accept)]
        self.open: list[socket.socket] = []
        self.threads[0].start()

    @property
    def url(self) -> str:
        return f"{'https' if self.context else 'http'}://127.0.0.1:{self.listener.getsockname()[1]}/v1"

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                connection = self.listener.accept()[0]
                self.connections += 1
                self.open.append(connection)
                self.threads.append(threading.Thread(target=self.serve, args=[connection]))
                self.threads[-1].start()

    def serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            if self.context is not None:
                connection = self.context.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as reader:
                while request := self.read(reader):
                    self.requests.append(request)
                    self.script(connection, self)

    def read(self, reader: BufferedReader) -> bytes:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = reader.readline()
            if not line:
                return b""
            head += line
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        return head + reader.read(int(lengths[0].split(b":")[1]))

    def stop(self) -> None:
        self.stopped.set()
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.threads[0].join(PATIENCE)
        for connection in self.open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for thread in self.threads:
            thread.join(PATIENCE)
        assert not [thread for thread in self.threads if thread.is_alive()]


@contextmanager
def raw(script: Script, context: ssl.SSLContext | None = None) -> Iterator[Raw]:
    server = Raw(script, context)
    try:
        yield server
    finally:
        server.stop()


def says(body: bytes | str, *headers: str, status: int = 200, keep: bool = True) -> Script:
    """Answer with `body`; without `keep` it ends with the connection."""
    content = body.encode() if isinstance(body, str) else body
    length = [f"Content-Length: {len(content)}"] if keep else ["Connection: close"]
    head = "\r\n".join([f"HTTP/1.1 {status} X", *headers, *length]) + "\r\n\r\n"

    def script(connection: socket.socket, server: Raw) -> None:
        connection.sendall(head.encode() + content)
        if not keep:
            connection.shutdown(socket.SHUT_RDWR)

    return script


def says_json(value: Any, *headers: str, status: int = 200) -> Script:
    return says(json.dumps(value), "Content-Type: application/json", *headers, status=status)


def closes(data: bytes) -> Script:
    def script(connection: socket.socket, server: Raw) -> None:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_RDWR)

    return script


def drips(data: bytes) -> Script:
    """Send a byte often enough that no single read times out."""

    def script(connection: socket.socket, server: Raw) -> None:
        for byte in data:
            connection.sendall(bytes([byte]))
            if server.stopped.wait(0.02):
                return

    return script


def backend(url: str, key: Any = None, **options: Any) -> SegmindBackend:
    return SegmindBackend(base_url=url, key=key or Keys(), **({"timeout": 5.0} | options))


def generate(client: SegmindBackend, seed: int = 7, **fields: Any) -> GeneratedImage:
    values: dict[str, Any] = {"prompt": PROMPT, "img_height": 768, "strength": 0.5} | fields
    params = Img2ImgParams(**values)
    return client.generate(IMAGE, params, seed)


def refused(client: SegmindBackend, kind: type[errors.JobError], **fields: Any) -> errors.JobError:
    with pytest.raises(errors.JobError) as caught:
        generate(client, **fields)
    assert type(caught.value) is kind
    for secret in (KEY, PROMPT, base64.b64encode(IMAGE).decode()[:60]):
        assert secret not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value


# --- what is sent


def test_the_request_is_segminds_own(segmind: SegmindStandIn) -> None:
    fields = {"negative_prompt": "blurry", "scheduler": "Euler a", "guidance_scale": 3.5, "num_inference_steps": 30}
    generate(backend(segmind.url), seed=98_877_465_625, samples=4, fit="contain", output_format="webp", **fields)
    [call] = segmind.calls
    assert call["body"] == fields | {
        "prompt": PROMPT,
        "samples": 1,
        "strength": 0.5,
        "seed": 98_877_465_625,
        "img_width": 512,
        "img_height": 768,
        "base64": False,
    }
    assert call["key_accepted"]
    assert call["headers"]["content-type"] == "application/json"
    assert call["image_size"] == (512, 768)
    assert call["image_sha256"] == hashlib.sha256(IMAGE).hexdigest()


def test_strength_is_sent_also_when_it_is_the_default(segmind: SegmindStandIn) -> None:
    generate(backend(segmind.url + "/"), strength=1.0)
    assert segmind.calls[0]["body"]["strength"] == 1.0


def test_the_environment_neither_proxies_nor_signs(
    segmind: SegmindStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password secret")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    generate(backend(segmind.url))
    assert "authorization" not in segmind.calls[0]["headers"]


def test_a_base_url_is_an_http_address() -> None:
    with pytest.raises(ValueError, match="base_url"):
        backend("api.segmind.com/v1")


# --- answers


def test_an_image_and_its_headers(segmind: SegmindStandIn) -> None:
    segmind.credits = 12.5
    made = generate(backend(segmind.url))
    with Image.open(BytesIO(made.data)) as image:
        assert (image.format, image.size) == ("JPEG", (512, 768))
    assert made.seconds > 0
    assert made.remaining_credits == 12.496


@pytest.mark.parametrize(
    ("header", "remaining"), [("3", 3.0), ("0", 0.0), ("nan", None), ("inf", None), ("-1", None), ("", None)]
)
def test_headers_that_are_no_number_are_ignored(header: str, remaining: float | None) -> None:
    headers = ("Content-Type: image/png", f"x-remaining-credits: {header}", f"x-generation-time: {header}")
    with raw(says(JPEG, *headers)) as server:
        made = generate(backend(server.url))
    assert made.remaining_credits == remaining
    assert made.seconds == 3.0 if header == "3" else 0 < made.seconds < 3


@pytest.mark.parametrize(
    "content_type", ["image/jpeg", "IMAGE/WEBP; q=1", "application/octet-stream", "binary/octet-stream", ""]
)
def test_image_bytes_come_back_untouched(content_type: str) -> None:
    headers = [f"Content-Type: {content_type}"] if content_type else []
    with raw(says(JPEG, *headers)) as server:
        assert generate(backend(server.url)).data == JPEG


ENCODED = base64.b64encode(JPEG).decode()


@pytest.mark.parametrize(
    "value",
    [
        {"image": ENCODED},
        {"image": [ENCODED, "other"]},
        {"output": ENCODED},
        {"data": [ENCODED]},
        {"image": None, "output": "data:image/jpeg;base64," + ENCODED},
        {"image": f"\n{ENCODED[:40]}\n{ENCODED[40:]}\n"},
    ],
)
@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/octet-stream"])
def test_json_that_holds_the_image(value: dict[str, Any], content_type: str) -> None:
    with raw(says(json.dumps(value), f"Content-Type: {content_type}")) as server:
        assert generate(backend(server.url)).data == JPEG


def test_json_though_bytes_were_asked_for(segmind: SegmindStandIn) -> None:
    segmind.behave("json")
    assert generate(backend(segmind.url)).data.startswith(b"\xff\xd8\xff")


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        "text",
        None,
        {"image": ""},
        {"image": []},
        {"image": {"b64": ENCODED}},
        {"image": 5},
        {"image": "not base64!"},
        {"image": "data:image/jpeg;base64,"},
        {"error": "the model is gone"},
        {"image": "https://segmind.example/result.jpg"},
        {"output": ["HTTP://segmind.example/result.jpg"]},
    ],
)
def test_json_without_an_image_is_broken_and_fetches_nothing(value: Any) -> None:
    with raw(says_json(value)) as server:
        error = refused(backend(server.url), errors.BackendBroken)
        assert len(server.requests) == 1
    assert not error.retryable


@pytest.mark.parametrize("body", ["{", "[" * 100_000, "\udcff".encode("utf-8", "surrogatepass")])
def test_json_that_is_none(body: str | bytes) -> None:
    with raw(says(body, "Content-Type: application/json")) as server:
        refused(backend(server.url), errors.BackendBroken)


@pytest.mark.parametrize("behaviour", ["html", "empty"])
def test_a_200_without_an_image(segmind: SegmindStandIn, behaviour: str) -> None:
    segmind.behave(behaviour)
    refused(backend(segmind.url), errors.BackendBroken)
    assert len(segmind.calls) == 1


@pytest.mark.parametrize("headers", [(), ("Content-Type: application/octet-stream",), ("Content-Type: text/plain",)])
def test_bytes_that_are_no_image(headers: tuple[str, ...]) -> None:
    with raw(says("no picture", *headers)) as server:
        refused(backend(server.url), errors.BackendBroken)


@pytest.mark.parametrize("behaviour", ["black", "garbage"])
def test_the_bytes_are_judged_by_others(segmind: SegmindStandIn, behaviour: str) -> None:
    segmind.behave(behaviour)
    assert generate(backend(segmind.url)).data


def test_an_answer_without_end() -> None:
    def endless(connection: socket.socket, server: Raw) -> None:
        connection.sendall(b"HTTP/1.1 200 X\r\nContent-Type: image/png\r\nConnection: close\r\n\r\n")
        while not server.stopped.is_set():
            connection.sendall(bytes(1_000_000))

    with raw(endless) as server:
        assert "larger" in refused(backend(server.url), errors.BackendBroken).detail


# --- errors


@pytest.mark.parametrize(
    ("behaviour", "kind", "text"),
    [
        ("400", errors.BackendRefused, "Bad request"),
        ("403", errors.BackendUnauthorized, "Forbidden"),
        ("404", errors.BackendRefused, "Not found"),
        ("405", errors.BackendRefused, "405 Method Not Allowed"),
        ("406-credits", errors.BackendOutOfCredits, "Insufficient credits"),
        ("406-content-type", errors.BackendRefused, "Content type"),
        ("429", errors.BackendRateLimited, "Rate limit"),
        ("500", errors.BackendFailed, "Internal server error"),
        ("502", errors.BackendFailed, "Bad gateway"),
        ("503", errors.BackendFailed, "unavailable"),
        ("504", errors.BackendGatewayTimeout, "timeout"),
    ],
)
def test_each_documented_error(segmind: SegmindStandIn, behaviour: str, kind: type[errors.JobError], text: str) -> None:
    segmind.behave(behaviour)
    client = backend(segmind.url)
    detail = refused(client, kind).detail
    assert detail.startswith(f"Segmind answered {behaviour[:3]}: ")
    assert text in detail
    assert "<" not in detail
    assert (len(segmind.calls), segmind.billed) == (1, 0)
    generate(client)
    assert segmind.billed == 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (201, errors.BackendBroken),
        (206, errors.BackendBroken),
        (301, errors.BackendRefused),
        (307, errors.BackendRefused),
        (402, errors.BackendRefused),
        (422, errors.BackendRefused),
        (501, errors.BackendBroken),
        (524, errors.BackendBroken),
    ],
)
def test_other_statuses(status: int, kind: type[errors.JobError]) -> None:
    with raw(says_json({"image": ENCODED}, "Location: /v1/elsewhere", status=status)) as server:
        refused(backend(server.url), kind)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ('{"error": "one", "error_description": "two", "message": "one"}', "one: two"),
        ('{"error": {"message": "nested"}}', "nested"),
        ('{"message": "<b>bold</b> &amp; brave\\n\\u0007 text"}', "bold & brave text"),
        ("<html><style>p {}</style><script>x < 1</script><h1>Bad\n gateway</h1></html>", "Bad gateway"),
        ('["a list"]', '["a list"]'),
        ("x y " * 500, ("x y " * 75)[:300]),
        ("", ""),
        (b"\xff\xfe\x00", "\ufffd\ufffd"),
    ],
)
def test_the_text_of_an_error(body: str | bytes, detail: str) -> None:
    with raw(says(body, status=500)) as server:
        said = refused(backend(server.url), errors.BackendFailed).detail
    assert said == (f"Segmind answered 500: {detail}" if detail else "Segmind answered 500")


@pytest.mark.parametrize(
    "text",
    [
        f"Invalid key {KEY}",
        f"bad prompt '{PROMPT}' given",
        f"prompt too long: {PROMPT[:25]}...",
        f'{{"prompt": "{PROMPT}", "image": "{base64.b64encode(IMAGE).decode()[:5000]}"}}',
        f"in other words: {PROMPT.replace(' ', '  ')}",
    ],
)
def test_what_is_echoed_is_masked(text: str) -> None:
    with raw(says_json({"error": text}, status=400)) as server:
        detail = refused(backend(server.url), errors.BackendRefused).detail
    assert "***" in detail
    assert not any(word in detail for word in ("lighthouse", "heavy rain", "iVBOR", "SG_"))


def test_a_short_prompt_is_masked_as_a_word_only() -> None:
    with raw(says_json({"error": "no cat in this category; concatenate"}, status=400)) as server:
        detail = refused(backend(server.url), errors.BackendRefused, prompt="cat").detail
    assert detail.endswith("no *** in this category; concatenate")


def test_a_prompt_that_is_echoed_does_not_tell_of_credits() -> None:
    with raw(says_json({"error": "Refused: a credit card on a table"}, status=406)) as server:
        refused(backend(server.url), errors.BackendRefused, prompt="a credit card on a table")


def test_an_error_whose_text_breaks_off_is_that_error() -> None:
    with raw(closes(b"HTTP/1.1 503 X\r\nContent-Length: 100\r\n\r\nbusy")) as server:
        assert refused(backend(server.url), errors.BackendFailed).retryable


# --- 429


def stamp(seconds: float, form: str = "%Y-%m-%dT%H:%M:%SZ") -> str:
    return dt.datetime.fromtimestamp(NOW + seconds, dt.UTC).strftime(form)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (f"x-rate-limit-reset-at-utc: {stamp(30)}", 30),
        (f"x-rate-limit-reset-at-utc: {stamp(30, '%Y-%m-%dT%H:%M:%S')}", 30),
        (f"x-rate-limit-reset-at-utc: {stamp(30, '%Y-%m-%d %H:%M:%S UTC')}", 30),
        (f"x-rate-limit-reset-at-utc: {stamp(3630, '%Y-%m-%dT%H:%M:%S.250+01:00')}", 30.25),
        (f"x-rate-limit-reset-at-utc: {stamp(30, '%a, %d %b %Y %H:%M:%S GMT')}", 30),
        (f"x-rate-limit-reset-at-utc: {NOW + 30:.0f}", 30),
        (f"x-rate-limit-reset-at-utc: {NOW + 30.5:.1f}", 30.5),
        (f"x-rate-limit-reset-at-utc: {(NOW + 30) * 1000:.0f}", 30),
        (f"x-rate-limit-reset-at-utc: {stamp(-100)}", 1),
        (f"x-rate-limit-reset-at-utc: {stamp(100_000)}", 300),
        ("x-rate-limit-reset-at-utc: soon", 5),
        ("x-rate-limit-reset-at-utc: 30", 5),
        ("x-rate-limit-reset-at-utc: ", 5),
        ("x-rate-limit-reset-at-utc: 9999-12-31T23:59:59-23:59", 300),
        ("x-other: 1", 5),
        ("Retry-After: 12", 12),
        (f"Retry-After: {stamp(12, '%a, %d %b %Y %H:%M:%S GMT')}", 12),
        (f"Retry-After: later\r\nx-rate-limit-reset-at-utc: {stamp(8)}", 8),
    ],
)
def test_the_wait_after_a_429(header: str, seconds: float) -> None:
    with raw(says_json({"error": "Rate limit exceeded"}, header, status=429)) as server:
        error = refused(backend(server.url, clock=lambda: NOW), errors.BackendRateLimited)
    assert error.retryable
    assert error.retry_after == pytest.approx(seconds)


def test_the_stand_ins_own_429(segmind: SegmindStandIn) -> None:
    segmind.reset_in = 40.0
    segmind.behave("429")
    error = refused(backend(segmind.url), errors.BackendRateLimited)
    assert error.retry_after == pytest.approx(40, abs=2)


# --- the key


def test_a_rotated_key_costs_no_failure(segmind: SegmindStandIn) -> None:
    keys = Keys()
    client = backend(segmind.url, keys)
    generate(client)
    segmind.rotate("SG_new")
    keys.stored = "SG_new\n"  # an editor's trailing newline
    generate(client)
    generate(client)
    assert [call["key_accepted"] for call in segmind.calls] == [True, False, True, True]
    assert (keys.refreshed, segmind.billed) == (1, 3)


def test_an_unchanged_key_is_not_tried_again(segmind: SegmindStandIn) -> None:
    segmind.rotate("SG_new")
    keys = Keys()
    refused(backend(segmind.url, keys), errors.BackendUnauthorized)
    assert (len(segmind.calls), keys.refreshed) == (1, 1)


def test_a_second_401_ends_it(segmind: SegmindStandIn) -> None:
    segmind.rotate("SG_newest")
    refused(backend(segmind.url, Keys(stored="SG_new")), errors.BackendUnauthorized)
    assert len(segmind.calls) == 2


@pytest.mark.parametrize("key", ["", "unset", " unset\n", "two words", "line\nbreak", "clé"])
def test_no_call_without_a_key(segmind: SegmindStandIn, key: str) -> None:
    refused(backend(segmind.url, Keys(key)), errors.BackendUnauthorized)
    assert segmind.calls == []


def test_the_first_key_is_found_while_the_placeholder_is_cached(segmind: SegmindStandIn) -> None:
    generate(backend(segmind.url, Keys("unset", stored=KEY)))
    assert len(segmind.calls) == 1


def test_a_key_emptied_by_a_rotation(segmind: SegmindStandIn) -> None:
    segmind.rotate("SG_new")
    refused(backend(segmind.url, Keys(stored="unset")), errors.BackendUnauthorized)
    assert len(segmind.calls) == 1


# --- connections that are never made: safe to repeat


def test_a_refused_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert refused(backend(f"http://127.0.0.1:{port}/v1"), errors.BackendUnreachable).retryable


@pytest.mark.parametrize("host", ["segmind.invalid", "a" * 70 + ".example", "segmind..example"])
def test_a_name_that_does_not_resolve(host: str) -> None:
    refused(backend(f"http://{host}/v1"), errors.BackendUnreachable)


def test_a_connection_that_is_not_accepted() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, socket.socket() as filler:
        # A full queue drops what comes next.
        filler.connect(listener.getsockname())
        client = backend(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", timeout=TIMEOUT)
        refused(client, errors.BackendUnreachable)


def certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """Return a server's context for 127.0.0.1 and the file of its self-signed certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "segmind")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    public, private = folder / "cert.pem", folder / "key.pem"
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, private)
    return context, public


def test_tls_reuses_its_connection_and_keeps_the_deadline(tmp_path: Path) -> None:
    context, authority = certificate(tmp_path)

    def trusting() -> requests.Session:
        session = requests.Session()
        session.verify = str(authority)
        return session

    with raw(says(JPEG, "Content-Type: image/jpeg"), context) as server, trusting() as one, trusting() as another:
        client = backend(server.url, session=one)
        assert generate(client).data == generate(client).data == JPEG
        assert (server.connections, len(server.requests)) == (1, 2)
        server.script = drips(b"HTTP/1.1 200 X\r\nx-drip: " + b"x" * 1000)
        # Enough for a handshake on a busy machine, and far less than the answer takes.
        refused(backend(server.url, session=another, timeout=1.0), errors.BackendTimeout)


def test_tls_that_is_not_trusted(tmp_path: Path) -> None:
    with raw(says(JPEG), certificate(tmp_path)[0]) as server:
        refused(backend(server.url), errors.BackendUnreachable)
        assert server.requests == []


def test_a_tls_handshake_that_breaks() -> None:
    with raw(says(JPEG)) as server:  # answers the handshake with silence until it looks like a request: never
        started = time.monotonic()
        url = server.url.replace("http:", "https:")
        refused(backend(url, timeout=TIMEOUT), errors.BackendUnreachable)
        assert time.monotonic() - started < 5
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def close() -> None:
            connection = listener.accept()[0]
            connection.settimeout(PATIENCE)
            connection.recv(1)
            connection.close()

        listener.settimeout(PATIENCE)
        thread = threading.Thread(target=close)
        thread.start()
        refused(backend(f"https://127.0.0.1:{listener.getsockname()[1]}/v1"), errors.BackendUnreachable)
        thread.join(PATIENCE)
        assert not thread.is_alive()


# --- what may have been billed: never repeated


def test_an_answer_that_does_not_come(segmind: SegmindStandIn) -> None:
    segmind.behave("hang")
    assert not refused(backend(segmind.url, timeout=TIMEOUT), errors.BackendTimeout).retryable
    assert len(segmind.calls) == 1


@pytest.mark.parametrize("behaviour", ["cut", "cut-before"])
def test_an_answer_that_is_cut(segmind: SegmindStandIn, behaviour: str) -> None:
    segmind.behave(behaviour)
    client = backend(segmind.url)
    assert not refused(client, errors.BackendBroken).retryable
    assert len(segmind.calls) == 1
    generate(client)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 X\r\nContent-Type: image/jpeg\r\nContent-Length: 500\r\n\r\nhalf",
        b"HTTP/1.1 200 X\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 X\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nhello\r\n",
        b"HTTP/1.1 200 X\r\nContent-Type: image/jpeg\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnone",
    ],
)
def test_answers_that_break_off(data: bytes) -> None:
    with raw(closes(data)) as server:
        refused(backend(server.url), errors.BackendBroken)
        assert len(server.requests) == 1


def test_a_repeat_inside_the_handler_of_an_older_error() -> None:
    with raw(closes(b"")) as server, socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listener.close()
        try:
            generate(backend(f"http://127.0.0.1:{port}/v1"))
        except errors.BackendUnreachable:
            with pytest.raises(errors.BackendBroken):
                generate(backend(server.url))


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 X\r\nx-drip: " + b"x" * 1000,
        b"HTTP/1.1 200 X\r\nContent-Type: image/jpeg\r\nContent-Length: 9999\r\n\r\n" + b"x" * 1000,
        b"HTTP/1.1 200 X\r\nContent-Type: image/jpeg\r\nConnection: close\r\n\r\n" + b"x" * 1000,
        b"HTTP/1.1 200 X\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 200,
    ],
)
def test_an_answer_that_drips_takes_no_longer(data: bytes) -> None:
    with raw(drips(data)) as server:
        started = time.monotonic()
        refused(backend(server.url, timeout=TIMEOUT), errors.BackendTimeout)
        assert TIMEOUT <= time.monotonic() - started < TIMEOUT + 3
        assert len(server.requests) == 1


def test_patience_with_one_request_is_shorter_than_the_timeout() -> None:
    def patience(params: Img2ImgParams) -> float:
        return params.num_inference_steps * TIMEOUT / 20

    with raw(drips(b"HTTP/1.1 200 X\r\nx-drip: " + b"x" * 1000)) as server:
        for steps in (20, 40):
            started = time.monotonic()
            refused(
                backend(server.url, timeout=60, patience=patience), errors.BackendTimeout, num_inference_steps=steps
            )
            assert TIMEOUT * steps / 20 <= time.monotonic() - started < TIMEOUT * steps / 20 + 3


def test_a_request_that_is_not_read() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = backend(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", timeout=TIMEOUT)
        params = Img2ImgParams(prompt=PROMPT)
        with pytest.raises(errors.BackendTimeout):
            client.generate(bytes(20_000_000), params, 1)


# --- the pool


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("gap", "connections"), [(0, 1), (19, 1), (21, 2), (100_000, 2), (-60, 2)])
def test_a_connection_is_reused_unless_it_was_idle(segmind: SegmindStandIn, gap: float, connections: int) -> None:
    clock = Clock()
    client = backend(segmind.url, clock=clock)
    generate(client)
    clock.now += gap
    generate(client)
    generate(client)
    assert len({call["connection"] for call in segmind.calls}) == connections


def test_an_error_keeps_the_connection(segmind: SegmindStandIn) -> None:
    client = backend(segmind.url)
    segmind.behave("500")
    refused(client, errors.BackendFailed)
    generate(client)
    assert len({call["connection"] for call in segmind.calls}) == 1


def test_a_connection_that_the_other_side_closed_is_replaced() -> None:
    with raw(says(JPEG, "Content-Type: image/jpeg")) as server:
        client = backend(server.url)
        generate(client)
        server.open[0].shutdown(socket.SHUT_RDWR)
        assert generate(client).data == JPEG
        assert server.connections == 2


def test_four_threads_share_the_pool(segmind: SegmindStandIn) -> None:
    client = backend(segmind.url)
    together = threading.Barrier(4, timeout=PATIENCE)

    def call(seed: int) -> bytes:
        together.wait()
        return generate(client, seed=seed).data

    with ThreadPoolExecutor(4) as threads:
        first = list(threads.map(call, range(4)))
        second = list(threads.map(call, range(4)))
    assert first == second
    assert len(set(first)) == 4
    assert len({call["connection"] for call in segmind.calls}) <= 4
    assert segmind.summary()["calls_by_seed"] == {str(seed): 2 for seed in range(4)}
