"""The container's process, called as SageMaker calls it: over a socket, with nothing in between."""

from __future__ import annotations

import base64
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from endpoint.model import SCHEDULERS, save_tiny
from tests.endpoint.served import ASKED, IMAGE, LONG, encoded, picture, serving
from tests.long import examples

# On a machine that does much else, the few steps below may take longer than SageMaker grants.
UNHURRIED = "from endpoint import process\nprocess.DRAIN_SECONDS = 50"
CANCELED = 'endpoint_requests_total{outcome="canceled"}'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    return str(folder)


@pytest.fixture(scope="module")
def server(model):
    with serving("--model", model, "--port", "0") as started:
        started.said("ready")
        yield started


@pytest.fixture
def single(model):
    """A server with one place to run and one to wait; it ends with the test."""
    with serving("--model", model, driver=UNHURRIED, MAX_RUNNING="1", MAX_BATCH="1", MAX_QUEUE="1") as started:
        started.said("ready")
        yield started


def opened(data: bytes) -> np.ndarray:
    image = Image.open(BytesIO(data))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


def pictured(answer) -> np.ndarray:
    return opened(base64.b64decode(answer.json["image"]))


# What comes out


def test_the_picture_is_the_pipelines(server, model):
    asked = {
        **ASKED,
        "image": encoded(picture(768, 512)),
        "negative_prompt": "rain",
        "scheduler": "DPM Multi",
        "guidance_scale": 6.5,
        "img_width": 768,
        "img_height": 512,
    }
    answer = server.invoke(asked)
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(model, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        asked["prompt"],
        picture(768, 512),
        strength=0.1,
        num_inference_steps=20,
        guidance_scale=6.5,
        negative_prompt="rain",
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    # A float near the middle between two values may be rounded either way.
    assert np.abs(pictured(answer).astype(int) - np.asarray(expected)).max() <= 1


def test_an_answer_in_json(server):
    answer = server.invoke(ASKED)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert set(answer.json) == {"image", "nsfw", "seed", "metrics"}
    assert (answer.json["nsfw"], answer.json["seed"]) == (False, 7)
    assert set(answer.json["metrics"]) == {"queue_ms", "run_ms"}
    assert answer.json["metrics"]["run_ms"] > 0
    assert pictured(answer).shape == (512, 512, 3)


def test_an_answer_in_bytes_is_the_same_picture(server):
    answer = server.invoke({**ASKED, "base64": False})
    assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
    assert answer.headers["x-seed"] == "7"
    assert float(answer.headers["x-generation-time"]) > 0
    assert (opened(answer.body) == pictured(server.invoke(ASKED))).all()


def test_a_random_seed_is_told_and_makes_the_picture_again(server):
    random = [server.invoke({**ASKED, "seed": seed}) for seed in (-1, None)]
    seeds = [answer.json["seed"] for answer in random]
    assert len({*seeds, 7, -1}) == 4
    assert (pictured(random[0]) == pictured(server.invoke({**ASKED, "seed": seeds[0]}))).all()
    assert not (pictured(random[0]) == pictured(random[1])).all()


def test_a_jpeg_and_a_picture_with_transparency_are_read(server):
    for image in (encoded(picture(), "JPEG"), encoded(picture().convert("RGBA")), encoded(picture().convert("L"))):
        assert server.invoke({**ASKED, "image": image}).status == 200


def test_requests_at_once_share_steps_and_change_nothing(server):
    seeds = range(2)
    alone = [pictured(server.invoke({**ASKED, "seed": seed})) for seed in seeds]
    shared = 'endpoint_batch_samples_bucket{le="1.0"}'
    before = server.metric("endpoint_batch_samples_count") - server.metric(shared)
    blocker = server.begin(LONG)
    server.wait_for("endpoint_running", bool)
    with ThreadPoolExecutor(len(seeds)) as callers:
        together = list(callers.map(lambda seed: pictured(server.invoke({**ASKED, "seed": seed})), seeds))
    blocker.close()
    assert server.metric("endpoint_batch_samples_count") - server.metric(shared) > before
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


# What is refused


WRONG = {
    "image": [1, "", "no base64!", base64.b64encode(b"no image").decode(), encoded(picture(), "GIF"), IMAGE[:400], []],
    "prompt": [1, "", "  ", "x" * 10_001, "\ud800", ["a"]],
    "negative_prompt": [1, "x" * 10_001, {}],
    "samples": [0, 2, True, "two"],
    "scheduler": ["ddim", "", 1, ["DDIM"]],
    "num_inference_steps": [19, 101, 20.5, True, "many", float("nan"), 10**5000 // 10**4990],
    "guidance_scale": [0, 0.09, 25.1, True, float("nan"), float("inf")],
    "strength": [0, 0.09, 1.01, True, float("-inf"), {}],
    "seed": [-2, 10**15, 1.5, False],
    "img_width": [0, 511, 513, 640, 1024, True],
    "img_height": ["big", [512]],
    "base64": [1, "yes", []],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named_with_what_is_accepted(server, name):
    for value in WRONG[name]:
        answer = server.invoke({**ASKED, name: value})
        assert (answer.status, answer.json["code"]) == (400, "invalid_request"), value
        assert list(answer.errors) == [name], value
        assert "must" in answer.errors[name]


def test_all_that_is_wrong_is_named_at_once(server):
    answer = server.invoke({"strength": 7, "scheduler": "DDIM 2", "Prompt": "x", "fit": "cover"})
    assert set(answer.errors) == {"strength", "scheduler", "Prompt", "fit", "image", "prompt"}
    assert answer.errors["strength"] == "must be a number from 0.1 to 1"
    assert all(name in answer.errors["scheduler"] for name in SCHEDULERS)
    # The first unknown one tells which are known.
    assert "negative_prompt" in answer.errors["Prompt"]
    assert answer.errors["fit"] == "is not known"
    assert (answer.errors["image"], answer.errors["prompt"]) == ("is required", "is required")


def test_a_body_of_many_wrong_fields_has_a_short_answer(server):
    answer = server.invoke({f"field {number}": number for number in range(100_000)})
    assert answer.status == 400
    assert list(answer.errors) == [f"field {number}" for number in range(20)]
    assert len(answer.body) < 4000
    # Its names are nobody's to log, whatever they say.
    answer = server.invoke({"is not known": 1, "strength": 7}, X_Amzn_SageMaker_Inference_Id="named")
    line = server.logged(lambda entry: entry.get("inference_id") == "named")
    assert line["fields"] == ["strength", "image", "prompt"]


@pytest.mark.parametrize(("width", "height"), [(512, 768), (768, 512), (64, 64), (20_000, 20_000)])
def test_an_image_of_another_size_is_refused(server, width, height):
    answer = server.invoke({**ASKED, "image": encoded(Image.new("1", (width, height)))})
    assert answer.status == 400
    assert answer.errors == {
        "image": f"must have 512 x 512 pixels, as img_width and img_height say; it has {width} x {height}"
    }


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 50_000, b"9" * 5000, b"[]", b"null"]
)
def test_a_body_that_is_no_json_object_is_refused(server, body):
    answer = server.call("POST", "/invocations", body, Content_Type="application/json")
    assert (answer.status, answer.json["code"], list(answer.errors)) == (400, "invalid_request", ["body"])


def test_another_content_type_is_refused(server):
    for headers in ({}, {"Content_Type": "image/png"}, {"Content_Type": "application/jsonl"}):
        answer = server.call("POST", "/invocations", json.dumps(ASKED), **headers)
        assert (answer.status, answer.json["code"]) == (415, "unsupported_media_type")
    named = server.call("POST", "/invocations", "{}", Content_Type="Application/JSON; charset=utf-8")
    assert named.status == 400


def test_a_body_that_is_too_large_is_refused(server):
    limit = 25 * 1024 * 1024
    declared = server.connect()
    declared.putrequest("POST", "/invocations")
    declared.putheader("Content-Type", "application/json")
    declared.putheader("Content-Length", str(limit + 1))
    declared.endheaders()
    # Before a byte of it was sent.
    assert declared.getresponse().status == 413
    declared.close()
    chunked = server.call("POST", "/invocations", iter([b" " * 2**20] * 26), Content_Type="application/json")
    assert (chunked.status, chunked.json["code"]) == (413, "too_large")
    largest = json.dumps(ASKED).encode().ljust(limit)
    assert server.call("POST", "/invocations", largest, Content_Type="application/json").status == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nothing", 404, "not_found"), ("GET", "/invocations", 405, "method_not_allowed")],
)
def test_other_routes_are_refused_as_json(server, method, path, status, code):
    answer = server.call(method, path)
    assert (answer.status, answer.json["code"]) == (status, code)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20) | st.sampled_from([IMAGE, "DDIM"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
BODIES = st.one_of(
    st.binary(max_size=200),
    JSON.map(json.dumps).map(str.encode),
    # Never a whole request: no prompt.
    st.dictionaries(st.sampled_from([*WRONG]).filter(lambda name: name != "prompt"), JSON).map(
        lambda body: json.dumps(body).encode()
    ),
)


def test_malformed_requests_in_between_harm_nobody(server):
    expected = pictured(server.invoke(ASKED))

    @settings(max_examples=examples(60), deadline=None)
    @given(BODIES)
    def refused(body):
        answer = server.call("POST", "/invocations", body, Content_Type="application/json")
        assert (answer.status, answer.json["code"]) == (400, "invalid_request")
        assert answer.errors

    with ThreadPoolExecutor(1) as caller:
        good = [caller.submit(server.invoke, ASKED) for _ in range(2)]
        refused()
        answers = [future.result() for future in good]
    for answer in answers:
        assert np.abs(pictured(answer).astype(int) - expected).max() <= 1
    assert server.call("GET", "/ping").status == 200


def test_broken_http_harms_nobody(server):
    for bytes_sent in (b"\0\1\2\r\n\r\n", b"POST /invocations HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"GET"):
        connection = server.connect()
        connection.connect()
        connection.sock.sendall(bytes_sent)
        connection.close()
    assert server.call("GET", "/ping").status == 200


# What an operator sees


def test_ping_and_metrics(server):
    asked = {**ASKED, "seed": 8}
    before = server.metric('endpoint_requests_total{outcome="succeeded"}')
    refused = server.metric('endpoint_requests_total{outcome="refused"}')
    steps, started = server.metric("endpoint_step_seconds_count"), server.metric("endpoint_queue_seconds_count")
    assert server.invoke(asked).status == 200
    assert server.invoke({}).status == 400
    assert server.metric('endpoint_requests_total{outcome="succeeded"}') == before + 1
    assert server.metric('endpoint_requests_total{outcome="refused"}') == refused + 1
    assert server.metric("endpoint_step_seconds_count") >= steps + 2
    assert server.metric("endpoint_queue_seconds_count") == started + 1
    assert server.metric("endpoint_ready") == 1
    server.wait_for("endpoint_running", lambda value: value == 0)
    page = server.call("GET", "/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    assert server.call("GET", "/ping").status == 200


def test_logs_are_json_lines_that_hold_no_prompt_and_no_picture(model):
    secret = "zyxwv"
    prompt = f"{secret} " * 200
    with serving("--model", model, DEVICE="cpu") as server:
        ready = server.said("ready")
        assert (ready["device"], ready["dtype"], ready["compile"]) == ("cpu", "float32", "off")
        done = server.invoke(
            {**ASKED, "prompt": prompt, "negative_prompt": secret}, X_Amzn_SageMaker_Inference_Id="job-0-1"
        )
        assert done.status == 200
        refused = server.invoke({**ASKED, "prompt": prompt, secret: 1, "strength": secret})
        assert secret not in refused.errors["strength"]
        line = server.logged(lambda entry: entry.get("inference_id") == "job-0-1")
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        entries = [json.loads(text) for text in server.lines]
        assert not server.errors
    assert line["outcome"] == "succeeded"
    assert {name: line[name] for name in ("status", "width", "height", "scheduler", "steps", "strength")} == {
        "status": 200,
        "width": 512,
        "height": 512,
        "scheduler": "DDIM",
        "steps": 20,
        "strength": 0.1,
    }
    assert line["ms"] >= line["queue_ms"] + line["run_ms"] - 2
    told = [entry for entry in entries if entry["message"] == "invocation"]
    assert [entry["outcome"] for entry in told] == ["succeeded", "refused"]
    assert told[1]["fields"] == ["strength"]
    everything = "".join(server.lines)
    assert secret not in everything
    assert IMAGE[1000:1040] not in everything


# Callers that leave, too many of them, and the end


def test_callers_that_leave_free_their_place_and_sigterm_finishes_what_runs(single):
    running = single.begin({**LONG, "scheduler": "Heun"})
    single.wait_for("endpoint_running", lambda value: value == 1)
    waiting = single.begin(LONG)
    single.wait_for("endpoint_waiting", lambda value: value == 1)
    full = single.invoke(ASKED)
    assert (full.status, full.json["code"]) == (503, "busy")
    assert int(full.headers["retry-after"]) > 0
    steps = single.metric("endpoint_step_seconds_count")

    waiting.close()
    single.wait_for("endpoint_waiting", lambda value: value == 0)
    assert single.metric("endpoint_running") == 1
    running.close()
    single.wait_for("endpoint_running", lambda value: value == 0)
    single.wait_for(CANCELED, lambda value: value == 2)
    # Heun has nearly 200 steps.
    assert single.metric("endpoint_step_seconds_count") < steps + 100
    assert single.invoke(ASKED).status == 200
    assert single.metric('endpoint_requests_total{outcome="busy"}') == 1

    running = single.begin({**ASKED, "strength": 0.3})
    single.wait_for("endpoint_running", lambda value: value == 1)
    waiting = single.begin(ASKED)
    single.wait_for("endpoint_waiting", lambda value: value == 1)
    single.process.send_signal(signal.SIGTERM)
    single.said("draining")
    assert single.call("GET", "/ping").status == 503
    refused = single.invoke(ASKED)
    assert (refused.status, refused.json["code"]) == (503, "busy")
    assert int(refused.headers["retry-after"]) > 0
    assert single.metric("endpoint_ready") == 0
    assert [connection.getresponse().status for connection in (running, waiting)] == [200, 200]
    running.close()
    waiting.close()
    assert single.end() == 0


def test_a_caller_that_leaves_before_its_request_is_whole_harms_nobody(server):
    canceled = server.metric(CANCELED)
    connection = server.connect()
    connection.putrequest("POST", "/invocations")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"{")
    connection.close()
    server.wait_for(CANCELED, lambda value: value == canceled + 1)


def test_what_lasts_longer_than_the_drain_may_is_answered_503(model):
    shorter = "from endpoint import process\nprocess.DRAIN_SECONDS = 0.2"
    with serving("--model", model, driver=shorter) as server:
        server.said("ready")
        running = server.begin({**LONG, "scheduler": "Heun"})
        server.wait_for("endpoint_running", lambda value: value == 1)
        server.process.send_signal(signal.SIGTERM)
        response = running.getresponse()
        assert response.status == 503
        assert json.load(response)["code"] == "busy"
        running.close()
        assert server.end() == 0


# The start

# Loads once a line comes in.
PATIENT = """
import sys
from endpoint import process
load = process.load
process.load = lambda *given: (sys.stdin.readline(), load(*given))[1]
"""


def test_nothing_is_taken_before_the_model_is_warm(model):
    with serving("--model", model, driver=PATIENT) as server:
        ping = server.call("GET", "/ping")
        assert (ping.status, ping.json["status"]) == (503, "warming up")
        answer = server.invoke(ASKED)
        assert (answer.status, answer.json["code"]) == (503, "busy")
        assert int(answer.headers["retry-after"]) > 0
        assert server.metric("endpoint_ready") == 0
        server.process.stdin.write("\n")
        server.process.stdin.flush()
        server.said("ready")
        assert server.call("GET", "/ping").status == 200
        assert server.invoke(ASKED).status == 200


def test_sigterm_while_the_model_loads_ends_the_process_at_once(model):
    with serving("--model", model, driver=PATIENT) as server:
        assert server.call("GET", "/ping").status == 503
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        ([], {"MODEL_DIR": "/no/folder"}, "error: cannot serve the model at /no/folder: there is no such folder"),
        (["--port", "eighty"], {}, "error: PORT must be an integer from 0 to 65535"),
        ([], {"MAX_BATCH": "0"}, "error: MAX_BATCH must be an integer from 1 to 100000"),
        ([], {"COMPILE": "fast"}, "error: COMPILE must be one of auto, off, default, max-autotune"),
        ([], {"DEVICE": "gpu"}, "error: DEVICE must be one of auto, cuda, cpu"),
        ([], {"SAFETY_CHECKER": "1"}, "error: SAFETY_CHECKER must be one of off, on"),
    ],
)
def test_a_start_that_fails_says_why_in_one_line(arguments, environ, said):
    with serving(*arguments, **environ) as server:
        assert server.end() in (1, 2)
        assert server.errors == said + "\n"


def test_a_folder_without_a_model_and_a_port_in_use_are_told(server, model, tmp_path):
    with serving("--model", str(tmp_path)) as empty:
        assert empty.end() == 1
        assert empty.errors.startswith(f"error: cannot serve the model at {tmp_path}: ")
        assert empty.errors.count("\n") == 1
    with serving("--model", model, "--port", str(server.port)) as second:
        assert second.end() == 1
        assert second.errors == f"error: cannot listen on 127.0.0.1:{server.port}: Address already in use\n"


# What the engine may answer. Its own tests show when it does.

ENGINE = """
from concurrent.futures import Future
from endpoint.engine import Engine, Result
submit = Engine.submit
def answered(engine, request):
    future = Future()
    if "broken" in request.prompt:
        future.set_exception(RuntimeError(request.prompt))
    elif "naked" in request.prompt:
        future.set_result(Result(None, flagged=True, queue_seconds=0.5, run_seconds=1.5))
    else:
        return submit(engine, request)
    return future
Engine.submit = answered
"""


def test_flagged_and_failed_requests(model):
    with serving("--model", model, driver=ENGINE) as server:
        server.said("ready")
        for wants_json in (True, False):
            flagged = server.invoke({**ASKED, "prompt": "naked secret", "base64": wants_json})
            assert flagged.status == 200
            assert flagged.json == {
                "image": None,
                "nsfw": True,
                "seed": 7,
                "metrics": {"queue_ms": 500, "run_ms": 1500},
            }
        failed = server.invoke({**ASKED, "prompt": "broken secret"})
        assert (failed.status, failed.json["code"], failed.json["errors"]) == (500, "internal_error", [])
        assert b"secret" not in failed.body
        assert server.logged(lambda entry: entry.get("outcome") == "failed")["error"] == "RuntimeError"
        assert server.invoke(ASKED).status == 200
        assert not any("secret" in line for line in server.lines)


FAULT = """
from endpoint.samples import Pool
class Fault(BaseException):
    pass
step = Pool.step
def fault(pool, samples):
    if any("dying" in sample.request.prompt for sample in samples):
        raise Fault(samples[0].request.prompt)
    step(pool, samples)
Pool.step = fault
"""


def test_an_engine_that_dies_ends_the_process_when_all_is_answered(model):
    with serving("--model", model, driver=FAULT, TRANSFORMERS_VERBOSITY="error") as server:
        server.said("ready")
        running = server.begin(LONG)
        server.wait_for("endpoint_running", bool)
        dying = server.begin({**ASKED, "prompt": "dying secret"})
        for connection in (running, dying):
            response = connection.getresponse()
            assert (response.status, json.load(response)["code"]) == (503, "busy")
            connection.close()
        assert server.end() == 1
        assert server.errors == f"error: cannot serve the model at {model}: the engine stopped by a fault\n"
        fault = server.said("the engine stopped by a fault: Fault")
        assert fault["error"] == "Fault"
        assert fault["at"]
        assert not any("secret" in line for line in server.lines)
