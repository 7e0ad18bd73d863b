"""What the Segmind stand-in promises: the documented API, and to do as it is told."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import pytest
import requests
from PIL import Image

from local.segmind import BEHAVIOURS, SegmindStandIn

KEY = "stand-in"


def picture(kind: str = "PNG") -> str:
    buffer = BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def call(segmind: SegmindStandIn, key: str = KEY, timeout: float = 5.0, **fields: Any) -> requests.Response:
    body = {name: value for name, value in ({"image": picture(), "prompt": "a hill"} | fields).items() if value != ...}
    with requests.Session() as session:
        session.trust_env = False
        return session.post(f"{segmind.url}/sd1.5-img2img", json=body, headers={"x-api-key": key}, timeout=timeout)


def control(segmind: SegmindStandIn, query: str, method: str = "POST") -> requests.Response:
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, f"{segmind.control_url}?{query}", timeout=5)


def image(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data))


def test_a_picture_with_the_headers(segmind: SegmindStandIn) -> None:
    answer = call(segmind, img_width=768, seed=5, strength=0.7)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
    assert (image(answer.content).format, image(answer.content).size) == ("JPEG", (768, 512))
    assert answer.headers["x-seed-value"] == "5"
    assert answer.headers["x-cost"] == "0.004"
    assert float(answer.headers["x-generation-time"]) > 0
    assert answer.headers["x-request-id"]
    assert answer.headers["x-rate-limit-remaining"] == "49"
    assert answer.headers["x-rate-limit-reset-at-utc"].endswith("Z")
    assert float(call(segmind).headers["x-remaining-credits"]) < float(answer.headers["x-remaining-credits"])


def test_the_seed_decides_and_the_strength_blends(segmind: SegmindStandIn) -> None:
    assert call(segmind, seed=5).content == call(segmind, seed=5).content
    assert len({call(segmind, seed=seed).content for seed in range(4)}) == 4
    assert call(segmind, seed=5, strength=0.2).content != call(segmind, seed=5, strength=0.9).content
    assert len({call(segmind).headers["x-seed-value"] for _ in range(3)}) == 3


def test_base64(segmind: SegmindStandIn) -> None:
    one = call(segmind, base64=True).json()["image"]
    several = call(segmind, base64=True, samples=3, seed=1).json()["image"]
    assert image(base64.b64decode(one)).format == "JPEG"
    assert len(set(several)) == 3
    assert segmind.billed == 2


@pytest.mark.parametrize("key", ["", "wrong"])
def test_the_key(segmind: SegmindStandIn, key: str) -> None:
    assert call(segmind, key).status_code == 401
    assert (segmind.billed, segmind.calls[0]["key_accepted"]) == (0, False)


def test_the_content_type(segmind: SegmindStandIn) -> None:
    answer = requests.post(f"{segmind.url}/sd1.5-img2img", data={"prompt": "x"}, headers={"x-api-key": KEY}, timeout=5)
    assert answer.status_code == 406
    assert "content type" in answer.json()["error"].lower()


def test_path_and_method(segmind: SegmindStandIn) -> None:
    wrong = requests.get(f"{segmind.url}/sd1.5-img2img", timeout=5)
    assert (wrong.status_code, wrong.headers["content-type"]) == (405, "text/html")
    assert requests.post(f"{segmind.url}/other", timeout=5).status_code == 404
    assert requests.get(f"{segmind.url}/other", timeout=5).status_code == 404


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image", ...),
        ("image", 5),
        ("image", "not base64!"),
        ("image", base64.b64encode(b"no picture").decode()),
        ("image", picture()[:200]),
        ("image", "data:image/png;base64," + picture()),
        ("image", "https://images.example/a.png"),
        ("prompt", ...),
        ("prompt", " "),
        ("negative_prompt", None),
        ("samples", 0),
        ("samples", 5),
        ("samples", "1"),
        ("samples", True),
        ("scheduler", "ddim"),
        ("scheduler", []),
        ("num_inference_steps", 19),
        ("num_inference_steps", 20.5),
        ("guidance_scale", 0),
        ("guidance_scale", 25.1),
        ("guidance_scale", "7"),
        ("strength", 0.05),
        ("strength", 2),
        ("seed", -2),
        ("seed", 10**15),
        ("img_width", 513),
        ("img_height", 512.0),
        ("base64", "false"),
        ("fit", "cover"),
    ],
)
def test_each_parameter_is_checked(segmind: SegmindStandIn, field: str, value: Any) -> None:
    answer = call(segmind, **{field: value})
    assert answer.status_code == 400
    assert field in answer.json()["error"]
    assert segmind.billed == 0


@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b"[" * 100_000])
def test_a_body_that_is_no_object(segmind: SegmindStandIn, body: bytes) -> None:
    headers = {"x-api-key": KEY, "Content-Type": "application/json"}
    assert requests.post(f"{segmind.url}/sd1.5-img2img", data=body, headers=headers, timeout=5).status_code == 400


@pytest.mark.parametrize("behaviour", [name for name in BEHAVIOURS if name[0].isdigit()])
def test_errors_on_demand(segmind: SegmindStandIn, behaviour: str) -> None:
    assert control(segmind, f"next={behaviour}&times=2").json()["behaviours"] == [behaviour, behaviour]
    answers = [call(segmind) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [int(behaviour[:3])] * 2 + [200]
    assert (segmind.billed, len(segmind.calls)) == (1, 3)
    assert ("credit" in answers[0].text) == (behaviour == "406-credits")
    assert "retry-after" not in answers[0].headers


def test_answers_on_demand(segmind: SegmindStandIn) -> None:
    for behaviour in ("html", "json", "black", "garbage", "empty"):
        segmind.behave(behaviour)
    assert call(segmind).headers["content-type"] == "text/html"
    assert image(base64.b64decode(call(segmind).json()["image"])).size == (512, 512)
    assert image(call(segmind).content).getextrema() == ((0, 0), (0, 0), (0, 0))
    assert call(segmind).content == b"these bytes are no picture"
    assert call(segmind).content == b""
    assert segmind.billed == 5


@pytest.mark.parametrize(("behaviour", "billed"), [("cut", 1), ("cut-before", 0)])
def test_cuts(segmind: SegmindStandIn, behaviour: str, billed: int) -> None:
    segmind.behave(behaviour)
    with pytest.raises(requests.RequestException):
        call(segmind)
    assert segmind.billed == billed


def test_a_hang_ends_when_released_stopped_or_left(segmind: SegmindStandIn) -> None:
    segmind.behave("hang", times=3)
    with pytest.raises(requests.ReadTimeout):
        call(segmind, timeout=0.1)
    with ThreadPoolExecutor(1) as thread:
        hanging = thread.submit(call, segmind)
        assert segmind.wait_for_calls(2)
        assert control(segmind, "release=1").status_code == 200
        assert isinstance(hanging.exception(), requests.ConnectionError)
        hanging = thread.submit(call, segmind)
        assert segmind.wait_for_calls(3)
        segmind.stop()
        assert isinstance(hanging.exception(), requests.ConnectionError)
    segmind.start()
    assert call(segmind).status_code == 200


def test_the_account_runs_out(segmind: SegmindStandIn) -> None:
    control(segmind, "credits=0.009")
    answers = [call(segmind) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 406]
    assert answers[1].headers["x-remaining-credits"] == "0.001"


def test_control_rotates_delays_counts_and_resets(segmind: SegmindStandIn) -> None:
    control(segmind, "key=other&latency=0.05&next=429&reset_in=90")
    assert call(segmind, "other", seed=3).status_code == 429
    assert call(segmind).status_code == 401
    assert call(segmind, "other", seed=3).elapsed.total_seconds() >= 0.05
    summary = control(segmind, "", "GET").json()
    assert summary["calls_by_seed"] == {"3": 2}
    assert (summary["calls"], summary["billed"], summary["behaviours"]) == (3, 1, [])
    assert control(segmind, "reset=1").json() == {
        "calls": 0,
        "calls_by_seed": {},
        "billed": 0,
        "looks": {},
        "behaviours": [],
        "credits": 100.0,
    }
    assert call(segmind).status_code == 200


@pytest.mark.parametrize(
    "query",
    [
        "next=explode",
        "next=429&times=0",
        "next=429&times=many",
        "times=2",
        "latency=-1",
        "latency=nan",
        "credits=lots",
        "reset=yes",
        "key=",
        "unknown=1",
        "next=429&next=500",
        "next=failed&at=nowhere",
        "at=status",
        "expire=yes",
        "next",
    ],
)
def test_an_order_that_is_not_understood_changes_nothing(segmind: SegmindStandIn, query: str) -> None:
    answer = control(segmind, f"{query}&reset_in=9" if query != "next" else query)
    assert answer.status_code == 400
    assert answer.json()["error"]
    assert segmind.summary()["behaviours"] == []
    assert segmind.reset_in == 1.0


def test_a_call_is_recorded_without_its_image(segmind: SegmindStandIn) -> None:
    call(segmind, seed=4)
    [recorded] = segmind.calls
    assert recorded["body"] == {"prompt": "a hill", "seed": 4}
    assert recorded["image_size"] == (256, 256)
    assert "x-api-key" not in recorded["headers"]


# The queue of v2


def submit(segmind: SegmindStandIn, key: str = KEY, **fields: Any) -> requests.Response:
    body = {"image": picture(), "prompt": "a hill"} | fields
    return fetch(f"{segmind.origin}/v2/sd1.5-img2img", key, "POST", json=body)


def fetch(url: str, key: str = KEY, method: str = "GET", **options: Any) -> requests.Response:
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, url, headers={"x-api-key": key} if key else {}, timeout=5, **options)


def test_a_request_goes_from_queued_to_its_picture(segmind: SegmindStandIn) -> None:
    segmind.latency = 60
    taken = submit(segmind, seed=5)
    assert (taken.status_code, taken.json()["status"]) == (200, "QUEUED")
    assert set(taken.json()) == {"request_id", "status", "poll_url", "status_url", "response_url"}
    assert fetch(taken.json()["status_url"]).json()["status"] == "QUEUED"
    segmind.release()
    status = fetch(taken.json()["status_url"]).json()
    assert (status["status"], "output" in status) == ("COMPLETED", False)
    done = fetch(taken.json()["response_url"]).json()
    assert {"cost", "remaining_credits", "inference_time", "queue_time", "total_time"} <= set(done["metrics"])
    # Whoever has its address may see a picture.
    shown = fetch(done["output"], key="")
    assert (shown.headers["content-type"], image(shown.content).format) == ("image/jpeg", "JPEG")
    assert (segmind.billed, segmind.looks) == (1, ["status", "status", "response", "output"])


def test_several_samples_are_a_list(segmind: SegmindStandIn) -> None:
    outputs = fetch(submit(segmind, samples=3).json()["response_url"]).json()["output"]
    assert len({fetch(output).content for output in outputs}) == 3


def test_what_fails_is_422_and_not_billed(segmind: SegmindStandIn) -> None:
    segmind.behave("failed")
    answer = fetch(submit(segmind).json()["status_url"])
    assert (answer.status_code, answer.json()["status"]) == (422, "FAILED")
    assert answer.json()["error"]
    assert segmind.billed == 0


def test_requests_expire(segmind: SegmindStandIn) -> None:
    taken = submit(segmind).json()
    assert control(segmind, "expire=1").status_code == 200
    for url in (taken["status_url"], taken["response_url"]):
        answer = fetch(url)
        assert (answer.status_code, "not found" in answer.json()["error"]) == (404, True)


@pytest.mark.parametrize("step", ["status", "response", "output"])
@pytest.mark.parametrize("behaviour", ["404", "406-credits", "410", "429", "503"])
def test_each_step_errs_as_told_once(segmind: SegmindStandIn, step: str, behaviour: str) -> None:
    taken = submit(segmind).json()
    urls = {"status": taken["status_url"], "response": taken["response_url"]}
    urls["output"] = fetch(urls["response"]).json()["output"]
    control(segmind, f"next={behaviour}&at={step}")
    assert [fetch(urls[step]).status_code for _ in range(2)] == [int(behaviour[:3]), 200]


def test_looks_need_the_key(segmind: SegmindStandIn) -> None:
    taken = submit(segmind).json()
    assert {fetch(taken[name], key="wrong").status_code for name in ("status_url", "response_url")} == {401}
    assert submit(segmind, key="wrong").status_code == 401


def test_v2_checks_what_it_is_sent(segmind: SegmindStandIn) -> None:
    assert submit(segmind, samples=9).status_code == 400
    assert segmind.requests == {}
