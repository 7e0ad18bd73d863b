"""A page on another origin uploads with the presigned form, and reads S3's answer."""

from __future__ import annotations

import pytest
import requests

from tests.system import ROOT, sample_base64

PAGE = "https://app.example.com"


@pytest.fixture
def form(stack):
    answer = requests.post(
        f"{stack.url}/uploads",
        json={"content_type": "image/heic"},
        headers={"x-api-key": stack.api_key, "Origin": PAGE},
        timeout=10,
    )
    assert answer.headers["access-control-allow-origin"] == "*"
    return answer.json()


def send(form, data, **changes):
    fields = {**form["fields"], **changes}
    return requests.post(
        form["url"], data=fields, files={"file": ("photo.heic", data)}, headers={"Origin": PAGE}, timeout=30
    )


def test_the_page_may_read_that_it_worked(form):
    answer = send(form, (ROOT / "events" / "phone.heic").read_bytes())
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] in ("*", PAGE)


@pytest.mark.parametrize(
    ("size", "changes", "status"),
    [
        (0, {}, 400),
        (25_000_001, {}, 400),
        (5, {"Content-Type": "text/html"}, 403),
        (5, {"key": "uploads/other/x"}, 403),
    ],
)
def test_the_form_is_held_to_its_policy(form, size, changes, status):
    answer = send(form, b"x" * size, **changes)
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] in ("*", PAGE)


def test_a_picture_read_for_one_origin_is_not_cached_for_another(stack):
    stack.segmind.reset()
    body = {"image": sample_base64(), "prompt": "a castle"}
    key = {"x-api-key": stack.api_key}
    job = requests.post(f"{stack.url}/sd1.5-img2img", json=body, headers=key, timeout=40).json()
    # After the redirect of an output's link, browsers send `Origin: null`.
    for origin in (PAGE, "null"):
        answer = requests.get(job["outputs"][0]["url"], headers={"Origin": origin}, timeout=10)
        assert answer.headers["access-control-allow-origin"] in ("*", origin)
        assert "origin" in answer.headers["vary"].lower()
