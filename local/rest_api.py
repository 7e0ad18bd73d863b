"""A REST API of API Gateway as data: its routes, its own answers, and the proxy events it makes of requests."""

from __future__ import annotations

import base64
import json
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from local.template import ACCOUNT, ApiSpec, Json

# What the gateway says by itself, and with which status where the template names none. AWS may keep to words of its own
# for REQUEST_TOO_LARGE, which it documents as not customisable.
_RESPONSES = {
    "MISSING_AUTHENTICATION_TOKEN": (403, "Missing Authentication Token"),
    "INVALID_API_KEY": (403, "Forbidden"),
    "REQUEST_TOO_LARGE": (413, "Request Too Long"),
    "BAD_REQUEST_BODY": (400, "Bad Request"),
    "API_CONFIGURATION_ERROR": (500, "Internal server error"),
    "INTEGRATION_TIMEOUT": (504, "Endpoint request timed out"),
    "DEFAULT_5XX": (502, "Internal server error"),  # the answer of a function that is none
}
# From a function: renamed, or dropped. To a function: dropped.
_REMAPPED = {
    *("authorization", "connection", "content-md5", "date", "max-forwards", "server", "user-agent", "www-authenticate")
}
_DROPPED = {"content-length", "expect", "host", "te", "trailer", "transfer-encoding", "upgrade", "via"}
_NOT_FORWARDED = {
    "x-forwarded-port",
    "x-forwarded-proto",
    "connection",
    "content-length",
    "expect",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
# Fields of callers that sign their requests, which these do not.
_NO_IDENTITY = (
    *("cognitoIdentityPoolId", "cognitoIdentityId", "cognitoAuthenticationType", "cognitoAuthenticationProvider"),
    *("accountId", "caller", "principalOrgId", "accessKey", "userArn", "user"),
)


@dataclass(frozen=True)
class Answer:
    """What goes back to the client."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


class MalformedAnswer(ValueError):
    """A function's answer is not of the form the proxy integration asks for."""


@dataclass
class Request:
    """A request as it came in, with what the gateway noted about it."""

    method: str
    target: str
    headers: Message
    source_ip: str
    body: bytes = b""
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    extended_id: str = field(default_factory=lambda: base64.b64encode(uuid.uuid4().bytes).decode())
    resource: str = ""

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    def first_media_type(self, header: str) -> str:
        return self.headers.get(header, "").partition(",")[0].partition(";")[0].strip().lower()


@dataclass(frozen=True)
class Route:
    resource: str
    operation: Json
    parameters: Mapping[str, str]

    @property
    def function(self) -> str | None:
        name: str | None = self.operation.get("x-local-function")
        return name

    @property
    def needs_key(self) -> bool:
        return any("api_key" in scheme for scheme in self.operation.get("security", []))

    @property
    def timeout(self) -> float:
        milliseconds = self.operation.get("x-amazon-apigateway-integration", {}).get("timeoutInMillis", 29_000)
        return float(milliseconds) / 1000


class RestApi:
    def __init__(self, spec: ApiSpec) -> None:
        self.name = spec.name
        self.stage = spec.stage
        self._paths: Json = spec.body["paths"]
        self._responses: Json = spec.body.get("x-amazon-apigateway-gateway-responses", {})
        self._binary: list[str] = spec.body.get("x-amazon-apigateway-binary-media-types", [])

    def path_within_stage(self, path: str) -> str | None:
        prefix = f"/{self.stage}"
        return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else None

    def match(self, method: str, path: str | None) -> Route | None:
        """Find the route; a path written out wins over one with a parameter, whatever its methods are."""
        for resource in sorted(self._paths, key=lambda text: text.replace("{", "\uffff")) if path else ():
            pattern = re.sub(r"\{(\w+)\+\}", r"(?P<\1>.+)", resource)
            pattern = re.sub(r"(?<!\?P<)\{(\w+)\}", r"(?P<\1>[^/]+)", pattern)
            found = re.fullmatch(pattern, path or "")
            methods = self._paths[resource]
            operation = methods.get(method.lower()) or methods.get("x-amazon-apigateway-any-method")
            if found:
                parameters = {k: unquote(v) for k, v in found.groupdict().items()}
                return Route(resource, operation, parameters) if operation else None
        return None

    def is_binary(self, media_type: str) -> bool:
        # The gateway takes what names no type for JSON.
        return any(fnmatchcase(media_type or "application/json", pattern) for pattern in self._binary)

    def mock(self, request: Request, route: Route) -> Answer:
        """Answer a mock integration: the preflights that SAM writes."""
        integration = route.operation["x-amazon-apigateway-integration"]
        if "*/*" in self._binary and "contentHandling" not in integration:
            # The gateway takes the mock's own request for binary then, and cannot apply its template.
            return self.own_answer("API_CONFIGURATION_ERROR", request)
        response = integration["responses"]["default"]
        prefix = "method.response.header."
        headers = [
            (name.removeprefix(prefix), _literal(value, request))
            for name, value in response.get("responseParameters", {}).items()
        ]
        content_type, template = next(iter(response.get("responseTemplates", {}).items()), ("application/json", ""))
        return Answer(
            int(response["statusCode"]), [("Content-Type", content_type), *headers, *_ids(request)], template.encode()
        )

    def own_answer(self, kind: str, request: Request) -> Answer:
        """Render one of the gateway's own answers as the template wants it."""
        status, message = _RESPONSES[kind]
        given = self._responses.get(kind) or self._responses.get(f"DEFAULT_{status // 100}XX") or {}
        status = int(given.get("statusCode", status))
        templates = given.get("responseTemplates") or {"application/json": '{"message":$context.error.messageString}'}
        accepted = request.first_media_type("Accept")
        content_type = next((t for t in (accepted, "application/json") if t in templates), next(iter(templates)))
        variables = self._variables(request) | {
            "error.message": message,
            "error.messageString": json.dumps(message),
            "error.responseType": kind,
            "error.validationErrorString": "",
        }
        body = re.sub(
            r"\$context\.([A-Za-z]+(?:\.[A-Za-z]+)*)", lambda m: str(variables.get(m[1], "")), templates[content_type]
        )
        headers = {"content-type": ("Content-Type", content_type)}
        for name, value in given.get("responseParameters", {}).items():
            name = name.removeprefix("gatewayresponse.header.")
            headers[name.lower()] = (name, _literal(value, request))
        return Answer(status, [*headers.values(), *_ids(request)], body.encode())

    def event(self, request: Request, route: Route, api_key: tuple[str, str] | None) -> Json:
        """Make the proxy event; `api_key` is the id and the value of the caller's key."""
        headers = [
            *((k, v) for k, v in request.headers.items() if k.lower() not in _NOT_FORWARDED),
            ("X-Amzn-Trace-Id", f"Root=1-{int(time.time()):08x}-{uuid.uuid4().hex[:24]}"),
            ("X-Forwarded-For", request.source_ip),
            ("X-Forwarded-Port", request.headers.get("Host", "").rpartition(":")[2]),
            ("X-Forwarded-Proto", "http"),
        ]
        query = parse_qsl(urlsplit(request.target).query, keep_blank_values=True)
        binary = self.is_binary(request.first_media_type("Content-Type"))
        body = base64.b64encode(request.body).decode() if binary else request.body.decode(errors="replace")
        return {
            "resource": route.resource,
            "path": self.path_within_stage(request.path),
            "httpMethod": request.method,
            "headers": dict(headers),
            "multiValueHeaders": _multi(headers),
            "queryStringParameters": dict(query) or None,
            "multiValueQueryStringParameters": _multi(query) or None,
            "pathParameters": dict(route.parameters) or None,
            "stageVariables": None,
            "requestContext": self._request_context(request, route, api_key),
            "body": body or None,
            "isBase64Encoded": binary and bool(request.body),
        }

    def _request_context(self, request: Request, route: Route, api_key: tuple[str, str] | None) -> Json:
        identity: Json = dict.fromkeys(_NO_IDENTITY)
        identity |= {"sourceIp": request.source_ip, "userAgent": request.headers.get("User-Agent")}
        if api_key:
            identity |= {"apiKeyId": api_key[0], "apiKey": api_key[1]}
        return {
            "resourceId": "local",
            "resourcePath": route.resource,
            "httpMethod": request.method,
            "extendedRequestId": request.extended_id,
            "requestTime": time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime()),
            "path": request.path,
            "accountId": ACCOUNT,
            "protocol": "HTTP/1.1",
            "stage": self.stage,
            "domainPrefix": "local",
            "requestTimeEpoch": int(time.time() * 1000),
            "requestId": request.id,
            "identity": identity,
            "domainName": request.headers.get("Host", ""),
            "apiId": "local",
        }

    def _variables(self, request: Request) -> dict[str, str]:
        return {
            "requestId": request.id,
            "extendedRequestId": request.extended_id,
            "httpMethod": request.method,
            "path": request.path,
            "resourcePath": request.resource,
            "stage": self.stage,
            "identity.sourceIp": request.source_ip,
        }

    def answer(self, request: Request, payload: Any) -> Answer:
        """Make the HTTP answer of what a function returned.

        Raises `MalformedAnswer`.
        """
        if not isinstance(payload, dict) or not isinstance(payload.get("body") or "", str):
            raise MalformedAnswer("not an object with a body of text")
        try:
            status = int(payload["statusCode"])
            multi = payload.get("multiValueHeaders") or {}
            single = {k: v for k, v in (payload.get("headers") or {}).items() if k not in multi}
            headers = [(k, str(v)) for k, v in single.items()] + [(k, str(v)) for k, vs in multi.items() for v in vs]
            body = (payload.get("body") or "").encode()
            # Otherwise the client gets the base64 text itself.
            if payload.get("isBase64Encoded") is True and self.is_binary(request.first_media_type("Accept")):
                body = base64.b64decode(body, validate=True)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MalformedAnswer(str(error)) from error
        if not 100 <= status <= 599:
            raise MalformedAnswer(f"status {status}")
        return Answer(status, [*_ids(request), *_passed_on(headers)], body)


def _passed_on(headers: list[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    if not any(name.lower() == "content-type" for name, _ in headers):
        yield "Content-Type", "application/json"
    for name, value in headers:
        if name.lower() in _REMAPPED:
            yield f"x-amzn-Remapped-{name}", value
        elif name.lower() not in _DROPPED:
            # What could end the header ends the answer's trust in it.
            yield name, re.sub(r"[\r\n]+", " ", value)


def _ids(request: Request) -> list[tuple[str, str]]:
    return [("x-amzn-RequestId", request.id), ("x-amz-apigw-id", request.extended_id)]


def _literal(value: str, request: Request) -> str:
    """A header's value: a literal in quotes, or a header of the request."""
    if value.startswith("'"):
        return value[1:-1]
    return request.headers.get(value.removeprefix("method.request.header."), "")


def _multi(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    joined: dict[str, list[str]] = {}
    for name, value in pairs:
        joined.setdefault(name, []).append(value)
    return joined
