"""SageMaker's contract around the engine: `/ping`, `/invocations`, and `/metrics` beside them.

One process, one event loop. Whatever takes milliseconds (JSON, images) runs in threads, the model in the engine's own.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from concurrent.futures import Future
from io import BytesIO
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from endpoint.engine import Busy, Engine, Result, Stopped, to_image
from endpoint.errors import InternalError, Refused, TooLarge, Unavailable, UnsupportedMediaType
from endpoint.logs import describe
from endpoint.metrics import CONTENT_TYPE, Metrics
from endpoint.requests import FIELDS, Asked, parse

# SageMaker's own limit of a real-time call.
MAX_BODY = 25 * 1024 * 1024
_WARMING_RETRY = 15
# By then another instance answers.
_DRAINING_RETRY = 5

log = logging.getLogger(__name__)


class Service:
    """The routes, and what they share. `use()` gives it its engine, `drain()` ends it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.engine: Engine | None = None
        self._draining = False
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._cut = asyncio.Event()
        metrics.watch("ready", "Whether requests are taken", lambda: self.ready)
        metrics.watch("waiting", "Requests in the queue", lambda: self.engine.waiting if self.engine else 0)
        metrics.watch("running", "Requests that take turns", lambda: self.engine.running if self.engine else 0)
        self.app = Starlette(
            routes=[
                Route("/ping", self._ping),
                Route("/invocations", self._invocations, methods=["POST"]),
                Route("/metrics", self._page),
            ],
            exception_handlers={HTTPException: _no_route},
        )

    @property
    def ready(self) -> bool:
        """Whether requests are taken: not while the model warms up, not while draining, not on a dead engine."""
        return self.engine is not None and self.engine.alive and not self._draining

    def use(self, engine: Engine) -> None:
        """Take requests for this engine from now on."""
        self.engine = engine

    async def drain(self, seconds: float) -> None:
        """Take no more requests; return when those taken are answered, those that last longer with a 503."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            self.cut()

    def cut(self) -> None:
        """Answer whatever is still running with a 503, now."""
        self._cut.set()

    async def _ping(self, _: HttpRequest) -> Response:
        state = "ready" if self.ready else "draining" if self._draining else "failed" if self.engine else "warming up"
        return JSONResponse({"status": state}, 200 if self.ready else 503)

    async def _page(self, _: HttpRequest) -> Response:
        return Response(self._metrics.page(), media_type=CONTENT_TYPE)

    async def _invocations(self, http: HttpRequest) -> Response:
        begun = time.monotonic()
        line: dict[str, Any] = {}
        if inference_id := http.headers.get("x-amzn-sagemaker-inference-id"):
            line["inference_id"] = inference_id[:64]
        self._open += 1
        self._idle.clear()
        try:
            outcome, response = await self._answer(http, line)
        except ClientDisconnect:
            # Nobody reads it.
            outcome, response = "canceled", Response(status_code=499)
        except Refused as refused:
            outcome = "busy" if isinstance(refused, Unavailable) else "refused"
            # Only names that are ours: an unknown one may be any text.
            line["fields"] = [error.field for error in refused.errors if error.field in (*FIELDS, "body")]
            response = _refusal(refused)
        except Exception as error:  # noqa: BLE001 (whatever a picture fails of is one caller's 500, and a line in the log)
            outcome = "failed"
            line |= describe(error)
            response = _refusal(InternalError("The picture could not be made"))
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()
        self._metrics.answered(outcome)
        took = {"outcome": outcome, "status": response.status_code, "ms": _ms(time.monotonic() - begun)}
        log.log(logging.ERROR if outcome == "failed" else logging.INFO, "invocation", extra={"fields": took | line})
        return response

    async def _answer(self, http: HttpRequest, line: dict[str, Any]) -> tuple[str, Response]:
        engine = self._ready_engine()
        asked = await asyncio.to_thread(parse, await _body(http))
        line |= asked.summary
        # It may have begun to drain meanwhile.
        engine = self._ready_engine()
        try:
            result = await self._result(engine.submit(asked.request), http)
        except Busy as busy:
            raise Unavailable("The queue is full", retry_after=busy.retry_after) from None
        except Stopped:
            raise Unavailable("Stopping", retry_after=_DRAINING_RETRY) from None
        line |= _metrics_of(result)
        if result.flagged:
            return "flagged", _json(asked, result, None)
        png = await asyncio.to_thread(_png, result)
        if asked.base64:
            return "succeeded", _json(asked, result, png)
        headers = {"x-generation-time": f"{result.run_seconds:.3f}", "x-seed": str(asked.request.seed)}
        return "succeeded", Response(png, media_type="image/png", headers=headers)

    def _ready_engine(self) -> Engine:
        if self._draining:
            raise Unavailable("Stopping", retry_after=_DRAINING_RETRY)
        if self.engine is None:
            raise Unavailable("The model is warming up", retry_after=_WARMING_RETRY)
        return self.engine

    async def _result(self, future: Future[Result], http: HttpRequest) -> Result:
        """Wait for the result as long as the caller does and the process may."""
        result = asyncio.wrap_future(future)
        gone, cut = asyncio.create_task(_gone(http)), asyncio.create_task(self._cut.wait())
        ends: list[asyncio.Future[Any]] = [result, gone, cut]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if result.done() and not result.cancelled():
                return result.result()
            if gone.done():
                raise ClientDisconnect
            raise Stopped
        finally:
            future.cancel()
            # Also on this side of it: asyncio would log the text of an error that nobody fetches.
            result.cancel()
            gone.cancel()
            cut.cancel()


async def _body(http: HttpRequest) -> bytes:
    """Read the body. One that is too large is refused before it is all in memory."""
    content_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise UnsupportedMediaType("The content type must be application/json")
    too_large = TooLarge(f"The body must have at most {MAX_BODY} bytes")
    declared = http.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > MAX_BODY:
        raise too_large
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise too_large
    return bytes(body)


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _png(result: Result) -> bytes:
    stream = BytesIO()
    # Level 1 takes a quarter of the default's time and a few more bytes, on their way to one reader.
    to_image(result).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _json(asked: Asked, result: Result, png: bytes | None) -> Response:
    return JSONResponse(
        {
            "image": None if png is None else base64.b64encode(png).decode(),
            "nsfw": result.flagged,
            "seed": asked.request.seed,
            "metrics": _metrics_of(result),
        }
    )


def _metrics_of(result: Result) -> dict[str, int]:
    return {"queue_ms": _ms(result.queue_seconds), "run_ms": _ms(result.run_seconds)}


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _refusal(refused: Refused) -> Response:
    return JSONResponse(refused.body, refused.status, refused.headers)


async def _no_route(_: HttpRequest, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    detail = "There is GET /ping, POST /invocations and GET /metrics"
    code = "method_not_allowed" if status == 405 else "not_found"
    return JSONResponse({"code": code, "detail": detail, "errors": []}, status, getattr(error, "headers", None))
