"""SageMaker in front of a container on this machine: what unmodified boto3 clients of `sagemaker-runtime` ask for.

Real-time and asynchronous invocations, the latter with S3 in, S3 out and notices to SNS; and `describe_endpoint`. What
it does next is told through a query on its own port; a list of all of it:

    curl -X POST 'http://127.0.0.1:PORT/control?next=500&times=2'
    curl http://127.0.0.1:PORT/control

    next=BEHAVIOUR   what the next invocation gets; with times=N the next N; queued behind what is queued already
        400 500 503      that status, as if from the container, which is not asked
        timeout          the container's answer would take too long
        refused          the call itself gets a 503; nothing is invoked
        cut              invoked, but the connection is closed without an answer
        expired          asynchronous: the request is older than RequestTTLSeconds when its turn comes
        lost             asynchronous: accepted, and never heard of again
        early            asynchronous: the call is answered only when the notice is out
    notices=WHAT     drop or twice: what becomes of the next notice; with times=N of the next N
    delay=SECONDS    how long after its answer each notice leaves
    cold=SECONDS     no instance for so long: invocations wait, `describe_endpoint` says so
    release=1        ends the cold, and sends what is delayed
    reset=1          back to the start

GET /control answers JSON: `invocations`, `waiting`, `running`, `instances`, `notices` sent, `behaviours` still queued.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import urllib3
from botocore.exceptions import ClientError

from local.http_server import Handler, LoopbackServer
from local.inference import HEADER, STATUSES, TIMED_OUT, Answer, Invocation, ModelError, ask, timestamp
from local.template import ACCOUNT, REGION, AsyncSpec, EndpointSpec

MAX_BODY = 25 * 2**20
SYNC_BEHAVIOURS = (*STATUSES, "timeout", "refused", "cut")
BEHAVIOURS = (*SYNC_BEHAVIOURS, "expired", "lost", "early")
NOTICES = ("drop", "twice")
_S3_OBJECT = re.compile("s3://[^/]+/.+")
_log = logging.getLogger(__name__)


class Refused(Exception):
    """The call is not accepted: SageMaker's own error."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        self.status = status
        self.kind = kind
        super().__init__(message)


class SageMaker:
    """One endpoint. `invocations` are all that were accepted, oldest first; `client` makes boto3 clients."""

    def __init__(self, endpoint: EndpointSpec, container: str, client: Callable[[str], Any], port: int = 0) -> None:
        self.endpoint = endpoint
        self.port = port
        self._container = urllib3.connectionpool.connection_from_url(container, maxsize=64, retries=False)
        self._client = client
        self.waiting = 0
        self.running = 0
        self._changed = threading.Condition()
        self._created = time.time()
        self._server: LoopbackServer | None = None
        self._stopping = False
        self._released = threading.Event()
        # As many as the container gets at once: what comes on top of it waits here, as in SageMaker's own queue.
        self._places = ThreadPoolExecutor(endpoint.asynchronous.concurrency if endpoint.asynchronous else 1)
        self.reset()

    def reset(self) -> None:
        """Go back to how it was made, after a `release`."""
        self.release()
        with self._changed:
            self.invocations: list[Invocation] = []
            self.notices = 0
            self.delay = 0.0
            self._behaviours: deque[str] = deque()
            self._notices: deque[str] = deque()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def control_url(self) -> str:
        return f"{self.url}/control"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs so that an unchanged boto3 finds this endpoint."""
        return {"AWS_ENDPOINT_URL_SAGEMAKER": self.url, "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": self.url}

    @property
    def instances(self) -> int:
        return int(time.monotonic() >= self._warm_at)

    def __enter__(self) -> SageMaker:
        self._server = LoopbackServer(type("SageMakerHandler", (_Handler,), {"owner": self}), self.port)
        self.port = int(self._server.server_address[1])
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self.release()
        self._places.shutdown(wait=True, cancel_futures=True)
        if self._server is not None:
            self._server.stop()
        self._container.close()

    # ------------------------------------------------------------------------------------------------ what tests say

    def behave(self, behaviour: str, times: int = 1) -> None:
        """Queue what the next `times` invocations get."""
        with self._changed:
            self._behaviours.extend([self._checked(behaviour)] * times)

    def _checked(self, behaviour: str) -> str:
        known = BEHAVIOURS if self.endpoint.asynchronous else SYNC_BEHAVIOURS
        if behaviour not in known:
            raise ValueError(f"next must be one of {', '.join(known)}")
        return behaviour

    def treat_notices(self, what: str, times: int = 1) -> None:
        """Queue what becomes of the next `times` notices."""
        if what not in NOTICES:
            raise ValueError(f"notices must be one of {', '.join(NOTICES)}")
        with self._changed:
            self._notices.extend([what] * times)

    def chill(self, seconds: float) -> None:
        """Have no instance for so long."""
        with self._changed:
            self._warm_at = time.monotonic() + seconds
            self._changed.notify_all()

    def release(self) -> None:
        """End the cold and every delay."""
        released, self._released = self._released, threading.Event()
        released.set()
        with self._changed:
            self._warm_at = 0.0
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], Any], timeout: float = 5.0) -> bool:
        """Wait until something is so, as invocations and notices come and go; False when it is not."""
        with self._changed:
            return bool(self._changed.wait_for(condition, timeout))

    def summary(self) -> dict[str, Any]:
        """Return the counts."""
        with self._changed:
            return {
                "invocations": len(self.invocations),
                "waiting": self.waiting,
                "running": self.running,
                "instances": self.instances,
                "notices": self.notices,
                "behaviours": [*self._behaviours],
            }

    def control(self, query: str) -> None:
        """Do what a control query says, all of it or, when any of it is wrong, nothing."""
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
        given = dict(pairs)
        known = ("next", "notices", "times", "delay", "cold", "release", "reset")
        if len(given) < len(pairs) or not given.keys() <= set(known):
            raise ValueError(f"each name may be given once; they are {', '.join(known)}")
        delay, cold = (float(given.get(name, "0")) for name in ("delay", "cold"))
        times = int(given.get("times", "1"))
        if not (0 <= delay <= 3600 and 0 <= cold <= 3600 and 1 <= times <= 1000):
            raise ValueError("delay and cold must be from 0 to 3600, times from 1 to 1000")
        if {given.get("reset", "1"), given.get("release", "1")} != {"1"}:
            raise ValueError("reset and release must be 1")
        if "notices" in given and given["notices"] not in NOTICES:
            raise ValueError(f"notices must be one of {', '.join(NOTICES)}")
        if "next" in given:
            self._checked(given["next"])
        if "reset" in given:
            self.reset()
        if "release" in given:
            self.release()
        if "next" in given:
            self.behave(given["next"], times)
        if "notices" in given:
            self.treat_notices(given["notices"], times)
        if "delay" in given:
            self.delay = delay
        if "cold" in given:
            self.chill(cold)

    # ------------------------------------------------------------------------------------------------ invocations

    def accept(self, invocation: Invocation) -> None:
        """Take note of an invocation, and give it what was queued for it.

        Raises `Refused`.
        """
        with self._changed:
            invocation.behaviour = self._behaviours.popleft() if self._behaviours else None
            if invocation.behaviour == "refused":
                raise Refused(503, "ServiceUnavailable", "The service is unavailable. Try your call again.")
            self.invocations.append(invocation)
            self._changed.notify_all()

    def invoke(self, invocation: Invocation, body: bytes) -> Answer:
        """Have the container answer now.

        Raises `ModelError`.
        """
        with self._turn(invocation):
            return ask(self._container, invocation, body)

    def enqueue(self, invocation: Invocation) -> tuple[str, str]:
        """Have the container answer later; return where the answer, or the model's error, will lie."""
        self._places.submit(self._run, invocation)
        return self._locations(invocation)

    def _locations(self, invocation: Invocation) -> tuple[str, str]:
        asynchronous = self._asynchronous
        outputs, failures = asynchronous.outputs.rstrip("/"), asynchronous.failures.rstrip("/")
        return f"{outputs}/{invocation.id}.out", f"{failures}/{invocation.id}-error.out"

    @property
    def _asynchronous(self) -> AsyncSpec:
        if self.endpoint.asynchronous is None:
            raise Refused(400, "ValidationError", "Endpoint does not support this inference type.")
        return self.endpoint.asynchronous

    def _run(self, invocation: Invocation) -> None:
        try:
            if invocation.behaviour != "lost":
                self._publish(invocation, self._outcome(invocation))
        except Exception:  # noqa: BLE001 (nobody reads the future of a thread in a pool)
            if not self._stopping:
                _log.exception("an answer could not be delivered")
        finally:
            invocation.done.set()

    def _outcome(self, invocation: Invocation) -> dict[str, Any]:
        """Return what the notice says of it."""
        output, failure = self._locations(invocation)
        try:
            with self._turn(invocation):
                answer = ask(self._container, invocation, self._read(invocation.input))
        except ModelError as error:
            if error.status:
                self._write(failure, error.message.encode(), error.content_type)
            return {"invocationStatus": "Failed", "failureReason": str(error)}
        self._write(output, answer.body, answer.content_type)
        described = {"contentType": answer.content_type, "outputLocation": output}
        return {"invocationStatus": "Completed", "responseParameters": described}

    @contextlib.contextmanager
    def _turn(self, invocation: Invocation) -> Iterator[None]:
        """Wait for an instance.

        Raises `ModelError` when the request is too old by then.
        """
        with self._changed:
            self.waiting += 1
            self._changed.notify_all()
            try:
                while not self._stopping and not self.instances and time.monotonic() < invocation.expires:
                    self._changed.wait(min(self._warm_at, invocation.expires) - time.monotonic())
            finally:
                self.waiting -= 1
            if self._stopping or time.monotonic() >= invocation.expires or invocation.behaviour == "expired":
                raise ModelError(0, "The request expired in the queue." if invocation.input else TIMED_OUT)
            self.running += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.running -= 1
                self._changed.notify_all()

    def _read(self, location: str) -> bytes:
        bucket, key = _s3_object(location)
        try:
            body: bytes = self._client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
        except ClientError as error:
            raise ModelError(0, f"{location} could not be read: {error.response['Error']['Code']}") from None
        return body

    def _write(self, location: str, body: bytes, content_type: str) -> None:
        bucket, key = _s3_object(location)
        self._client("s3").put_object(Bucket=bucket, Key=key, Body=body, ContentType=content_type)

    def _publish(self, invocation: Invocation, outcome: dict[str, Any]) -> None:
        released = self._released
        if self.delay:
            released.wait(self.delay)
        with self._changed:
            treatment = self._notices.popleft() if self._notices else None
        succeeded = outcome["invocationStatus"] == "Completed"
        topic = self._asynchronous.success_topic if succeeded else self._asynchronous.error_topic
        notice = {
            "awsRegion": REGION,
            "eventTime": timestamp(),
            "receivedTime": invocation.received_at,
            **outcome,
            "requestParameters": {
                "contentType": invocation.content_type,
                "endpointName": self.endpoint.name,
                "inputLocation": invocation.input,
            },
            "inferenceId": invocation.inference_id,
            "eventVersion": "1.0",
            "eventSource": "aws:sagemaker",
            "eventName": "InferenceResult",
        }
        for _ in range({"drop": 0, "twice": 2}.get(treatment or "", 1) if topic else 0):
            self._client("sns").publish(TopicArn=topic, Message=json.dumps(notice))
            with self._changed:
                self.notices += 1
                self._changed.notify_all()

    def describe(self, name: Any) -> dict[str, Any]:
        """Return what `describe_endpoint` tells.

        Raises `Refused`.
        """
        arn = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:endpoint/{name}"
        if name != self.endpoint.name:
            raise Refused(400, "ValidationException", f'Could not find endpoint "{arn}".')
        with self._changed:
            wanted = int(self.instances or self.waiting > 0)
        variant = {
            "VariantName": self.endpoint.variant,
            "CurrentWeight": 1.0,
            "DesiredWeight": 1.0,
            "CurrentInstanceCount": self.instances,
            "DesiredInstanceCount": wanted,
        }
        return {
            "EndpointName": name,
            "EndpointArn": arn,
            "EndpointConfigName": name,
            "EndpointStatus": "InService",
            "ProductionVariants": [variant],
            "CreationTime": self._created,
            "LastModifiedTime": self._created,
        }


class _Handler(Handler):
    owner: SageMaker

    def do_GET(self) -> None:
        if self.path == "/control":
            self._json(200, self.owner.summary())
        else:
            self._json(404, {"Message": "not found"})

    def do_POST(self) -> None:
        body = self.read_body(MAX_BODY)
        if body is None:
            self.reply_and_drop_body(413, [("Content-Type", "text/plain")], b"Request Entity Too Large")
            return
        parts = urlsplit(self.path)
        try:
            match [unquote(part) for part in parts.path.split("/")[1:]]:
                case ["control"]:
                    self._control(parts.query)
                case ["endpoints", name, ("invocations" | "async-invocations") as kind]:
                    self._invoke(name, body, asynchronous=kind.startswith("async"))
                case [""] if self.headers.get("X-Amz-Target") == "SageMaker.DescribeEndpoint":
                    self._json(200, self.owner.describe(json.loads(body).get("EndpointName")))
                case _:
                    raise Refused(400, "UnknownOperationException", "The local machine does not play this.")
        except Refused as refused:
            # The two services name the error in different places.
            said = {"__type": refused.kind, "Message": str(refused)}
            self._json(refused.status, said, [("x-amzn-ErrorType", refused.kind)])
        except ModelError as error:
            self._json(424, _described(error, self.owner.endpoint), [("x-amzn-ErrorType", "ModelError")])

    def _control(self, query: str) -> None:
        try:
            self.owner.control(query)
        except ValueError as error:
            self._json(400, {"error": str(error)})
        else:
            self._json(200, self.owner.summary())

    def _invoke(self, name: str, body: bytes, *, asynchronous: bool) -> None:
        owner = self.owner
        if name != owner.endpoint.name:
            raise Refused(400, "ValidationError", f"Endpoint {name} of account {ACCOUNT} not found.")
        if asynchronous != bool(owner.endpoint.asynchronous):
            raise Refused(400, "ValidationError", "Endpoint does not support this inference type.")
        invocation = _asynchronous(self.headers) if asynchronous else _synchronous(self.headers)
        owner.accept(invocation)
        if asynchronous:
            output, failure = owner.enqueue(invocation)
            headers = [(f"{HEADER}OutputLocation", output), (f"{HEADER}FailureLocation", failure)]
            status, answer = 202, json.dumps({"InferenceId": invocation.inference_id}).encode()
            headers.append(("Content-Type", "application/json"))
            if invocation.behaviour == "early":
                invocation.done.wait()
        else:
            given = owner.invoke(invocation, body)
            # Of the container's headers these alone reach the caller.
            headers = [
                ("Content-Type", given.content_type),
                ("x-Amzn-Invoked-Production-Variant", owner.endpoint.variant),
            ]
            if given.attributes is not None:
                headers.append((f"{HEADER}Custom-Attributes", given.attributes))
            status, answer = 200, given.body
        if invocation.behaviour == "cut":
            self.close_connection = True
        else:
            self.reply(status, headers, answer)

    def _json(self, status: int, value: Any, headers: Iterable[tuple[str, str]] = ()) -> None:
        self.reply(status, [("Content-Type", "application/json"), *headers], json.dumps(value).encode())


def _synchronous(headers: Message) -> Invocation:
    return Invocation(
        inference_id=_inference_id(headers),
        content_type=headers.get("Content-Type", ""),
        accept=headers.get("Accept", ""),
        attributes=headers.get(f"{HEADER}Custom-Attributes", ""),
    )


def _asynchronous(headers: Message) -> Invocation:
    location = _at_most(1024, "inputLocation", headers.get(f"{HEADER}InputLocation", ""))
    if not _S3_OBJECT.fullmatch(location):
        raise _unacceptable("inputLocation", location, f"satisfy regular expression pattern: {_S3_OBJECT.pattern}")
    return Invocation(
        inference_id=_inference_id(headers),
        content_type=headers.get(f"{HEADER}Content-Type", ""),
        accept=headers.get(f"{HEADER}Accept", ""),
        attributes=headers.get(f"{HEADER}Custom-Attributes", ""),
        input=location,
        ttl=_between(60, 21_600, "requestTTLSeconds", headers.get(f"{HEADER}RequestTTLSeconds", "21600")),
        timeout=_between(1, 3600, "invocationTimeoutSeconds", headers.get(f"{HEADER}InvocationTimeoutSeconds", "900")),
    )


def _inference_id(headers: Message) -> str:
    return _at_most(64, "inferenceId", headers.get(f"{HEADER}Inference-Id", "")) or str(uuid.uuid4())


def _at_most(length: int, name: str, value: str) -> str:
    if len(value) > length:
        raise _unacceptable(name, value, f"have length less than or equal to {length}")
    return value


def _between(low: int, high: int, name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < low:
        raise _unacceptable(name, value, f"have value greater than or equal to {low}")
    if int(value) > high:
        raise _unacceptable(name, value, f"have value less than or equal to {high}")
    return int(value)


def _unacceptable(name: str, value: str, must: str) -> Refused:
    text = f"1 validation error detected: Value '{value}' at '{name}' failed to satisfy constraint: Member must {must}"
    return Refused(400, "ValidationError", text)


def _described(error: ModelError, endpoint: EndpointSpec) -> dict[str, Any]:
    group = f"/aws/sagemaker/Endpoints/{endpoint.name}"
    return {
        "Message": f"{error} See the log group {group} in account {ACCOUNT} for more information.",
        "OriginalMessage": error.message,
        "OriginalStatusCode": error.status,
        "LogStreamArn": f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:{group}",
    }


def _s3_object(location: str) -> tuple[str, str]:
    bucket, _, key = location.removeprefix("s3://").partition("/")
    return bucket, key
