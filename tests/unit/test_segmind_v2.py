"""The client of Segmind's v2 against the stand-in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from img2img import errors
from img2img.backends import Pending, Wait
from img2img.backends.segmind_v2 import SegmindQueue, origin_of
from img2img.params import Img2ImgParams
from local.segmind import SegmindStandIn
from tests.unit.test_segmind import IMAGE, KEY, PROMPT, Keys, Raw, raw

PARAMS = Img2ImgParams(prompt=PROMPT, negative_prompt="blurry", seed=7)


class Clock:
    def __init__(self) -> None:
        self.now = 1_780_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def segmind() -> Iterator[SegmindStandIn]:
    with SegmindStandIn(KEY) as stand_in:
        yield stand_in


def client(segmind: SegmindStandIn | Raw, clock: Clock, **options: Any) -> SegmindQueue:
    given = {"key": Keys(), "timeout": 5.0, "origins": [getattr(segmind, "origin", "https://pictures.example")]}
    return SegmindQueue(base_url=segmind.url, clock=clock, **(given | options))


def submit(queue: SegmindQueue, clock: Clock, later: float = 1.0) -> Pending:
    pending = queue.generate(IMAGE, PARAMS, 7)
    clock.now += later
    return pending


def test_a_submit_sends_what_v1_sends_and_notes_the_request(segmind, clock):
    pending = submit(client(segmind, clock), clock)
    [call] = segmind.calls
    assert call["key_accepted"]
    assert (call["body"]["samples"], call["body"]["seed"], call["body"]["strength"]) == (1, 7, 1.0)
    assert dict(pending.notes) == {"request_id": next(iter(segmind.requests)), "asked_at": "1780000000.000"}
    assert pending.backend == "segmind"


@pytest.mark.parametrize("base", ["{origin}/v1", "{origin}/v1/", "{origin}/v2", "{origin}"])
def test_v2_lies_beside_v1(segmind, clock, base):
    queue = SegmindQueue(
        base_url=base.format(origin=segmind.origin), origins=[segmind.origin], key=Keys(), timeout=5, clock=clock
    )
    assert queue.answer(submit(queue, clock), None)


def test_a_picture_with_what_segmind_says_of_it(segmind, clock):
    queue = client(segmind, clock)
    pending = submit(queue, clock)
    found = queue.answer(pending, None)
    assert found
    assert found.data == segmind.requests[pending.notes["request_id"]].pictures[0]
    assert (found.backend, found.remaining_credits) == ("segmind", segmind.credits)
    assert found.seconds > 0


def test_a_list_of_pictures_gives_its_first(segmind, clock):
    queue = client(segmind, clock)
    segmind.behave("list", at="response")
    assert queue.answer(submit(queue, clock), None)


def test_there_is_none_while_it_runs(segmind, clock):
    segmind.latency = 60
    queue = client(segmind, clock)
    pending = submit(queue, clock)
    assert queue.answer(pending, None) is None
    assert segmind.looks == ["status"]
    segmind.release()
    assert queue.answer(pending, None)


def test_nothing_is_known_of_no_call(segmind, clock):
    assert client(segmind, clock).answer(None, None) is None


def test_what_it_waits_for(segmind, clock):
    assert client(segmind, clock).waits_for(answering=False) is Wait.BACKEND_BUSY


@pytest.mark.parametrize(
    ("age", "wait"), [(0, 1), (0.9, 2.1), (1, 2), (2.9, 3.1), (3, 3), (6, 5), (7, 4), (11, 5), (3600, 1)]
)
def test_when_to_look(segmind, clock, age, wait):
    pending = Pending(backend="segmind", notes={"request_id": "r", "asked_at": f"{clock():.3f}"})
    clock.now += age
    assert client(segmind, clock).look_after(pending) == pytest.approx(wait)


def test_patience_ends_a_request_after_one_more_look(segmind, clock):
    segmind.latency = 60
    queue = client(segmind, clock, patience=lambda _: 8.0)
    pending = submit(queue, clock, later=6)
    assert queue.look_after(pending) == pytest.approx(2)
    assert queue.answer(pending, None) is None
    clock.now += 2
    with pytest.raises(errors.BackendTimeout):
        queue.answer(pending, None)
    segmind.release()
    assert queue.answer(pending, None)


def test_a_rotated_key_is_read_again_at_a_look(segmind, clock):
    keys = Keys(stored="SG_new")
    queue = client(segmind, clock, key=keys)
    pending = submit(queue, clock)
    segmind.rotate("SG_new")
    assert queue.answer(pending, None)
    assert keys.refreshed == 1


def test_a_failed_run_may_be_asked_for_again_and_its_text_is_passed_on(segmind, clock):
    segmind.behave("failed")
    queue = client(segmind, clock)
    with pytest.raises(errors.BackendFailed, match="422: The model could not make a picture") as raised:
        queue.answer(submit(queue, clock), None)
    assert raised.value.retryable
    assert segmind.billed == 0


@pytest.mark.parametrize("trouble", ["500", "502", "503"])
def test_a_submit_that_was_refused_by_a_broken_server_may_be_repeated(segmind, clock, trouble):
    segmind.behave(trouble)
    with pytest.raises(errors.BackendFailed) as raised:
        submit(client(segmind, clock), clock)
    assert raised.value.retryable


@pytest.mark.parametrize("trouble", ["cut", "cut-before", "html"])
def test_a_submit_that_may_have_been_taken_is_never_repeated(segmind, clock, trouble):
    segmind.behave(trouble)
    with pytest.raises(errors.BackendBroken) as raised:
        submit(client(segmind, clock), clock)
    assert not raised.value.retryable


def test_a_submit_that_is_never_answered_may_have_been_taken(segmind, clock):
    segmind.behave("hang")
    with pytest.raises(errors.BackendTimeout) as raised:
        submit(client(segmind, clock, timeout=0.2), clock)
    assert not raised.value.retryable


def test_the_model_may_be_gone(segmind, clock):
    segmind.behave("410")
    with pytest.raises(errors.BackendGone):
        submit(client(segmind, clock), clock)


def test_a_rate_limit_says_when_it_ends(segmind, clock):
    segmind.behave("429")
    with pytest.raises(errors.BackendRateLimited) as raised:
        submit(client(segmind, clock), clock)
    assert raised.value.retry_after


def test_a_look_that_hangs_is_given_up_and_made_again(segmind, clock):
    queue = client(segmind, clock, timeout=0.3)
    pending = submit(queue, clock)
    for step in ("status", "response", "output"):
        segmind.behave("hang", at=step)
        assert queue.answer(pending, None) is None
    assert queue.answer(pending, None)


def test_a_server_that_is_gone_for_now_is_looked_at_again(segmind, clock):
    queue = client(segmind, clock)
    pending = submit(queue, clock)
    segmind.stop()
    assert queue.answer(pending, None) is None
    segmind.start()
    assert queue.answer(pending, None)


def test_the_key_is_not_shown_where_pictures_lie(segmind, clock):
    queue = client(segmind, clock)
    queue.answer(submit(queue, clock), None)
    assert segmind.keys_shown["output"] == 0


def test_a_picture_elsewhere_is_not_fetched(segmind, clock):
    segmind.behave("elsewhere", at="response")
    queue = client(segmind, clock)
    with pytest.raises(errors.BackendBroken, match=r"where none may be fetched from: http://127\.0\.0\.2:9"):
        queue.answer(submit(queue, clock), None)
    assert "output" not in segmind.looks


def answers(*bodies: bytes) -> Any:
    """Return a script that answers each request with the next of these bodies."""
    left = list(bodies)
    lock = threading.Lock()

    def script(connection: Any, _server: Raw) -> None:
        with lock:
            body = left.pop(0)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)

    return script


@pytest.mark.parametrize("request_id", ['"../../v1/x"', '""', "5", "null", '"a b"', f'"{"a" * 129}"'])
def test_an_id_that_is_none_is_no_part_of_an_address(clock, request_id):
    with raw(answers(f'{{"request_id": {request_id}, "status": "QUEUED"}}'.encode())) as server:
        with pytest.raises(errors.BackendBroken):
            submit(client(server, clock), clock)
        assert len(server.requests) == 1


def test_addresses_of_the_answer_are_not_followed(clock):
    taken = b'{"request_id": "r-1", "status_url": "http://127.0.0.2:9/x", "response_url": "http://127.0.0.2:9/y"}'
    with raw(answers(taken)) as server:
        assert submit(client(server, clock), clock).notes["request_id"] == "r-1"


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://images.segmind.com/a/b.jpg", "https://images.segmind.com"),
        ("https://IMAGES.segmind.com:443/x", "https://images.segmind.com"),
        ("https://images.segmind.com:8443/x", "https://images.segmind.com:8443"),
        ("https://images.segmind.com@evil.example/x", ""),
        ("https://images.segmind.com.evil.example/x", "https://images.segmind.com.evil.example"),
        ("ftp://images.segmind.com/x", ""),
        ("file:///etc/passwd", ""),
        ("https://images.segmind.com:x/", ""),
        ("https://[::1", ""),
        ("", ""),
    ],
)
def test_origins(url, origin):
    assert origin_of(url) == origin
