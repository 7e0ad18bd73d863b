"""API Gateway on one machine: HTTP in, REST proxy events to the functions, HTTP out."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from local.http_server import Handler, LoopbackServer
from local.lambda_runtime import Invoke, RequestTooLarge, Result
from local.rest_api import Answer, MalformedAnswer, Request, RestApi, Route
from local.template import ApiSpec

MAX_BODY = 10 * 2**20
KeyId = Callable[[str], str | None]
_log = logging.getLogger(__name__)


class Gateway:
    """Serves REST APIs on loopback, at one port: the first part of a path is the stage, which tells them apart."""

    def __init__(self, port: int, *, log: Path) -> None:
        """Take the port; whoever connects before `serve` waits for it."""
        self._invoke: Invoke = _not_yet
        self._key_id: KeyId = lambda _value: None
        self._apis: tuple[RestApi, ...] = ()
        self._server = LoopbackServer(type("GatewayHandler", (_GatewayHandler,), {"gateway": self}), port)
        # After the port: when that is taken, the log may belong to whoever has it.
        self._log: IO[str] = log.open("w", buffering=1)

    @property
    def urls(self) -> dict[str, str]:
        """The addresses of the APIs by their names in the template."""
        return {api.name: f"http://{self._server.address}/{api.stage}" for api in self._apis}

    def api_of(self, request: Request) -> RestApi:
        """Return the API that a request is for, the first one if it is for none."""
        return next((api for api in self._apis if api.path_within_stage(request.path)), self._apis[0])

    def serve(self, specs: Iterable[ApiSpec], invoke: Invoke, key_id: KeyId) -> None:
        """Answer requests from now on. `key_id` returns the id of an API key by its value, None to refuse it."""
        self._apis = tuple(RestApi(spec) for spec in specs)
        self._invoke = invoke
        self._key_id = key_id
        self._server.start()

    def stop(self) -> None:
        self._server.stop()
        self._log.close()

    def note(self, request: Request, answer: Answer, seconds: float) -> None:
        """Write a line of the access log; neither query nor headers, which may hold what nobody should read."""
        line = {"method": request.method, "path": request.path, "status": answer.status, "ms": round(seconds * 1000)}
        self._log.write(json.dumps({**line, "requestId": request.id}) + "\n")

    def answer(self, request: Request) -> Answer:
        """Do what the gateway does with a request whose body has been read."""
        api = self.api_of(request)
        route = api.match(request.method, api.path_within_stage(request.path))
        if route is None:
            return api.own_answer("MISSING_AUTHENTICATION_TOKEN", request)
        request.resource = route.resource
        key = request.headers.get("x-api-key", "")
        key_id = self._key_id(key) if route.needs_key and key else None
        if route.needs_key and not key_id:
            return api.own_answer("INVALID_API_KEY", request)
        if route.function is None:
            return api.mock(request, route)
        event = api.event(request, route, (key_id, key) if key_id else None)
        return self._integrate(api, request, route, json.dumps(event).encode())

    def _integrate(self, api: RestApi, request: Request, route: Route, event: bytes) -> Answer:
        outcome: list[Result | Exception] = []

        def call() -> None:
            try:
                outcome.append(self._invoke(route.function or "", event))
            except RequestTooLarge as error:
                outcome.append(error)

        # The gateway hangs up on a function that takes too long; the function itself runs on.
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(route.timeout)
        match outcome:
            case []:
                return api.own_answer("INTEGRATION_TIMEOUT", request)
            case [Result(failed=False) as result]:
                try:
                    return api.answer(request, result.json())
                except MalformedAnswer:
                    return api.own_answer("DEFAULT_5XX", request)
            case [RequestTooLarge()]:
                return api.own_answer("REQUEST_TOO_LARGE", request)
            case _:
                return api.own_answer("DEFAULT_5XX", request)


def _not_yet(_function: str, _event: bytes) -> Result:
    raise RuntimeError("the gateway does not serve yet")


class _GatewayHandler(Handler):
    gateway: Gateway
    timeout = 75  # how long a connection may idle

    def __getattr__(self, name: str) -> Callable[[], None]:
        # Whatever the method: an unknown one is answered as an unknown route is.
        if name.startswith("do_"):
            return self._handle
        raise AttributeError(name)

    def handle_expect_100(self) -> bool:
        # A client that asks first is told "too large" before it sends anything.
        length = self.headers.get("Content-Length", "")
        return (length.isdecimal() and int(length) > MAX_BODY) or super().handle_expect_100()

    def _handle(self) -> None:
        started = time.monotonic()
        request = Request(self.command, self.path, self.headers, self.client_address[0])
        api = self.gateway.api_of(request)
        try:
            body = self.read_body(MAX_BODY)
        except ValueError:
            answer = api.own_answer("BAD_REQUEST_BODY", request)
            self.reply_and_drop_body(answer.status, answer.headers, answer.body)
            return
        if body is None:
            answer = api.own_answer("REQUEST_TOO_LARGE", request)
            self.gateway.note(request, answer, time.monotonic() - started)
            self.reply_and_drop_body(answer.status, answer.headers, answer.body)
            return
        request.body = body
        try:
            answer = self.gateway.answer(request)
        except Exception as error:  # noqa: BLE001 (a fault of the gateway is its answer too)
            # Its type alone: the message may quote the request.
            path = urlsplit(request.target).path
            _log.error("the gateway failed at %s %s: %s", request.method, path, type(error).__name__)
            answer = api.own_answer("DEFAULT_5XX", request)
        self.gateway.note(request, answer, time.monotonic() - started)
        self.reply(answer.status, answer.headers, answer.body)
