"""The process of the SageMaker endpoint's container, without Docker: `python -m endpoint serve` on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import urllib3

from local.http_server import HOST

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-endpoint" / "bin" / "python"
_TINY_MAKER = ROOT / "endpoint" / "model.py"
TINY_MODEL = ROOT / ".local" / "tiny-model"
# A large model is read from the disk, or from a hub, and tried out before it is ready.
_PROGRESS_SECONDS = 5.0
_POLL_SECONDS = 0.1
Progress = Callable[[str], None]


class EndpointError(Exception):
    """The endpoint's process does not run; the text says why."""


class Container:
    """A process that serves a model. `url` is where, once `wait_until_ready` has returned."""

    def __init__(self, model: str, log: Path, python: Path = PYTHON) -> None:
        self._log = log
        port = _free_port()
        self.url = f"http://{HOST}:{port}"
        command = [*_endpoint(python), "serve", "--model", _model(model), "--port", str(port), "--host", HOST]
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "local.leash", *command],
                cwd=ROOT,
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    def wait_until_ready(self, progress: Progress = lambda _: None) -> None:
        """Wait until it answers a ping, and say now and then that it is waited for.

        Raises `EndpointError` when it ends instead.
        """
        started = said = time.monotonic()
        with urllib3.PoolManager(retries=False, timeout=2.0) as http:
            while not self._answers(http):
                try:
                    status = self._process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    if time.monotonic() - said >= _PROGRESS_SECONDS:
                        said = time.monotonic()
                        progress(f"The endpoint reads its model and warms up: {said - started:.0f} s")
                else:
                    raise EndpointError(f"the endpoint ended with status {status}; {_end_of(self._log)}")

    def _answers(self, http: urllib3.PoolManager) -> bool:
        try:
            return http.request("GET", f"{self.url}/ping").status == 200
        except urllib3.exceptions.HTTPError:
            return False

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End it; what it works on is cut off."""
        if self.alive:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


def tiny_model(log: Path, python: Path = PYTHON, progress: Progress = lambda _: None) -> Path:
    """Return the folder of the model with random weights, made unless one is there that is newer than its maker.

    Raises `EndpointError`.
    """
    if not (TINY_MODEL.is_dir() and TINY_MODEL.stat().st_mtime > _TINY_MAKER.stat().st_mtime):
        progress("Making the tiny model with random weights")
        unfinished = TINY_MODEL.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        with log.open("wb") as sink:
            made = subprocess.run(
                [*_endpoint(python), "tiny", str(unfinished)],
                cwd=ROOT,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                check=False,
            )
        if made.returncode:
            raise EndpointError(f"the tiny model could not be made; {_end_of(log)}")
        shutil.rmtree(TINY_MODEL, ignore_errors=True)
        unfinished.rename(TINY_MODEL)
    return TINY_MODEL


def _endpoint(python: Path) -> Sequence[str]:
    if not python.is_file():
        raise EndpointError(
            f"there is no {python}; `make run BACKEND=sagemaker` makes it, with the endpoint's packages"
        )
    return [str(python), "-m", "endpoint"]


def _end_of(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return "\n".join([f"the end of {log}:", *lines[-6:]]).rstrip()


def _model(model: str) -> str:
    """Return a folder by its full path, and anything else, a name on a hub, as it is."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def _environment() -> dict[str, str]:
    # In production it is given no key and no credentials either. Of our own packages it sees none.
    ours = ("SEGMIND_API_KEY", "API_KEY", "PYTHONPATH")
    # The rest of the system runs beside it: threads that spin while they wait would cost it most of a small machine.
    return {"OMP_WAIT_POLICY": "PASSIVE"} | {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS_", *ours))
    }


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])
