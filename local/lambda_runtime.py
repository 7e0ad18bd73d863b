"""The Lambda Runtime API: where a function's processes ask for work and leave its results.

Serves any runtime client, AWS's own `awslambdaric` included; `functions.py` adds the processes of `sandbox.py`.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from local.http_server import Handler, LoopbackServer
from local.template import ACCOUNT, REGION

MAX_REQUEST = 6 * 2**20
MAX_RESPONSE = MAX_REQUEST + 100  # Lambda's own number: 6,291,556
_JSON = [("Content-Type", "application/json")]
_API = "/2018-06-01/runtime"


@dataclass(frozen=True)
class Result:
    """What an invocation gave: a JSON payload, and whether it is the description of an error."""

    payload: bytes
    failed: bool = False

    def json(self) -> Any:
        return json.loads(self.payload)


# Runs the function of a name with a payload.
Invoke = Callable[[str, bytes], Result]


class RequestTooLarge(Exception):
    """The event is larger than Lambda takes."""


def failure(kind: str, message: str) -> Result:
    """Return the result of an invocation that Lambda itself ended."""
    return Result(json.dumps({"errorType": kind, "errorMessage": message}).encode(), failed=True)


@dataclass(eq=False)
class _Invocation:
    payload: bytes
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    sandbox: str = ""
    started: float = 0.0
    result: Result | None = None


@dataclass(eq=False)
class _Waiter:
    """One runtime client that asked for work."""

    sandbox: str
    invocation: _Invocation | None = None


class RuntimeApi:
    """The Runtime API (2018-06-01) of one function, on a port of its own.

    `on_shortage` is called, with no lock held, when an invocation finds no sandbox waiting; `on_overdue` with the
    sandbox whose invocation ran out of time.
    """

    def __init__(
        self,
        name: str,
        timeout: float,
        on_shortage: Callable[[], None] = lambda: None,
        on_overdue: Callable[[str], None] = lambda _sandbox: None,
    ) -> None:
        self.arn = f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:{name}"
        self._timeout = timeout
        self._on_shortage = on_shortage
        self._on_overdue = on_overdue
        self._changed = threading.Condition()
        self._waiters: list[_Waiter] = []
        self._pending: deque[_Invocation] = deque()
        self._running: dict[str, _Invocation] = {}
        self._returning: set[str] = set()  # sandboxes that have answered, and will ask again in a moment
        self._doomed: set[str] = set()  # sandboxes that ran out of time, and are being ended
        self._broken: Result | None = None
        self._server = LoopbackServer(type("RuntimeHandler", (_RuntimeHandler,), {"api": self}))
        self._server.start()

    @property
    def address(self) -> str:
        """What goes into AWS_LAMBDA_RUNTIME_API."""
        return self._server.address

    @property
    def shortage(self) -> int:
        """How many more sandboxes are needed for all invocations to run."""
        with self._changed:
            return len(self._pending) - len(self._returning)

    def invoke(self, payload: bytes) -> Result:
        """Run the function once and wait for what it gives.

        Raises `RequestTooLarge`.
        """
        if len(payload) > MAX_REQUEST:
            raise RequestTooLarge
        invocation = _Invocation(payload)
        with self._changed:
            self._pending.append(invocation)
            self._assign()
        if self.shortage > 0:
            self._on_shortage()
        with self._changed:
            self._changed.wait_for(lambda: invocation.result or invocation.started or self._broken)
            if not invocation.started:
                return invocation.result or self._broken or failure("Runtime.Unknown", "not started")
            left = invocation.started + self._timeout - time.monotonic()
            self._changed.wait_for(lambda: invocation.result, timeout=left)
            if invocation.result:
                return invocation.result
            message = f"{invocation.id} Task timed out after {self._timeout:.2f} seconds"
            invocation.result = failure("Sandbox.Timedout", message)
            self._running.pop(invocation.id, None)
            self._doomed.add(invocation.sandbox)
        self._on_overdue(invocation.sandbox)
        return invocation.result

    def sandbox_exited(self, sandbox: str, reason: str) -> None:
        """Fail the invocation that a dead sandbox was running."""
        with self._changed:
            self._returning.discard(sandbox)
            self._doomed.discard(sandbox)
            self._waiters = [waiter for waiter in self._waiters if waiter.sandbox != sandbox]
            for invocation in [i for i in self._running.values() if i.sandbox == sandbox]:
                message = f"RequestId: {invocation.id} Error: Runtime exited with error: {reason}"
                self._finish(invocation, failure("Runtime.ExitError", message))

    def dismiss(self) -> None:
        """Let every sandbox end with what it works on."""
        with self._changed:
            self._doomed |= self._returning | {i.sandbox for i in self._running.values() if i.sandbox}
            self._waiters.clear()
            self._changed.notify_all()

    def break_down(self, result: Result) -> None:
        """Give `result` to every invocation from now on: the function cannot start."""
        with self._changed:
            self._broken = result
            for invocation in [*self._pending, *self._running.values()]:
                self._finish(invocation, result)
            self._pending.clear()
            self._changed.notify_all()

    def close(self) -> None:
        self.break_down(failure("Runtime.Closed", "the runtime is shutting down"))
        self._server.stop()

    def next(self, sandbox: str) -> _Invocation | None:
        """Wait for work; None means that there will be none."""
        waiter = _Waiter(sandbox)
        with self._changed:
            self._returning.discard(sandbox)
            if sandbox and sandbox in self._doomed:
                return None
            self._waiters.append(waiter)
            self._assign()
            self._changed.wait_for(lambda: waiter.invocation or self._broken or waiter not in self._waiters)
            return waiter.invocation

    def finish(self, invocation_id: str, result: Result) -> bool:
        """Record an answer; false when nobody waits for it any more."""
        with self._changed:
            invocation = self._running.get(invocation_id)
            if invocation:
                self._finish(invocation, result)
                if invocation.sandbox:
                    self._returning.add(invocation.sandbox)
            return invocation is not None

    def _assign(self) -> None:
        while self._pending and self._waiters and not self._broken:
            # The sandbox that worked last is the warmest.
            waiter, invocation = self._waiters.pop(), self._pending.popleft()
            invocation.started, invocation.sandbox = time.monotonic(), waiter.sandbox
            self._running[invocation.id] = invocation
            waiter.invocation = invocation
        self._changed.notify_all()

    def _finish(self, invocation: _Invocation, result: Result) -> None:
        invocation.result = invocation.result or result
        self._running.pop(invocation.id, None)
        self._changed.notify_all()

    def headers(self, invocation: _Invocation) -> list[tuple[str, str]]:
        deadline = time.time() + invocation.started + self._timeout - time.monotonic()
        trace = f"1-{int(time.time()):08x}-{secrets.token_hex(12)}"
        return [
            ("Content-Type", "application/json"),
            ("Lambda-Runtime-Aws-Request-Id", invocation.id),
            ("Lambda-Runtime-Deadline-Ms", str(int(deadline * 1000))),
            ("Lambda-Runtime-Invoked-Function-Arn", self.arn),
            ("Lambda-Runtime-Trace-Id", f"Root={trace};Parent={secrets.token_hex(8)};Sampled=0"),
        ]


class _RuntimeHandler(Handler):
    api: RuntimeApi

    def do_GET(self) -> None:
        if self.path == f"{_API}/invocation/next":
            invocation = self.api.next(self.headers.get("Lambda-Runtime-Sandbox-Id", ""))
            if invocation is None:
                self.close_connection = True
                self.reply(410)
            else:
                self.reply(200, self.api.headers(invocation), invocation.payload)
        elif self.path == f"{_API}/restore/next":
            self.reply(200)
        else:
            self.reply(404)

    def do_POST(self) -> None:
        body = self.read_body(MAX_RESPONSE)
        match self.path.removeprefix(f"{_API}/").split("/"):
            case ["invocation", invocation_id, "response"] if body is None:
                message = f"Response payload size exceeded maximum allowed payload size ({MAX_RESPONSE} bytes)."
                self.api.finish(invocation_id, failure("Function.ResponseSizeTooLarge", message))
                self.reply_and_drop_body(413, _JSON, b'{"errorType":"RequestEntityTooLarge"}')
            case ["invocation", invocation_id, ("response" | "error") as outcome]:
                if self.api.finish(invocation_id, Result(body or b"null", failed=outcome == "error")):
                    self._accept()
                else:
                    self.reply(400, _JSON, b'{"errorType":"InvalidRequestID"}')
            case ["init" | "restore", "error"]:
                self.api.break_down(Result(body or b"{}", failed=True))
                self._accept()
            case _:
                self.reply(404)

    def _accept(self) -> None:
        self.reply(202, _JSON, b'{"status":"OK"}')
