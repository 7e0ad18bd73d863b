"""Every AWS and HTTP call that the functions make, with a place before and after each where a test steps in.

A call is named after its operation; one that belongs to a sample carries the sample's index ("POST 0",
"GetStatus 0", "PutObject 1", "InvokeEndpointAsync 0"), and one made again carries its number ("UpdateItem #2").
"""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import boto3
import pytest
import requests

from local.inference import HEADER, Invocation
from tests.long import LONG, REST

# The seed of every job here, so that a call of the backend tells its sample.
SEED = 1000
BEFORE: Literal["before"] = "before"
AFTER: Literal["after"] = "after"
MOMENTS = (BEFORE, AFTER)
Place = tuple[str, str]
Step = Callable[[str, str], None]


def places(calls: Iterable[str]) -> list[Place]:
    """Return the places before and after each call, in their order."""
    return list(itertools.product(calls, MOMENTS))


def apart(walk: Iterable[Place]) -> list[Place]:
    """Return the places of a walk, one call after the other, that leave different things behind.

    AWS cannot tell a process that died after a call from one that died before its next. `LONG=1` goes to both.
    """
    following = list(walk)
    different = [
        place
        for place, then in itertools.pairwise([*following, None])
        if place[1] == BEFORE or then is None or then[1] == AFTER
    ]
    if REST:
        return [place for place in following if place not in different]
    return following if LONG else different


class Killed(BaseException):
    """The process is gone: no `except Exception` of the code it ran in may catch this."""


class Calls:
    """Shows the calls to one step at a time. `made` names those that the last step let happen, in their order.

    `invocations` tells which the endpoint has accepted: what lies in S3 of one is named after it.
    """

    def __init__(self, invocations: Callable[[], Sequence[Invocation]] = tuple) -> None:
        self.made: list[str] = []
        self._invocations = invocations
        self._step: Step | None = None
        self._unseen = 0
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._thread = threading.local()
        # The samples of Segmind's requests.
        self._requests: dict[str, int] = {}

    @contextmanager
    def shown_to(self, step: Step) -> Iterator[None]:
        """Have `step` called before and after every call of any thread."""
        self.made, self._counts = [], Counter()
        self._step = step
        try:
            yield
        finally:
            self._step = None

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Make calls that no step sees, while every thread that is watched waits in its step."""
        self._unseen += 1
        try:
            yield
        finally:
            self._unseen -= 1

    def _reach(self, name: str, moment: str) -> None:
        step = self._step
        if step is None or self._unseen:
            return
        if moment == AFTER:
            step(self._thread.name, AFTER)
            return
        with self._lock:
            self._counts[name] += 1
            name += f" #{self._counts[name]}" if self._counts[name] > 1 else ""
        self._thread.name = name
        step(name, BEFORE)
        self.made.append(name)

    def _before_send(self, event_name: str, request: Any, **_: Any) -> None:
        operation = event_name.rpartition(".")[2]
        # boto3 has encoded what it sends.
        about = request.headers.get(f"{HEADER}InputLocation", request.url.encode()).decode()
        about = next((call.input for call in self._invocations() if call.id in about), about)
        # An output's object is named after its sample, and so is the request for one.
        found = re.search(r"/(\d)\.\w+(?:\?|$)", about)
        sample = found[1] if found else None
        if operation == "UpdateItem" and threading.current_thread() is not threading.main_thread():
            # It writes down what the thread's own sample was told.
            sample = getattr(self._thread, "sample", None)
        self._reach(operation if sample is None else f"{operation} {sample}", BEFORE)

    def _response_received(self, **_: Any) -> None:
        self._reach("", AFTER)

    def _name_of(self, request: requests.PreparedRequest) -> str:
        """Return the name of a call of Segmind: each sample has its own thread."""
        if request.method == "POST":
            self._thread.sample = json.loads(request.body or "")["seed"] - SEED
            return f"POST {self._thread.sample}"
        path = str(request.url).partition("//")[2].split("/")[1:]
        step = "Output" if path[0] == "outputs" else "Status" if path[-1] == "status" else "Response"
        self._thread.sample = self._requests[path[1] if path[0] == "outputs" else path[2]]
        return f"Get{step} {self._thread.sample}"

    @contextmanager
    def watched(self) -> Iterator[Calls]:
        """Watch the clients that are made from now on, and everything that goes through `requests`."""
        session = boto3.Session()
        # Before moto's own, in which the call takes effect.
        session.events.register_first("before-send", self._before_send)
        session.events.register_last("response-received", self._response_received)
        send = requests.Session.send
        calls = self

        def watched_send(session: requests.Session, request: requests.PreparedRequest, **options: Any) -> Any:
            name = calls._name_of(request)
            calls._reach(name, BEFORE)
            response = send(session, request, **options)
            if request.method == "POST" and "application/json" in response.headers.get("Content-Type", ""):
                calls._requests[response.json().get("request_id", "")] = calls._thread.sample
            try:
                calls._reach(name, AFTER)
            except BaseException:
                # The kernel closes what a dead process held open.
                response.close()
                raise
            return response

        with pytest.MonkeyPatch.context() as patch:
            # A new process would make new clients, which takes long; they keep nothing from call to call.
            patch.setattr(boto3, "client", cache(session.client))
            patch.setattr(requests.Session, "send", watched_send)
            yield self


class InOrder:
    """A step that makes the calls named in `order` wait for each other, whatever threads they come from."""

    def __init__(self, order: Sequence[str] = ()) -> None:
        self._order = list(order)
        self._reached: set[str] = set()
        self._done: set[str] = set()
        self._changed = threading.Condition()

    @property
    def over(self) -> bool:
        """Whether nothing waits any longer."""
        return False

    def __call__(self, name: str, moment: str) -> None:
        with self._changed:
            if moment == BEFORE and name in self._order:
                self._reached.add(name)
                self._changed.notify_all()
                # The first waits until the other threads stand here, so that none is under way when something happens.
                others = self._first_of_each() if name == self._order[0] else set()
                earlier = set(self._order[: self._order.index(name)])
                in_time = self._changed.wait_for(
                    lambda: self.over or (others <= self._reached and earlier <= self._done), timeout=30
                )
                assert in_time, f"{name} waited for {earlier - self._done or others - self._reached}"
            try:
                self.at(name, moment)
            finally:
                if moment == AFTER:
                    self._done.add(name)
                self._changed.notify_all()

    def _first_of_each(self) -> set[str]:
        """Return the call with which each sample begins, and so each thread."""
        firsts: dict[str, str] = {}
        for call in self._order:
            firsts.setdefault(call.split()[1], call)
        return set(firsts.values())

    def at(self, name: str, moment: str) -> None:
        """Do what is to be done here."""


class Kill(InOrder):
    """Kills the process at one place: from there on none of its threads makes another call."""

    def __init__(self, name: str, moment: str, order: Sequence[str] = ()) -> None:
        super().__init__(order)
        self._place = (name, moment)
        self.dead = False

    @property
    def over(self) -> bool:
        return self.dead

    def at(self, name: str, moment: str) -> None:
        if (name, moment) == self._place:
            self.dead = True
        if self.dead:
            raise Killed


class Meanwhile(Kill):
    """Has something else happen at one place, once; it may kill the process at a later one."""

    def __init__(
        self,
        calls: Calls,
        happens: Callable[[], Any],
        at: tuple[str, str],
        order: Sequence[str] = (),
        kill: tuple[str, str] = ("nowhere", BEFORE),
    ) -> None:
        super().__init__(*kill, order)
        self._calls = calls
        self._happens = happens
        self._at = at
        self.happened = False

    def at(self, name: str, moment: str) -> None:
        if (name, moment) == self._at and not self.happened:
            self.happened = True
            with self._calls.unseen():
                self._happens()
        super().at(name, moment)
