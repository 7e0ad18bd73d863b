"""The local machine itself: its gateway, Lambda runtime, pollers and commands against what AWS does."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import pytest
import requests
from botocore.stub import Stubber

from img2img import __version__
from local.api_keys import FRESH_SECONDS, PAUSE_SECONDS, ApiKeys
from local.commands import main
from local.demo import DemoFailed, demo
from local.functions import Function, FunctionError, lambda_environment
from local.gateway import Gateway
from local.lambda_runtime import RequestTooLarge, Result, RuntimeApi
from local.pollers import Clock, QueuePoller, failed_items
from local.stack import Stack
from local.template import ApiSpec, Blueprint, FunctionSpec, QueueMapping, Schedule, TemplateError
from tests.stack.client import wait_until

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 2**20


# -------------------------------------------------------------------------------------------------- gateway


@pytest.fixture
def client(stack):
    with requests.Session() as session:
        session.headers["x-api-key"] = stack.api_key
        yield session


def raw(stack, request: bytes) -> http.client.HTTPResponse:
    """Send bytes as they are and read the answer."""
    address = urlsplit(stack.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(request)
        response = http.client.HTTPResponse(connection)
        response.begin()
        response.body = response.read()
        response.close()
        return response


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/nothing"), ("PUT", "/jobs"), ("GET", "/sd1.5-img2img"), ("PURGE", "/jobs")]
)
def test_an_unknown_route_or_method_is_a_problem_with_404(stack, client, method, path):
    answer = client.request(method, stack.url + path, timeout=10)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "not_found"
    assert answer.headers["x-amzn-requestid"]


def test_outside_the_stage_there_is_nothing(stack, client):
    assert client.get(stack.url.removesuffix("/v1") + "/health", timeout=10).status_code == 404


@pytest.mark.parametrize("headers", [{}, {"x-api-key": "wrong"}])
def test_a_missing_or_unknown_key_is_a_problem_with_403(stack, headers):
    answer = requests.get(f"{stack.url}/jobs", headers=headers, timeout=10)
    assert answer.status_code == 403
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "forbidden"
    assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("headers", [{}, {"x-api-key": "wrong"}])
def test_a_missing_or_unknown_key_is_told_to_segminds_clients_as_segmind_does(stack, headers):
    answer = requests.post(f"{stack.compatible_url}/sd1.5-img2img", json={}, headers=headers, timeout=10)
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"error": "Send a valid API key in the x-api-key header."}
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/sd1.5-img2img"),
        ("POST", "/v1/get-user-credits"),
        ("OPTIONS", "/v1/sd1.5-img2img"),
        ("POST", "/v3/sd1.5-img2img"),
        ("GET", "/health"),
        ("GET", "/v1/jobs"),
    ],
)
def test_an_unknown_route_or_method_is_told_to_segminds_clients_as_segmind_does(stack, client, method, path):
    answer = client.request(method, stack.compatible_url.removesuffix("/v1") + path, timeout=10)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    assert "POST /v1/sd1.5-img2img" in answer.json()["error"]


def test_a_key_opens_both_apis(stack, client):
    assert client.get(f"{stack.url}/jobs", timeout=10).ok
    opened = client.get(f"{stack.compatible_url}/requests/01ARZ3NDEKTSV4RRFFQ69G5FAV", timeout=10)
    # The function's own answer, not the gateway's.
    assert opened.status_code == 404
    assert "route" not in opened.json()["error"]


def test_segminds_clients_have_room_for_a_picture_of_some_3_mb(stack, client):
    def post(megabytes: float) -> requests.Response:
        body = {"image": base64.b64encode(b"x" * int(megabytes * MEGABYTE)).decode()}
        return client.post(f"{stack.compatible_url}/another-model", json=body, timeout=30)

    assert post(3.1).status_code == 404
    # The event holds the body, which holds the picture, both in base64.
    for megabytes in (3.5, 30):
        answer = post(megabytes)
        assert answer.status_code == 413
        assert "URL" in answer.json()["error"]


def test_health_needs_no_key(stack):
    assert requests.get(f"{stack.url}/health", timeout=10).json() == {"status": "ok", "version": __version__}


def test_a_preflight_needs_no_key_and_allows_what_clients_send(stack):
    answer = requests.options(f"{stack.url}/sd1.5-img2img", timeout=10)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert {"GET", "POST", "PUT", "DELETE"} <= set(answer.headers["access-control-allow-methods"].split(","))
    assert {"x-api-key", "prefer", "idempotency-key"} <= set(
        answer.headers["access-control-allow-headers"].lower().split(",")
    )


def test_a_body_of_30_mb_is_answered_and_not_cut_off(stack, client):
    body = b"x" * (30 * MEGABYTE)
    for data in (body, iter([body[:MEGABYTE]] * 30)):  # with a length, and in chunks
        answer = client.post(f"{stack.url}/sd1.5-img2img", data, timeout=30)
        assert answer.status_code == 413
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_client_that_asks_first_is_refused_before_it_sends(stack):
    head = (
        f"POST /v1/uploads HTTP/1.1\r\nHost: x\r\nx-api-key: {stack.api_key}\r\n"
        f"Content-Length: {30 * MEGABYTE}\r\nExpect: 100-continue\r\n\r\n"
    )
    assert raw(stack, head.encode()).status == 413


def test_an_event_over_lambdas_6_mb_is_too_large(stack, client):
    answer = client.post(f"{stack.url}/sd1.5-img2img", json={"image": "A" * (7 * MEGABYTE)}, timeout=30)
    assert answer.status_code == 413


def test_a_length_that_is_none_is_a_bad_request(stack):
    assert raw(stack, b"POST /v1/uploads HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n").status == 400


def test_a_connection_is_kept_and_a_cut_body_harms_nobody(stack, client):
    address = urlsplit(stack.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(b"POST /v1/uploads HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    with contextlib.closing(connection):
        for _ in range(2):
            connection.request("GET", "/v1/health")
            used = connection.sock
            assert json.loads(connection.getresponse().read())["status"] == "ok"
            assert connection.sock is used


def test_a_browser_may_send_the_upload_form(stack):
    bucket = f"{stack.aws['endpoint_url']}/{stack.resources['UploadsBucket']}"
    headers = {"Origin": "https://app.example.com", "Access-Control-Request-Method": "POST"}
    answer = requests.options(bucket, headers=headers, timeout=10)
    assert answer.headers["access-control-allow-origin"] in ("*", headers["Origin"])


def echo_api(answer, binary=("image/png", "application/octet-stream"), **changes):
    """An API of one thing whose function is `answer`, a plain function of the event."""
    proxy = {"x-amazon-apigateway-integration": {"type": "aws_proxy", **changes}, "x-local-function": "Echo"}
    body = {
        "paths": {"/things/{id}": {"post": proxy, "get": proxy}, "/things/new": {"post": proxy}},
        "x-amazon-apigateway-binary-media-types": [*binary],
        "x-amazon-apigateway-gateway-responses": {
            "DEFAULT_5XX": {
                "responseParameters": {"gatewayresponse.header.Origin-Was": "method.request.header.Origin"},
                "responseTemplates": {"text/plain": "$context.error.responseType at $context.resourcePath"},
            }
        },
    }
    return [ApiSpec("Echo", "v1", body)], lambda _function, payload: answer(json.loads(payload))


@pytest.fixture
def serve(tmp_path):
    """Start a gateway before a plain function, and give its address."""
    with contextlib.ExitStack() as ending:

        def start(answer, **changes):
            gateway = Gateway(0, log=tmp_path / "gateway.log")
            ending.callback(gateway.stop)
            gateway.serve(*echo_api(answer, **changes), lambda _value: None)
            return gateway.urls["Echo"]

        yield start


@pytest.fixture
def readings(stack):
    """How often the keys were read from the stack's API Gateway."""
    events = stack.client("apigateway").meta.events
    counted: list[float] = []

    def count(**_details) -> None:
        counted.append(time.monotonic())

    events.register("before-call.apigateway.GetApiKeys", count)
    yield counted
    events.unregister("before-call.apigateway.GetApiKeys", count)


def test_a_known_key_is_looked_up_once_in_a_while_and_wrong_ones_share_the_readings(stack, readings):
    keys = ApiKeys(stack.client("apigateway"), stack.resources["UsagePlan"])
    began = time.monotonic()
    assert {keys.id_of(stack.api_key) for _ in range(1000)} == {stack.api_key_id}
    assert len(readings) <= 1 + (time.monotonic() - began) / FRESH_SECONDS
    readings.clear()
    began = time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(keys.id_of, (f"wrong-{number}" for number in range(200)))) == {None}
    assert len(readings) <= 1 + (time.monotonic() - began) / PAUSE_SECONDS
    assert len(readings) < 50


def test_keys_come_in_pages(stack):
    gateway = boto3.client("apigateway", **stack.aws)
    with Stubber(gateway) as answers:
        for operation, items in [
            ("get_usage_plan_keys", [{"id": "one"}, {"id": "two"}]),
            ("get_api_keys", [{"id": name, "value": f"value of {name}", "enabled": True} for name in ("one", "two")]),
        ]:
            answers.add_response(operation, {"items": items[:1], "position": "next"})
            answers.add_response(operation, {"items": items[1:]})
        keys = ApiKeys(gateway, "plan")
        assert [keys.id_of("value of one"), keys.id_of("value of two")] == ["one", "two"]


def returned(value) -> Result:
    return Result(json.dumps(value).encode())


def test_the_proxy_event_is_the_gateways(serve):
    url = serve(lambda event: returned({"statusCode": 200, "body": json.dumps(event)}))
    address = f"{url}/things/a%20b?tag=1&tag=2&empty="
    event = requests.post(address, "text", headers={"X-Twice": "a", "Content-Type": "text/plain"}, timeout=10).json()
    assert event["resource"] == "/things/{id}"
    assert event["path"] == "/things/a%20b"
    assert event["pathParameters"] == {"id": "a b"}
    assert event["queryStringParameters"] == {"tag": "2", "empty": ""}
    assert event["multiValueQueryStringParameters"] == {"tag": ["1", "2"], "empty": [""]}
    assert event["multiValueHeaders"]["X-Twice"] == ["a"]
    assert event["headers"]["X-Forwarded-Proto"] == "http"
    assert "content-length" not in {name.lower() for name in event["headers"]}
    assert (event["body"], event["isBase64Encoded"]) == ("text", False)
    context = event["requestContext"]
    assert (context["path"], context["stage"]) == ("/v1/things/a%20b", "v1")
    assert context["domainName"] == urlsplit(url).netloc
    assert context["identity"]["sourceIp"] == "127.0.0.1"
    # A path written out wins over one with a parameter, also where it lacks the method.
    assert requests.post(f"{url}/things/new", timeout=10).json()["resource"] == "/things/new"
    assert requests.get(f"{url}/things/new", timeout=10).status_code == 403
    plain = requests.get(f"{url}/things/1", timeout=10).json()
    assert (plain["body"], plain["queryStringParameters"]) == (None, None)


@pytest.mark.parametrize(
    ("accept", "body"),
    [
        ("image/png", b"\x89PNG"),
        ("image/png;q=0.9, */*", b"\x89PNG"),
        ("*/*", b"iVBORw=="),
        ("text/html, image/png", b"iVBORw=="),
    ],
)
def test_a_binary_answer_is_decoded_only_for_a_client_that_accepts_it_first(serve, accept, body):
    answer = {
        "statusCode": 200,
        "headers": {"Content-Type": "image/png", "Connection": "x", "Via": "y", "X-One": "1"},
        "multiValueHeaders": {"Set-Cookie": ["a=1", "b=2"]},
        "body": base64.b64encode(b"\x89PNG").decode(),
        "isBase64Encoded": True,
    }
    got = requests.get(f"{serve(lambda _event: returned(answer))}/things/1", headers={"Accept": accept}, timeout=10)
    assert got.content == body
    assert got.headers["content-type"] == "image/png"
    assert got.headers["x-amzn-remapped-connection"] == "x"
    assert "via" not in got.headers
    assert got.headers["set-cookie"] == "a=1, b=2"


def test_a_binary_body_arrives_as_base64(serve):
    url = serve(
        lambda event: returned({"statusCode": 200, "body": json.dumps([event["body"], event["isBase64Encoded"]])})
    )
    answer = requests.post(f"{url}/things/1", b"\x89PNG", headers={"Content-Type": "image/png"}, timeout=10)
    assert answer.json() == ["iVBORw==", True]


@pytest.mark.parametrize(
    "headers", [{"Accept": "*/*"}, {"Accept": "application/json, text/plain, */*"}, {"Accept": None}]
)
def test_where_everything_is_binary_all_bodies_are_base64_and_every_answer_is_decoded(serve, headers):
    events = []

    def answer(event):
        events.append(event)
        body = base64.b64encode(b"\x89PNG").decode()
        return returned({"statusCode": 200, "body": body, "isBase64Encoded": event["httpMethod"] == "POST"})

    url = serve(answer, binary=["*/*"])
    posted = requests.post(f"{url}/things/1", json={"a": 1}, headers=headers, timeout=10)
    untyped = requests.post(f"{url}/things/1", b"{}", headers=headers, timeout=10)
    assert [posted.content, untyped.content] == [b"\x89PNG"] * 2
    assert [(e["body"], e["isBase64Encoded"]) for e in events] == [("eyJhIjogMX0=", True), ("e30=", True)]
    # What does not say that it is base64 is text.
    assert requests.get(f"{url}/things/1", headers=headers, timeout=10).content == b"iVBORw=="
    assert (events[-1]["body"], events[-1]["isBase64Encoded"]) == (None, False)


def test_apis_are_told_apart_by_their_stages(tmp_path):
    gateway = Gateway(0, log=tmp_path / "gateway.log")
    with contextlib.ExitStack() as ending:
        ending.callback(gateway.stop)
        (first,), invoke = echo_api(
            lambda event: returned({"statusCode": 200, "body": event["requestContext"]["path"]})
        )
        second = replace(first, name="Second", stage="v10")
        gateway.serve([first, second], invoke, lambda _value: None)
        assert [requests.get(f"{url}/things/1", timeout=10).text for url in gateway.urls.values()] == [
            "/v1/things/1",
            "/v10/things/1",
        ]


@pytest.mark.parametrize(
    "result",
    [
        returned("text"),
        returned({"body": "no status"}),
        returned({"statusCode": 200, "body": {"not": "text"}}),
        returned({"statusCode": 99}),
        Result(b'{"errorType": "ValueError"}', failed=True),
    ],
)
def test_a_function_that_fails_or_answers_nonsense_is_502(serve, result):
    answer = requests.get(f"{serve(lambda _event: result)}/things/1", headers={"Origin": "https://a"}, timeout=10)
    assert answer.status_code == 502
    assert answer.text == "DEFAULT_5XX at /things/{id}"
    assert answer.headers["origin-was"] == "https://a"


def test_a_function_that_takes_too_long_is_504_and_runs_on(serve):
    release, done = threading.Event(), threading.Event()

    def slow(_event):
        release.wait(10)
        done.set()
        return returned({"statusCode": 200})

    answer = requests.get(f"{serve(slow, timeoutInMillis=100)}/things/1", timeout=10)
    assert answer.status_code == 504
    assert answer.text == "INTEGRATION_TIMEOUT at /things/{id}"
    release.set()
    assert done.wait(10)


# -------------------------------------------------------------------------------------------------- Lambda

TOY = """
import json, os, pathlib, sys, time
print(json.dumps({"message": "imported"}))

def handler(event, context):
    match event.get("do"):
        case "raise":
            raise ValueError("no good")
        case "exit":
            sys.exit(3)
        case "die":
            os.kill(os.getpid(), 9)
        case "hang":
            while True:
                time.sleep(1)
        case "large":
            return "x" * event["size"]
        case "odd":
            return {1, 2}
        case "meet":
            here = pathlib.Path(event["at"])
            (here / str(os.getpid())).touch()
            while len(list(here.iterdir())) < event["many"]:
                time.sleep(0.01)
    print(json.dumps({"message": "ran", "event": event}))
    return {
        "pid": os.getpid(),
        "path": sys.path,
        "environ": dict(os.environ),
        "request_id": context.aws_request_id,
        "arn": context.invoked_function_arn,
        "left": context.get_remaining_time_in_millis(),
        "event": event,
    }
"""


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "app.py").write_text(TOY)
    return FunctionSpec("Toy", tmp_path / "task", (tmp_path / "layer",), "app.handler", 5, 256, {"COLOUR": "green"})


@pytest.fixture
def function(toy, tmp_path):
    running = Function(toy, {"AWS_REGION": "eu-west-1"}, log=tmp_path / "toy.log", concurrency=3)
    with contextlib.closing(running):
        running.wait_until_ready()
        yield running


def run(function, **event) -> Result:
    return function.invoke(json.dumps(event).encode())


def kind(result: Result) -> str:
    assert result.failed
    return result.json()["errorType"]


def test_a_function_runs_with_lambdas_environment_and_nothing_else(function, toy):
    answer = run(function, value="ü").json()
    assert answer["event"] == {"value": "ü"}
    assert answer["arn"].endswith(":function:Toy")
    assert 0 < answer["left"] <= 5000
    environ = answer["environ"]
    assert (environ["COLOUR"], environ["AWS_REGION"], environ["AWS_LAMBDA_FUNCTION_NAME"]) == (
        "green",
        "eu-west-1",
        "Toy",
    )
    assert not {"HOME", "AWS_PROFILE", "PYTEST_CURRENT_TEST"} & environ.keys()
    assert answer["path"][:2] == [str(toy.directory), str(toy.layers[0])]
    assert not {str(ROOT), str(ROOT / "local"), ""} & set(answer["path"])


def test_sandboxes_are_reused_one_after_the_other_and_multiplied_at_the_same_time(function, tmp_path):
    first, second = run(function).json(), run(function).json()
    assert first["pid"] == second["pid"]
    assert first["request_id"] != second["request_id"]
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda _: run(function, do="meet", at=str(meeting), many=3).json()["pid"], range(3)))
    assert len(set(together)) == 3
    # No more than three, however many ask.
    with ThreadPoolExecutor(8) as pool:
        later = {answer.json()["pid"] for answer in pool.map(lambda _: run(function), range(24))}
    assert later <= set(together)


def test_an_exception_is_the_answer_and_the_sandbox_lives_on(function):
    pid = run(function).json()["pid"]
    result = run(function, do="raise")
    assert kind(result) == "ValueError"
    assert result.json()["errorMessage"] == "no good"
    assert kind(run(function, do="odd")) == "TypeError"
    assert run(function).json()["pid"] == pid


@pytest.mark.parametrize(("end", "reason"), [("exit", "exit status 3"), ("die", "SIGKILL")])
def test_a_sandbox_that_ends_fails_its_invocation_and_is_replaced(function, end, reason):
    pid = run(function).json()["pid"]
    result = run(function, do=end)
    assert kind(result) == "Runtime.ExitError"
    assert reason in result.json()["errorMessage"]
    assert run(function).json()["pid"] != pid


def test_an_invocation_out_of_time_loses_its_sandbox(toy, tmp_path):
    running = Function(replace(toy, timeout=1), {}, log=tmp_path / "toy.log", concurrency=1)
    with contextlib.closing(running):
        pid = run(running).json()["pid"]
        result = run(running, do="hang")
        assert kind(result) == "Sandbox.Timedout"
        assert "Task timed out after 1.00 seconds" in result.json()["errorMessage"]
        assert run(running).json()["pid"] != pid
    lines = [json.loads(line) for line in (tmp_path / "toy.log").read_text().splitlines()]
    assert [line["level"] for line in lines if "timed out" in str(line.get("message"))] == ["ERROR"]


def test_payloads_have_lambdas_limits(function):
    assert len(run(function, do="large", size=6 * MEGABYTE - 100).payload) > 6 * MEGABYTE - 100
    assert kind(run(function, do="large", size=6 * MEGABYTE + 100)) == "Function.ResponseSizeTooLarge"
    assert not run(function).failed
    with pytest.raises(RequestTooLarge):
        run(function, value="x" * (6 * MEGABYTE))


def test_a_module_that_cannot_be_imported_is_said_at_once(toy, tmp_path):
    (toy.directory / "app.py").write_text("import nothing_of_this_name")
    running = Function(toy, {}, log=tmp_path / "toy.log", concurrency=1)
    with contextlib.closing(running):
        with pytest.raises(FunctionError, match="ModuleNotFoundError: No module named 'nothing_of_this_name'"):
            running.wait_until_ready()
        assert kind(run(running)) == "ModuleNotFoundError"


def test_what_a_function_prints_is_its_log(function, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda number: run(function, number=number, long="x" * 20_000), range(30)))
    lines = [json.loads(line) for line in (tmp_path / "toy.log").read_text().splitlines()]
    assert [line["message"] for line in lines].count("imported") == 1
    assert sorted(line["event"]["number"] for line in lines if line["message"] == "ran") == list(range(30))


@pytest.mark.skipif(sys.platform != "linux", reason="AWS's runtime client is for Linux")
def test_awss_own_runtime_client_is_served(toy):
    api = RuntimeApi("Toy", timeout=5)
    with contextlib.closing(api):
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "awslambdaric", "app.handler"],
            env=lambda_environment(toy, api.address),
            cwd=toy.directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            answer = api.invoke(b'{"value": 1}').json()
            assert answer["event"] == {"value": 1}
            assert answer["arn"] == api.arn
            assert answer["environ"]["_X_AMZN_TRACE_ID"].startswith("Root=1-")
            assert 0 < answer["left"] <= 5000
            assert kind(api.invoke(b'{"do": "raise"}')) == "ValueError"
            assert len(api.invoke(json.dumps({"do": "large", "size": 5_000_000}).encode()).payload) > 5_000_000
        finally:
            process.kill()
            process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="AWS's runtime client is for Linux")
def test_an_init_error_of_awss_runtime_client_reaches_the_caller(toy):
    api = RuntimeApi("Toy", timeout=5)
    (toy.directory / "app.py").write_text("1 / 0")
    with contextlib.closing(api):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "awslambdaric", "app.handler"],
            env=lambda_environment(toy, api.address),
            cwd=toy.directory,
            capture_output=True,
            timeout=20,
            check=False,
        )
        assert done.returncode == 1
        assert kind(api.invoke(b"{}")) == "ZeroDivisionError"


# -------------------------------------------------------------------------------------------------- queues and clock


@pytest.mark.parametrize(
    ("result", "left"),
    [
        (returned({"batchItemFailures": []}), set()),
        (returned({}), set()),
        (returned(None), set()),
        (returned({"batchItemFailures": None}), set()),
        (returned({"batchItemFailures": [{"itemIdentifier": "a"}]}), {"a"}),
        (returned({"batchItemFailures": [{"itemIdentifier": "x"}]}), {"a", "b"}),
        (returned({"batchItemFailures": [{"itemIdentifier": ""}]}), {"a", "b"}),
        (returned({"batchItemFailures": [{"id": "a"}]}), {"a", "b"}),
        (returned({"batchItemFailures": "a"}), {"a", "b"}),
        (Result(b"{}", failed=True), {"a", "b"}),
    ],
)
def test_which_messages_of_a_batch_stay(result, left):
    assert failed_items(result, {"a", "b"}, reports=True) == left


def test_without_the_setting_a_reported_failure_is_ignored():
    failure = returned({"batchItemFailures": [{"itemIdentifier": "a"}]})
    assert failed_items(failure, {"a"}, reports=False) == set()


class Queue:
    """A queue with dead letters, a poller, and a function that answers each receive of a body with the next word."""

    def __init__(self, sqs, name: str, visibility: int = 60, concurrency: int = 2) -> None:
        self.sqs = sqs
        self.dead = sqs.create_queue(QueueName=f"{name}-dead")["QueueUrl"]
        redrive = {"deadLetterTargetArn": self._arn(self.dead), "maxReceiveCount": 2}
        attributes = {"VisibilityTimeout": str(visibility), "RedrivePolicy": json.dumps(redrive)}
        self.url = sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]
        self.seen: list[dict] = []
        self.answers: dict[str, list[str]] = {}
        self.running = self.most = 0
        self.gate = threading.Event()
        self.gate.set()
        self.lock = threading.Lock()
        mapping = QueueMapping("Toy", name, 1, concurrency, reports_failures=True)
        self.poller = QueuePoller(mapping, self.url, self._arn(self.url), sqs, self.invoke)
        self.poller.start()

    def _arn(self, url: str) -> str:
        return self.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]

    def send(self, body: str, *answers: str) -> None:
        self.answers[body] = list(answers)
        self.sqs.send_message(QueueUrl=self.url, MessageBody=body)

    def invoke(self, function: str, payload: bytes) -> Result:
        (record,) = json.loads(payload)["Records"]
        with self.lock:
            self.seen.append(record)
            self.running += 1
            self.most = max(self.most, self.running)
            answer = self.answers[record["body"]].pop(0)
        self.gate.wait(10)
        with self.lock:
            self.running -= 1
        if answer == "again":  # what a function does that wants to be asked again soon
            self.sqs.change_message_visibility(
                QueueUrl=self.url, ReceiptHandle=record["receiptHandle"], VisibilityTimeout=0
            )
        if answer == "raise":
            return Result(b"{}", failed=True)
        failures = [] if answer == "done" else [{"itemIdentifier": record["messageId"]}]
        return returned({"batchItemFailures": failures})

    def count(self, url: str) -> int:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        attributes = self.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
        return sum(map(int, attributes.values()))

    def close(self) -> None:
        self.poller.stop()
        # The long poll ends with a message.
        self.sqs.send_message(QueueUrl=self.url, MessageBody="end")
        self.poller.join()


@pytest.fixture
def queue(stack, request):
    with contextlib.ExitStack() as ending:

        def make(**options) -> Queue:
            made = Queue(stack.client("sqs"), request.node.name[:60], **options)
            ending.callback(made.close)
            return made

        yield make


def test_a_message_is_gone_when_its_function_is_done(queue):
    jobs = queue()
    jobs.send("one", "done")
    wait_until(lambda: jobs.seen and jobs.count(jobs.url) == 0)
    (record,) = jobs.seen
    assert record["eventSource"] == "aws:sqs"
    assert record["eventSourceARN"].endswith(":test_a_message_is_gone_when_its_function_is_done")
    assert record["attributes"]["ApproximateReceiveCount"] == "1"


def test_a_failed_message_comes_back_when_its_visibility_ends(queue):
    jobs = queue()
    jobs.send("later", "fail")
    jobs.send("soon", "again", "done")
    wait_until(lambda: len(jobs.seen) == 3 and jobs.count(jobs.url) == 1)
    assert [record["body"] for record in jobs.seen].count("soon") == 2
    assert jobs.seen[-1]["attributes"]["ApproximateReceiveCount"] == "2"


def test_a_message_that_always_fails_ends_with_the_dead_letters(queue):
    jobs = queue(visibility=1)
    jobs.send("hopeless", "raise", "raise")
    wait_until(lambda: jobs.count(jobs.dead) == 1)
    assert len(jobs.seen) == 2


def test_no_more_is_received_than_may_run_at_once(queue):
    jobs = queue(concurrency=2)
    jobs.gate.clear()
    for number in range(5):
        jobs.send(f"job {number}", "done")
    wait_until(lambda: jobs.running == 2)
    waiting = {"QueueUrl": jobs.url, "AttributeNames": ["ApproximateNumberOfMessages"]}
    assert jobs.sqs.get_queue_attributes(**waiting)["Attributes"]["ApproximateNumberOfMessages"] == "3"
    jobs.gate.set()
    wait_until(lambda: jobs.count(jobs.url) == 0)
    assert jobs.most == 2
    assert len(jobs.seen) == 5


def test_the_clock_runs_a_schedule_again_and_again():
    events: list[tuple[str, dict]] = []

    def invoke(function: str, payload: bytes) -> Result:
        events.append((function, json.loads(payload)))
        return returned(None)

    clock = Clock((Schedule("Tick", "Toy", 0.01, None), Schedule("Own", "Other", 0.01, '{"mine": 1}')), invoke)
    clock.start()
    wait_until(lambda: len(events) > 5)
    clock.stop()
    clock.join()
    assert ("Other", {"mine": 1}) in events
    event = next(event for function, event in events if function == "Toy")
    assert event["detail-type"] == "Scheduled Event"
    assert event["resources"] == ["arn:aws:events:us-east-1:123456789012:rule/Tick"]


# -------------------------------------------------------------------------------------------------- stack and commands


def test_a_parameter_that_the_template_lacks_is_refused():
    with pytest.raises(TemplateError, match="no parameter Nothing"):
        Blueprint.load(ROOT / "template.yaml", {"Nothing": "1"})


def test_the_data_resources_are_the_templates(stack):
    dynamodb = stack.client("dynamodb")
    table = dynamodb.describe_table(TableName=stack.resources["JobsTable"])["Table"]
    assert [index["IndexName"] for index in table["GlobalSecondaryIndexes"]] == ["open"]
    ttl = dynamodb.describe_time_to_live(TableName=stack.resources["JobsTable"])["TimeToLiveDescription"]
    assert (ttl["TimeToLiveStatus"], ttl["AttributeName"]) == ("ENABLED", "expires_at")
    names = ["VisibilityTimeout", "RedrivePolicy"]
    queue = stack.client("sqs").get_queue_attributes(QueueUrl=stack.resources["JobsQueue"], AttributeNames=names)
    assert queue["Attributes"]["VisibilityTimeout"] == "720"
    assert "deadLetterTargetArn" in queue["Attributes"]["RedrivePolicy"]
    environment = stack.environment["ApiFunction"]
    assert environment["JOBS_TABLE"] == stack.resources["JobsTable"]
    assert environment["SEGMIND_BASE_URL"] == stack.segmind.url


def test_a_transaction_that_fails_leaves_everything_as_it_was(stack):
    dynamodb, table = stack.client("dynamodb"), stack.resources["JobsTable"]

    def key(name: str) -> dict:
        return {"pk": {"S": "TRANSACTION"}, "sk": {"S": name}}

    def held() -> list[dict]:
        return dynamodb.query(
            TableName=table, KeyConditionExpression="pk = :pk", ExpressionAttributeValues={":pk": key("")["pk"]}
        )["Items"]

    before = [key("changed") | {"n": {"N": "1"}, "m": {"M": {"a": {"S": "b"}}}}, key("deleted")]
    for item in before:
        dynamodb.put_item(TableName=table, Item=item)
    raised = {
        "UpdateExpression": "SET n = n + :one, m.a = :one",
        "ExpressionAttributeValues": {":one": {"N": "1"}},
    }
    writes = [
        {"Update": {"TableName": table, "Key": key("changed"), **raised}},
        {"Delete": {"TableName": table, "Key": key("deleted")}},
        {"Put": {"TableName": table, "Item": key("new")}},
    ]
    refused = {"TableName": table, "Key": key("none"), "ConditionExpression": "attribute_exists(pk)"}
    with pytest.raises(dynamodb.exceptions.TransactionCanceledException):
        dynamodb.transact_write_items(TransactItems=[*writes, {"ConditionCheck": refused}])
    assert held() == before
    dynamodb.transact_write_items(TransactItems=writes)
    assert held() == [key("changed") | {"n": {"N": "2"}, "m": {"M": {"a": {"N": "1"}}}}, key("new")]


def test_an_operator_finds_what_the_template_names(stack, admin):
    assert admin.teams.get("local").account.added == 1_000_000
    described = stack.client("cloudformation").describe_stacks(StackName="local")["Stacks"][0]
    outputs = {output["OutputKey"]: output["OutputValue"] for output in described["Outputs"]}
    for name, resource in [
        ("JobsTableName", "JobsTable"),
        ("UsagePlanId", "UsagePlan"),
        ("UploadsBucketName", "UploadsBucket"),
        ("ResultsBucketName", "ResultsBucket"),
        ("SegmindSecretArn", "SegmindSecret"),
    ]:
        assert outputs[name] == stack.resources[resource]
    assert outputs["JobsQueueUrl"] == stack.environment["ApiFunction"]["JOBS_QUEUE_URL"]
    # What refers to something that is not made here.
    assert not {"ApiUrl", "SegmindCompatibleUrl", "DashboardUrl"} & outputs.keys()


def test_a_function_is_invoked_directly(stack):
    stack.invoke("SweepFunction", json.loads((ROOT / "events" / "schedule.json").read_text()))
    with pytest.raises(FunctionError):
        stack.invoke("WorkerFunction", "no event")


def processes() -> dict[int, int]:
    """Return the parents of all processes that are not just waiting to be buried."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines()]
    return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}


def descendants(pid: int) -> set[int]:
    parents = processes()
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Run:
    """`python -m local run` as somebody starts it in a terminal."""

    def __init__(self, logs: Path, **environ: str) -> None:
        error = self._start(logs, environ)
        if "is in use" in error:  # somebody was faster
            error = self._start(logs, environ)
        assert not error, error

    def _start(self, logs: Path, environ: dict[str, str]) -> str:
        """Start it on a port that was free just now; return what it says if it ends at once."""
        self.port = free_port()
        kept = {name: value for name, value in os.environ.items() if name not in ("SEGMIND_API_KEY", "API_KEY")}
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "local", "run", "--port", str(self.port), "--latency", "0"),
                *("--logs", str(logs), "--env", str(logs / "aws.env")),
            ],
            cwd=ROOT,
            env=kept | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started = time.monotonic()
        self.said = ""
        while "-d @-" not in self.said:
            line = self.process.stdout.readline()
            if not line:
                return self.process.communicate()[1] or "it ended without a word"
            self.said += line
        self.seconds = time.monotonic() - started
        return ""

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def is_listening(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False


def test_run_says_what_to_paste_and_ends_without_a_trace(tmp_path):
    with Run(tmp_path) as running:
        assert running.seconds < 20  # twice what is promised: the tests share the machine
        assert f"API      http://127.0.0.1:{running.port}/v1 " in running.said
        assert f"Drop-in  http://127.0.0.1:{running.port}/segmind/v1 " in running.said
        assert "simulated" in running.said
        # What it says to try works when pasted.
        command = running.said.partition("Try\n")[2]
        pasted = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        assert json.loads(pasted.stdout)["status"] == "succeeded"
        # What it says to source leads the operator's commands here, whatever else the shell is set up for.
        source, _, command = re.search(r"^Admin +(.+)$", running.said, re.MULTILINE)[1].partition("; ")
        assert command == 'make admin ARGS="team list"'
        listed = subprocess.run(
            ["sh", "-c", f'{source}; exec "$0" -m img2img --stack "$STACK" team list', sys.executable],
            cwd=ROOT,
            env=os.environ | {"AWS_PROFILE": "production", "PYTHONPATH": "layers/core/python"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert re.search(r"^local\b.*\b999\b", listed.stdout, re.MULTILINE)  # it has paid for one picture

        # So does what it says to copy, for any tool of AWS's that leaves it to the environment where AWS is.
        source, sample, inbox, prefix = re.search(
            r"^Inbox +(.+); aws s3 cp (\S+) s3://([^/]+)/(\S+/)$", running.said, re.MULTILINE
        ).groups()
        outbox, results = re.search(r"^Outbox +aws s3 ls s3://([^/]+)/(\S+/)$", running.said, re.MULTILINE).groups()
        name = Path(sample).name
        copy = (
            "import boto3, sys; s3 = boto3.client('s3'); s3.upload_file(*sys.argv[1:4]); "
            "s3.get_waiter('object_exists').wait("
            "Bucket=sys.argv[4], Key=sys.argv[5], WaiterConfig={'Delay': 1, 'MaxAttempts': 30})"
        )
        places = (sample, inbox, f"{prefix}{name}", outbox, f"{results}{name}.json")
        subprocess.run(
            ["sh", "-c", f'{source}; exec "$0" "$@"', sys.executable, "-c", copy, *places],
            cwd=ROOT,
            env=os.environ | {"AWS_PROFILE": "production"},
            timeout=60,
            check=True,
        )

        second = subprocess.run(
            [sys.executable, "-m", "local", "run", "--port", str(running.port)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert second.returncode == 1
        assert second.stderr == f"error: port {running.port} is in use; choose another with --port\n"

        children = descendants(running.process.pid)
        assert len(children) >= 6  # moto and five functions
        os.killpg(running.process.pid, signal.SIGINT)  # as the terminal does
        running.process.send_signal(signal.SIGINT)  # and somebody impatient
        out, err = running.process.communicate(timeout=20)
        assert (running.process.returncode, out, err) == (0, "", "")
        assert not children & processes().keys()
        assert not running.is_listening()
        assert not (tmp_path / "aws.env").exists()


def test_run_with_a_key_calls_the_real_api_and_leaves_nothing_behind_when_killed(tmp_path):
    own = "an-api-key-of-my-own"
    with Run(tmp_path, SEGMIND_API_KEY="a-key-of-mine", API_KEY=own) as running:
        assert "real API" in running.said
        assert "a-key-of-mine" not in running.said
        assert requests.get(f"http://127.0.0.1:{running.port}/v1/jobs", headers={"x-api-key": own}, timeout=10).ok
        children = descendants(running.process.pid)
        running.process.kill()
        running.process.wait()
        wait_until(lambda: not children & processes().keys())


@pytest.mark.parametrize("arguments", [["run", "--port", "0"], ["demo", "--url", "http://127.0.0.1:1/v1"]])
def test_an_api_key_that_api_gateway_would_not_take_is_refused(arguments, capsys, monkeypatch):
    monkeypatch.setenv("API_KEY", "short")
    assert main(arguments) == 1
    assert capsys.readouterr().err == "error: API_KEY must have at least 20 characters, as in API Gateway\n"


def test_demo_shows_a_job_and_saves_its_picture(stack, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("API_KEY", stack.api_key)
    assert main(["demo", "--url", stack.url, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    (saved,) = tmp_path.iterdir()
    assert str(saved) in said
    assert "succeeded" in said
    url = next(line.split()[1] for line in said.splitlines() if line.startswith("URL"))
    assert requests.get(url, timeout=10).content == saved.read_bytes()


def test_demo_starts_a_stack_of_its_own_where_nobody_listens(tmp_path):
    def fresh() -> Stack:
        return Stack(logs=tmp_path / "logs")

    address = f"http://127.0.0.1:{free_port()}/v1"
    (saved,) = demo(
        address,
        "local-development-key",
        ROOT / "events" / "orientation-6.jpg",
        "a tree",
        tmp_path / "out",
        fresh_stack=fresh,
    )
    assert saved.stat().st_size > 1000


def test_demo_says_why_not(stack, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("API_KEY", "wrong")
    assert main(["demo", "--url", stack.url, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: HTTP 403")
    with pytest.raises(DemoFailed, match="there is no file"):
        demo(stack.url, stack.api_key, tmp_path / "none.jpg", "x", tmp_path, fresh_stack=Stack)
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(DemoFailed, match="HTTP 415"):
        demo(stack.url, stack.api_key, tmp_path / "text.jpg", "x", tmp_path, fresh_stack=Stack)
