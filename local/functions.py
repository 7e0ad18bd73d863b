"""A Lambda function on one machine: its Runtime API, and the processes of `sandbox.py` that ask it for work."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from local.lambda_runtime import Result, RuntimeApi
from local.template import FunctionSpec

_SANDBOX = Path(__file__).with_name("sandbox.py")


class FunctionError(Exception):
    """The function raised, timed out, ended its process or did not start."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        self.kind = str(description.get("errorType", "Unknown"))
        self.message = str(description.get("errorMessage", ""))
        super().__init__(f"{self.kind}: {self.message}")


def lambda_environment(spec: FunctionSpec, runtime_api: str) -> dict[str, str]:
    """Return what Lambda sets, and then what the template does."""
    lambda_sets = {
        "AWS_EXECUTION_ENV": "AWS_Lambda_python3.13",
        "AWS_LAMBDA_FUNCTION_NAME": spec.name,
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(spec.memory),
        "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
        "AWS_LAMBDA_LOG_GROUP_NAME": f"/aws/lambda/{spec.name}",
        "AWS_LAMBDA_LOG_STREAM_NAME": uuid.uuid4().hex,
        "AWS_LAMBDA_RUNTIME_API": runtime_api,
        "LAMBDA_TASK_ROOT": str(spec.directory),
        "LANG": "en_US.UTF-8",
        "PATH": os.defpath,
        "PYTHONPATH": os.pathsep.join(map(str, (spec.directory, *spec.layers))),
        "TZ": ":UTC",
        "_HANDLER": spec.handler,
    }
    if sys.platform == "darwin":
        # Both keep macOS from ending a forked process that asks for the system's proxies.
        lambda_sets |= {"OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES", "no_proxy": "*"}
    return lambda_sets | dict(spec.environment)


class Function:
    """A function with as many sandboxes as are needed at once, up to `concurrency`.

    Its output goes to the file `log`, or to this process's own output when there is none.
    """

    def __init__(
        self, spec: FunctionSpec, environment: Mapping[str, str], *, log: Path | None, concurrency: int
    ) -> None:
        self.spec = spec
        self._concurrency = concurrency
        self._sandboxes = 0
        self._starting = 0
        self._lock = threading.Lock()
        self._started = threading.Event()
        self._error: Mapping[str, Any] | None = None
        self._closing = False
        self._log: IO[bytes] | None = log.open("ab", buffering=0) if log else None
        self._api = RuntimeApi(spec.name, spec.timeout, on_shortage=self._grow, on_overdue=self._kill)
        self._control, theirs = socket.socketpair()
        control = {"SANDBOX_CONTROL_FD": str(theirs.fileno())}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SANDBOX)],  # -P: the folder of the script stays off the function's path
                cwd=spec.directory,
                env=lambda_environment(spec, self._api.address) | dict(environment) | control,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def wait_until_ready(self) -> None:
        """Wait until the handler is imported.

        Raises `FunctionError` when it cannot be.
        """
        self._started.wait()
        if self._error:
            raise FunctionError(self._error)

    def invoke(self, payload: bytes) -> Result:
        """Run the function once and wait for what it gives.

        Raises `RequestTooLarge`.
        """
        result = self._api.invoke(payload)
        if result.failed and not self._closing:
            description = result.json()
            # What ends a sandbox cannot be logged by it.
            if str(description.get("errorType", "")).startswith(("Sandbox.", "Runtime.", "Function.")):
                self._write({"level": "ERROR", "message": description.get("errorMessage"), "function": self.spec.name})
        return result

    def renew(self) -> None:
        """Have the next invocations run in new sandboxes, which remember nothing, as after a deployment."""
        self._api.dismiss()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End every process of the function; may be called again."""
        if self._closing:
            return
        self._closing = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join()
        self._control.close()
        self._api.close()
        if self._log:
            self._log.close()

    def _grow(self) -> None:
        with self._lock:
            wanted = min(self._api.shortage - self._starting, self._concurrency - self._sandboxes - self._starting)
            for _ in range(wanted):
                self._starting += 1
                self._send("fork")

    def _kill(self, sandbox: str) -> None:
        if sandbox:
            with self._lock:
                self._send("kill", int(sandbox))

    def _send(self, *message: Any) -> None:
        with contextlib.suppress(OSError):
            self._control.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        with self._control.makefile("rb") as lines, contextlib.suppress(ConnectionError):
            for line in lines:
                self._note(json.loads(line))
        # The process that forks is gone, and with it every sandbox.
        self._error = self._error or {"errorType": "Runtime.ExitError", "errorMessage": "the function's process ended"}
        self._api.break_down(Result(json.dumps(self._error).encode(), failed=True))
        self._started.set()

    def _note(self, message: list[Any]) -> None:
        match message:
            case ["ready"]:
                self._started.set()
            case ["broken", dict(error)]:
                self._error = error
            case ["forked", _]:
                with self._lock:
                    self._starting -= 1
                    self._sandboxes += 1
            case ["exited", int(pid), int(status)]:
                with self._lock:
                    self._sandboxes -= 1
                reason = f"signal: {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
                self._api.sandbox_exited(str(pid), reason)
                self._grow()

    def _write(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line) + "\n"
        if self._log:
            with contextlib.suppress(ValueError):  # closed in the meantime
                self._log.write(text.encode())
        else:
            print(text, end="", flush=True)
