"""The endpoint's backends through the whole system on one machine, over a container that no model runs in."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from PIL import Image

from img2img.admin.audit import audit
from img2img.admin.stack import Operator
from local.commands import _welcome
from local.stack import Stack
from tests.container import FakeContainer, painted
from tests.stack.client import FIELDS, Client, wait_until
from tests.system import ROOT

PRICE = 1000
PROMPT = "a prompt that must never be logged"


@pytest.fixture(scope="module")
def container() -> Iterator[FakeContainer]:
    with FakeContainer() as running:
        yield running


def started(container, logs, **options) -> Stack:
    return Stack(container=container.url, logs=logs, schedules=False, **options)


@pytest.fixture(scope="module")
def asynchronous(container, tmp_path_factory) -> Iterator[Stack]:
    with started(container, tmp_path_factory.mktemp("async"), backend="sagemaker") as running:
        yield running


@pytest.fixture(scope="module")
def realtime(container, tmp_path_factory) -> Iterator[Stack]:
    logs = tmp_path_factory.mktemp("realtime")
    with started(container, logs, backend="sagemaker", invocation="realtime") as running:
        yield running


@pytest.fixture(scope="module")
def automatic(container, tmp_path_factory) -> Iterator[Stack]:
    logs, parameters = tmp_path_factory.mktemp("auto"), {"FallbackAfterSeconds": "2"}
    with started(container, logs, backend="auto", parameters=parameters) as running:
        yield running


@pytest.fixture
def caller(container):
    """Return the caller of a stack's API, once the endpoint does nothing out of the ordinary."""

    def of(stack: Stack) -> Client:
        container.reset()
        stack.sagemaker.reset()
        if stack.segmind:
            stack.segmind.reset()
        return Client(stack.url, stack.api_key)

    return of


def balance(client: Client) -> int:
    found: int = client.get("/balance").json()["balance"]
    return found


def assert_books_are_right(stack: Stack) -> None:
    admin = Operator("local", **stack.aws)
    found = audit(admin.credits, admin.jobs, "local")
    assert found.still
    assert found.differences == ()
    assert found.account.reserved == 0


def assert_queues_are_empty(stack: Stack) -> None:
    sqs, names = stack.client("sqs"), ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]

    def held() -> int:
        urls = [url for name, url in stack.resources.items() if name.endswith("Queue")]
        counts = [sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"] for url in urls]
        return sum(int(value) for count in counts for value in count.values())

    wait_until(lambda: held() == 0)


def pixels(url: str) -> bytes:
    """Load the picture that a presigned URL names, without a key."""
    answer = requests.get(url, timeout=10)
    answer.raise_for_status()
    return Image.open(io.BytesIO(answer.content)).convert("RGB").tobytes()


def expected(seed: int) -> bytes:
    return Image.open(io.BytesIO(painted((512, 512), seed))).tobytes()


@pytest.fixture(params=["asynchronous", "realtime"])
def stack(request) -> Stack:
    """Each way to call the endpoint in turn."""
    return request.getfixturevalue(request.param)


# -------------------------------------------------------------------------------------------------- both ways


def test_a_segmind_client_notices_nothing(stack, caller, container):
    client = caller(stack)
    answer = client.create()
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert (job["status"], job["backend"], job["input"]["seed"]) == ("succeeded", "sagemaker", FIELDS["seed"])
    assert pixels(job["outputs"][0]["url"]) == expected(FIELDS["seed"])
    assert {"x-remaining-credits", "x-generation-time", "x-request-id"} <= {name.lower() for name in answer.headers}
    [sent] = container.requests
    named = ("prompt", "negative_prompt", "scheduler", "num_inference_steps", "guidance_scale", "strength", "seed")
    assert {name: sent[name] for name in named} == {name: FIELDS[name] for name in named}


def test_each_sample_is_a_call_of_its_own(stack, caller, container):
    client = caller(stack)
    job = client.create(samples=4, seed=100).json()
    assert job["status"] == "succeeded", job
    assert [output["seed"] for output in job["outputs"]] == [100, 101, 102, 103]
    assert [pixels(output["url"]) for output in job["outputs"]] == [expected(seed) for seed in range(100, 104)]
    assert sorted(sent["seed"] for sent in container.requests) == [100, 101, 102, 103]


def test_base64_and_bytes_are_answered_as_by_segmind(stack, caller):
    client = caller(stack)
    image = client.create(base64=True).json()["image"]
    assert Image.open(io.BytesIO(base64.b64decode(image))).size == (512, 512)
    answer = client.create(headers={"Accept": "image/png"}, output_format="png")
    assert answer.headers["content-type"] == "image/png"


def test_a_flagged_picture_is_withheld(stack, caller, container):
    client = caller(stack)
    container.next.append("flagged")
    answer = client.create()
    assert (answer.status_code, answer.json()["code"]) == (502, "output_blocked")


def test_a_request_that_the_container_refuses_fails_and_costs_nothing(stack, caller, container):
    client = caller(stack)
    before = balance(client)
    container.next.extend([400] * 3)
    answer = client.create()
    assert answer.status_code == 502, answer.text
    assert answer.json()["code"].startswith("backend_")
    assert balance(client) == before
    assert_books_are_right(stack)


def test_an_error_of_the_container_is_overcome(stack, caller, container):
    client = caller(stack)
    container.next.append(500)
    answer = client.create()
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    assert len(container.requests) == 2


def test_a_container_that_always_breaks_fails_the_job(asynchronous, caller):
    stack, client = asynchronous, caller(asynchronous)
    before = balance(client)
    stack.sagemaker.behave("500", times=100)
    job = client.ended(client.create(headers={"Prefer": "respond-async"}).json()["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "backend_failed")
    assert len(stack.sagemaker.invocations) == 3
    assert balance(client) == before
    assert_books_are_right(stack)


def test_nothing_is_left_behind(stack, caller):
    client = caller(stack)
    assert client.create().status_code == 200
    assert_queues_are_empty(stack)
    assert_books_are_right(stack)


def test_the_logs_hold_no_prompt_and_no_image(stack, caller, container):
    client = caller(stack)
    container.next.append(500)
    assert client.create(prompt=PROMPT).status_code == 200
    [sent] = {sent["prompt"] for sent in container.requests}
    assert sent == PROMPT
    text = "\n".join(stack.log_lines())
    image = base64.b64encode(painted((512, 512), FIELDS["seed"])).decode()
    assert [secret for secret in (PROMPT, image[100:140], stack.api_key) if secret in text] == []


# -------------------------------------------------------------------------------------------------- asynchronous


def test_the_endpoint_of_the_template_is_the_one_that_is_called(asynchronous):
    environment = asynchronous.environment["WorkerFunction"]
    spec = asynchronous.sagemaker.endpoint
    assert environment["SAGEMAKER_ENDPOINT"] == spec.name
    assert environment["RESULTS_QUEUE_URL"] == asynchronous.resources["ResultsQueue"]
    assert spec.asynchronous.concurrency == 32
    assert spec.asynchronous.outputs == f"s3://{asynchronous.resources['UploadsBucket']}/answers/"
    assert asynchronous.segmind is None
    described = asynchronous.client("cloudformation").describe_stacks(StackName="local")["Stacks"][0]
    outputs = {output["OutputKey"]: output["OutputValue"] for output in described["Outputs"]}
    assert outputs["EndpointName"] == spec.name


def test_a_notice_that_comes_twice_charges_once(asynchronous, caller):
    client = caller(asynchronous)
    before = balance(client)
    asynchronous.sagemaker.treat_notices("twice", times=4)
    job = client.create(samples=2).json()
    assert job["status"] == "succeeded"
    assert before - balance(client) == job["credits"]["charged"]
    assert_queues_are_empty(asynchronous)
    assert_books_are_right(asynchronous)


def test_a_notice_that_comes_before_the_worker_knows_is_not_lost(asynchronous, caller):
    client = caller(asynchronous)
    asynchronous.sagemaker.behave("early")
    answer = client.create()
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    assert len(asynchronous.sagemaker.invocations) == 1


def test_an_answer_that_nobody_was_told_of_is_found(asynchronous, caller):
    client = caller(asynchronous)
    asynchronous.sagemaker.treat_notices("drop")
    job = client.create(headers={"Prefer": "respond-async"}).json()
    wait_until(lambda: asynchronous.sagemaker.invocations and asynchronous.sagemaker.invocations[0].done.is_set())
    wait_until(lambda: waits(client, job["id"]))
    sweep_soon(asynchronous, job["id"])
    assert client.ended(job["id"])["status"] == "succeeded"
    assert len(asynchronous.sagemaker.invocations) == 1
    assert_books_are_right(asynchronous)


def waits(client: Client, job_id: str) -> str | None:
    """Return what a job waits for."""
    detail = client.get(f"/jobs/{job_id}").json()["status_detail"]
    return detail["code"] if detail else None


def sweep_soon(stack: Stack, job_id: str) -> None:
    """Run the sweep as if the job were due."""
    key = {"pk": {"S": "TEAM#local"}, "sk": {"S": f"JOB#{job_id}"}}
    stack.client("dynamodb").update_item(
        TableName=stack.resources["JobsTable"],
        Key=key,
        UpdateExpression="SET due_at = :past",
        ExpressionAttributeValues={":past": {"N": "1"}},
    )
    stack.invoke("SweepFunction", json.loads((ROOT / "events" / "schedule.json").read_text()))


def test_a_job_says_that_it_waits_for_a_cold_endpoint(asynchronous, caller):
    client = caller(asynchronous)
    for function in asynchronous.functions.values():
        function.renew()  # what is known of the endpoint counts for a while
    asynchronous.sagemaker.chill(600)
    answer = client.create(headers={"Prefer": "wait=1"})
    assert answer.status_code == 202
    job_id = answer.json()["id"]
    assert wait_until(lambda: waits(client, job_id)) == "endpoint_starting"
    asynchronous.sagemaker.release()
    job = client.ended(job_id)
    assert (job["status"], job["status_detail"]) == ("succeeded", None)


def test_an_expired_request_is_made_again(asynchronous, caller, container):
    client = caller(asynchronous)
    asynchronous.sagemaker.behave("expired")
    assert client.create().status_code == 200
    assert (len(asynchronous.sagemaker.invocations), len(container.requests)) == (2, 1)
    assert_books_are_right(asynchronous)


def test_a_call_whose_answer_was_lost_ends_once(asynchronous, caller):
    client = caller(asynchronous)
    before = balance(client)
    asynchronous.sagemaker.behave("cut")
    job = client.create().json()
    assert job["status"] == "succeeded", job
    assert before - balance(client) == job["credits"]["charged"]
    assert_queues_are_empty(asynchronous)
    assert_books_are_right(asynchronous)


def test_a_canceled_job_stays_canceled_when_its_answer_comes(asynchronous, caller):
    client = caller(asynchronous)
    before = balance(client)
    asynchronous.sagemaker.chill(600)
    job_id = client.create(headers={"Prefer": "respond-async"}).json()["id"]
    assert asynchronous.sagemaker.wait_for(lambda: asynchronous.sagemaker.waiting, 15)
    wait_until(lambda: waits(client, job_id))
    canceled = client.session.post(f"{client.url}/jobs/{job_id}/cancel", timeout=10).json()
    assert canceled["status"] == "canceled", canceled
    asynchronous.sagemaker.release()
    assert asynchronous.sagemaker.wait_for(lambda: asynchronous.sagemaker.notices == 1, 15)
    assert_queues_are_empty(asynchronous)
    assert client.get(f"/jobs/{job_id}").json()["status"] == "canceled"
    assert balance(client) == before
    assert_books_are_right(asynchronous)


def test_many_jobs_wait_in_sagemakers_queue_and_all_end(asynchronous, caller, container):
    client = caller(asynchronous)
    container.next.extend(["hang"] * 40)
    ids = [client.create(headers={"Prefer": "respond-async"}, samples=4).json()["id"] for _ in range(10)]
    container.wait_for(32, seconds=30)
    assert asynchronous.sagemaker.wait_for(lambda: len(asynchronous.sagemaker.invocations) == 40, 30)
    assert len(container.requests) == 32  # what the template lets an instance have at once
    container.next.clear()
    container.release()
    assert {client.ended(job_id, 60)["status"] for job_id in ids} == {"succeeded"}
    assert_books_are_right(asynchronous)


def test_the_welcome_says_that_the_pictures_of_the_tiny_model_are_noise(asynchronous):
    text = _welcome(asynchronous, 1.0, "logs", Path("aws.env"))
    assert "noise" in text
    assert asynchronous.sagemaker.control_url in text
    assert "Segmind  simulated" not in text


# -------------------------------------------------------------------------------------------------- real time


def test_a_real_time_endpoint_has_neither_queue_nor_function_for_answers(realtime):
    assert "CollectFunction" not in realtime.functions
    assert not [name for name in realtime.resources if "Results" in name and "Queue" in name]
    assert realtime.environment["WorkerFunction"]["RESULTS_QUEUE_URL"] == ""
    assert realtime.sagemaker.endpoint.asynchronous is None


# -------------------------------------------------------------------------------------------------- auto


def test_segmind_comes_first(automatic, caller, container):
    job = caller(automatic).create().json()
    assert (job["status"], job["backend"], job["backend_reason"]) == ("succeeded", "segmind", None)
    assert container.requests == []


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("406-credits", "backend_out_of_credits"),
        ("401", "backend_unauthorized"),
        ("503", "backend_failed"),
        ("hang", "backend_timeout"),
    ],
)
def test_the_endpoint_serves_what_segmind_does_not(automatic, caller, behaviour, reason):
    client = caller(automatic)
    for function in automatic.functions.values():
        function.renew()  # an outage is remembered for a while
    automatic.segmind.behave(behaviour, times=10)
    answer = client.create()
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert (job["status"], job["backend"], job["backend_reason"]) == ("succeeded", "sagemaker", reason)
    assert pixels(job["outputs"][0]["url"]) == expected(FIELDS["seed"])
    assert json.loads(client.get(f"/jobs/{job['id']}").text)["backend_reason"] == reason
    assert_books_are_right(automatic)
