"""What clients do, over HTTP, through the whole system on one machine."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import requests
from PIL import Image, ImageChops, ImageStat

from tests.stack.client import FIELDS, Client
from tests.system import ROOT, sample_base64


@pytest.fixture
def client(stack):
    stack.segmind.reset()
    return Client(stack.url, stack.api_key)


def picture(url: str) -> Image.Image:
    """Load what a presigned URL names, without a key."""
    answer = requests.get(url, timeout=10)
    answer.raise_for_status()
    return Image.open(io.BytesIO(answer.content))


def test_a_segmind_client_needs_only_a_new_address_and_key(client):
    answer = client.create()
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert job["status"] == "succeeded"
    assert job["input"]["seed"] == FIELDS["seed"]
    assert [picture(output["url"]).size for output in job["outputs"]] == [(512, 512)]
    assert {"x-remaining-credits", "x-generation-time", "x-request-id"} <= {name.lower() for name in answer.headers}


def test_a_segmind_client_that_asks_for_base64_finds_the_image_field(client):
    image = client.create(base64="true", samples="1").json()["image"]
    assert Image.open(io.BytesIO(base64.b64decode(image))).size == (512, 512)


def test_accept_image_answers_with_the_bytes(client):
    answer = client.create(headers={"Accept": "image/jpeg"})
    assert answer.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(answer.content)).size == (512, 512)


def test_a_heic_phone_photo_uploaded_by_a_browser_comes_out_upright(client, stack):
    form = client.session.post(f"{client.url}/uploads", json={"content_type": "image/heic"}, timeout=10)
    assert form.status_code == 201, form.text
    photo = (ROOT / "events" / "phone.heic").read_bytes()
    form = form.json()
    sent = requests.post(form["url"], data=form["fields"], files={"file": ("IMG_1.HEIC", photo)}, timeout=10)
    assert sent.ok, sent.text
    job = client.create(image=form["id"], fit="contain").json()
    assert job["status"] == "succeeded", job
    key = f"inputs/local/{job['id']}.png"
    s3 = stack.client("s3")
    stored = s3.get_object(Bucket=stack.resources["UploadsBucket"], Key=key)["Body"].read()
    shown = Image.open(io.BytesIO(stored)).convert("RGB")
    upright = Image.open(ROOT / "events" / "sample.jpg").convert("RGB")
    upright = upright.resize((512, round(512 * upright.height / upright.width)))
    top = (512 - upright.height) // 2
    shown = shown.crop((0, top, 512, top + upright.height))
    assert max(ImageStat.Stat(ImageChops.difference(shown, upright)).mean) < 12
    assert picture(job["outputs"][0]["url"]).size == (512, 512)


def test_an_image_body_is_an_upload(client):
    photo = (ROOT / "events" / "photo.avif").read_bytes()
    upload = client.session.post(f"{client.url}/uploads", photo, headers={"Content-Type": "image/avif"}, timeout=10)
    assert upload.status_code == 201, upload.text
    assert upload.json()["content_type"] == "image/avif"
    assert client.create(image=upload.json()["id"]).json()["status"] == "succeeded"


def test_when_the_wait_runs_out_the_job_runs_on(client, stack):
    stack.segmind.latency = 5
    answer = client.create(headers={"Prefer": "wait=1"})
    assert answer.status_code == 202
    assert answer.headers["Preference-Applied"] == "wait=1"
    assert answer.headers["Retry-After"]
    job_id = answer.json()["id"]
    assert answer.headers["Location"] == f"{client.url}/jobs/{job_id}"
    assert client.ended(job_id)["status"] == "succeeded"


def test_when_the_caller_hangs_up_the_job_runs_on(client, stack):
    stack.segmind.latency = 0.5
    body = json.dumps({"image": sample_base64(), **FIELDS, "metadata": {"caller": "hung up"}})
    address = urlsplit(client.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = (
            f"POST {address.path}/sd1.5-img2img HTTP/1.1\r\nHost: {address.netloc}\r\nx-api-key: {stack.api_key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body.encode())
        assert stack.segmind.wait_for_calls(1, timeout=20)
    jobs = [job for job in client.get("/jobs").json()["jobs"] if job["metadata"] == {"caller": "hung up"}]
    assert len(jobs) == 1
    assert client.ended(jobs[0]["id"])["status"] == "succeeded"


def test_twenty_requests_with_one_key_at_once_make_one_job(client, stack):
    stack.segmind.latency = 0.5
    headers = {"Idempotency-Key": "twenty-at-once"}
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: Client(stack.url, stack.api_key).create(headers=headers), range(20)))
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {200, 409}, [answer.text for answer in answers]
    assert statuses[200] >= 1
    assert all(answer.headers["Retry-After"] for answer in answers if answer.status_code == 409)
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 200}) == 1
    assert len(stack.segmind.calls) == 1
    replayed = client.create(headers=headers)
    assert replayed.headers["Idempotent-Replayed"] == "true"
    assert client.create(headers=headers, prompt="another").status_code == 422
    assert len(stack.segmind.calls) == 1


def test_a_rotated_segmind_key_fails_no_job(client, stack):
    assert client.create().status_code == 200
    stack.segmind.rotate("a-new-key")
    secret = stack.resources["SegmindSecret"]
    stack.client("secretsmanager").put_secret_value(SecretId=secret, SecretString="a-new-key")
    try:
        assert client.create().status_code == 200
    finally:
        stack.segmind.reset()
        stack.client("secretsmanager").put_secret_value(SecretId=secret, SecretString=stack.segmind.key)
    assert client.create().status_code == 200


@pytest.mark.parametrize(
    ("behaviour", "status", "code", "calls"),
    [
        ("400", 502, "backend_refused", 1),
        ("406-credits", 503, "backend_out_of_credits", 1),
        ("cut", 502, "backend_broken", 1),
        ("html", 502, "backend_broken", 1),
        ("black", 502, "output_blocked", 1),
        ("503", 200, None, 2),
    ],
)
def test_what_a_waiting_caller_hears_of_backend_trouble(client, stack, behaviour, status, code, calls):
    stack.segmind.behave(behaviour, times=1)
    answer = client.create()
    assert answer.status_code == status, answer.text
    if code:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["code"] == code
        job = client.get(f"/jobs/{answer.json()['job_id']}").json()
        assert (job["status"], job["error"]["code"]) == ("failed", code)
    assert len(stack.segmind.calls) == calls


def test_nothing_is_left_in_the_queue(client, stack):
    assert client.create().status_code == 200
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    sqs = stack.client("sqs")
    until = time.monotonic() + 10
    while time.monotonic() < until:
        counts = [
            sqs.get_queue_attributes(QueueUrl=stack.resources[queue], AttributeNames=names)["Attributes"]
            for queue in ("JobsQueue", "JobsDeadLetterQueue")
        ]
        if not any(int(value) for count in counts for value in count.values()):
            return
        time.sleep(0.1)
    raise AssertionError(counts)


def test_the_logs_hold_no_secret_prompt_or_image(client, stack):
    prompt = "a prompt that must never be logged"
    answer = client.create(prompt=prompt, headers={"Idempotency-Key": "a-key-for-the-log"})
    assert answer.status_code == 200
    stack.segmind.behave("400", times=1)
    client.create(prompt=prompt)
    client.create(prompt=prompt, image="https://127.0.0.1/secret-path")
    text = "\n".join(stack.log_lines())
    secrets = [prompt, stack.segmind.key, stack.api_key, sample_base64()[:40], "X-Amz-Signature", "secret-path"]
    assert [secret for secret in secrets if secret in text] == []
    lines = [json.loads(line) for line in stack.log_lines()]
    of_job = [line for line in lines if line.get("job_id") == answer.json()["id"]]
    assert {line.get("correlation_id") for line in of_job} == {answer.headers["x-request-id"]}
    assert {"job created", "answered", "job ended"} <= {line.get("message") for line in of_job}
