"""Which of two backends serves a sample: the first one's errors that lead to the second, and for how long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from img2img import errors
from img2img.backends import GeneratedImage, Pending
from img2img.backends.auto import PAUSE_SECONDS, AutoBackend
from img2img.errors import BackendRateLimited, JobError
from img2img.params import Img2ImgParams

NOW = 1_790_000_000.0
UNTIL = NOW + 1800
# What the second backend needs.
RESERVE = 100
PARAMS = Img2ImgParams(prompt="a castle", seed=7)
UNABLE = [
    errors.BackendOutOfCredits,
    errors.BackendUnauthorized,
    errors.BackendGone,
    errors.BackendFailed,
    errors.BackendUnreachable,
    errors.BackendTimeout,
    errors.BackendGatewayTimeout,
]
TO_BLAME = [errors.BackendRefused, errors.BackendBroken, errors.OutputBlocked, errors.InternalError]


class Fake:
    """A backend that gives what it is told; `calls` are the seeds that it was asked for."""

    def __init__(self, gives: Any) -> None:
        self.gives = gives
        self.calls: list[int] = []
        self.asked: list[dict[str, Any]] = []
        self.before: Callable[[int], None] = lambda _: None

    def generate(self, image: bytes, params: Img2ImgParams, seed: int, *, name: str, until: float) -> Any:
        self.calls.append(seed)
        self.asked.append({"image": image, "params": params, "seed": seed, "name": name, "until": until})
        self.before(seed)
        if isinstance(self.gives, JobError):
            raise self.gives
        return self.gives


class Pair:
    """Both backends, and a clock that a test moves."""

    def __init__(self) -> None:
        self.now = NOW
        self.first = Fake(GeneratedImage(b"first", 1.0, "segmind", remaining_credits=5.0))
        self.second = Fake(GeneratedImage(b"second", 2.0, backend="sagemaker"))
        self.backend = AutoBackend(self.first, self.second, reserve=RESERVE, clock=lambda: self.now)

    def ask(self, seed: int = 7, until: float = UNTIL) -> Any:
        return self.backend.generate(b"image", PARAMS, seed, name="team/job/1/0", until=until)


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_the_first_backend_serves_as_long_as_it_can(pair):
    for seed in (7, 8):
        assert pair.ask(seed) == GeneratedImage(b"first", 1.0, "segmind", remaining_credits=5.0, reason="")
    assert (pair.first.calls, pair.second.calls) == ([7, 8], [])


@pytest.mark.parametrize("error", UNABLE, ids=lambda error: error.code)
def test_the_second_serves_what_the_first_one_cannot_and_says_why(pair, error):
    pair.first.gives = error("down")
    assert pair.ask() == GeneratedImage(b"second", 2.0, backend="sagemaker", reason=error.code)
    same = {"image": b"image", "params": PARAMS, "seed": 7, "name": "team/job/1/0", "until": UNTIL}
    assert pair.first.asked == pair.second.asked == [same]


def test_what_is_pending_at_the_second_says_why_as_well(pair):
    pair.first.gives = errors.BackendFailed("down")
    pair.second.gives = Pending(backend="sagemaker", notes={"inference_id": "job-1-0"})
    found = pair.ask()
    assert found.notes == {"inference_id": "job-1-0"}
    assert (found.backend, found.reason) == ("sagemaker", "backend_failed")


@pytest.mark.parametrize("error", TO_BLAME, ids=lambda error: error.code)
def test_what_is_the_requests_fault_or_may_have_been_billed_is_passed_on(pair, error):
    pair.first.gives = error("no")
    for _ in range(2):
        with pytest.raises(error):
            pair.ask()
    assert (pair.first.calls, pair.second.calls) == ([7, 7], [])


def test_every_error_of_a_backend_is_decided_about():
    backends = {error for error in JobError.__subclasses__() if error is not errors.DeadlineExceeded}
    assert {*UNABLE, *TO_BLAME, BackendRateLimited} == {error for error in backends if "code" in error.__dict__}


def test_a_bug_of_the_first_is_not_hidden(pair):
    pair.first.before = lambda _: 1 // 0
    with pytest.raises(ZeroDivisionError):
        pair.ask()
    assert pair.second.calls == []


@pytest.mark.parametrize("retry_after", [0.5, 10.0, 1799.0 - RESERVE, None])
def test_a_rate_limit_that_leaves_time_for_the_other_is_waited_for(pair, retry_after):
    pair.first.gives = BackendRateLimited("slow down", retry_after=retry_after)
    for _ in range(2):
        with pytest.raises(BackendRateLimited) as raised:
            pair.ask()
        assert raised.value.retry_after == retry_after
    assert (len(pair.first.calls), pair.second.calls) == (2, [])


@pytest.mark.parametrize("retry_after", [1800.0 - RESERVE, 1800.0, 90_000.0])
def test_a_rate_limit_that_leaves_too_little_time_is_not(pair, retry_after):
    pair.first.gives = BackendRateLimited("slow down", retry_after=retry_after)
    found = pair.ask()
    assert (found.backend, found.reason) == ("sagemaker", "backend_rate_limited")
    # Another job may have the time to wait for it.
    with pytest.raises(BackendRateLimited):
        pair.ask(until=NOW + 100_000)
    assert (len(pair.first.calls), len(pair.second.calls)) == (2, 1)


def test_the_first_is_left_alone_for_a_while(pair):
    pair.first.gives = errors.BackendOutOfCredits("empty")
    pair.ask(1)
    pair.first.gives = GeneratedImage(b"first", 1.0, "segmind")
    pair.now += PAUSE_SECONDS - 0.1
    assert pair.ask(2).reason == "backend_out_of_credits"
    assert pair.first.calls == [1]
    pair.now += 0.1
    assert pair.ask(3) == GeneratedImage(b"first", 1.0, "segmind")
    assert (pair.first.calls, pair.second.calls) == ([1, 3], [1, 2])


def test_each_outage_has_its_own_reason_and_its_own_pause(pair):
    pair.first.gives = errors.BackendOutOfCredits("empty")
    pair.ask()
    pair.now += PAUSE_SECONDS
    pair.first.gives = errors.BackendUnreachable("down")
    assert pair.ask().reason == "backend_unreachable"
    pair.now += PAUSE_SECONDS - 0.1
    assert pair.ask().reason == "backend_unreachable"
    assert len(pair.first.calls) == 2


@pytest.mark.parametrize("error", [errors.BackendRefused, errors.BackendFailed, errors.BackendUnreachable])
def test_what_the_second_raises_is_raised(pair, error):
    pair.first.gives = errors.BackendTimeout("slow")
    pair.second.gives = error("no")
    for _ in range(2):
        with pytest.raises(error):
            pair.ask()
    assert (len(pair.first.calls), len(pair.second.calls)) == (1, 2)


def test_samples_that_are_asked_for_together_are_each_served_once(pair):
    """The first fails for all four while they are on their way: none waits, and none is lost."""
    together = threading.Barrier(4, timeout=10)
    pair.first.gives = errors.BackendFailed("down")
    pair.first.before = lambda _: together.wait() and None
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(pair.ask, range(4)))
    assert [image.reason for image in found] == ["backend_failed"] * 4
    assert sorted(pair.first.calls) == sorted(pair.second.calls) == [0, 1, 2, 3]
    pair.first.before = lambda _: None
    assert pair.ask(4).reason == "backend_failed"
    assert 4 not in pair.first.calls


def test_a_success_that_was_on_its_way_does_not_end_the_pause(pair):
    asked, failed = threading.Event(), threading.Event()

    def slowly(seed: int) -> None:
        if seed == 1:
            asked.set()
            assert failed.wait(10)

    pair.first.before = slowly
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(pair.ask, 1)
        assert asked.wait(10)
        served, pair.first.gives = pair.first.gives, errors.BackendFailed("down")
        assert pair.ask(2).backend == "sagemaker"
        pair.first.gives = served
        failed.set()
        assert slow.result(10).backend == "segmind"
    assert pair.ask(3).reason == "backend_failed"
