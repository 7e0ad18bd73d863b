"""A pipeline drops files into the inbox and finds results in the outbox, through the whole system on one machine."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, quote_plus

import pillow_heif
import pytest
from PIL import Image

from img2img.admin.audit import audit
from local.stack import Stack
from tests.stack.client import Client, wait_until

PRICE = 1000  # of one sample of 20 steps and 512 x 512
SOFT = {"prompt": "a soft landscape", "strength": 0.4}
TURNED = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
NAMES = [
    "IMG 0001.jpg",
    "one+one.jpg",
    "one one.jpg",
    "one%20one.jpg",
    "one%2Bone.jpg",
    "100%.jpg",
    "%",
    "%20",
    "%zz.jpg",
    "a&b=c?d#e.jpg",
    "quo'te\"s.jpg",
    "back\\slash.jpg",
    "~!$(),;:@[]{}|^`<>.jpg",
    "🌄🏰.jpg",
    "👩‍👩‍👧‍👦 family.png",
    "città è già.jpg",
    "東京タワー.jpg",
    "Красная площадь.jpg",
    "القاهرة.jpg",
    "प्रयाग.webp",
    "2026/11/22/photo.jpg",
    "2026/11/22/a photo + 100%.jpg",
    "a//b.jpg",
    "no-extension",
    ".hidden",
    "two.dots..jpg",
    "results.json",
    f"{'long ' * 176}.jpg",
    f"{'x' * 870}.jpg",
    f"{'deep/' * 174}.jpg",
    f"{'長' * 290}.jpg",
]


def picture() -> Image.Image:
    """Return a small picture that is light at its top."""
    return Image.linear_gradient("L").resize((64, 64)).transpose(Image.Transpose.FLIP_TOP_BOTTOM).convert("RGB")


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    """Return a photo that is stored as a phone stores it: turned, with a note of how it is to be shown."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture().transpose(TURNED[orientation]), exif=exif)


def good_files(count: int) -> dict[str, bytes]:
    """Return photos as phones and cameras make them, by name: the odd names, then as many others as it takes."""
    pillow_heif.register_heif_opener()
    photos = [
        encoded(picture()),
        *(turned(orientation) for orientation in TURNED),
        encoded(picture(), "PNG"),
        encoded(picture(), "WEBP"),
        encoded(picture(), "HEIF"),
    ]
    names = NAMES + [f"IMG_{number:04}.JPG" for number in range(count - len(NAMES))]
    return {name: photos[number % len(photos)] for number, name in enumerate(names)}


# By name, with the code of their error.
BROKEN = {
    "empty.jpg": (b"", "unsupported_image"),
    "notes.txt": (b"not a photo\n" * 20, "unsupported_image"),
    "cut off.jpg": (encoded(picture())[:500], "unsupported_image"),
    "huge+.png": (encoded(Image.new("1", (8001, 8001)), "PNG"), "too_large"),
    "brochure 100%.pdf": (b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", "unsupported_image"),
}


@dataclass(frozen=True)
class Pipeline:
    """What works for a team with its inbox and outbox, and looks at its jobs with a key."""

    stack: Stack
    client: Client
    team: str

    @property
    def s3(self) -> Any:
        return self.stack.client("s3")

    def put(self, name: str, data: bytes, preset: str = "soft", **metadata: str) -> str:
        """Drop a file into the inbox, and return its ETag."""
        named = {key.replace("_", "-"): value for key, value in metadata.items()}
        bucket, key = self.stack.resources["UploadsBucket"], f"inbox/{self.team}/{preset}/{name}"
        return str(self.s3.put_object(Bucket=bucket, Key=key, Body=data, Metadata=named)["ETag"])

    def outbox(self) -> dict[str, tuple[str, datetime]]:
        """Return the ETag and the time of each result, by key without the team's prefix."""
        prefix = f"outbox/{self.team}/"
        pages = self.s3.get_paginator("list_objects_v2").paginate(
            Bucket=self.stack.resources["ResultsBucket"], Prefix=prefix
        )
        found = [item for page in pages for item in page.get("Contents", ())]
        return {item["Key"].removeprefix(prefix): (item["ETag"], item["LastModified"]) for item in found}

    def file(self, name: str, preset: str = "soft") -> Any:
        """Return an object of the outbox, as boto3 does."""
        bucket, key = self.stack.resources["ResultsBucket"], f"outbox/{self.team}/{preset}/{name}"
        return self.s3.get_object(Bucket=bucket, Key=key)

    def document(self, name: str, preset: str = "soft") -> dict[str, Any]:
        """Return a document of the outbox."""
        found: dict[str, Any] = json.load(self.file(name, preset)["Body"])
        return found

    def awaited(self, name: str, preset: str = "soft") -> dict[str, Any]:
        """Return a document of the outbox as soon as it is there."""
        wait_until(lambda: f"{preset}/{name}" in self.outbox(), 30)
        return self.document(name, preset)

    def calls(self) -> list[dict[str, Any]]:
        """Return what the backend was asked for with the team's own prompt."""
        prompt = f"{SOFT['prompt']} of {self.team}"
        return [call["body"] for call in self.stack.segmind.calls if call["body"].get("prompt") == prompt]


@pytest.fixture(scope="module")
def new_pipeline(stack, new_team) -> Callable[..., Pipeline]:
    """Make a team with a preset `soft` and, unless told otherwise, credits for ten samples."""

    def make(team: str, thousandths: int = 10 * PRICE) -> Pipeline:
        client = new_team(team, thousandths)
        preset = {**SOFT, "prompt": f"{SOFT['prompt']} of {team}"}
        answer = client.session.put(f"{client.url}/presets/soft", json=preset, timeout=10)
        assert answer.status_code == 201, answer.text
        return Pipeline(stack, client, team)

    return make


def messages(stack: Stack, queue: str) -> int:
    """Return how many messages a queue holds, in flight or not."""
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    url = stack.resources[queue]
    found = stack.client("sqs").get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
    return sum(int(count) for count in found.values())


# -------------------------------------------------------------------------------------------------- two hundred files

STRAYS = ("inbox/nobody/soft/a photo.jpg", "inbox/photo without a team.jpg")


@pytest.fixture(scope="module", autouse=True)
def _strays(stack) -> None:
    """Objects that belong to no team; what becomes of them takes a while."""
    stack.segmind.reset()
    for key in STRAYS:
        stack.client("s3").put_object(Bucket=stack.resources["UploadsBucket"], Key=key, Body=b"x")


@dataclass(frozen=True)
class Dropped:
    """All the files that were dropped into one inbox, and the ETags that S3 answered with."""

    pipeline: Pipeline
    good: dict[str, bytes]
    etags: dict[str, str]


@pytest.fixture(scope="module")
def dropped(new_pipeline) -> Dropped:
    pipeline = new_pipeline("pipeline", 200 * PRICE)
    good = good_files(195)
    files = [*good.items(), *((name, data) for name, (data, _) in BROKEN.items())]
    random.Random(1).shuffle(files)
    with ThreadPoolExecutor(8) as pool:
        etags = list(pool.map(lambda file: pipeline.put(*file), files))
    assert pipeline.stack.segmind.wait_for_calls(len(good), timeout=120)
    documents = {f"soft/{name}.json" for name in good} | {f"soft/{name}.error.json" for name in BROKEN}
    wait_until(lambda: documents <= pipeline.outbox().keys())
    return Dropped(pipeline, good, dict(zip((name for name, _ in files), etags, strict=True)))


def test_each_photo_has_its_picture_and_each_broken_file_its_error(dropped):
    expected = {f"soft/{name}{ending}" for name in dropped.good for ending in ("-0.jpg", ".json")}
    expected |= {f"soft/{name}.error.json" for name in BROKEN}
    assert dropped.pipeline.outbox().keys() == expected

    def check(name: str) -> str:
        job = dropped.pipeline.document(f"{name}.json")
        found = dropped.pipeline.file(f"{name}-0.jpg")
        assert Image.open(found["Body"]).size == (512, 512)
        assert found["ContentType"] == "image/jpeg"
        assert (found["Metadata"]["job-id"], found["Metadata"]["seed"]) == (job["id"], str(job["input"]["seed"]))
        assert (job["status"], job["source"]["key"]) == ("succeeded", f"inbox/pipeline/soft/{name}")
        return str(job["id"])

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(check, dropped.good))) == 195
    errors = {name: dropped.pipeline.document(f"{name}.error.json") for name in BROKEN}
    assert {name: job["error"]["code"] for name, job in errors.items()} == {
        name: code for name, (_, code) in BROKEN.items()
    }


def test_the_team_sees_a_job_of_each_file(dropped):
    jobs = {job["source"]["key"]: job for job in dropped.pipeline.client.jobs()}
    assert jobs.keys() == {f"inbox/pipeline/soft/{name}" for name in dropped.etags}
    for name, etag in dropped.etags.items():
        job = jobs[f"inbox/pipeline/soft/{name}"]
        assert job["status"] == ("failed" if name in BROKEN else "succeeded")
        assert job["source"]["bucket"] == dropped.pipeline.stack.resources["UploadsBucket"]
        assert job["source"]["preset"] == "soft"
        assert job["source"]["version"].startswith(f"{etag.strip(chr(34))}:")


def test_each_sample_was_asked_for_once_and_paid_for_once(dropped, admin):
    pipeline = dropped.pipeline
    made = Counter(job["input"]["seed"] for job in pipeline.client.jobs() if job["status"] == "succeeded")
    assert Counter(call["seed"] for call in pipeline.calls()) == made
    assert made.total() == 195
    found = audit(admin.credits, admin.jobs, "pipeline")
    assert (found.still, found.differences) == (True, ())
    account = pipeline.client.get("/balance").json()
    assert (account["balance"], account["reserved"], account["charged"]) == (5 * PRICE, 0, 195 * PRICE)
    usage = pipeline.client.get("/usage", params={"group_by": "key"}).json()
    counts = {"jobs": 200, "succeeded": 195, "failed": 5, "canceled": 0, "images": 195, "charged": 195 * PRICE}
    (row,) = usage["rows"]
    assert row.items() >= {"key": "inbox", **counts}.items()


def test_every_kind_of_photo_goes_to_the_backend_upright(dropped):
    pipeline = dropped.pipeline
    for name in list(dropped.good)[:7]:
        job = pipeline.document(f"{name}.json")
        stored = pipeline.s3.get_object(
            Bucket=pipeline.stack.resources["UploadsBucket"], Key=f"inputs/pipeline/{job['id']}.png"
        )
        sent = Image.open(stored["Body"]).convert("L")
        top, bottom = sent.getpixel((256, 40)), sent.getpixel((256, 472))
        assert top > bottom + 150, name


def notices(pipeline: Pipeline) -> Iterator[str]:
    """Return what S3 sent of each object, from what became of it."""
    for job in pipeline.client.jobs():
        source = job["source"]
        etag, _, sequencer = source["version"].rpartition(":")
        named = {"key": quote_plus(source["key"], safe="/"), "size": 1, "eTag": etag, "sequencer": sequencer}
        s3 = {"s3SchemaVersion": "1.0", "bucket": {"name": source["bucket"]}, "object": named}
        record = {"eventVersion": "2.1", "eventSource": "aws:s3", "eventName": "ObjectCreated:Put", "s3": s3}
        yield json.dumps({"Records": [record]})


def without_urls(job: dict[str, Any]) -> dict[str, Any]:
    """Return a job without what is signed afresh for each answer."""
    signed = {"url", "url_expires_at"}
    outputs = [{name: value for name, value in output.items() if name not in signed} for output in job["outputs"]]
    return {**job, "outputs": outputs}


def everything(pipeline: Pipeline) -> dict[str, Any]:
    """Return all that the deliveries of a notice could change."""
    inputs = pipeline.s3.get_paginator("list_objects_v2").paginate(
        Bucket=pipeline.stack.resources["UploadsBucket"], Prefix=f"inputs/{pipeline.team}/"
    )
    return {
        "jobs": [without_urls(job) for job in pipeline.client.jobs()],
        "outbox": pipeline.outbox(),
        "inputs": [(item["Key"], item["ETag"], item["LastModified"]) for page in inputs for item in page["Contents"]],
        "calls": len(pipeline.calls()),
        "balance": pipeline.client.get("/balance").json(),
        "usage": pipeline.client.get("/usage").json(),
        "dead": messages(pipeline.stack, "JobsDeadLetterQueue"),
    }


def test_a_second_delivery_of_every_notice_in_another_order_changes_nothing(dropped):
    pipeline = dropped.pipeline
    before = everything(pipeline)
    bodies = list(notices(pipeline))
    assert len(bodies) == 200
    random.Random(2).shuffle(bodies)
    sqs, queue = pipeline.stack.client("sqs"), pipeline.stack.resources["UploadsQueue"]
    for first in range(0, len(bodies), 10):
        entries = [{"Id": str(number), "MessageBody": body} for number, body in enumerate(bodies[first : first + 10])]
        assert len(sqs.send_message_batch(QueueUrl=queue, Entries=entries)["Successful"]) == len(entries)
    wait_until(lambda: messages(pipeline.stack, "UploadsQueue") == 0, 60)
    wait_until(lambda: messages(pipeline.stack, "JobsQueue") == 0)
    assert everything(pipeline) == before


# -------------------------------------------------------------------------------------------------- one at a time


def test_metadata_overrides_the_preset(new_pipeline):
    pipeline = new_pipeline("choosy")
    prompt = "un château à 100% 🏰 + 東京"
    pipeline.put("a.jpg", encoded(picture()), prompt=quote(prompt), samples="2", seed="41", x_ray="7", strength="0.9")
    job = pipeline.awaited("a.jpg.json")
    asked = {name: job["input"][name] for name in ("prompt", "samples", "seed", "strength")}
    assert asked == {"prompt": prompt, "samples": 2, "seed": 41, "strength": 0.9}
    calls = [call["body"] for call in pipeline.stack.segmind.calls if call["body"].get("prompt") == prompt]
    assert {(call["seed"], call["strength"]) for call in calls} == {(41, 0.9), (42, 0.9)}
    assert pipeline.outbox().keys() == {"soft/a.jpg-0.jpg", "soft/a.jpg-1.jpg", "soft/a.jpg.json"}
    assert [pipeline.file(f"a.jpg-{index}.jpg")["Metadata"]["seed"] for index in (0, 1)] == ["41", "42"]


def test_overwriting_a_file_makes_another_job_and_replaces_its_results(new_pipeline):
    pipeline = new_pipeline("again")
    ids: list[str] = []
    for data in (encoded(picture()), encoded(picture(), quality=30), encoded(picture(), quality=30)):
        pipeline.put("a photo.jpg", data)
        wait_until(lambda: pipeline.awaited("a photo.jpg.json")["id"] not in ids)
        job = pipeline.document("a photo.jpg.json")
        assert pipeline.file("a photo.jpg-0.jpg")["Metadata"]["job-id"] == job["id"]
        ids.append(job["id"])
    assert [job["id"] for job in pipeline.client.jobs()] == ids[::-1]
    assert pipeline.client.get("/balance").json()["charged"] == 3 * PRICE


def test_a_file_that_asks_for_something_wrong_says_so_and_costs_nothing(new_pipeline):
    pipeline = new_pipeline("wrong")
    session, presets = pipeline.client.session, f"{pipeline.client.url}/presets"
    assert session.put(f"{presets}/silent", json={"strength": 0.5}, timeout=10).status_code == 201
    pipeline.put("a.jpg", encoded(picture()), preset="unheard-of")
    pipeline.put("a.jpg", encoded(picture()), preset="silent")
    pipeline.put("a.jpg", encoded(picture()), strength="strong", samples="9")
    codes = {
        preset: pipeline.awaited("a.jpg.error.json", preset)["error"] for preset in ("unheard-of", "silent", "soft")
    }
    assert {preset: error["code"] for preset, error in codes.items()} == {
        "unheard-of": "preset_unknown",
        "silent": "invalid_request",
        "soft": "invalid_request",
    }
    assert "prompt" in codes["silent"]["detail"]
    assert {"strength", "samples"} <= set(codes["soft"]["detail"].replace(":", " ").split())
    jobs = pipeline.client.jobs()
    assert [job["status"] for job in jobs] == ["failed"] * 3
    assert {(job["credits"]["reserved"], job["credits"]["charged"]) for job in jobs} == {(0, 0)}
    account = pipeline.client.get("/balance").json()
    assert (account["balance"], account["reserved"], account["charged"]) == (10 * PRICE, 0, 0)

    # Once there is such a preset, the same file is good enough.
    assert session.put(f"{presets}/unheard-of", json=SOFT, timeout=10).status_code == 201
    pipeline.put("a.jpg", encoded(picture()), preset="unheard-of")
    pipeline.awaited("a.jpg.json", "unheard-of")
    wait_until(lambda: "unheard-of/a.jpg.error.json" not in pipeline.outbox())


def test_a_team_that_cannot_pay_or_is_disabled_gets_an_error_file(new_pipeline, admin):
    poor, closed = new_pipeline("poor", 0), new_pipeline("out-of-service")
    admin.teams.enable("out-of-service", enabled=False)
    for pipeline in (poor, closed):
        pipeline.put("a.jpg", encoded(picture()))
    assert poor.awaited("a.jpg.error.json")["error"]["code"] == "insufficient_credits"
    assert closed.awaited("a.jpg.error.json")["error"]["code"] == "team_disabled"
    assert [job["error"]["code"] for job in poor.client.jobs()] == ["insufficient_credits"]
    today = {"from": str(datetime.now(UTC).date()), "group_by": "key"}
    (row,) = poor.client.get("/usage", params=today).json()["rows"]
    assert (row["key"], row["jobs"], row["failed"], row["charged"]) == ("inbox", 1, 1, 0)
    assert poor.calls() == closed.calls() == []


def test_what_belongs_to_no_team_ends_with_the_dead_letters(stack):
    sqs, dead = stack.client("sqs"), stack.resources["UploadsDeadLetterQueue"]
    wait_until(lambda: messages(stack, "UploadsDeadLetterQueue") == len(STRAYS), 60)
    assert messages(stack, "UploadsQueue") == 0
    found = sqs.receive_message(QueueUrl=dead, MaxNumberOfMessages=10, VisibilityTimeout=0)["Messages"]
    bodies = " ".join(message["Body"] for message in found)
    assert all(quote_plus(key) in bodies for key in STRAYS)
    log = [json.loads(line) for line in stack.log_lines("IngestFunction")]
    assert {line["detail"] for line in log if line.get("message") == "belongs to no team"}
