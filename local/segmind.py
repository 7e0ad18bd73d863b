"""A stand-in for Segmind's sd1.5-img2img, v1 and v2: its checks, headers and errors, and pictures marked "simulated".

What it does next is told through a query on its own port; a list of all of it:

    curl -X POST 'http://127.0.0.1:PORT/control?next=429&times=2&reset_in=3'
    curl http://127.0.0.1:PORT/control

    next=BEHAVIOUR   what the next call gets; with times=N the next N calls; queued behind what is queued already
        400 401 403 404 405 406-credits 406-content-type 410 429 500 502 503 504    that status (405 is HTML)
        hang             no answer until release, stop or the client goes away
        cut              the connection closed in the middle of a billed answer
        cut-before       the connection closed without an answer
        html             200 with an HTML page
        json             200 with JSON, whatever `base64` says (v1)
        black            200 with a black picture
        garbage          200 image/jpeg with bytes that are no image
        empty            200 image/jpeg with no bytes; at=response: no output
        failed           v2: the request is taken, and ends as FAILED
        list             v2, at=response: the output as a list
        elsewhere        v2, at=response: the output at another origin
    at=STEP          v2: which call that is: submit (the default, and v1's only one), status, response or output
    latency=SECONDS  how long each answer takes, with v2 each request
    reset_in=SECONDS how far ahead `x-rate-limit-reset-at-utc` lies
    credits=N        what is left of the account; a call that costs more gets a 406
    key=KEY          the only key accepted from now on
    expire=1         v2: forgets every request, as Segmind does after an hour
    release=1        ends every `hang`, and answers at once what waits for its latency
    reset=1          back to the start: key, credits, latency, requests, counts and queues

GET /control answers JSON: `calls`, `calls_by_seed`, `billed` (pictures), `looks` (GETs of v2, by step), `behaviours`
still queued, `credits`.
"""

from __future__ import annotations

import argparse
import contextlib
import select
import socket
import threading
import time
import uuid
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from local.http_server import LoopbackServer
from local.segmind_server import COST, ERRORS, SegmindHandler

CREDITS = 100.0
BEHAVIOURS = (
    *(*ERRORS, "hang", "cut", "cut-before", "html", "json", "black", "garbage", "empty"),
    *("failed", "list", "elsewhere"),
)
STEPS = ("submit", "status", "response", "output")


@dataclass(frozen=True)
class Submitted:
    """A request of v2. `at` is when it was taken, by the monotonic clock, `released` what ends it at once."""

    id: str
    pictures: list[bytes]
    credits_left: float
    failed: bool
    at: float
    seconds: float
    released: threading.Event


class SegmindStandIn:
    """The server and what it is told. `calls` records every request to the API: all fields but the image itself."""

    def __init__(self, key: str, port: int = 0, latency: float = 0.0) -> None:
        self.port = port
        self._initial = (key, latency)
        self._lock = threading.Condition()
        self._server: LoopbackServer | None = None
        self.released = threading.Event()
        self._stopped = threading.Event()
        self.reset()

    def reset(self) -> None:
        """Go back to how it was made, after a `release`."""
        self.release()
        with self._lock:
            self.key, self.latency = self._initial
            self.credits = CREDITS
            self.reset_in = 1.0
            self.billed = 0
            self.calls: list[dict[str, Any]] = []
            self._queues: dict[str, deque[str]] = {step: deque() for step in STEPS}
            self.requests: dict[str, Submitted] = {}
            self.looks: list[str] = []
            self.keys_shown: Counter[str] = Counter()

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.origin}/v1"

    @property
    def control_url(self) -> str:
        return f"{self.origin}/control"

    def start(self) -> SegmindStandIn:
        """Listen, on the same port again after a `stop`."""
        self._stopped.clear()
        stand_in = self

        class Bound(SegmindHandler):
            owner = stand_in

        self._server = LoopbackServer(Bound, self.port)
        self.port = int(self._server.server_address[1])
        self._server.start()
        return self

    def stop(self) -> None:
        self._stopped.set()
        self.release()
        if self._server is not None:
            self._server.stop()
            self._server = None

    def __enter__(self) -> SegmindStandIn:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def behave(self, behaviour: str, times: int = 1, at: str = STEPS[0]) -> None:
        """Queue what the next `times` calls get."""
        if behaviour not in BEHAVIOURS:
            raise ValueError(f"next must be one of {', '.join(BEHAVIOURS)}")
        with self._lock:
            self._queues[at].extend([behaviour] * times)

    def expire(self) -> None:
        """Forget every request."""
        self.requests.clear()

    def rotate(self, key: str) -> None:
        """Accept only `key` from now on."""
        self.key = key

    def release(self) -> None:
        """End every `hang` and latency that is waiting."""
        released, self.released = self.released, threading.Event()
        released.set()

    def summary(self) -> dict[str, Any]:
        """Return the counts, without keys or prompts."""
        with self._lock:
            seeds = Counter(str(call["body"]["seed"]) for call in self.calls if "seed" in call["body"])
            return {
                "calls": len(self.calls),
                "calls_by_seed": dict(seeds),
                "billed": self.billed,
                "looks": dict(Counter(self.looks)),
                "behaviours": [behaviour for queue in self._queues.values() for behaviour in queue],
                "credits": self.credits,
            }

    def control(self, query: str) -> None:
        """Do what a control query says, all of it or, when any of it is wrong, nothing."""
        given, numbers, times = _controls(query)
        if "reset" in given:
            self.reset()
        if "release" in given:
            self.release()
        for name, number in numbers.items():
            setattr(self, name, number)
        if "key" in given:
            self.rotate(given["key"])
        if "next" in given:
            self.behave(given["next"], times, given.get("at", STEPS[0]))
        if "expire" in given:
            self.expire()

    def record(self, call: dict[str, Any]) -> str | None:
        """Count a call and return what it was told to get, if anything."""
        with self._lock:
            self.calls.append(call)
            self._lock.notify_all()
            return self._told(STEPS[0])

    def look(self, step: str, has_key: bool) -> str | None:
        """Count a GET of v2 and return what it was told to get, if anything."""
        with self._lock:
            self.looks.append(step)
            self.keys_shown[step] += has_key
            self._lock.notify_all()
            return self._told(step)

    def _told(self, step: str) -> str | None:
        return self._queues[step].popleft() if self._queues[step] else None

    def submit(self, pictures: list[bytes], credits_left: float, *, failed: bool) -> Submitted:
        """Take a request."""
        request = Submitted(
            str(uuid.uuid4()), pictures, credits_left, failed, time.monotonic(), self.latency, self.released
        )
        self.requests[request.id] = request
        return request

    def state_of(self, request: Submitted) -> str:
        """Return a request's status."""
        age = time.monotonic() - request.at
        if age < request.seconds and not request.released.is_set():
            return "QUEUED" if age < request.seconds / 4 else "PROCESSING"
        return "FAILED" if request.failed else "COMPLETED"

    def wait_for_calls(self, count: int, timeout: float = 5.0) -> bool:
        """Wait until at least `count` calls have arrived; False when they have not."""
        with self._lock:
            return self._lock.wait_for(lambda: len(self.calls) >= count, timeout)

    def bill(self) -> float | None:
        """Take the price of a call and return what is left, or None when the account does not have it."""
        with self._lock:
            if self.credits < COST:
                return None
            self.credits = round(self.credits - COST, 6)
            self.billed += 1
            return self.credits

    def rest(self, released: threading.Event) -> None:
        """Take as long as an answer takes, or until the release."""
        if self.latency:
            released.wait(self.latency)

    def hang(self, released: threading.Event, connection: socket.socket) -> None:
        """Wait for the release, or for the client to go away."""
        while not self._stopped.is_set() and not released.wait(0.05):
            # No client sends another request before this one is answered: what can be read is its end.
            if select.select([connection], [], [], 0)[0]:
                return


def _controls(query: str) -> tuple[dict[str, str], dict[str, float], int]:
    """Return what a control query says: all of it, its numbers, and how many times. Raises `ValueError`."""
    pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    given = dict(pairs)
    if len(given) < len(pairs):
        raise ValueError("each name may be given once")
    known = ("next", "times", "at", "latency", "reset_in", "credits", "key", "expire", "release", "reset")
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{', '.join(unknown)}: not known; the names are {', '.join(known)}")
    numbers: dict[str, float] = {
        name: float(given[name]) for name in ("latency", "reset_in", "credits") if name in given
    }
    if not all(0 <= number <= 1_000_000 for number in numbers.values()):
        raise ValueError(f"{', '.join(numbers)} must be numbers from 0 to 1000000")
    times = int(given.get("times", "1"))
    if not 1 <= times <= 1000 or ("times" in given and "next" not in given):
        raise ValueError("times must be from 1 to 1000, and goes with next")
    if given.get("next", "hang") not in BEHAVIOURS:
        raise ValueError(f"next must be one of {', '.join(BEHAVIOURS)}")
    if given.get("at", STEPS[0]) not in STEPS or ("at" in given and "next" not in given):
        raise ValueError(f"at must be one of {', '.join(STEPS)}, and goes with next")
    if given.get("key") == "" or {given.get(name, "1") for name in ("expire", "reset", "release")} != {"1"}:
        raise ValueError("key must not be empty; expire, reset and release must be 1")
    return given, numbers, times


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for Segmind's sd1.5-img2img")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--key", default="local")
    parser.add_argument("--latency", type=float, default=0.0)
    options = parser.parse_args()
    with SegmindStandIn(options.key, options.port, options.latency) as stand_in:
        print(f"{stand_in.url}/sd1.5-img2img, control: {stand_in.control_url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
