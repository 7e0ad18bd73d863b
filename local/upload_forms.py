"""What S3 does with a presigned upload form and moto does not: hold it to its policy, and answer browsers.

https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-HTTPPOSTConstructPolicy.html
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from xml.sax.saxutils import escape

from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

StartResponse = Callable[..., Any]
_UNSIGNED = {"policy", "x-amz-signature"}
_LARGEST = 64_000_000


@dataclass(frozen=True)
class Form:
    """The fields up to the file, and the file's size; None without a file. What follows the file does not count."""

    fields: Mapping[str, str]
    size: int | None


class Refused(Exception):
    """S3 refuses the form: an HTTP status, S3's code and its text."""

    def __init__(self, status: str, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


def read_form(body: bytes, boundary: str) -> Form:
    """Read a multipart body."""
    decoder = MultipartDecoder(boundary.encode())
    decoder.receive_data(body)
    decoder.receive_data(None)
    fields: dict[str, str] = {}
    name, size = "", None
    while not isinstance(event := decoder.next_event(), Epilogue | NeedData):
        match event:
            case File() if size is None:
                name, size = "", 0
            case Field() if size is None:
                name = event.name.lower()
            case Data() if size is not None and not name:
                size += len(event.data)
            case Data() if name:
                fields[name] = fields.get(name, "") + event.data.decode(errors="replace")
            case Field() | File():
                break
    return Form(fields, size)


def check(form: Form, bucket: str, now: datetime) -> None:
    """Hold a form to its own policy; the signature is taken as good. Raises `Refused`."""
    if form.size is None:
        raise Refused("400 Bad Request", "InvalidArgument", "POST requires exactly one file upload per request.")
    try:
        policy = json.loads(base64.b64decode(form.fields["policy"]))
        ends = datetime.fromisoformat(policy["expiration"])
        conditions = policy["conditions"]
    except (KeyError, ValueError):
        raise Refused("403 Forbidden", "AccessDenied", "Access Denied") from None
    if ends <= now:
        raise Refused("403 Forbidden", "AccessDenied", "Invalid according to Policy: Policy expired.")
    given = {**form.fields, "bucket": bucket}
    covered = {"bucket"}
    for condition in conditions:
        match condition:
            case ["content-length-range", int(low), int(high)]:
                if form.size > high:
                    raise Refused("400 Bad Request", "EntityTooLarge", "Your proposed upload exceeds the maximum.")
                if form.size < low:
                    raise Refused("400 Bad Request", "EntityTooSmall", "Your proposed upload is below the minimum.")
                continue
            case [("eq" | "starts-with") as how, str(variable), str(wanted)]:
                name = variable.removeprefix("$").lower()
                holds = given.get(name, "").startswith(wanted) if how == "starts-with" else given.get(name) == wanted
            case dict():
                ((field, wanted),) = condition.items()
                name = field.lower()
                holds = given.get(name) == wanted
            case _:
                raise Refused("400 Bad Request", "InvalidPolicyDocument", "Invalid Policy: unknown condition.")
        covered.add(name)
        if not holds:
            text = f"Invalid according to Policy: Policy Condition failed: {json.dumps(condition)}"
            raise Refused("403 Forbidden", "AccessDenied", text)
    extra = set(form.fields) - covered - _UNSIGNED
    if extra:
        text = f"Invalid according to Policy: Extra input fields: {', '.join(sorted(extra))}"
        raise Refused("403 Forbidden", "AccessDenied", text)


class UploadForms:
    """WSGI: checks upload forms on their way to moto, and lets pages of the bucket's CORS origins read the answer."""

    def __init__(self, app: Any, origins: Callable[[str], Iterable[str]]) -> None:
        """`origins` returns the origins that may POST to a bucket."""
        self._app = app
        self._origins = origins

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        bucket = environ["PATH_INFO"].strip("/")
        kind, options = parse_options_header(environ.get("CONTENT_TYPE"))
        is_form = environ["REQUEST_METHOD"] == "POST" and kind == "multipart/form-data" and "/" not in bucket
        # What is answered to one origin must not be taken from the cache for another.
        added = [("Vary", "Origin")] if "HTTP_ORIGIN" in environ else []
        if is_form:
            added += self._cors(bucket, environ.get("HTTP_ORIGIN"))

        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            return start_response(status, [*headers, *added], *rest)

        if not is_form:
            answer: Iterable[bytes] = self._app(environ, start)
            return answer
        try:
            length = int(environ.get("CONTENT_LENGTH") or 0)
            if length > _LARGEST:
                raise Refused("400 Bad Request", "EntityTooLarge", "Your proposed upload exceeds the maximum.")
            body = environ["wsgi.input"].read(length)
            check(read_form(body, options.get("boundary", "")), bucket, datetime.now(UTC))
        except Refused as refused:
            xml = f"<Error><Code>{refused.code}</Code><Message>{escape(refused.message)}</Message></Error>".encode()
            start(refused.status, [("Content-Type", "application/xml"), ("Content-Length", str(len(xml)))])
            return [xml]
        stored: Iterable[bytes] = self._app({**environ, "wsgi.input": io.BytesIO(body)}, start)
        return stored

    def _cors(self, bucket: str, origin: str | None) -> list[tuple[str, str]]:
        origins = set(self._origins(bucket)) if origin else set()
        if "*" in origins:
            return [("Access-Control-Allow-Origin", "*")]
        return [("Access-Control-Allow-Origin", origin)] if origin in origins and origin else []
