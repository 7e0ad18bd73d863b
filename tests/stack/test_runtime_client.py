"""The functions under AWS's own runtime client, from import to answer, as in Lambda."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from local.functions import lambda_environment
from local.lambda_runtime import RuntimeApi
from tests.system import ROOT, rest_event, sample_base64

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="AWS's runtime client is for Linux")


@contextmanager
def under_awslambdaric(stack, name: str) -> Iterator[RuntimeApi]:
    """Run one function of the stack in a process that is not ours."""
    spec = stack.functions[name].spec
    api = RuntimeApi(name, timeout=spec.timeout)
    with contextlib.closing(api):
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "awslambdaric", spec.handler],
            env=lambda_environment(spec, api.address) | dict(stack.environment[name]),
            cwd=spec.directory,
            stdout=subprocess.DEVNULL,
        )
        try:
            yield api
        finally:
            process.kill()
            process.wait()


def invoke(api: RuntimeApi, event: dict) -> dict:
    result = api.invoke(json.dumps(event).encode())
    assert not result.failed, result.json()
    return result.json()


def test_a_job_from_its_request_to_its_end(stack):
    stack.segmind.reset()
    key_id = stack.api_key_id
    with under_awslambdaric(stack, "ApiFunction") as api:
        body = {"image": sample_base64(), "prompt": "a castle on a hill"}
        # The queue's own worker runs it meanwhile.
        answer = invoke(api, rest_event("POST", "/sd1.5-img2img", body, {"Prefer": "wait=20"}, key_id=key_id))
        job = json.loads(answer["body"])
        assert (answer["statusCode"], job["status"]) == (200, "succeeded")
        picture = invoke(api, rest_event("GET", f"/jobs/{job['id']}/outputs/0", key_id=key_id))
        assert picture["statusCode"] == 302


def test_the_worker_runs_a_message(stack):
    event = json.loads((ROOT / "events" / "jobs-queue.json").read_text())
    with under_awslambdaric(stack, "WorkerFunction") as api:
        assert invoke(api, event) == {"batchItemFailures": []}


def test_the_sweep_runs_on_schedule(stack):
    with under_awslambdaric(stack, "SweepFunction") as api:
        assert invoke(api, json.loads((ROOT / "events" / "schedule.json").read_text())) == {}
