"""Segmind's own SDK, and callers as there are many: nothing but the address and the key is new."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from contextlib import contextmanager

import httpx
import pytest
import requests
from PIL import Image
from segmind import SegmindClient
from segmind.exceptions import SegmindError

from tests.stack.client import FIELDS as SENT
from tests.stack.client import Client
from tests.system import sample_base64

MODEL = "sd1.5-img2img"
FIELDS = {"image": sample_base64(), **SENT, "img_height": 768}


@pytest.fixture
def url(stack):
    stack.segmind.reset()
    return stack.compatible_url


@contextmanager
def client_of(url, api_key):
    client = SegmindClient(api_key=api_key, base_url=url)
    yield client
    # It cannot be closed.
    client._client.close()


@pytest.fixture
def segmind(url, stack):
    with client_of(url, stack.api_key) as client:
        yield client


def size(data: bytes) -> tuple[int, int]:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture.size


def fetched(result):
    assert result["status"] == "COMPLETED"
    return httpx.get(result["output"], timeout=10).raise_for_status().content


def test_the_sdk_runs_a_model(segmind):
    assert size(fetched(segmind.run(MODEL, **FIELDS))) == (512, 768)


def test_the_sdk_submits_and_waits(segmind, stack):
    job = segmind.submit_async(MODEL, **FIELDS)
    assert job.status()["status"] in ("QUEUED", "PROCESSING", "COMPLETED")
    result = job.wait(timeout=30, interval=0.1)
    assert size(fetched(result)) == (512, 768)
    main = Client(stack.url, stack.api_key).ended(result["request_id"])
    assert (main["status"], main["via"]) == ("succeeded", "segmind")


def test_the_sdk_waits_for_bytes(segmind):
    answer = segmind.run_sync(MODEL, **FIELDS)
    assert answer.headers["content-type"].startswith("image/")
    assert size(answer.content) == (512, 768)
    assert answer.headers["x-seed-value"] == str(FIELDS["seed"])


def test_the_sdk_asks_for_base64(segmind):
    encoded = segmind.run_sync(MODEL, **{**FIELDS, "base64": True}).json()["image"]
    assert size(base64.b64decode(encoded)) == (512, 768)


@pytest.mark.parametrize("call", ["run", "run_sync", "submit_async"])
def test_the_sdk_can_read_a_refusal(segmind, call):
    with pytest.raises(SegmindError) as refused:
        getattr(segmind, call)(MODEL, **{**FIELDS, "num_inference_steps": 7})
    assert "num_inference_steps" in refused.value.detail


def test_the_sdk_can_read_a_refused_key(url):
    with client_of(url, "SG_nobodys") as client, pytest.raises(SegmindError) as refused:
        client.run_sync(MODEL, **FIELDS)
    assert (refused.value.status, bool(refused.value.detail)) == (401, True)


@pytest.mark.parametrize("accept", [None, "application/json, text/plain, */*", "image/jpeg"])
def test_other_callers_get_bytes(url, stack, accept):
    headers = {"x-api-key": stack.api_key, "Accept": accept}
    answer = requests.post(f"{url}/{MODEL}", json=FIELDS, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    assert size(answer.content) == (512, 768)


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
def test_curl_without_accept_gets_bytes(url, stack):
    command = ["curl", "-s", f"{url}/{MODEL}", "-H", f"x-api-key: {stack.api_key}", "-H", "Accept:"]
    command += ["-H", "Content-Type: application/json", "-d", "@-"]
    done = subprocess.run(command, input=json.dumps(FIELDS).encode(), capture_output=True, timeout=30, check=True)
    assert size(done.stdout) == (512, 768)


def test_a_body_past_the_limit_is_told_to_send_a_url(url, stack):
    body = {**FIELDS, "image": "A" * 7_000_000}
    answer = requests.post(f"{url}/{MODEL}", json=body, headers={"x-api-key": stack.api_key}, timeout=30)
    assert answer.status_code == 413
    assert "URL" in answer.json()["error"]
