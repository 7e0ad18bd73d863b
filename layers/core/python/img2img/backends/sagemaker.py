"""A SageMaker endpoint that hosts the diffusers pipeline, called in real time or asynchronously.

An asynchronous call leaves its request in S3, as `requests/<name>.json`, and is told where the answer will lie. When it
is there SageMaker says so, through a topic and a queue; but what counts is what lies in S3, for a notice may be lost.
The endpoint bills nothing by the call, so whatever broke may be asked for again.
"""

from __future__ import annotations

import base64
import json
import math
import re
import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, ClientError, ReadTimeoutError

from img2img.aws import AwsError, error_code
from img2img.backends import ENDPOINT_FIELDS, GeneratedImage, Notice, Pending, Wait, request_body
from img2img.errors import (
    BackendBroken,
    BackendFailed,
    BackendGatewayTimeout,
    BackendRateLimited,
    BackendRefused,
    BackendUnreachable,
    JobError,
)
from img2img.params import Img2ImgParams

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_sagemaker import SageMakerClient
    from mypy_boto3_sagemaker_runtime import SageMakerRuntimeClient

NAME = "sagemaker"
REQUESTS = "requests/"
MAX_ANSWER = 30_000_000
# SageMaker's bounds of RequestTTLSeconds.
_SHORTEST_TTL, _LONGEST_TTL = 60, 21_600
# How long what is known of the endpoint's instances counts as fresh.
_STATE_SECONDS = 30.0
_BUSY_SECONDS = 10.0
# Of the container's codes, what is not its own fault.
_STATUSES = {"invalid_request": 400, "too_large": 413, "unsupported_media_type": 415, "busy": 503}


def read_notice(body: str) -> Notice:
    """Read a message of the answers queue: SageMaker's notice inside SNS's envelope.

    Raises `ValueError`, `KeyError`, `TypeError` or `AttributeError` for anything else. Source:
    https://docs.aws.amazon.com/sagemaker/latest/dg/async-inference-check-predictions.html
    """
    said = json.loads(json.loads(body)["Message"])
    key = _key_of(said["requestParameters"]["inputLocation"])
    found = re.fullmatch(rf"{REQUESTS}(.+/\d+)\.json", key)
    if not found:
        raise ValueError("the notice is of no request of ours")
    output = None
    if said["invocationStatus"] == "Completed":
        output = str(said["responseParameters"]["outputLocation"])
    return Notice(
        backend=NAME,
        name=found[1],
        call=str(said["inferenceId"]),
        output=output,
        failure_reason=str(said.get("failureReason", "")),
    )


class SageMakerBackend:
    """Generates through one endpoint. Safe to share between threads. `clock` tells epoch seconds.

    `bucket` is where requests and answers lie; `timeout` is how long the endpoint may work on one asynchronous call.
    """

    def __init__(
        self,
        *,
        runtime: SageMakerRuntimeClient,
        control: SageMakerClient,
        s3: S3Client,
        endpoint: str,
        bucket: str,
        asynchronous: bool,
        timeout: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._runtime = runtime
        self._control = control
        self._s3 = s3
        self._endpoint = endpoint
        self._bucket = bucket
        self._asynchronous = asynchronous
        self._timeout = timeout
        self._clock = clock
        self._is_cold: tuple[float, bool] = (-math.inf, False)

    def generate(
        self, image: bytes, params: Img2ImgParams, seed: int, *, name: str, until: float
    ) -> GeneratedImage | Pending:
        """Return the picture or, of an asynchronous endpoint, where it will be.

        Raises `BackendRefused`, `BackendBroken`, and what may be asked for again:
        `BackendRateLimited` (with `retry_after`), `BackendFailed`, `BackendUnreachable`, `BackendGatewayTimeout`.
        """
        body = json.dumps(request_body(image, params, seed, ENDPOINT_FIELDS, as_json=True)).encode()
        # At most 64 characters: without the team, whose name may take half of them.
        inference_id = name.partition("/")[2].replace("/", "-")
        try:
            if self._asynchronous:
                return self._send(body, name, inference_id, until)
            return self._ask(body, inference_id)
        except AwsError as error:
            raise _trouble(error) from None

    def _ask(self, body: bytes, inference_id: str) -> GeneratedImage:
        started = time.monotonic()
        answer = self._runtime.invoke_endpoint(
            EndpointName=self._endpoint,
            Body=body,
            ContentType="application/json",
            Accept="application/json",
            InferenceId=inference_id,
        )
        data = _whole(answer["Body"])
        return _picture(data, time.monotonic() - started)

    def _send(self, body: bytes, name: str, inference_id: str, until: float) -> Pending:
        key = f"{REQUESTS}{name}.json"
        self._s3.put_object(Bucket=self._bucket, Key=key, Body=body, ContentType="application/json")
        left = math.ceil(until - self._clock())
        answer = self._runtime.invoke_endpoint_async(
            EndpointName=self._endpoint,
            InputLocation=f"s3://{self._bucket}/{key}",
            ContentType="application/json",
            Accept="application/json",
            InferenceId=inference_id,
            RequestTTLSeconds=min(max(left, _SHORTEST_TTL), _LONGEST_TTL),
            InvocationTimeoutSeconds=self._timeout,
        )
        notes = {
            "inference_id": inference_id,
            "endpoint": self._endpoint,
            "output": answer["OutputLocation"],
            "failure": answer.get("FailureLocation", ""),
        }
        return Pending(backend=NAME, notes=notes)

    def answer(self, pending: Pending | None, notice: Notice | None) -> GeneratedImage | None:
        """Return the picture of an asynchronous call, None while there is none.

        Raises the `JobError` of a call that failed, and botocore's `ClientError` and `BotoCoreError`.
        """
        notes = pending.notes if pending else {}
        output = notes.get("output", "")
        if notice and notice.output:
            output = notice.output
        elif notice and pending and notice.call == notes.get("inference_id"):
            raise failure(notice.failure_reason)
        if not output:
            return None
        data = self._read(output)
        if data is not None:
            return _picture(data, 0.0)
        if (where := notes.get("failure")) and (reason := self._read(where)) is not None:
            raise failure(reason.decode("utf-8", "replace"))
        if notes.get("endpoint") != self._endpoint:
            # With another instance type or kind of invocation it is another one, and takes over no requests.
            raise BackendUnreachable("The SageMaker endpoint that had the request was replaced")
        return None

    def _read(self, location: str) -> bytes | None:
        bucket = urlsplit(location).netloc
        if bucket != self._bucket:
            raise BackendBroken("SageMaker answered in a bucket that is not ours")
        try:
            answer = self._s3.get_object(Bucket=bucket, Key=_key_of(location))
        except ClientError as error:
            if error_code(error) not in ("NoSuchKey", "404"):
                raise
            return None
        return _whole(answer["Body"])

    def look_after(self, pending: Pending) -> None:  # noqa: ARG002 (there is a notice of each)
        """Return None: SageMaker says when it is done."""
        return

    def waits_for(self, *, answering: bool) -> Wait:
        """Return what a pending sample waits for: an endpoint that answers runs, and is not asked about."""
        return Wait.ENDPOINT_STARTING if not answering and self.is_cold() else Wait.ENDPOINT_BUSY

    def is_cold(self) -> bool:
        """Whether no instance of the endpoint runs, so that an answer takes minutes. False when that is not known."""
        asked, cold = self._is_cold
        if self._clock() - asked >= _STATE_SECONDS:
            try:
                found = self._control.describe_endpoint(EndpointName=self._endpoint)
            except AwsError:
                return False
            cold = not any(variant.get("CurrentInstanceCount") for variant in found.get("ProductionVariants", []))
            self._is_cold = (self._clock(), cold)
        return cold


def failure(reason: str) -> JobError:
    """Return the error that a failed call stands for, by the status that a notice names or the container's own code.

    The text itself is not passed on: the model's own error may quote the request.
    """
    # The object in S3 holds what the container said, without its status.
    if found := re.match(r'\s*\{"code":\s*"(\w+)"', reason):
        return _of_status(_STATUSES.get(found[1], 500))
    found = re.search(r"error \((\d{3})\)", reason)
    return _of_status(int(found[1]) if found else 500)


def _of_status(status: int) -> JobError:
    detail = f"The SageMaker endpoint answered {status}"
    match status:
        case 429 | 503:
            return BackendRateLimited(detail, retry_after=_BUSY_SECONDS)
        case 408 | 504:
            return BackendGatewayTimeout(detail)
        case _ if 400 <= status < 500:
            return BackendRefused(detail)
        case _:
            return BackendFailed(detail)


def _trouble(error: BotoCoreError | ClientError) -> JobError:
    """Return what it means for a sample that SageMaker, or S3 for its request, gave an error."""
    if isinstance(error, ReadTimeoutError):
        return BackendGatewayTimeout("The SageMaker endpoint did not answer in time")
    if not isinstance(error, ClientError):
        return BackendUnreachable(f"SageMaker could not be reached ({type(error).__name__})")
    code = error_code(error)
    if code == "ModelError":
        return _of_status(int(str(error.response.get("OriginalStatusCode", 500))))
    # S3 where it is the request that could not be left there.
    detail = f"AWS answered {code}"
    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
    # While a stack is updated its endpoint may not be there, or the right to call it not have spread yet.
    if code in ("AccessDenied", "AccessDeniedException"):
        return BackendUnreachable(detail)
    if code == "ValidationError" and "not found" in error.response["Error"].get("Message", ""):
        return BackendUnreachable("There is no such SageMaker endpoint")
    if status == 429 or "Throttl" in code or code in ("ModelNotReadyException", "SlowDown"):
        return BackendRateLimited(detail, retry_after=_BUSY_SECONDS)
    return BackendFailed(detail) if status >= 500 else BackendRefused(detail)


def _whole(body: StreamingBody) -> bytes:
    """Read an answer, or so much of it as shows that it is too large. Raises `IncompleteReadError`."""
    # As a context manager of its own it would hand out urllib3's response, with urllib3's errors.
    with closing(body):
        data = body.read(MAX_ANSWER + 1)
        if len(data) <= MAX_ANSWER:
            # Only at its end does botocore see that a body broke off.
            body.read()
        return data


def _key_of(location: str) -> str:
    parts = urlsplit(str(location))
    if parts.scheme != "s3":
        raise ValueError("must be an S3 URI")
    return parts.path.removeprefix("/")


def _picture(body: bytes, seconds: float) -> GeneratedImage:
    """Read the endpoint's answer, JSON with the picture in it or with word of why there is none."""
    if len(body) > MAX_ANSWER:
        raise BackendBroken(f"The SageMaker endpoint's answer is larger than {MAX_ANSWER} bytes")
    try:
        fields: Any = json.loads(body)
        run_ms = float(fields["metrics"]["run_ms"]) if "metrics" in fields else seconds * 1000
        flagged = bool(fields.get("nsfw"))
        data = b"" if flagged else base64.b64decode(fields["image"], validate=True)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise BackendBroken("The SageMaker endpoint's answer holds no image") from None
    if not ((data or flagged) and math.isfinite(run_ms)):
        raise BackendBroken("The SageMaker endpoint's answer holds no image")
    return GeneratedImage(data, run_ms / 1000, flagged=flagged, backend=NAME)
