"""The endpoint's process, started as SageMaker starts it, and a client for it."""

from __future__ import annotations

import base64
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
DEADLINE = 60


def picture(width: int = 512, height: int = 512, number: int = 0) -> Image.Image:
    """Return a picture of noise in blocks, which is different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    """Return the image file in base64."""
    stream = BytesIO()
    image.save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()


IMAGE = encoded(picture())
# The fewest steps that there are: two.
ASKED = {"image": IMAGE, "prompt": "a castle on a hill", "strength": 0.1, "seed": 7, "base64": True}
LONG = {**ASKED, "strength": 1, "num_inference_steps": 100}


class Answer:
    """An HTTP answer, read."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def json(self) -> Any:
        """The body's JSON."""
        return json.loads(self.body)

    @property
    def errors(self) -> dict[str, str]:
        """What is wrong with which field."""
        return {error["field"]: error["detail"] for error in self.json["errors"]}


class Server:
    """A running process: its log lines as they come, and calls to it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.errors = ""
        self._came = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read_lines, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_lines(self) -> None:
        for line in self.process.stdout or ():
            with self._came:
                self.lines.append(line)
                self._came.notify_all()
        with self._came:
            self._came.notify_all()

    def _read_errors(self) -> None:
        self.errors = self.process.stderr.read() if self.process.stderr else ""

    def logged(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for a log line and return it."""
        seen = 0
        with self._came:
            while True:
                for line in self.lines[seen:]:
                    seen += 1
                    entry = json.loads(line)
                    if wanted(entry):
                        return entry
                ended = not self._readers[0].is_alive()
                assert not ended, f"it ended without that line: {self.lines} {self.errors}"
                assert self._came.wait(DEADLINE), f"no such line: {self.lines}"

    def said(self, message: str) -> dict[str, Any]:
        """Wait for a message in the log."""
        return self.logged(lambda entry: entry["message"] == message)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.said("listening")["port"])

    def connect(self) -> http.client.HTTPConnection:
        """Return a new connection."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Make a call of its own connection."""
        connection = self.connect()
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def invoke(self, asked: Any, **headers: str) -> Answer:
        """Call `/invocations` with this as JSON."""
        return self.call("POST", "/invocations", json.dumps(asked), Content_Type="application/json", **headers)

    def begin(self, asked: Any) -> http.client.HTTPConnection:
        """Send a request, and return the connection that its answer will come by."""
        connection = self.connect()
        connection.request("POST", "/invocations", json.dumps(asked), {"Content-Type": "application/json"})
        return connection

    def metric(self, name: str) -> float:
        """Return one value of `/metrics`, 0 if it is not there yet."""
        lines = self.call("GET", "/metrics").body.decode().splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name), 0.0)

    def wait_for(self, name: str, wanted: Callable[[float], bool]) -> float:
        """Ask for a metric until it is as wanted."""
        deadline = time.monotonic() + DEADLINE
        while not wanted(value := self.metric(name)):
            assert time.monotonic() < deadline, f"{name} is {value}"
            # It shares its processors with the server that it waits for.
            time.sleep(0.02)
        return value

    def end(self) -> int:
        """Wait for the process and all that it has written, and return its exit status."""
        status = self.process.wait(DEADLINE)
        for reader in self._readers:
            reader.join()
        return status


@contextmanager
def serving(*arguments: str, driver: str = "", **environ: str) -> Iterator[Server]:
    """Start `python -m endpoint serve`. `driver` is code to run in the process first."""
    start = ["-c", f"{driver}\nfrom endpoint.__main__ import main\nmain()"] if driver else ["-m", "endpoint"]
    # A model this small gains nothing by threads, which lose much time waiting for each other on a busy machine.
    own = {"PORT": "0", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *start, "serve", *arguments],
        cwd=ROOT,
        env={**os.environ, **own, **environ},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    server = Server(process)
    try:
        yield server
    finally:
        process.kill()
        server.end()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()
