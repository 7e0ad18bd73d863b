"""A job from its request to its end, through the handlers."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image

from img2img import __version__
from img2img.jobs.listing import JobFilter
from tests.system import ROOT, Context, create_team, function, rest_event


def fetch(system, url: str) -> bytes:
    """Read what a presigned URL names (moto in memory has no server to ask)."""
    bucket, key = urlsplit(url).netloc.partition(".")[0], urlsplit(url).path[1:]
    return system.s3.get_object(Bucket=bucket, Key=key)["Body"].read()


def succeeded(system, **fields) -> dict:
    """Create a job and run it."""
    created = system.create(**fields)
    assert created.status == 202, created.content
    assert system.deliver() == 1
    job = system.job(created.json["id"])
    assert job["status"] == "succeeded", job
    return job


def test_a_job_succeeds(system):
    job = succeeded(system, seed=98877465625, samples=2, img_width=768, metadata={"order": "17"})
    assert job["input"] == {
        "prompt": "a castle on a hill",
        "negative_prompt": "",
        "samples": 2,
        "scheduler": "DDIM",
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "strength": 1.0,
        "seed": 98877465625,
        "img_width": 768,
        "img_height": 512,
        "fit": "cover",
        "output_format": None,
    }
    assert job["metadata"] == {"order": "17"}
    assert job["backend"] == "segmind"
    assert job["error"] is None
    assert job["metrics"]["total_ms"] >= job["metrics"]["queue_ms"] >= 0
    assert job["metrics"]["backend_ms"] > 0
    assert [output["seed"] for output in job["outputs"]] == [98877465625, 98877465626]
    for output in job["outputs"]:
        data = fetch(system, output["url"])
        picture = Image.open(io.BytesIO(data))
        assert picture.size == (output["width"], output["height"]) == (768, 512)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (output["bytes"], output["sha256"])
        assert output["content_type"] == "image/jpeg"


def test_a_random_seed_is_resolved_before_the_job_runs(system):
    first, second = (system.create().json["input"]["seed"] for _ in range(2))
    assert first != second
    assert min(first, second) >= 0


def test_segmind_is_asked_for_exactly_what_the_caller_asked_for(system):
    fields = {
        "prompt": "p",
        "negative_prompt": "n",
        "scheduler": "DPM2 a Karras",
        "num_inference_steps": "33",
        "guidance_scale": "10.5",
        "strength": "0.75",
        "seed": "7",
        "img_width": "512",
        "img_height": "768",
    }
    succeeded(system, **fields, samples="2")
    sent = [{name: call["body"][name] for name in fields} for call in system.segmind.calls]
    expected = {
        **fields,
        "num_inference_steps": 33,
        "guidance_scale": 10.5,
        "strength": 0.75,
        "img_width": 512,
        "img_height": 768,
    }
    assert sorted(sent, key=lambda body: body["seed"]) == [{**expected, "seed": 7}, {**expected, "seed": 8}]


def test_a_waiting_caller_gets_the_finished_job_with_its_headers(system):
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(system.create, wait=20)
        while not system.messages():
            pass
        system.deliver()
        answer = answer.result()
    assert answer.status == 200
    assert answer.json["status"] == "succeeded"
    assert answer.headers["preference-applied"] == "wait=20"
    assert float(answer.headers["x-generation-time"]) > 0
    assert answer.headers["x-remaining-credits"] == "999999"
    assert answer.json["credits"] == {"reserved": 1000, "charged": 1000, "released": 0, "price_version": "1:1000"}
    assert answer.headers["x-request-id"]
    assert answer.headers["location"].endswith(f"/v1/jobs/{answer.json['id']}")
    assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    ("prefer", "applied"),
    [
        ("respond-async", "respond-async"),
        ("wait=0", "wait=0"),
        ("respond-async, wait=0", "wait=0"),
        ('WAIT="0"', "wait=0"),
        ("handling=lenient; x, wait = 0", "wait=0"),
    ],
)
def test_prefer(system, prefer, applied):
    answer = system.create(headers={"Prefer": prefer})
    assert (answer.status, answer.headers["preference-applied"]) == (202, applied)
    assert answer.headers["retry-after"] == "1"


def replay(system, headers=None, **fields):
    """Run a job and ask for it again with its key, so that it has ended when the answer is made."""
    key = {"Idempotency-Key": "the-key"}
    created = system.create(headers=key, **fields)
    system.deliver()
    return created.json["id"], system.create(wait=5, headers={**key, **(headers or {})}, **fields)


@pytest.mark.parametrize("accept", ["image/*", "image/png, */*", "image/jpeg;q=0.9"])
def test_accept_image_answers_with_the_picture(system, accept):
    job_id, answer = replay(system, {"Accept": accept})
    assert answer.status == 200
    assert answer.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(answer.content)).size == (512, 512)
    assert answer.headers["location"].endswith(job_id)


@pytest.mark.parametrize("accept", ["application/json, image/*", "*/*", ""])
def test_other_accept_headers_answer_with_json(system, accept):
    _, answer = replay(system, {"Accept": accept})
    assert answer.json["status"] == "succeeded"


@pytest.mark.parametrize("samples", [1, 3])
def test_base64_adds_segminds_image_field(system, samples):
    _, answer = replay(system, samples=samples, base64="true")
    found = [answer.json["image"]] if samples == 1 else answer.json["image"]
    hashes = [hashlib.sha256(base64.b64decode(image)).hexdigest() for image in found]
    assert hashes == [output["sha256"] for output in answer.json["outputs"]]


def test_pictures_too_large_for_one_answer_are_left_to_their_urls(system):
    noise = Image.effect_noise((1200, 1200), 200).convert("RGB")
    _, answer = replay(system)
    stream = io.BytesIO()
    noise.save(stream, "png")
    job = system.services.jobs.list("default", JobFilter()).jobs[0]
    assert len(stream.getvalue()) < 6_000_000 * 3 / 4
    output = job.outputs[0]
    system.s3.put_object(Bucket="results", Key=output.key, Body=stream.getvalue())
    system.dynamodb.update_item(
        TableName="jobs",
        Key={"pk": {"S": "TEAM#default"}, "sk": {"S": f"JOB#{job.id}"}},
        UpdateExpression="SET outputs = :o",
        ExpressionAttributeValues={
            ":o": {"S": json.dumps([{**vars(output), "bytes": 4_600_000}])},
        },
    )
    for extra in ({"headers": {"Accept": "image/*"}}, {"base64": True}):
        answer = system.create(headers={"Idempotency-Key": "the-key", **extra.pop("headers", {})}, wait=5, **extra)
        assert (answer.status, answer.json["code"]) == (413, "answer_too_large")
        assert "URL" in answer.json["detail"]
        assert answer.headers["location"].endswith(answer.json["job_id"])


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_output_format(system, output_format):
    job = succeeded(system, output_format=output_format)
    output = job["outputs"][0]
    assert output["content_type"] == f"image/{output_format}"
    assert Image.open(io.BytesIO(fetch(system, output["url"]))).format == output_format.upper()


def test_the_backends_bytes_stay_untouched(system):
    plain, same = succeeded(system, seed=1), succeeded(system, seed=1, output_format="jpeg")
    assert plain["outputs"][0]["sha256"] == same["outputs"][0]["sha256"]


def test_presigned_urls_are_sigv4_regional_and_virtual_hosted(system):
    url = urlsplit(succeeded(system)["outputs"][0]["url"])
    assert url.netloc == "results.s3.eu-west-1.amazonaws.com"
    assert parse_qs(url.query)["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]
    assert parse_qs(url.query)["X-Amz-Expires"] == ["3600"]
    form = system.api("POST", "/uploads", {"content_type": "image/heic"}).json
    assert form["url"] == "https://uploads.s3.eu-west-1.amazonaws.com/"
    assert form["fields"]["x-amz-algorithm"] == "AWS4-HMAC-SHA256"
    policy = json.loads(base64.b64decode(form["fields"]["policy"]))["conditions"]
    assert form["fields"]["Content-Type"] == "image/heic"
    assert {"Content-Type": "image/heic"} in policy
    assert {"key": f"uploads/default/{form['id']}"} in policy
    assert ["content-length-range", 1, form["max_bytes"]] in policy


def test_an_announced_upload_becomes_a_job(system):
    form = system.api("POST", "/uploads", {"content_type": "image/heic"})
    assert form.status == 201
    phone = (ROOT / "events" / "phone.heic").read_bytes()
    system.s3.put_object(Bucket="uploads", Key=form.json["fields"]["key"], Body=phone)
    succeeded(system, image=form.json["id"])


@pytest.mark.parametrize("content_type", ["image/jpeg", "application/octet-stream", "image/x-whatever"])
def test_an_image_body_is_stored_under_the_type_it_has(system, content_type):
    photo = (ROOT / "events" / "orientation-6.jpg").read_bytes()
    stored = system.api("POST", "/uploads", photo, {"Content-Type": content_type})
    assert stored.status == 201
    assert (stored.json["content_type"], stored.json["bytes"]) == ("image/jpeg", len(photo))
    assert (stored.json["width"], stored.json["height"]) == (320, 213)
    succeeded(system, image=stored.json["id"])


def test_a_data_uri_equals_its_bare_base64(system):
    photo = base64.b64encode((ROOT / "events" / "photo.webp").read_bytes()).decode()
    hashes = {
        succeeded(system, image=image, seed=3)["outputs"][0]["sha256"]
        for image in (photo, f"data:image/webp;base64,{photo}", f"  {photo[:64]}\r\n{photo[64:]}\n")
    }
    assert len(hashes) == 1


def test_an_output_link_redirects_to_a_fresh_url(system):
    job = succeeded(system)
    answer = system.api("GET", f"/jobs/{job['id']}/outputs/0")
    assert (answer.status, answer.content) == (302, b"")
    assert fetch(system, answer.headers["location"])
    for index in ("1", "4", "-1", "x"):
        assert system.api("GET", f"/jobs/{job['id']}/outputs/{index}").status == 404


def test_listing_pages_and_filters(system):
    ids = []
    for _ in range(5):
        ids.append(system.create().json["id"])
        system.clock.advance(60)
    ids.reverse()
    system.api("POST", f"/jobs/{ids[1]}/cancel")
    seen, cursor = [], None
    while True:
        page = system.api("GET", "/jobs", query={"limit": "2", **({"cursor": cursor} if cursor else {})}).json
        seen += [job["id"] for job in page["jobs"]]
        cursor = page["cursor"]
        if not cursor:
            break
    assert seen == ids

    def listed(**query):
        return [job["id"] for job in system.api("GET", "/jobs", query=query).json["jobs"]]

    assert listed(status="canceled") == [ids[1]]
    assert listed(status="queued") == [ids[0], *ids[2:]]
    third = system.job(ids[2])["created_at"]
    assert listed(created_after=third) == ids[:2]
    assert listed(created_before=third) == ids[3:]
    first = system.job(ids[0])["created_at"]
    assert listed(created_after=third, created_before=first) == [ids[1]]


def test_cancel_is_idempotent_and_keeps_a_finished_job(system):
    job_id = system.create().json["id"]
    for _ in range(2):
        answer = system.api("POST", f"/jobs/{job_id}/cancel")
        assert (answer.status, answer.json["status"]) == (200, "canceled")
    assert system.deliver() == 1
    assert system.segmind.calls == []
    done = succeeded(system)
    assert system.api("POST", f"/jobs/{done['id']}/cancel").json["status"] == "succeeded"


def test_delete_removes_the_job_and_its_objects(system):
    job = succeeded(system, samples=4)
    assert len(system.objects("results")) == 4
    deleted = system.api("DELETE", f"/jobs/{job['id']}")
    assert (deleted.status, deleted.content) == (204, b"")
    assert system.objects("results") == system.objects("uploads") == []
    assert system.api("GET", f"/jobs/{job['id']}").status == 404
    assert system.api("DELETE", f"/jobs/{job['id']}").status == 404


def test_a_job_canceled_while_it_runs_leaves_no_result(system):
    system.segmind.behave("hang", times=1)
    job_id = system.create().json["id"]
    [record] = system.receive()
    worker = threading.Thread(target=system.work, args=[record])
    worker.start()
    while not system.segmind.calls:
        pass
    assert system.api("POST", f"/jobs/{job_id}/cancel").json["status"] == "canceled"
    system.segmind.release()
    worker.join()
    assert system.job(job_id)["status"] == "canceled"
    assert system.objects("results") == []


def test_another_teams_job_is_not_found(system):
    job = succeeded(system)
    create_team(system.services, "other", "key-of-the-other")
    for method, path in [("GET", ""), ("GET", "/outputs/0"), ("POST", "/cancel"), ("DELETE", "")]:
        assert system.api(method, f"/jobs/{job['id']}{path}", key_id="key-of-the-other").status == 404
    assert system.api("GET", "/jobs", key_id="key-of-the-other").json["jobs"] == []
    shown = system.job(job["id"])
    assert (shown["status"], shown["outputs"][0]["sha256"]) == ("succeeded", job["outputs"][0]["sha256"])


def test_a_teams_keys_share_its_jobs(system):
    job = succeeded(system)
    system.services.teams.add_key("second-key", "default", label="second")
    assert system.api("GET", f"/jobs/{job['id']}", key_id="second-key").json["id"] == job["id"]


def test_another_teams_upload_is_not_found(system):
    create_team(system.services, "other", "key-of-the-other")
    photo = (ROOT / "events" / "photo.webp").read_bytes()
    upload = system.api("POST", "/uploads", photo, {"Content-Type": "image/webp"}).json["id"]
    body = {"image": upload, "prompt": "a castle"}
    answer = system.api("POST", "/sd1.5-img2img", body, {"Prefer": "wait=0"}, key_id="key-of-the-other")
    assert (answer.status, answer.json["code"]) == (404, "not_found")
    assert system.api("POST", "/sd1.5-img2img", body, {"Prefer": "wait=0"}).status == 202


def test_health_tells_the_version_and_needs_no_settings_but_its_own(system):
    assert system.api("GET", "/health").json == {"status": "ok", "version": __version__}


def test_a_custom_domains_base_path_is_part_of_the_urls_and_not_of_the_route(system):
    job_id = system.create().json["id"]
    # With a mapping, both paths contain it.
    event = rest_event("GET", f"/images/jobs/{job_id}") | {
        "resource": "/jobs/{id}",
        "pathParameters": {"id": job_id},
    }
    event["requestContext"]["path"] = f"/images/jobs/{job_id}"
    event["multiValueHeaders"]["Host"] = ["api.team.example"]
    document = json.loads(function("api").handler(event, Context())["body"])
    assert document["urls"]["get"] == f"https://api.team.example/images/jobs/{job_id}"


@pytest.mark.parametrize("limit", ["0", "101", "-1", "1.5", "x", "", "0000000011000", "٣"])
def test_a_limit_out_of_range(system, limit):
    answer = system.api("GET", "/jobs", query={"limit": limit})
    assert (answer.status, answer.json["errors"][0]["field"]) == (400, "limit")


def test_an_inline_image_has_the_limit_of_an_upload(system):
    system.services.settings = dataclasses.replace(system.services.settings, max_image_bytes=10_000)
    answer = system.create()
    assert (answer.status, answer.json["errors"][0]["field"]) == (413, "image")


def test_several_samples_are_a_list_even_when_one_is_delivered(system):
    system.segmind.behave("black")
    _, answer = replay(system, samples=2, base64=True)
    assert isinstance(answer.json["image"], list)
    assert len(answer.json["image"]) == 1
    assert sorted(output["status"] for output in answer.json["outputs"]) == ["blocked", "succeeded"]


def test_a_canceled_job_claims_no_generation_time(system):
    key = {"Idempotency-Key": "k"}
    job_id = system.create(headers=key).json["id"]
    system.api("POST", f"/jobs/{job_id}/cancel")
    answer = system.create(wait=5, headers=key)
    assert (answer.status, answer.json["status"]) == (200, "canceled")
    assert "x-generation-time" not in answer.headers


def test_the_scheme_is_the_gateways_and_not_the_callers(system):
    event = rest_event("GET", "/jobs/" + system.create().json["id"])
    event["multiValueHeaders"]["X-Forwarded-Proto"] = ["gopher", "https"]
    document = json.loads(function("api").handler(event, Context())["body"])
    assert document["urls"]["get"].startswith("https://api.example/v1/jobs/")


def test_a_longer_wait_than_there_is_is_shortened(system):
    _, answer = replay(system, {"Prefer": "wait=100"})
    assert (answer.status, answer.headers["preference-applied"]) == (200, "wait=25")


def test_the_seed_after_the_last_is_the_first(system):
    job = succeeded(system, seed=999_999_999_999_999, samples=2)
    assert [output["seed"] for output in job["outputs"]] == [999_999_999_999_999, 0]
