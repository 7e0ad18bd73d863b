"""The process around the server: it listens at once, loads the model behind that, and drains when it is told to end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
import uvicorn

from endpoint.engine import Engine
from endpoint.metrics import Metrics
from endpoint.model import Compile, Model
from endpoint.server import Service
from endpoint.settings import CACHE_NAME, Settings

# SageMaker kills 30 s after SIGTERM; the rest is for the last answers on their way and for the engine's end.
DRAIN_SECONDS = 25
_FAREWELL_SECONDS = 2

log = logging.getLogger(__name__)


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; return the process's exit status."""
    _quieten()
    try:
        listener = socket.create_server((settings.host, settings.port), backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        return _failed(f"cannot listen on {settings.host}:{settings.port}: {reason}")
    try:
        asyncio.run(_run(listener, lambda metrics: load(settings, metrics)))
    # Whatever a model's files, a download or a compiler come up with.
    except Exception as error:  # noqa: BLE001
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return _failed(f"cannot serve the model at {settings.model}: {reason}")
    return 0


def leave(status: int) -> None:
    """End the process, also while a thread is inside torch, where the interpreter's own end would abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if any(thread.daemon for thread in threading.enumerate()):
        os._exit(status)
    sys.exit(status)


def load(settings: Settings, metrics: Metrics) -> Engine:
    """Load the model, start its engine and warm it up. Raises whatever keeps it from that."""
    # A path that is none would be taken for a hub name, with an error that speaks of hub names.
    if Path(settings.model).is_absolute() and not Path(settings.model).is_dir():
        raise FileNotFoundError("there is no such folder")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("there is no GPU that torch can use, and DEVICE is cuda")
    cuda = settings.device != "cpu" and torch.cuda.is_available()
    dtype = ("float16" if cuda else "float32") if settings.dtype == "auto" else settings.dtype
    compiled = ("max-autotune" if cuda else "off") if settings.compile == "auto" else settings.compile
    model = Model.load(
        settings.model,
        device="cuda" if cuda else "cpu",
        dtype=getattr(torch, dtype),
        compile=cast("Compile", compiled),
        safety_checker=settings.safety_checker == "on",
    )
    engine = Engine(
        model,
        max_batch=settings.max_batch,
        max_running=settings.max_running,
        max_queue=settings.max_queue,
        observer=metrics,
    )
    sizes = [(int(width), int(height)) for width, _, height in (size.partition("x") for size in settings.warm_sizes)]
    if compiled == "off":
        engine.warm_up(sizes[:1])
    else:
        own = Path(settings.compile_cache) if settings.compile_cache else None
        read_cache(own if own and own.exists() else Path(settings.model, CACHE_NAME))
        engine.warm_up(sizes)
        if own:
            write_cache(own)
    return engine


def read_cache(file: Path) -> None:
    """Take what compiling made before, if the file is there. It holds code, as trusted as our own."""
    if file.is_file():
        # None: of other versions, or broken. Torch has said so, and compiles again.
        found = torch.compiler.load_cache_artifacts(file.read_bytes())
        _tell("compile cache read", usable=found is not None)


def write_cache(file: Path) -> None:
    """Keep what compiling made. Only a warning where that fails: the model serves without it."""
    made = torch.compiler.save_cache_artifacts()
    if made is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Never half a file under that name.
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_bytes(made[0])
        part.replace(file)
    except OSError as error:
        log.warning("the compile cache could not be written", exc_info=error)


async def _run(listener: socket.socket, load: Callable[[Metrics], Engine]) -> None:
    metrics = Metrics()
    service = Service(metrics)
    told = asyncio.Event()
    server = uvicorn.Server(
        uvicorn.Config(
            service.app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            # Longer than SageMaker's proxy keeps a connection: one that is closed just as it is used would fail a call.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_FAREWELL_SECONDS,
        )
    )

    def end() -> None:
        if told.is_set():
            service.cut()
        told.set()

    loop = asyncio.get_running_loop()
    # Its own would close the door at once, while SageMaker is to read a 503 from `/ping` as long as requests end.
    server.handle_exit = lambda *_: loop.call_soon_threadsafe(end)
    tasks = [asyncio.create_task(job) for job in (told.wait(), _work(service, lambda: load(metrics)))]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    _tell("listening", host=listener.getsockname()[0], port=listener.getsockname()[1])
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        _tell("draining")
        await service.drain(DRAIN_SECONDS)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        server.should_exit = True
        await serving
    if service.engine:
        last = _in_thread(service.engine.stop)
        await asyncio.wait([asyncio.wrap_future(last)], timeout=_FAREWELL_SECONDS)
    _tell("stopped")


async def _work(service: Service, load: Callable[[], Engine]) -> None:
    """Load the model and serve it. Raises whatever keeps it from that, also later."""
    engine = await asyncio.wrap_future(_in_thread(load))
    service.use(engine)
    model = engine.model
    _tell("ready", device=str(model.device), dtype=str(model.dtype).removeprefix("torch."), compile=model.compiled)
    await asyncio.wrap_future(_in_thread(engine.wait))
    # SageMaker starts a new process for one that ended.
    raise RuntimeError("the engine stopped by a fault")


def _in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Run it in a thread that the end of the process does not wait for, as it does for those of an executor."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (it is handed to whoever waits)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _tell(message: str, **fields: Any) -> None:
    log.info(message, extra={"fields": fields})


def _failed(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 1


def _quieten() -> None:
    """Have the libraries report through our log, and draw no progress bars."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.disable_default_handler()
        library.enable_propagation()
