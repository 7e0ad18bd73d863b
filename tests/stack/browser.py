"""Headless Chromium, told what to do over a pipe: nothing to install besides the browser itself."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
_PATIENCE = 120
# The browser expects its commands at 3, and answers at 4.
_PIPES = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """One page of a browser. https://chromedevtools.github.io/devtools-protocol/"""

    def __init__(self, commands: BinaryIO, answers: BinaryIO) -> None:
        self._commands = commands
        self._answers = answers
        self._sent = 0
        self._session: dict[str, str] = {}
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def open(self, url: str) -> None:
        """Go to a page, and return once its scripts run."""
        self._call("Page.enable")
        self._call("Page.navigate", url=url)
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in the page, of a promise once it has one. Raises what it raises."""
        answer = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Save what is to be seen as PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **parameters: Any) -> Any:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters, **self._session}
        self._commands.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._sent:
            pass
        if "error" in answer:
            raise RuntimeError(answer["error"]["message"])
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser is gone")
            message += byte
        found: dict[str, Any] = json.loads(message)
        return found


@contextlib.contextmanager
def headless(profile: Path) -> Iterator[Browser]:
    """Start a browser with an empty profile."""
    assert PROGRAM
    commands_in, commands_out = os.pipe()
    answers_in, answers_out = os.pipe()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", _PIPES, str(commands_in), str(answers_out), PROGRAM),
            *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *(
                "--no-first-run",
                "--disable-background-networking",
                "--window-size=600,700",
                f"--user-data-dir={profile}",
            ),
        ],
        pass_fds=(commands_in, answers_out),
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_in)
    os.close(answers_out)
    # Whoever waits for a browser that hangs is told that it is gone.
    patience = threading.Timer(_PATIENCE, process.kill)
    patience.start()
    try:
        with os.fdopen(commands_out, "wb", buffering=0) as commands, os.fdopen(answers_in, "rb") as answers:
            yield Browser(commands, answers)
    finally:
        patience.cancel()
        process.terminate()
        process.wait(timeout=20)
