"""A function's processes: one that imports the handler once, and forks a sandbox for each concurrent invocation.

Started as a script, never imported by the rest, and with nothing on its path but the standard library, the installed
packages and what Lambda would put there: the function's folder and its layers. Forking after the import is what
SnapStart does to a function: state made at import is the same in every sandbox.

Talks to its parent over the socket in `SANDBOX_CONTROL_FD`, in lines of JSON: `["fork"]` and `["kill", pid]` come in,
`["ready"]`, `["broken", error]`, `["forked", pid]` and `["exited", pid, status]` go out. When the parent goes, all end.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

Handle = Callable[[Any, Any], Any]
_API = "/2018-06-01/runtime"


class Context:
    """The second argument of a handler."""

    def __init__(self, headers: http.client.HTTPMessage) -> None:
        self.aws_request_id = headers["Lambda-Runtime-Aws-Request-Id"]
        self.invoked_function_arn = headers["Lambda-Runtime-Invoked-Function-Arn"]
        self.function_name = os.environ["AWS_LAMBDA_FUNCTION_NAME"]
        self.function_version = os.environ["AWS_LAMBDA_FUNCTION_VERSION"]
        self.memory_limit_in_mb = os.environ["AWS_LAMBDA_FUNCTION_MEMORY_SIZE"]
        self.log_group_name = os.environ["AWS_LAMBDA_LOG_GROUP_NAME"]
        self.log_stream_name = os.environ["AWS_LAMBDA_LOG_STREAM_NAME"]
        self.identity = None
        self.client_context = None
        self._deadline_ms = int(headers["Lambda-Runtime-Deadline-Ms"])

    def get_remaining_time_in_millis(self) -> int:
        return max(0, self._deadline_ms - int(time.time() * 1000))


class _JsonLines(logging.Formatter):
    """What Lambda's JSON log format makes of a record of the root logger."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname,
            "message": record.getMessage(),
            "logger": record.name,
        }
        if record.exc_info:
            line["stackTrace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _describe(error: BaseException) -> dict[str, Any]:
    return {
        "errorMessage": str(error),
        "errorType": type(error).__name__,
        "stackTrace": traceback.format_tb(error.__traceback__),
    }


def _log_error(error: dict[str, Any]) -> None:
    print(json.dumps({"level": "ERROR", **error}))


def _load() -> Handle:
    module, _, name = os.environ["_HANDLER"].rpartition(".")
    handle: Handle = getattr(importlib.import_module(module), name)
    return handle


def _run_hooks(name: str) -> None:
    """Run SnapStart's hooks, if the function asked for any."""
    hooks = sys.modules.get("snapshot_restore_py")
    for function, args, kwargs in getattr(hooks, name)() if hooks else ():
        function(*args, **kwargs)


def _serve(handle: Handle) -> None:
    """Run invocations one after the other, until the runtime API goes."""
    connection = http.client.HTTPConnection(os.environ["AWS_LAMBDA_RUNTIME_API"])
    identity = {"Lambda-Runtime-Sandbox-Id": str(os.getpid())}
    while True:
        connection.request("GET", f"{_API}/invocation/next", headers=identity)
        response = connection.getresponse()
        payload = response.read()
        if response.status != 200:
            return
        os.environ["_X_AMZN_TRACE_ID"] = response.headers["Lambda-Runtime-Trace-Id"]
        context = Context(response.headers)
        outcome, body, headers = _invoke(handle, payload, context)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.request("POST", f"{_API}/invocation/{context.aws_request_id}/{outcome}", body, headers)
        connection.getresponse().read()


def _invoke(handle: Handle, payload: bytes, context: Context) -> tuple[str, bytes, dict[str, str]]:
    headers = {"Content-Type": "application/json"}
    try:
        return "response", json.dumps(handle(json.loads(payload), context)).encode(), headers
    except Exception as error:  # noqa: BLE001 (whatever a handler raises is its answer)
        problem = _describe(error) | {"requestId": context.aws_request_id}
        _log_error(problem)
        return "error", json.dumps(problem).encode(), headers | {"Lambda-Runtime-Function-Error-Type": "Unhandled"}


class _Zygote:
    def __init__(self, handle: Handle, control: socket.socket) -> None:
        self._handle = handle
        self._control = control
        self._children: set[int] = set()
        # A child's end interrupts the wait for the parent's next word.
        self._wakeup, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        self._wakeup_sender = wakeup
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)

    def run(self) -> None:
        lines = self._control.makefile("rb", buffering=0)
        while True:
            ready, _, _ = select.select([self._control, self._wakeup], [], [])
            if self._wakeup in ready:
                self._wakeup.recv(4096)
                self._reap()
            if self._control in ready:
                line = lines.readline()
                if not line:
                    return
                match json.loads(line):
                    case ["fork"]:
                        self._fork()
                    case ["kill", int(pid)] if pid in self._children:
                        os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _fork(self) -> None:
        pid = os.fork()
        if pid == 0:
            self._become_sandbox()
        self._children.add(pid)
        _send(self._control, "forked", pid)

    def _become_sandbox(self) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self._control, self._wakeup, self._wakeup_sender):
                end.close()
            _run_hooks("get_after_restore")
            with contextlib.suppress(ConnectionError, http.client.HTTPException):
                _serve(self._handle)
            status = 0
        except SystemExit as end_of_handler:
            status = end_of_handler.code if isinstance(end_of_handler.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _reap(self) -> None:
        for pid in list(self._children):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self._children.discard(pid)
                _send(self._control, "exited", pid, os.waitstatus_to_exitcode(status))


def _send(control: socket.socket, *message: Any) -> None:
    control.sendall(json.dumps(message).encode() + b"\n")


def main() -> None:
    control = socket.socket(fileno=int(os.environ.pop("SANDBOX_CONTROL_FD")))
    # One write per line, however long: the sandboxes of a function share one log.
    sys.stdout = open(1, "w", buffering=1 << 20, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(line_buffering=True)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_JsonLines())
    logging.getLogger().addHandler(handler)
    try:
        handle = _load()
        _run_hooks("get_before_snapshot")
    except BaseException as error:  # noqa: BLE001 (a module may end in any way)
        problem = _describe(error)
        _log_error(problem)
        _send(control, "broken", problem)
        return
    zygote = _Zygote(handle, control)
    _send(control, "ready")
    try:
        with contextlib.suppress(ConnectionError):
            zygote.run()
    finally:
        zygote.end()


if __name__ == "__main__":
    main()
