"""`check-segmind`, against the stand-in and answers that nobody expects."""

from __future__ import annotations

import io
import sys

import pytest
from PIL import Image

from img2img.__main__ import main
from local.segmind import SegmindStandIn
from tests.system import ROOT

KEY = "SG_0123456789abcdef"


@pytest.fixture
def segmind():
    with SegmindStandIn(KEY) as started:
        yield started


@pytest.fixture
def check(segmind, tmp_path, monkeypatch, capsys):
    """Return a function that runs the command with a key from a pipe and returns its exit status and output."""

    def run(*arguments, key=KEY):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{key}\n"))
        options = ["--image", str(ROOT / "events/sample.jpg"), "--out", str(tmp_path), "--base-url", segmind.url]
        status = main(["check-segmind", *arguments, *options])
        shown = capsys.readouterr()
        assert key not in shown.out + shown.err
        return status, shown.out + shown.err

    return run


def test_v1_as_it_is_expected(check, tmp_path, segmind):
    status, said = check("v1", "--yes")
    assert status == 0, said
    assert "!!" not in said
    assert "about 0.004 USD" in said
    assert said.endswith("SegmindApi: v1\n")
    with Image.open(tmp_path / "segmind-v1.jpeg") as picture:
        assert picture.size == (512, 512)
    assert len(segmind.calls) == 1


def test_v2_as_it_is_expected(check, tmp_path, monkeypatch):
    monkeypatch.setattr("img2img.admin.segmind._POLL_SECONDS", (0.05,))
    status, said = check("v2", "--yes")
    # The stand-in's pictures lie on a plain address.
    assert [line for line in said.splitlines() if line.startswith("!!")] == [
        line for line in said.splitlines() if "origin of the output" in line
    ]
    assert said.endswith("SegmindApi: v2\n")
    assert status == 0
    with Image.open(tmp_path / "segmind-v2.jpeg") as picture:
        assert picture.size == (512, 512)


@pytest.mark.parametrize(
    ("behaviour", "named"),
    [("406-credits", "406"), ("500", "500"), ("html", "content-type"), ("cut", "connection"), ("garbage", "picture")],
)
def test_what_is_not_expected_is_marked(check, segmind, tmp_path, behaviour, named):
    segmind.behave(behaviour)
    status, said = check("v1", "--yes")
    assert status == 1
    assert [line for line in said.splitlines() if line.startswith("!!") and named in line], said
    assert said.endswith("none of these works\n")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_key(check):
    status, said = check("v1", "--yes", key="SG_another")
    assert status == 1
    assert "401" in said


def test_nothing_is_spent_without_being_agreed_to(check, segmind):
    status, said = check("v1")
    assert status == 1
    assert "--yes" in said
    assert segmind.calls == []


def test_an_api_that_is_none(check, segmind):
    status, said = check("v3", "--yes")
    assert status == 1
    assert "known are v1, v2" in said
    assert segmind.calls == []
