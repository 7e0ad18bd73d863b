"""One request to the container of a SageMaker endpoint, and what may come of it."""

from __future__ import annotations

import json
import threading
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime

import urllib3

SYNC_SECONDS = 60.0
_CODES = {"400": "invalid_request", "500": "internal_error", "503": "busy"}
STATUSES = tuple(_CODES)
HEADER = "X-Amzn-SageMaker-"
TIMED_OUT = (
    "Your invocation timed out while waiting for a response from container primary. Review the latency metrics for "
    "each container in Amazon CloudWatch, resolve the issue, and try again."
)


class ModelError(Exception):
    """The container answered with an error, or (status 0) not at all."""

    def __init__(self, status: int, message: str, content_type: str = "text/plain") -> None:
        self.status = status
        self.message = message
        self.content_type = content_type
        whose = "client" if 400 <= status < 500 else "server"
        super().__init__(f'Received {whose} error ({status}) from primary with message "{message}".')


@dataclass(frozen=True)
class Answer:
    """What the container said."""

    body: bytes
    content_type: str
    attributes: str | None = None


@dataclass(eq=False)
class Invocation:
    """One request to the container; `input` names its body in S3 when it is asynchronous."""

    inference_id: str
    content_type: str = ""
    accept: str = ""
    attributes: str = ""
    input: str = ""
    ttl: float = SYNC_SECONDS
    timeout: float = SYNC_SECONDS
    behaviour: str | None = None
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    received: float = field(default_factory=time.monotonic)
    received_at: str = field(default_factory=lambda: timestamp())
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def expires(self) -> float:
        return self.received + self.ttl


def ask(container: urllib3.HTTPConnectionPool, invocation: Invocation, body: bytes) -> Answer:
    """Send one request to the container.

    Raises `ModelError`.
    """
    if invocation.behaviour in STATUSES:
        error = {"code": _CODES[invocation.behaviour], "detail": "told to fail", "errors": []}
        raise ModelError(int(invocation.behaviour), json.dumps(error), "application/json")
    if invocation.behaviour == "timeout":
        raise ModelError(0, TIMED_OUT)
    headers = {
        "Content-Type": invocation.content_type,
        "Accept": invocation.accept,
        f"{HEADER}Custom-Attributes": invocation.attributes,
        f"{HEADER}Inference-Id": invocation.inference_id,
    }
    try:
        response = container.request(
            "POST",
            "/invocations",
            body=body,
            headers={name: value for name, value in headers.items() if value},
            timeout=urllib3.Timeout(total=invocation.timeout),
            redirect=False,
        )
    except urllib3.exceptions.TimeoutError:
        raise ModelError(0, TIMED_OUT) from None
    except urllib3.exceptions.HTTPError:
        raise ModelError(0, "The connection to container primary was closed.") from None
    content_type = response.headers.get("Content-Type", "application/octet-stream")
    if response.status >= 300:
        raise ModelError(response.status, response.data.decode("utf-8", "replace"), content_type)
    if "Content-Length" not in response.headers:
        raise ModelError(0, "The response from container primary did not specify the required Content-Length header")
    return Answer(response.data, content_type, response.headers.get(f"{HEADER}Custom-Attributes"))


def timestamp() -> str:
    """Return this moment, as SageMaker writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
