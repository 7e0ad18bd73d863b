"""Segmind's v2 behind the whole system: submitted, looked at again through a queue that really delays, fetched."""

from __future__ import annotations

import io

import pytest
import requests
from PIL import Image

from local.stack import Stack
from tests.stack.client import Client


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    parameters = {"SegmindApi": "v2"}
    with Stack(logs=tmp_path_factory.mktemp("logs"), schedules=False, parameters=parameters) as running:
        yield running


@pytest.fixture
def client(stack):
    stack.segmind.reset()
    return Client(stack.url, stack.api_key)


def test_a_caller_who_waits_gets_the_picture(client, stack):
    stack.segmind.latency = 1.5
    answer = client.create(samples=2)
    assert answer.status_code == 200, answer.text
    for output in answer.json()["outputs"]:
        assert Image.open(io.BytesIO(requests.get(output["url"], timeout=10).content)).size == (512, 512)
    assert (len(stack.segmind.calls), stack.segmind.billed) == (2, 2)


def test_nobody_waits_and_messages_look(client, stack):
    stack.segmind.latency = 5
    answer = client.create(headers={"Prefer": "respond-async"})
    assert answer.status_code == 202, answer.text
    job = client.ended(answer.json()["id"])
    assert (job["status"], job["backend"]) == ("succeeded", "segmind")
    # After 1 and 3 seconds at the earliest, and so on until it is there.
    assert stack.segmind.looks[-3:] == ["status", "response", "output"]
    assert set(stack.segmind.looks[:-3]) == {"status"}
    assert stack.segmind.billed == 1


@pytest.mark.parametrize(
    ("told", "code"), [(("410", 1, "submit"), "backend_gone"), (("empty", 1, "response"), "backend_broken")]
)
def test_errors_reach_the_caller(client, stack, told, code):
    stack.segmind.behave(*told)
    answer = client.create()
    assert answer.json()["code"] == code
