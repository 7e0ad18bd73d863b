"""What the SageMaker front promises: AWS's contract to unmodified boto3 clients, and to do as it is told."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import pytest
import requests
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError
from PIL import Image

from local.sagemaker import BEHAVIOURS, MAX_BODY, SageMaker
from local.template import AsyncSpec, EndpointSpec
from tests.container import FakeContainer
from tests.stack.client import wait_until
from tests.system import fresh_aws

BUCKET = "uploads"
NAME = "an-endpoint"
REQUEST = {"image": "aGVsbG8=", "prompt": "a hill", "seed": 7, "img_width": 512, "img_height": 768, "base64": True}


@pytest.fixture(scope="module")
def topics() -> dict[str, str]:
    """Topics of success and failure, each with a queue behind it, in moto."""
    fresh_aws()
    sns, sqs = boto3.client("sns"), boto3.client("sqs")
    found = {}
    for name in ("success", "error"):
        found[name] = sns.create_topic(Name=name)["TopicArn"]
        queue = sqs.create_queue(QueueName=f"{name}-notices")["QueueUrl"]
        arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        sns.subscribe(TopicArn=found[name], Protocol="sqs", Endpoint=arn)
        found[f"{name}-queue"] = queue
    return found


@pytest.fixture(scope="module")
def running(topics) -> Iterator[tuple[FakeContainer, SageMaker, SageMaker]]:
    specs = AsyncSpec(2, f"s3://{BUCKET}/answers/", f"s3://{BUCKET}/failures/", topics["success"], topics["error"])
    with (
        FakeContainer() as container,
        SageMaker(EndpointSpec(NAME, "main", specs), container.url, boto3.client) as asynchronous,
        SageMaker(EndpointSpec(NAME, "main"), container.url, boto3.client) as realtime,
    ):
        yield container, asynchronous, realtime
        container.release()


@pytest.fixture
def container(running, topics) -> Iterator[FakeContainer]:
    container, *fronts = running
    container.reset()
    for front in fronts:
        front.reset()
        assert front.wait_for(lambda front=front: front.running == front.waiting == 0)
    notices(topics, "success")
    notices(topics, "error")
    yield container
    container.release()


@pytest.fixture
def front(container, running) -> SageMaker:
    return running[1]


@pytest.fixture
def realtime(container, running) -> SageMaker:
    return running[2]


def runtime(front: SageMaker) -> Any:
    config = Config(retries={"total_max_attempts": 1}, read_timeout=20)
    return boto3.client("sagemaker-runtime", endpoint_url=front.url, config=config)


def sagemaker(front: SageMaker) -> Any:
    return boto3.client("sagemaker", endpoint_url=front.url)


def control(front: SageMaker, query: str, method: str = "POST") -> requests.Response:
    return requests.request(method, f"{front.control_url}?{query}" if query else front.control_url, timeout=5)


def invoke(front: SageMaker, **others: Any) -> dict[str, Any]:
    parameters = {"EndpointName": NAME, "Body": json.dumps(REQUEST), "ContentType": "application/json", **others}
    return runtime(front).invoke_endpoint(**parameters)


def put(name: str = "request", **fields: Any) -> str:
    boto3.client("s3").put_object(Bucket=BUCKET, Key=f"requests/{name}.json", Body=json.dumps(REQUEST | fields))
    return f"s3://{BUCKET}/requests/{name}.json"


def invoke_later(front: SageMaker, **others: Any) -> dict[str, Any]:
    location = others.pop("InputLocation", None) or put()
    parameters = {"EndpointName": NAME, "InputLocation": location, "ContentType": "application/json", **others}
    return runtime(front).invoke_endpoint_async(**parameters)


def notices(topics: dict[str, str], kind: str) -> list[dict[str, Any]]:
    """Take what a topic has told so far."""
    sqs, url = boto3.client("sqs"), topics[f"{kind}-queue"]
    found = []
    for message in sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages", []):
        sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
        envelope = json.loads(message["Body"])
        assert (envelope["Type"], envelope["TopicArn"]) == ("Notification", topics[kind])
        found.append(json.loads(envelope["Message"]))
    return found


def the_notice(topics: dict[str, str], kind: str) -> dict[str, Any]:
    [notice] = wait_until(lambda: notices(topics, kind))
    return notice


def stored(location: str) -> bytes | None:
    bucket, _, key = location.removeprefix("s3://").partition("/")
    s3 = boto3.client("s3")
    try:
        return s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    except s3.exceptions.NoSuchKey:
        return None


def refused(call: Any, *arguments: Any, **parameters: Any) -> dict[str, Any]:
    with pytest.raises(ClientError) as raised:
        call(*arguments, **parameters)
    return raised.value.response


# -------------------------------------------------------------------------------------------------- real time


def test_a_call_is_answered_by_the_container(realtime, container):
    answer = invoke(realtime, Accept="application/json", CustomAttributes="abc", InferenceId="job-0-1")
    said = json.loads(answer["Body"].read())
    assert Image.open(io.BytesIO(base64.b64decode(said["image"]))).size == (512, 768)
    assert (answer["ContentType"], answer["InvokedProductionVariant"]) == ("application/json", "main")
    assert answer["CustomAttributes"] == "cba"
    # Of its other headers none passes.
    assert "x-seed" not in answer["ResponseMetadata"]["HTTPHeaders"]
    [headers] = container.headers
    assert (headers["content-type"], headers["accept"]) == ("application/json", "application/json")
    assert headers["x-amzn-sagemaker-inference-id"] == "job-0-1"
    assert container.requests[0]["prompt"] == "a hill"


def test_a_picture_is_passed_on_as_bytes(realtime):
    answer = invoke(realtime, Body=json.dumps(REQUEST | {"base64": False}), Accept="image/png")
    assert answer["ContentType"] == "image/png"
    assert Image.open(answer["Body"]).size == (512, 768)


@pytest.mark.parametrize(("status", "whose"), [(400, "client"), (500, "server"), (503, "server")])
def test_the_containers_error_is_a_model_error(realtime, container, status, whose):
    container.next.append(status)
    answer = refused(invoke, realtime)
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert answer["Error"]["Code"] == "ModelError"
    assert answer["Error"]["Message"].startswith(f'Received {whose} error ({status}) from primary with message "')
    assert answer["OriginalStatusCode"] == status
    assert json.loads(answer["OriginalMessage"])["detail"] == "told to fail"
    assert NAME in answer["LogStreamArn"]


@pytest.mark.parametrize("behaviour", ["400", "500", "503"])
def test_errors_on_demand_without_asking_the_container(realtime, container, behaviour):
    control(realtime, f"next={behaviour}")
    assert refused(invoke, realtime)["OriginalStatusCode"] == int(behaviour)
    assert container.requests == []
    assert invoke(realtime)["ResponseMetadata"]["HTTPStatusCode"] == 200


def test_an_answer_that_takes_too_long_is_a_model_error_without_status(realtime):
    control(realtime, "next=timeout")
    answer = refused(invoke, realtime)
    assert (answer["Error"]["Code"], answer["OriginalStatusCode"]) == ("ModelError", 0)
    assert "timed out" in answer["OriginalMessage"]


def test_a_container_that_is_gone_is_a_model_error_without_status(topics):
    with FakeContainer() as gone:
        url = gone.url
    with SageMaker(EndpointSpec(NAME, "main"), url, boto3.client) as front:
        assert refused(invoke, front)["OriginalStatusCode"] == 0


def test_a_body_may_have_25_mb(realtime, container):
    def padded(size: int) -> bytes:
        text = json.dumps(REQUEST).encode()
        return text + b" " * (size - len(text))

    assert invoke(realtime, Body=padded(MAX_BODY))["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert refused(invoke, realtime, Body=padded(MAX_BODY + 1))["ResponseMetadata"]["HTTPStatusCode"] == 413
    assert len(container.requests) == 1


def test_a_call_may_be_refused_or_its_answer_lost(realtime, container):
    control(realtime, "next=refused")
    control(realtime, "next=cut")
    assert refused(invoke, realtime)["Error"]["Code"] == "ServiceUnavailable"
    assert container.requests == []
    with pytest.raises(ConnectionClosedError):
        invoke(realtime)
    assert len(container.requests) == 1


# -------------------------------------------------------------------------------------------------- both


def test_an_endpoint_of_another_name_is_not_found(front, realtime):
    for call, endpoint in ((invoke, realtime), (invoke_later, front)):
        error = refused(call, endpoint, EndpointName="another")["Error"]
        assert error["Code"] == "ValidationError"
        assert "another" in error["Message"]
        assert "not found" in error["Message"]


def test_each_endpoint_takes_its_own_kind_of_call(front, realtime, container):
    for call, endpoint in ((invoke, front), (invoke_later, realtime)):
        answer = refused(call, endpoint)
        assert answer["Error"]["Code"] == "ValidationError"
        assert "inference type" in answer["Error"]["Message"]
    assert container.requests == []


def test_an_endpoint_is_described(front):
    described = sagemaker(front).describe_endpoint(EndpointName=NAME)
    assert (described["EndpointName"], described["EndpointStatus"]) == (NAME, "InService")
    [variant] = described["ProductionVariants"]
    assert (variant["CurrentInstanceCount"], variant["DesiredInstanceCount"]) == (1, 1)
    error = refused(sagemaker(front).describe_endpoint, EndpointName="another")["Error"]
    assert error["Code"] == "ValidationException"
    assert "Could not find endpoint" in error["Message"]
    assert refused(sagemaker(front).list_endpoints)["Error"]["Code"] == "UnknownOperationException"


# -------------------------------------------------------------------------------------------------- asynchronous


def test_an_answer_lies_in_s3_and_is_announced(front, container, topics):
    answer = invoke_later(front, InferenceId="job-0-1", Accept="application/json")
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 202
    assert answer["InferenceId"] == "job-0-1"
    notice = the_notice(topics, "success")
    assert (notice["invocationStatus"], notice["inferenceId"]) == ("Completed", "job-0-1")
    assert notice["requestParameters"] == {
        "contentType": "application/json",
        "endpointName": NAME,
        "inputLocation": f"s3://{BUCKET}/requests/request.json",
    }
    assert notice["responseParameters"] == {
        "contentType": "application/json",
        "outputLocation": answer["OutputLocation"],
    }
    assert (notice["eventSource"], notice["eventName"]) == ("aws:sagemaker", "InferenceResult")
    assert answer["OutputLocation"].startswith(f"s3://{BUCKET}/answers/")
    assert json.loads(stored(answer["OutputLocation"]))["seed"] == 7
    assert container.headers[0]["accept"] == "application/json"
    assert notices(topics, "error") == []
    assert control(front, "", "GET").json() == {
        "invocations": 1,
        "waiting": 0,
        "running": 0,
        "instances": 1,
        "notices": 1,
        "behaviours": [],
    }


def test_the_models_error_lies_in_s3_and_is_announced(front, container, topics):
    container.next.append(500)
    answer = invoke_later(front)
    notice = the_notice(topics, "error")
    assert (notice["invocationStatus"], notice["inferenceId"]) == ("Failed", answer["InferenceId"])
    assert "(500)" in notice["failureReason"]
    assert answer["FailureLocation"].startswith(f"s3://{BUCKET}/failures/")
    assert answer["FailureLocation"].endswith("-error.out")
    assert json.loads(stored(answer["FailureLocation"]))["detail"] == "told to fail"
    assert stored(answer["OutputLocation"]) is None
    assert notices(topics, "success") == []


def test_the_input_is_read_when_its_turn_comes(front, topics):
    front.chill(60)
    location = f"s3://{BUCKET}/requests/late.json"
    answer = invoke_later(front, InputLocation=location)
    put("late", seed=11)
    front.release()
    the_notice(topics, "success")
    assert json.loads(stored(answer["OutputLocation"]))["seed"] == 11


def test_an_input_that_is_not_there_fails(front, container, topics):
    invoke_later(front, InputLocation=f"s3://{BUCKET}/requests/nothing.json")
    assert "NoSuchKey" in the_notice(topics, "error")["failureReason"]
    assert container.requests == []


def test_a_container_may_take_no_longer_than_the_invocation_timeout(front, container, topics):
    container.next.append("hang")
    answer = invoke_later(front, InvocationTimeoutSeconds=1)
    assert "timed out" in the_notice(topics, "error")["failureReason"]
    assert stored(answer["FailureLocation"]) is None


def test_an_answer_without_its_length_fails(front, container, topics):
    container.next.append("endless")
    invoke_later(front)
    assert "Content-Length" in the_notice(topics, "error")["failureReason"]


def test_no_more_than_the_endpoints_limit_run_at_once(front, container, topics):
    container.next.extend(["hang"] * 5)
    for _ in range(5):
        invoke_later(front)
    container.wait_for(2)
    assert front.wait_for(lambda: front.running == 2)
    assert control(front, "", "GET").json()["invocations"] == 5
    assert len(container.requests) == 2
    container.next.clear()
    container.release()
    assert front.wait_for(lambda: front.notices == 5)
    assert container.most_busy == 2


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"InferenceId": "x" * 65}, "inferenceId"),
        ({"RequestTTLSeconds": 21_601}, "requestTTLSeconds"),
        ({"InvocationTimeoutSeconds": 3601}, "invocationTimeoutSeconds"),
        ({"InputLocation": "requests/request.json"}, "inputLocation"),
        ({"InputLocation": f"s3://{BUCKET}"}, "inputLocation"),
    ],
)
def test_what_aws_would_refuse_is_refused(front, parameters, named):
    answer = refused(invoke_later, front, **parameters)
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 400
    assert answer["Error"]["Code"] == "ValidationError"
    assert f"at '{named}' failed to satisfy constraint" in answer["Error"]["Message"]
    assert front.invocations == []


def test_the_bounds_themselves_are_accepted(front):
    for ttl, timeout in ((60, 1), (21_600, 3600)):
        invoke_later(front, InferenceId="x" * 64, RequestTTLSeconds=ttl, InvocationTimeoutSeconds=timeout)
    assert front.wait_for(lambda: front.notices == 2)


def test_what_boto3_does_not_check_is_checked_here(front):
    headers = {
        "X-Amzn-SageMaker-InputLocation": f"s3://{BUCKET}/a",
        "X-Amzn-SageMaker-RequestTTLSeconds": "59",
    }
    answer = requests.post(f"{front.url}/endpoints/{NAME}/async-invocations", headers=headers, timeout=5)
    assert answer.status_code == 400
    assert "requestTTLSeconds" in answer.json()["Message"]


# -------------------------------------------------------------------------------------------------- on demand


def test_a_cold_endpoint_has_no_instance_and_lets_invocations_wait(front, container, topics):
    control(front, "cold=60")
    assert sagemaker(front).describe_endpoint(EndpointName=NAME)["ProductionVariants"][0]["CurrentInstanceCount"] == 0
    invoke_later(front)
    assert front.wait_for(lambda: front.waiting == 1)
    [variant] = sagemaker(front).describe_endpoint(EndpointName=NAME)["ProductionVariants"]
    assert (variant["CurrentInstanceCount"], variant["DesiredInstanceCount"]) == (0, 1)
    assert container.requests == []
    assert control(front, "release=1").json()["instances"] == 1
    assert the_notice(topics, "success")


def test_it_warms_up_by_itself(front, topics):
    control(front, "cold=0.2")
    invoke_later(front)
    assert the_notice(topics, "success")


def test_an_expired_request_fails_without_being_run(front, container, topics):
    control(front, "next=expired")
    answer = invoke_later(front)
    assert "expired" in the_notice(topics, "error")["failureReason"]
    assert container.requests == []
    assert stored(answer["FailureLocation"]) is None


def test_the_age_of_a_request_counts_from_the_call(front, topics):
    front.chill(60)
    invoke_later(front, RequestTTLSeconds=60)
    assert front.wait_for(lambda: front.waiting == 1)
    front.invocations[0].ttl = 0  # as if a minute had gone by
    front.chill(30)
    assert "expired" in the_notice(topics, "error")["failureReason"]


def test_notices_are_dropped_and_doubled(front, topics):
    control(front, "notices=drop")
    control(front, "notices=twice")
    lost = invoke_later(front)
    wait_until(lambda: stored(lost["OutputLocation"]))
    wait_until(front.invocations[0].done.is_set)
    invoke_later(front, InferenceId="twice")
    assert front.wait_for(lambda: front.notices == 2)
    assert [notice["inferenceId"] for notice in notices(topics, "success")] == ["twice", "twice"]


def test_a_notice_may_be_late(front, topics):
    control(front, "delay=3600")
    answer = invoke_later(front)
    wait_until(lambda: stored(answer["OutputLocation"]))
    assert notices(topics, "success") == []
    control(front, "release=1")
    assert the_notice(topics, "success")


def test_a_notice_may_be_there_before_the_call_is_answered(front, topics):
    control(front, "next=early")
    answer = invoke_later(front)
    [notice] = notices(topics, "success")
    assert notice["inferenceId"] == answer["InferenceId"]


def test_an_invocation_may_run_though_its_call_failed_or_never_though_it_did_not(front, container, topics):
    control(front, "next=cut")
    control(front, "next=lost")
    with pytest.raises(ConnectionClosedError):
        invoke_later(front, InferenceId="cut")
    assert the_notice(topics, "success")["inferenceId"] == "cut"
    lost = invoke_later(front)
    wait_until(front.invocations[1].done.is_set)
    assert (front.notices, len(container.requests), stored(lost["OutputLocation"])) == (1, 1, None)


def test_several_are_told_in_one_order(front, container, topics):
    assert control(front, "next=500&times=2").json()["behaviours"] == ["500", "500"]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: invoke_later(front), range(3)))
    assert front.wait_for(lambda: front.notices == 3)
    assert len(container.requests) == 1
    assert control(front, "reset=1").json()["invocations"] == 0


@pytest.mark.parametrize(
    "query",
    [
        "next=explode",
        "next=500&times=0",
        "next=500&times=many",
        "next=500&next=503",
        "notices=none",
        "delay=-1",
        "cold=nan",
        "reset=yes",
        "release=0",
        "unknown=1",
        "next",
    ],
)
def test_an_order_that_is_not_understood_changes_nothing(front, query):
    answer = control(front, query if query == "next" else f"{query}&next=500" if "next" not in query else query)
    assert answer.status_code == 400
    assert answer.json()["error"]
    summary = control(front, "", "GET").json()
    assert (summary["behaviours"], summary["instances"]) == ([], 1)


@pytest.mark.parametrize("behaviour", ["expired", "lost", "early"])
def test_a_real_time_endpoint_knows_no_queue(realtime, behaviour):
    assert behaviour in BEHAVIOURS
    assert control(realtime, f"next={behaviour}").status_code == 400
