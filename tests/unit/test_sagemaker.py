"""The SageMaker client over real sockets: what it asks for, and what each answer, error and notice means."""

from __future__ import annotations

import base64
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, EndpointConnectionError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from img2img import errors
from img2img.backends import ENDPOINT_FIELDS, GeneratedImage, Pending, request_body
from img2img.backends.sagemaker import MAX_ANSWER, SageMakerBackend, failure, read_notice
from img2img.backends.segmind import SegmindBackend
from img2img.errors import JobError
from img2img.params import Img2ImgParams
from local.sagemaker import SageMaker
from local.segmind import SegmindStandIn
from local.template import AsyncSpec, EndpointSpec
from tests.container import FakeContainer, painted
from tests.long import examples
from tests.system import fresh_aws

BUCKET = "uploads"
ENDPOINT = "an-endpoint"
PROMPT = "a lighthouse in heavy rain, oil painting"
PARAMS = Img2ImgParams(prompt=PROMPT, negative_prompt="blurred", seed=7, img_width=512, img_height=768, strength=0.6)
NAME = "default/01ARZ3NDEKTSV4RRFFQ69G5FAV/1/0"
ID = "01ARZ3NDEKTSV4RRFFQ69G5FAV-1-0"
NOW = 1_790_000_000.0
TIMEOUT = 600


def png(size: tuple[int, int] = (512, 768)) -> bytes:
    buffer = BytesIO()
    Image.linear_gradient("L").convert("RGB").resize(size).save(buffer, "PNG")
    return buffer.getvalue()


IMAGE = png()


@pytest.fixture(scope="module", autouse=True)
def _aws() -> None:
    fresh_aws()


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[FakeContainer, SageMaker, SageMaker]]:
    topics = (f"arn:aws:sns:eu-west-1:123456789012:{name}" for name in ("succeeded", "failed"))
    spec = AsyncSpec(4, f"s3://{BUCKET}/answers/", f"s3://{BUCKET}/failures/", *topics)
    with (
        FakeContainer() as container,
        SageMaker(EndpointSpec(ENDPOINT, "main", spec), container.url, boto3.client) as asynchronous,
        SageMaker(EndpointSpec(ENDPOINT, "main"), container.url, boto3.client) as realtime,
    ):
        yield container, asynchronous, realtime
        container.release()


@pytest.fixture
def container(running) -> FakeContainer:
    container, *fronts = running
    container.reset()
    for front in fronts:
        front.reset()
    return container


@pytest.fixture
def front(container, running) -> SageMaker:
    return running[1]


@pytest.fixture
def realtime(container, running) -> SageMaker:
    return running[2]


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def backend_at(url: str, *, asynchronous: bool = False, read_timeout: float = 20, **others: Any) -> SageMakerBackend:
    config = Config(connect_timeout=2, read_timeout=read_timeout, retries={"total_max_attempts": 1})
    parts = {
        "runtime": boto3.client("sagemaker-runtime", endpoint_url=url, config=config),
        "control": boto3.client("sagemaker", endpoint_url=url, config=config),
        "s3": boto3.client("s3"),
        "endpoint": ENDPOINT,
        "bucket": BUCKET,
        "asynchronous": asynchronous,
        "timeout": TIMEOUT,
        "clock": Clock(),
    }
    return SageMakerBackend(**{**parts, **others})


def ask(backend: SageMakerBackend, *, name: str = NAME, until: float = NOW + 1800, **fields: Any) -> Any:
    return backend.generate(IMAGE, PARAMS, 7, name=name, until=until, **fields)


@pytest.fixture
def asks(front) -> SageMakerBackend:
    """A backend that asks the endpoint asynchronously."""
    return backend_at(front.url, asynchronous=True)


@pytest.fixture
def calls(realtime) -> SageMakerBackend:
    """A backend that calls the endpoint in real time."""
    return backend_at(realtime.url)


def failed(what: Callable[[], Any]) -> JobError:
    with pytest.raises(JobError) as raised:
        what()
    assert raised.value.__cause__ is None
    return raised.value


def put(key: str, body: bytes) -> str:
    boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=body)
    return f"s3://{BUCKET}/{key}"


def get(key: str) -> Any:
    return boto3.client("s3").get_object(Bucket=BUCKET, Key=key)


def pending(output: str = f"s3://{BUCKET}/answers/none", failed_at: str = f"s3://{BUCKET}/failures/none") -> Pending:
    notes = {"inference_id": ID, "endpoint": ENDPOINT, "output": output, "failure": failed_at}
    return Pending(backend="sagemaker", notes=notes)


# What is asked for


def test_a_call_in_real_time_is_segminds_request(calls, container):
    found = ask(calls)
    assert found == GeneratedImage(painted((512, 768), 7), 0.02, backend="sagemaker")
    assert found.remaining_credits is None
    [headers] = container.headers
    assert (headers["content-type"], headers["accept"]) == ("application/json", "application/json")
    assert headers["x-amzn-sagemaker-inference-id"] == ID


def test_the_fields_are_those_that_segmind_gets(calls, container):
    ask(calls)
    with SegmindStandIn("SG_0123456789abcdef") as segmind:
        SegmindBackend(base_url=segmind.url, key=lambda refresh: segmind.key, timeout=5).generate(IMAGE, PARAMS, 7)
        [there] = segmind.calls
    [here] = container.requests
    assert here == {**{name: value for name, value in there["body"].items() if name != "image"}, "base64": True}
    assert there["body"]["base64"] is False


def test_the_image_is_raw_base64():
    body = request_body(IMAGE, PARAMS, 9, ENDPOINT_FIELDS, as_json=True)
    assert base64.b64decode(body["image"], validate=True) == IMAGE
    assert (body["seed"], body["strength"], body["samples"]) == (9, 0.6, 1)


def test_an_asynchronous_call_leaves_its_request_and_tells_where_the_answer_will_be(asks, front, container):
    found = ask(asks)
    assert (found.notes["inference_id"], found.backend, found.reason) == (ID, "sagemaker", "")
    [invocation] = front.invocations
    assert invocation.input == f"s3://{BUCKET}/requests/{NAME}.json"
    assert (invocation.content_type, invocation.accept) == ("application/json", "application/json")
    assert (invocation.ttl, invocation.timeout) == (1800, TIMEOUT)
    lies = get(f"requests/{NAME}.json")
    assert lies["ContentType"] == "application/json"
    assert json.loads(lies["Body"].read()) == request_body(IMAGE, PARAMS, 7, ENDPOINT_FIELDS, as_json=True)
    assert found.notes["output"] == f"s3://{BUCKET}/answers/{invocation.id}.out"
    assert found.notes["failure"] == f"s3://{BUCKET}/failures/{invocation.id}-error.out"
    assert invocation.done.wait(10)
    assert asks.answer(found, None) == GeneratedImage(painted((512, 768), 7), 0.02, backend="sagemaker")


def test_the_longest_names_fit_into_an_inference_id(asks, front):
    found = ask(asks, name=f"{'t' * 32}/01ARZ3NDEKTSV4RRFFQ69G5FAV/999999/3")
    assert found.notes["inference_id"] == "01ARZ3NDEKTSV4RRFFQ69G5FAV-999999-3"
    assert len(found.notes["inference_id"]) <= 64
    assert len(front.invocations) == 1


@pytest.mark.parametrize(
    ("left", "ttl"), [(-5, 60), (0, 60), (59.5, 60), (60.2, 61), (1800, 1800), (21_600, 21_600), (1e6, 21_600)]
)
def test_a_request_lives_as_long_as_somebody_wants_its_picture_within_what_sagemaker_takes(asks, front, left, ttl):
    ask(asks, until=NOW + left)
    assert front.invocations[0].ttl == ttl


def test_four_threads_share_one_backend(calls, container):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: calls.generate(IMAGE, PARAMS, i, name=f"t/j/1/{i}", until=NOW), range(4)))
    assert [image.data for image in found] == [painted((512, 768), seed) for seed in range(4)]


# Errors of the call itself


STATUSES = {
    400: (errors.BackendRefused, False),
    404: (errors.BackendRefused, False),
    413: (errors.BackendRefused, False),
    415: (errors.BackendRefused, False),
    408: (errors.BackendGatewayTimeout, True),
    429: (errors.BackendRateLimited, True),
    500: (errors.BackendFailed, True),
    502: (errors.BackendFailed, True),
    503: (errors.BackendRateLimited, True),
    504: (errors.BackendGatewayTimeout, True),
}


@pytest.mark.parametrize("status", STATUSES)
def test_the_containers_status_decides(calls, container, status):
    kind, retryable = STATUSES[status]
    container.next.append(status)
    error = failed(lambda: ask(calls))
    assert (type(error), error.retryable) == (kind, retryable)
    assert error.detail == f"The SageMaker endpoint answered {status}"
    assert len(container.requests) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_container_is_asked_again_after_a_while(calls, container, status):
    container.next.append(status)
    assert failed(lambda: ask(calls)).retry_after == 10


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [("timeout", errors.BackendFailed), ("refused", errors.BackendFailed), ("cut", errors.BackendUnreachable)],
)
def test_trouble_on_the_way_may_be_asked_for_again_but_is_not_repeated_here(realtime, calls, behaviour, kind):
    realtime.behave(behaviour)
    error = failed(lambda: ask(calls))
    assert (type(error), error.retryable) == (kind, True)
    assert len(realtime.invocations) == (0 if behaviour == "refused" else 1)
    assert isinstance(ask(calls), GeneratedImage)


def test_an_endpoint_that_does_not_answer_in_time(realtime, container):
    container.next.append("hang")
    error = failed(lambda: ask(backend_at(realtime.url, read_timeout=0.3)))
    assert (type(error), error.retryable) == (errors.BackendGatewayTimeout, True)
    assert error.detail == "The SageMaker endpoint did not answer in time"
    container.wait_for(1)
    container.release()
    assert len(container.requests) == 1


def test_an_endpoint_that_is_not_there(realtime):
    error = failed(lambda: ask(backend_at(realtime.url, endpoint="another")))
    assert (type(error), error.detail) == (errors.BackendUnreachable, "There is no such SageMaker endpoint")


def test_a_service_that_cannot_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    error = failed(lambda: ask(backend_at(f"http://127.0.0.1:{port}")))
    assert (type(error), error.retryable) == (errors.BackendUnreachable, True)
    assert "EndpointConnectionError" in error.detail


AWS_ERRORS = [
    (403, "AccessDeniedException", errors.BackendUnreachable),
    (403, "AccessDenied", errors.BackendUnreachable),
    (400, "UnrecognizedClientException", errors.BackendRefused),
    (400, "ThrottlingException", errors.BackendRateLimited),
    (429, "ModelNotReadyException", errors.BackendRateLimited),
    (429, "TooManyRequests", errors.BackendRateLimited),
    (503, "SlowDown", errors.BackendRateLimited),
    (400, "ValidationError", errors.BackendRefused),
    (413, "RequestEntityTooLarge", errors.BackendRefused),
    (500, "InternalFailure", errors.BackendFailed),
    (503, "ServiceUnavailable", errors.BackendFailed),
    (530, "InternalDependencyException", errors.BackendFailed),
]


@contextmanager
def answered(client: Any, operation: str, status: int, code: str, message: str = "") -> Iterator[list[str]]:
    """Have AWS answer an operation with an error; the list grows with every call."""
    made: list[str] = []
    parsed = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {}, "RequestId": "id"},
    }

    def answer(model: Any, **_: Any) -> tuple[AWSResponse, Any]:
        made.append(model.name)
        return AWSResponse("https://aws.example", status, {}, None), parsed

    event = f"before-call.*.{operation}"
    client.meta.events.register_first(event, answer)
    yield made
    client.meta.events.unregister(event, answer)


@pytest.mark.parametrize("operation", ["InvokeEndpoint", "InvokeEndpointAsync", "PutObject"])
@pytest.mark.parametrize(("status", "code", "kind"), AWS_ERRORS, ids=lambda value: str(value))
def test_what_aws_says_decides(front, realtime, operation, status, code, kind):
    asynchronous = operation != "InvokeEndpoint"
    backend = backend_at(front.url if asynchronous else realtime.url, asynchronous=asynchronous)
    client = backend._s3 if operation == "PutObject" else backend._runtime
    with answered(client, operation, status, code, f"AWS quotes {PROMPT}") as made:
        error = failed(lambda: ask(backend))
    assert type(error) is kind
    assert error.detail == f"AWS answered {code}"
    assert made == [operation]
    assert (error.retry_after == 10) == (kind is errors.BackendRateLimited)


def test_a_request_that_could_not_be_left_in_s3_is_not_called_for(front):
    backend = backend_at(front.url, asynchronous=True)
    with answered(backend._s3, "PutObject", 500, "InternalError"):
        failed(lambda: ask(backend))
    assert front.invocations == []


# Answers


@contextmanager
def answering(body: bytes, length: int | None = None) -> Iterator[str]:
    """Stand in for SageMaker with one answer, of which `length` may promise more."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length or len(body)}\r\n\r\n"

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection = listener.accept()[0]
                with connection, suppress(OSError), connection.makefile("rb") as reader:
                    size = 0
                    while (line := reader.readline()) not in (b"\r\n", b""):
                        if line.lower().startswith(b"content-length:"):
                            size = int(line.split(b":")[1])
                    reader.read(size)
                    connection.sendall(head.encode() + body)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join(10)


PICTURE = base64.b64encode(b"a picture").decode()
NO_IMAGE = [
    b"",
    b"<html>",
    b"\xff\xfe\x00",
    b"[]",
    b"7",
    b"null",
    b'"image"',
    b"{}",
    b'{"image": null}',
    b'{"image": null, "nsfw": false}',
    b'{"image": ""}',
    b'{"image": 7}',
    b'{"image": "no base64!"}',
    '{"image": "ä"}'.encode(),
    f'{{"image": "{PICTURE}", "metrics": null}}'.encode(),
    f'{{"image": "{PICTURE}", "metrics": {{}}}}'.encode(),
    f'{{"image": "{PICTURE}", "metrics": {{"run_ms": "soon"}}}}'.encode(),
    f'{{"image": "{PICTURE}", "metrics": {{"run_ms": NaN}}}}'.encode(),
    f'{{"image": "{PICTURE}", "metrics": {{"run_ms": 1e999}}}}'.encode(),
    f'{{"image": "{PICTURE}", "metrics": {{"run_ms": 1{"0" * 400}}}}}'.encode(),
    b'{"image": null, "nsfw": true, "metrics": {"run_ms": NaN}}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("body", NO_IMAGE, ids=lambda body: body[:40].decode("latin-1"))
def test_an_answer_without_an_image_is_broken(asks, body):
    error = failed(lambda: asks.answer(pending(put("answers/broken", body)), None))
    assert type(error) is errors.BackendBroken
    assert error.detail == "The SageMaker endpoint's answer holds no image"


def test_an_answer_without_an_image_in_real_time_is_broken():
    with answering(b'{"image": null}') as url:
        assert type(failed(lambda: ask(backend_at(url)))) is errors.BackendBroken


def test_an_answer_that_breaks_off_may_be_asked_for_again():
    with answering(b'{"image": "', length=1000) as url:
        error = failed(lambda: ask(backend_at(url)))
    assert (type(error), error.retryable) == (errors.BackendUnreachable, True)


def test_an_answer_that_s3_breaks_off_is_trouble_with_s3():
    with answering(b'{"image": "', length=1000) as url:
        s3 = boto3.client("s3", endpoint_url=url, config=Config(retries={"total_max_attempts": 1}))
        with pytest.raises(BotoCoreError):
            backend_at(url, s3=s3).answer(pending(), None)


@pytest.mark.parametrize("size", [MAX_ANSWER + 1, MAX_ANSWER + 1000])
def test_an_answer_that_is_too_large_is_broken(asks, size):
    error = failed(lambda: asks.answer(pending(put("answers/large", b"7" * size)), None))
    assert (type(error), str(MAX_ANSWER) in error.detail) == (errors.BackendBroken, True)


@pytest.mark.parametrize("place", ["output", "failure"])
def test_an_answer_in_a_bucket_that_is_not_ours_is_not_read(asks, place):
    boto3.client("s3").put_object(Bucket="results", Key="answers/x", Body=json.dumps({"image": PICTURE}))
    foreign = "s3://results/answers/x"
    call = pending(output=foreign) if place == "output" else pending(failed_at=foreign)
    error = failed(lambda: asks.answer(call, None))
    assert (type(error), error.detail) == (errors.BackendBroken, "SageMaker answered in a bucket that is not ours")


def test_no_answer_is_none(asks):
    assert asks.answer(pending(), None) is None
    assert asks.answer(pending(failed_at=""), None) is None


def test_an_answer_without_metrics_is_one(asks):
    found = asks.answer(pending(put("answers/plain", json.dumps({"image": PICTURE}).encode())), None)
    assert found == GeneratedImage(b"a picture", 0.0, backend="sagemaker")


def test_a_flagged_answer_has_no_picture(asks, calls, container):
    said = {"image": None, "nsfw": True, "seed": 7, "metrics": {"queue_ms": 3, "run_ms": 812}}
    found = asks.answer(pending(put("answers/flagged", json.dumps(said).encode())), None)
    assert found == GeneratedImage(b"", 0.812, flagged=True, backend="sagemaker")
    container.next.append("flagged")
    assert ask(calls) == GeneratedImage(b"", 0.02, flagged=True, backend="sagemaker")


def test_a_picture_counts_for_more_than_a_failure(asks):
    answer = put("answers/both", json.dumps({"image": PICTURE}).encode())
    assert asks.answer(pending(answer, put("failures/both", b"(500)")), None).data == b"a picture"


@pytest.mark.parametrize("status", [400, 500, 503])
def test_a_failure_in_s3_means_what_its_notice_means(asks, front, container, status):
    container.next.append(status)
    call = ask(asks)
    assert front.invocations[0].done.wait(10)
    error = failed(lambda: asks.answer(call, None))
    assert (type(error), error.retryable) == STATUSES[status]


def test_trouble_with_s3_is_no_failure_of_the_call(asks):
    with answered(asks._s3, "GetObject", 403, "AccessDenied"), pytest.raises(ClientError):
        asks.answer(pending(), None)

    def fail(**_: Any) -> None:
        raise EndpointConnectionError(endpoint_url="https://aws.example")

    asks._s3.meta.events.register_first("before-call.s3.GetObject", fail)
    with pytest.raises(EndpointConnectionError):
        asks.answer(pending(), None)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
numbers = st.integers() | st.floats() | st.integers(10**300, 10**400)
answers = st.fixed_dictionaries(
    {},
    optional={
        "image": json_values | st.binary(max_size=30).map(lambda data: base64.b64encode(data).decode()),
        "nsfw": json_values,
        "metrics": json_values | st.fixed_dictionaries({"run_ms": json_values | numbers}),
    },
)


class Bucket:
    """S3 with one object in it."""

    def __init__(self, body: bytes) -> None:
        self.body = body

    def get_object(self, **_: Any) -> dict[str, Any]:
        return {"Body": BytesIO(self.body)}


def holding(body: bytes) -> SageMakerBackend:
    parts: dict[str, Any] = {"runtime": None, "control": None, "s3": Bucket(body)}
    return SageMakerBackend(**parts, endpoint=ENDPOINT, bucket=BUCKET, asynchronous=True, timeout=TIMEOUT)


@given(st.binary(max_size=60) | (json_values | answers).map(lambda value: json.dumps(value).encode()))
@settings(max_examples=examples(400), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_answer_is_a_picture_or_broken(body):
    try:
        found = holding(body).answer(pending(), None)
    except errors.BackendBroken:
        return
    assert bool(found.data) != found.flagged
    assert math.isfinite(found.seconds)


# Failures


@pytest.mark.parametrize("status", STATUSES)
def test_a_failures_text_names_the_containers_status(status):
    error = failure(f'Received server error ({status}) from primary with message "{{"code": "x"}}". See the log group')
    assert (type(error), error.retryable) == STATUSES[status]
    assert error.detail == f"The SageMaker endpoint answered {status}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The request expired in the queue.",
        'Received server error (0) from primary with message "Your invocation timed out".',
        "s3://uploads/requests/a could not be read: NoSuchKey",
        "(12345)",
    ],
)
def test_a_failure_without_a_status_may_be_asked_for_again(text):
    error = failure(text)
    assert (type(error), error.retryable) == (errors.BackendFailed, True)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_request", errors.BackendRefused),
        ("too_large", errors.BackendRefused),
        ("busy", errors.BackendRateLimited),
        ("internal_error", errors.BackendFailed),
    ],
)
def test_the_containers_own_words_count_by_their_code(code, kind):
    assert type(failure(json.dumps({"code": code, "detail": "an error (404) and error (503)", "errors": []}))) is kind


def test_a_failures_text_is_not_passed_on():
    text = f'Received client error (400) from primary with message "{PROMPT} (503)". See the log group'
    error = failure(text)
    assert type(error) is errors.BackendRefused
    assert PROMPT not in f"{error!r} {error.detail}"


@given(st.text(max_size=100))
def test_any_text_is_a_failure(text):
    assert isinstance(failure(text), JobError)


# Notices


def notice(**changes: Any) -> str:
    said = {
        "awsRegion": "eu-west-1",
        "eventTime": "2026-05-01T10:00:00.000Z",
        "receivedTime": "2026-05-01T10:00:00.000Z",
        "invocationStatus": "Completed",
        "requestParameters": {
            "contentType": "application/json",
            "endpointName": ENDPOINT,
            "inputLocation": f"s3://{BUCKET}/requests/{NAME}.json",
        },
        "responseParameters": {
            "contentType": "application/json",
            "outputLocation": f"s3://{BUCKET}/answers/a.out",
        },
        "inferenceId": ID,
        "eventVersion": "1.0",
        "eventSource": "aws:sagemaker",
        "eventName": "InferenceResult",
        **changes,
    }
    message = json.dumps({name: value for name, value in said.items() if value is not None})
    return json.dumps({"Type": "Notification", "MessageId": "m", "TopicArn": "arn", "Message": message})


def test_a_notice_of_success():
    found = read_notice(notice())
    assert (found.name, found.index, found.call) == (NAME, 0, ID)
    assert (found.output, found.failure_reason) == (f"s3://{BUCKET}/answers/a.out", "")


@pytest.mark.parametrize("parameters", [None, {"outputLocation": "s3://uploads/failures/a-error.out"}])
def test_a_notice_of_failure(parameters):
    reason = "The request expired in the queue."
    found = read_notice(notice(invocationStatus="Failed", failureReason=reason, responseParameters=parameters))
    assert (found.name, found.output, found.failure_reason) == (NAME, None, reason)


def test_the_fronts_own_notices_are_read(asks, front, container):
    sqs = boto3.client("sqs")
    url = sqs.get_queue_url(QueueName="results")["QueueUrl"]
    sqs.purge_queue(QueueUrl=url)
    container.next.append(400)
    for index in range(2):
        ask(asks, name=f"default/JOB/1/{index}")
        assert front.invocations[index].done.wait(10)
    bodies = [message["Body"] for message in sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10)["Messages"]]
    refused, done = sorted(map(read_notice, bodies), key=lambda found: found.index)
    assert (refused.name, refused.call, refused.output) == ("default/JOB/1/0", "JOB-1-0", None)
    assert type(failure(refused.failure_reason)) is errors.BackendRefused
    assert (done.name, done.failure_reason) == ("default/JOB/1/1", "")
    assert asks.answer(pending(done.output), None).data == painted((512, 768), 7)


PROMISED = (ValueError, KeyError, TypeError, AttributeError)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "no JSON",
        "[]",
        "7",
        "{}",
        '{"Message": 7}',
        '{"Message": "7"}',
        '{"Message": "{}"}',
        notice(requestParameters=None),
        notice(requestParameters="x"),
        notice(requestParameters={"inputLocation": 7}),
        notice(requestParameters={"inputLocation": "https://uploads/requests/a/b/1/0.json"}),
        notice(requestParameters={"inputLocation": "s3://uploads/uploads/a/b/1/0.json"}),
        notice(requestParameters={"inputLocation": "s3://uploads/requests/a/b/1/x.json"}),
        notice(requestParameters={"inputLocation": "s3://uploads/requests/a/b/1/0.png"}),
        notice(requestParameters={"inputLocation": "s3://[/requests/a/b/1/0.json"}),
        notice(invocationStatus=None),
        notice(inferenceId=None),
        notice(responseParameters=None),
        notice(responseParameters={}),
    ],
)
def test_what_is_no_notice_of_ours_is_refused(body):
    with pytest.raises(PROMISED):
        read_notice(body)


parts = st.fixed_dictionaries(
    {},
    optional={
        "invocationStatus": st.sampled_from(["Completed", "Failed"]) | json_values,
        "inferenceId": json_values,
        "failureReason": json_values,
        "requestParameters": json_values
        | st.fixed_dictionaries(
            {"inputLocation": json_values | st.text(max_size=20).map(lambda text: f"s3://b/requests/{text}/0.json")}
        ),
        "responseParameters": json_values | st.fixed_dictionaries({"outputLocation": json_values}),
    },
)
envelopes = st.fixed_dictionaries({"Message": json_values | (json_values | parts).map(json.dumps)}) | json_values


@given(st.text(max_size=40) | envelopes.map(json.dumps))
@settings(max_examples=examples(400), deadline=None)
def test_any_message_is_a_notice_or_refused_as_promised(body):
    try:
        found = read_notice(body)
    except PROMISED:
        return
    assert found.index >= 0
    assert found.name.endswith("/0")
    assert isinstance(found.failure_reason, str)


# A cold endpoint


def described(front: SageMaker) -> tuple[SageMakerBackend, list[str], Clock]:
    """Return a backend, the calls that it makes of SageMaker's control plane, and its clock."""
    made: list[str] = []
    clock = Clock()
    backend = backend_at(front.url, asynchronous=True, clock=clock)
    backend._control.meta.events.register("before-call", lambda model, **_: made.append(model.name))
    return backend, made, clock


def test_an_endpoint_without_instances_is_cold(front):
    backend, _, clock = described(front)
    front.chill(60)
    assert backend.is_cold()
    front.release()
    clock.now += 30
    assert not backend.is_cold()


def test_what_is_known_of_the_instances_is_fresh_for_half_a_minute(front):
    backend, made, clock = described(front)
    front.chill(60)
    assert [backend.is_cold() for _ in range(3)] == [True] * 3
    front.release()
    clock.now += 29.9
    assert backend.is_cold()
    assert made == ["DescribeEndpoint"]
    clock.now += 0.1
    assert not backend.is_cold()
    assert made == ["DescribeEndpoint"] * 2


def test_what_cannot_be_known_is_not_cold(front):
    backend, _, _ = described(front)
    front.chill(60)
    with answered(backend._control, "DescribeEndpoint", 400, "ThrottlingException"):
        assert not backend.is_cold()
    assert backend.is_cold()
    assert not backend_at(front.url, endpoint="another").is_cold()
    assert not backend_at("http://127.0.0.1:9").is_cold()
    front.release()
