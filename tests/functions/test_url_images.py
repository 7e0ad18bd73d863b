"""Images that a caller names by URL, from an https server that does what it should not."""

from __future__ import annotations

import ssl
import time

import pytest

from img2img.fetch import Fetcher
from tests.https_server import Server, certificates, loopback, ok, redirect, repeat, resolver
from tests.system import ROOT

HOST = "images.example"
PHOTO = (ROOT / "events" / "photo.webp").read_bytes()


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return certificates(tmp_path_factory.mktemp("tls"), HOST)


@pytest.fixture
def server(system, chain):
    """A server that the system takes for a public one."""
    server = Server(chain[1])
    system.services.fetcher = fetcher(server, chain)
    yield server
    server.close()


def fetcher(server, chain, timeout=5.0):
    return Fetcher(
        max_bytes=200_000,
        timeout=timeout,
        ports={server.port},
        resolve=resolver("127.0.0.1"),
        is_public=loopback,
        ssl_context=ssl.create_default_context(cafile=str(chain[0])),
    )


def create(system, server, path="/photo", **headers):
    return system.create(image=f"https://{HOST}:{server.port}{path}", headers=headers)


def test_an_image_by_url_becomes_a_job(system, server):
    server.behaviours["/photo"] = ok(PHOTO)
    job_id = create(system, server).json["id"]
    system.deliver()
    assert system.job(job_id)["status"] == "succeeded"


def test_a_repeated_request_fetches_once(system, server):
    server.behaviours["/photo"] = ok(PHOTO)
    first, second = (create(system, server, **{"Idempotency-Key": "k"}) for _ in range(2))
    assert first.json["id"] == second.json["id"]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("behaviour", "status", "code"),
    [
        (redirect("https://127.0.0.1/"), 400, "image_unreachable"),
        (redirect("https://169.254.169.254/latest/meta-data/"), 400, "image_unreachable"),
        (redirect("http://images.example/photo"), 400, "image_unreachable"),
        (redirect("/photo"), 400, "image_unreachable"),
        (ok(b"<html>not found</html>"), 415, "unsupported_image"),
        (ok(PHOTO[:5000]), 415, "unsupported_image"),
        (ok(b"\0" * 200_001), 413, "too_large"),
        (repeat(b"HTTP/1.1 200 OK\r\n\r\n", b"\xff" * 65_536), 413, "too_large"),
    ],
    ids=["private", "metadata", "http", "loop", "html", "truncated", "large", "endless"],
)
def test_a_bad_url_costs_nothing(system, server, behaviour, status, code):
    server.behaviours["/photo"] = behaviour
    assert refused(system, server, status, code) < 5  # it is what was answered that was refused, not the time it took


def test_a_slow_url_costs_nothing_but_its_time(system, server, chain):
    system.services.fetcher = fetcher(server, chain, timeout=0.5)
    server.behaviours["/photo"] = repeat(b"HTTP/1.1 200 OK\r\n\r\n", b"\xff", pause=0.05)
    assert 0.5 <= refused(system, server, 400, "image_unreachable") < 5


def refused(system, server, status, code):
    """Have an image refused, check that nothing came of it, and return how many seconds the refusal took."""
    started = time.monotonic()
    answer = create(system, server)
    seconds = time.monotonic() - started
    assert (answer.status, answer.json["code"]) == (status, code)
    assert [error["field"] for error in answer.json["errors"]] == ["image"]
    assert system.api("GET", "/jobs").json["jobs"] == []
    assert system.messages() == 0
    assert system.objects("uploads") == []
    assert system.segmind.calls == []
    return seconds
