"""What callers get wrong. Every answer is a problem that names the field, and nothing is left behind.

What the gateway refuses before a handler sees it (keys, routes, sizes) is tested against the local stack.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from img2img.params import FIELDS, SCHEDULERS
from tests.long import examples
from tests.system import ROOT, Answer, System, running_system

UPLOAD_ID = "upl_01ARZ3NDEKTSV4RRFFQ69G5FAV"
JOB_ID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
READABLE = "accepted are JPEG, PNG, WebP, HEIC/HEIF, AVIF, GIF and TIFF"
MEMBERS = {"type", "title", "status", "detail", "error", "code", "errors"}
# A traceback, a class or a file of the code.
INSIDES = re.compile(
    r"Traceback|File \"|\.py\b|\w+(Error|Exception|Warning)\b|botocore|boto3|PIL\b|pillow|object at 0x"
)


@pytest.fixture(scope="module")
def system():
    with running_system() as started:
        yield started


@pytest.fixture(scope="module", autouse=True)
def finished_job(system):
    """A job with one output, made before any other."""
    created = system.create(image=encoded(png()))
    assert system.deliver() == 1
    return created.json["id"]


def items(system: System) -> Iterator[dict[str, Any]]:
    shown = "pk, sk, balance, entries, charged"
    for page in system.dynamodb.get_paginator("scan").paginate(TableName="jobs", ProjectionExpression=shown):
        yield from page["Items"]


def state(system: System) -> dict[str, Any]:
    """Return all that a request could leave behind."""
    return {
        "items": list(items(system)),
        "messages": system.messages(),
        "uploads": system.objects("uploads"),
        "calls": len(system.segmind.calls),
    }


def assert_problem(answer: Answer, status: int, code: str) -> Any:
    """Check the form of an answer that refuses, and return it."""
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json"), answer.content[:500]
    problem = answer.json
    assert set(problem) == MEMBERS
    assert (problem["status"], problem["code"], problem["type"]) == (status, code, "about:blank")
    assert problem["title"]
    # Where Segmind's clients look.
    assert problem["error"] == problem["detail"]
    assert problem["detail"]
    assert all(set(error) == {"field", "detail"} for error in problem["errors"])
    assert not INSIDES.search(answer.content.decode())
    return problem


def assert_refused(
    system: System, send: Callable[[], Answer], status: int, code: str, field: str | None, detail: str = ""
) -> None:
    """Check that a request is answered with a problem that blames one field, or none, and changes nothing."""
    before = state(system)
    problem = assert_problem(send(), status, code)
    assert state(system) == before
    assert [error["field"] for error in problem["errors"]] == ([] if field is None else [field])
    assert all(detail in error["detail"] for error in problem["errors"])
    assert field in problem["detail"] if field else detail in problem["detail"]


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def sample(name: str) -> bytes:
    return (ROOT / "events" / name).read_bytes()


def png(size: tuple[int, int] = (64, 64), mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 1).save(buffer, "PNG")
    return buffer.getvalue()


def create(system: System, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
    return system.api(
        "POST", "/sd1.5-img2img", body, {"Prefer": "wait=0", "Content-Type": "application/json", **(headers or {})}
    )


def good(**fields: Any) -> dict[str, Any]:
    return {"image": encoded(png()), "prompt": "a castle on a hill", **fields}


# Fields

INTEGERS: Mapping[str, tuple[str, list[Any]]] = {
    "samples": ("an integer from 1 to 4", [0, 5, -1, 1.5, "two", "", True, [1], {}, "1e400", 10**30]),
    "num_inference_steps": ("an integer from 20 to 100", [19, 101, 20.5, "many", False, [], "0x20", "\uff12\uff10"]),
    "seed": ("-1 (random) or an integer from 0 to 999999999999999", [-2, 10**15, 0.5, "random", True, [], "--1"]),
}
OTHERS: Mapping[str, tuple[str, list[Any]]] = {
    "guidance_scale": ("a number from 0.1 to 25", [0, 0.09, 25.01, -7.5, "high", True, [7.5], "7,5", float("nan")]),
    "strength": ("a number from 0.1 to 1", [0, 0.05, 1.01, -1, "full", True, {}, float("inf"), "nan", "Infinity"]),
    "img_width": ("512 or 768", [0, 511, 1024, 512.5, "wide", True, [512], "512px"]),
    "img_height": ("512 or 768", [0, 640, 769, "tall", False, {}, -512]),
    "scheduler": ("one of " + ", ".join(SCHEDULERS), ["ddim", "", "Karras", 1, True, ["DDIM"], {}, "\ud800"]),
    "fit": ("one of cover, contain, stretch", ["fill", "COVER", "", 0, []]),
    "output_format": ("one of png, jpeg, webp", ["gif", "PNG", "", 1, {}]),
    "base64": ("true or false", ["yes", "", 1, 0, [], {}, 0.0]),
    "preset": ("the name of a preset: 1 to 64 letters", ["", "a b", "a/b", ".", "x" * 65, 5, True, ["x"], {}]),
    "prompt": ("a string of at most 10000 characters", ["x" * 10_001, 5, True, [], {}]),
    "negative_prompt": ("a string of at most 10000 characters", ["x" * 10_001, 5, False, [], {}]),
    "metadata": (
        "an object of at most 16 strings",
        [
            {str(number): "x" for number in range(17)},
            {"key": "x" * 501},
            {"k" * 41: "x"},
            {"key": 1},
            {"key": None},
            {"key": {"deeper": "x"}},
            [["key", "x"]],
            "key=x",
            7,
        ],
    ),
    "image": ("an upload id, an https URL, a data URI or base64", ["", " ", 5, True, ["x"], {"url": "x"}]),
}


def _field_cases() -> list[Any]:
    return [
        pytest.param(field, value, detail, id=f"{field}={json.dumps(value)[:40]}")
        for field, (detail, values) in {**INTEGERS, **OTHERS}.items()
        for value in values
    ]


@pytest.mark.parametrize(("field", "value", "detail"), _field_cases())
def test_a_field_out_of_range_or_of_the_wrong_type(system, field, value, detail):
    assert_refused(system, lambda: create(system, good(**{field: value})), 400, "invalid_request", field, detail)


@pytest.mark.parametrize(
    ("field", "value", "detail"),
    [
        ("prompt", "", "must not be empty"),
        ("prompt", " \n\t", "must not be empty"),
        ("prompt", "half a pair \ud83d", "valid Unicode"),
        ("negative_prompt", "\udc00", "valid Unicode"),
        ("metadata", {"key": "\ud800"}, "valid Unicode"),
        ("metadata", {"\ud800": "x"}, "valid Unicode"),
        ("strenght", 0.5, f"is not known; known are {', '.join(FIELDS)}"),
        ("webhook", "https://example.com", "is not known"),
        ("", 1, "is not known"),
        ("x" * 100, "the name is cut off", "is not known"),
        ("__class__", {}, "is not known"),
        ("Prompt", "names have one spelling", "is not known"),
    ],
)
def test_text_that_is_none_and_names_that_are_none(system, field, value, detail):
    assert_refused(system, lambda: create(system, good(**{field: value})), 400, "invalid_request", field, detail)


def test_an_unknown_name_of_any_length_is_answered_with_its_start(system):
    sent = "y" * 100_000
    assert_refused(system, lambda: create(system, good(**{sent: 1})), 400, "invalid_request", "y" * 100, "is not known")


def test_an_unknown_name_that_is_no_text_is_answered_with_bytes_that_are(system):
    before = state(system)
    answer = system.api("POST", "/sd1.5-img2img", json.dumps(good(**{"\ud800": 1})), {"Prefer": "wait=0"})
    problem = assert_problem(answer, 400, "invalid_request")
    assert len(problem["errors"]) == 1
    assert "is not known" in problem["detail"]
    assert state(system) == before


@pytest.mark.parametrize("missing", ["image", "prompt"])
def test_a_missing_field(system, missing):
    without = {name: value for name, value in good().items() if name != missing}
    for body in (without, good(**{missing: None})):
        assert_refused(system, lambda body=body: create(system, body), 400, "invalid_request", missing, "is required")


def test_an_unknown_preset(system):
    assert_refused(
        system, lambda: create(system, good(preset="oil")), 400, "invalid_request", "preset", "There is no preset oil"
    )


def test_everything_that_is_wrong_is_named_at_once(system):
    before = state(system)
    wrong = {"prompt": 1, "samples": 9, "strength": "x", "fit": "y", "sizes": 3}
    problem = assert_problem(create(system, wrong), 400, "invalid_request")
    assert {error["field"] for error in problem["errors"]} == {*wrong, "image"}
    assert all(name in problem["detail"] for name in [*wrong, "image"])
    assert state(system) == before


def test_a_thousand_unknown_fields_are_not_all_echoed(system):
    before = state(system)
    answer = create(system, good(**{f"field{number}": number for number in range(1000)}))
    problem = assert_problem(answer, 400, "invalid_request")
    assert 1 <= len(problem["errors"]) <= 20
    assert len(answer.content) < 20_000
    assert state(system) == before


@pytest.mark.parametrize("empty", [None, {}])
@pytest.mark.parametrize("field", ["samples", "seed", "strength", "metadata"])
def test_null_means_that_an_optional_field_is_not_set(system, field, empty):
    if empty is None or field == "metadata":
        assert create(system, good(**{field: empty})).status == 202
    else:
        assert create(system, good(**{field: empty})).status == 400


NUMBERS_AS_STRINGS = {
    "samples": ("2", 2),
    "num_inference_steps": (" 30 ", 30),
    "guidance_scale": ("7.25", 7.25),
    "strength": ("5e-1", 0.5),
    "seed": ("98877465625", 98877465625),
    "img_width": ("768", 768),
    "img_height": ("512.0", 512),
}


@pytest.mark.parametrize("field", NUMBERS_AS_STRINGS)
def test_a_number_sent_as_a_string_is_read(system, field):
    sent, read = NUMBERS_AS_STRINGS[field]
    answer = create(system, good(**{field: sent}))
    assert answer.status == 202, answer.json
    assert answer.json["input"][field] == read


@pytest.mark.parametrize("sent", ["true", "false", "True", " FALSE "])
def test_a_boolean_sent_as_a_string_is_read(system, sent):
    assert create(system, good(base64=sent)).status == 202


# Bodies


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut off"),
        pytest.param(b"prompt=a+castle", id="a form"),
        pytest.param(b"{'prompt': 'x'}", id="single quotes"),
        pytest.param(b'{"prompt": "x",}', id="a comma too many"),
        pytest.param(b'{"prompt": "\xff\xfe"}', id="not UTF-8"),
        pytest.param(b'{"prompt": "\x00"}', id="a control character"),
        pytest.param(b'{"prompt": "\\ud8"}', id="half an escape"),
        pytest.param(b"{}{}", id="two objects"),
        pytest.param(b"[" * 100_000, id="deep and open"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, id="deep"),
        pytest.param(b'{"metadata":' * 50_000 + b"1" + b"}" * 50_000, id="deep objects"),
        pytest.param(b'{"seed": ' + b"9" * 10_000 + b"}", id="an integer of 10,000 digits"),
        pytest.param(b"\x1f\x8b\x08\x00", id="gzip"),
        pytest.param(b"\xff\xd8\xff\xe0", id="a JPEG"),
        pytest.param(b"undefined", id="undefined"),
    ],
)
def test_a_body_that_is_not_json(system, body):
    assert_refused(system, lambda: create(system, body), 400, "invalid_request", "body", "must be valid JSON")


@pytest.mark.parametrize("body", ["[]", '"text"', "1", "null", "true", "NaN", '[{"prompt": "x"}]'])
def test_json_that_is_not_an_object(system, body):
    assert_refused(system, lambda: create(system, body), 400, "invalid_request", "body", "must be a JSON object")


def test_no_body_at_all(system):
    assert_refused(system, lambda: system.api("POST", "/sd1.5-img2img"), 400, "invalid_request", "body", "valid JSON")


@pytest.mark.parametrize(
    "content_type",
    [
        *("text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"),
        *("image/jpeg", "application/octet-stream", "application/jsonp", "json", "*/*"),
    ],
)
def test_a_content_type_that_is_not_json(system, content_type):
    assert_refused(
        system,
        lambda: create(system, good(), {"Content-Type": content_type}),
        *(415, "unsupported_media_type", "Content-Type", "must be application/json"),
    )


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("", id="empty"),
        pytest.param("k" * 256, id="256 characters"),
        pytest.param("one\ntwo", id="line feed"),
        pytest.param("one\x00", id="null"),
        pytest.param("\x7f", id="delete"),
        pytest.param("\u202eone", id="a direction mark"),
    ],
)
def test_an_idempotency_key_that_is_none(system, key):
    assert_refused(
        system,
        lambda: create(system, good(), {"Idempotency-Key": key}),
        *(400, "invalid_request", "Idempotency-Key", "must have 1 to 255 printable characters"),
    )


def test_a_refused_request_does_not_use_up_its_key(system):
    key = {"Idempotency-Key": "used once"}
    assert_refused(system, lambda: create(system, good(image=encoded(b"text")), key), 415, "unsupported_image", "image")
    assert_refused(system, lambda: create(system, good(samples=9), key), 400, "invalid_request", "samples")
    assert create(system, good(), key).status == 202


# Images


def _with_header_size(jpeg: bytes) -> bytes:
    at = next(at for at in range(len(jpeg)) if jpeg[at : at + 2] in (b"\xff\xc0", b"\xff\xc2"))
    return jpeg[: at + 5] + struct.pack(">HH", 65_500, 65_500) + jpeg[at + 9 :]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png_of(width: int, height: int, *before: bytes, data: bytes = b"") -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *before, _chunk(b"IDAT", data), _chunk(b"IEND", b"")])


def _cut(name: str) -> bytes:
    data = sample(name)
    return data[: len(data) // 2]


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9"/></svg>'
TEXT = b"This is a text file that somebody named holiday.jpg.\n" * 20

UNREADABLE: Mapping[str, bytes] = {
    "text": TEXT,
    "one byte": b"x",
    "SVG": SVG,
    "SVG without a declaration": SVG[21:],
    "HTML": b"<!DOCTYPE html><title>404</title>",
    "PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "ZIP": b"PK\x03\x04" + bytes(200),
    "BMP": b"BM" + bytes(200),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "MP4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(200),
    "null bytes": bytes(1000),
    "JPEG cut in half": _cut("sample.jpg"),
    "JPEG cut in its header": sample("sample.jpg")[:100],
    "JPEG without its picture": b"\xff\xd8\xff\xd9",
    "JPEG header and text": sample("sample.jpg")[:20] + TEXT,
    "PNG cut in half": _cut("alpha.png"),
    "PNG signature alone": b"\x89PNG\r\n\x1a\n",
    "PNG with a broken header checksum": _flipped(png(), 30),
    "PNG with broken data": _flipped(sample("alpha.png"), 50_000),
    "PNG without data": _png_of(64, 64),
    "PNG of no size": _png_of(0, 0),
    "GIF header and text": b"GIF89a" + TEXT,
    "GIF cut in half": _cut("palette.gif"),
    "WebP header and text": b"RIFF\0\1\0\0WEBPVP8 " + TEXT,
    "WebP cut in half": _cut("photo.webp"),
    "HEIC cut in half": _cut("phone.heic"),
    "HEIC header and text": sample("phone.heic")[:24] + TEXT,
    "AVIF cut in half": _cut("photo.avif"),
    "TIFF cut in half": _cut("photo.tiff"),
    "TIFF that points beyond its end": b"II*\0\xff\xff\xff\x7f" + bytes(100),
}
TOO_LARGE: Mapping[str, bytes] = {
    "PNG that unpacks to 81 megapixels": png((9000, 9000), "1"),
    "PNG that says 2500 megapixels": _png_of(50_000, 50_000, data=zlib.compress(bytes(1000))),
    "PNG that says 2^62 pixels": _png_of(2**31 - 1, 2**31 - 1),
    "JPEG that says 4290 megapixels": _with_header_size(sample("sample.jpg")),
    "GIF that says 4294 megapixels": b"GIF89a\xff\xff\xff\xff" + sample("palette.gif")[10:],
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_bytes_that_are_no_whole_picture(system, name):
    image = encoded(UNREADABLE[name])
    assert_refused(system, lambda: create(system, good(image=image)), 415, "unsupported_image", "image", READABLE)


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_upload_that_is_no_whole_picture(system, name):
    send = partial(system.api, "POST", "/uploads", UNREADABLE[name], {"Content-Type": "image/jpeg"})
    assert_refused(system, send, 415, "unsupported_image", "image", READABLE)


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_decompression_bomb(system, name):
    data = TOO_LARGE[name]
    assert_refused(system, lambda: create(system, good(image=encoded(data))), 413, "too_large", "image", "pixels")
    send = partial(system.api, "POST", "/uploads", data, {"Content-Type": "image/png"})
    assert_refused(system, send, 413, "too_large", "image", "pixels")


def test_a_png_whose_text_unpacks_to_20_megabytes(system):
    bomb = _png_of(64, 64, _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20_000_000))))
    assert_refused(system, lambda: create(system, good(image=encoded(bomb))), 415, "unsupported_image", "image")


@pytest.mark.parametrize(
    "uri",
    [
        pytest.param("data:image/jpeg;base64," + encoded(TEXT), id="text that says it is a JPEG"),
        pytest.param("data:image/svg+xml;base64," + encoded(SVG), id="SVG"),
        pytest.param("data:image/heic;base64," + encoded(_cut("phone.heic")), id="half a HEIC"),
        pytest.param("DATA:;BASE64," + encoded(TEXT), id="text without a type"),
    ],
)
def test_a_data_uri_that_holds_no_picture(system, uri):
    assert_refused(system, lambda: create(system, good(image=uri)), 415, "unsupported_image", "image", READABLE)


@pytest.mark.parametrize(
    ("image", "detail"),
    [
        pytest.param("data:image/png,abc", "must be a data URI of the form data:image/...;base64,...", id="no base64"),
        pytest.param("data:image/png;base64", "must be a data URI of the form", id="a data URI without its data"),
        pytest.param("data:image/png;base64,", "holds no bytes", id="a data URI of no bytes"),
        pytest.param("data:image/png;base64,@@@@", "no valid base64", id="a data URI of no base64"),
        pytest.param("data:", "must be a data URI of the form", id="data"),
        pytest.param(encoded(png())[:-5] + "!", "no valid base64", id="a character that base64 has not"),
        pytest.param(encoded(png()).rstrip("=")[:-1] + "A=A", "no valid base64", id="padding in the middle"),
        pytest.param("A", "no valid base64", id="one character"),
        pytest.param("=", "no valid base64", id="padding"),
        pytest.param("-_-_", "no valid base64", id="the alphabet of URLs"),
        pytest.param("Bücher", "no valid base64", id="letters beyond ASCII"),
        pytest.param("\ud800", "must be valid Unicode text", id="half a pair"),
        pytest.param("https://10.0.0.1/\ud800", "must be valid Unicode text", id="half a pair in a URL"),
        pytest.param("holiday.jpg", "no valid base64", id="a file name"),
        pytest.param("file:///etc/passwd", "no valid base64", id="a file URL"),
        pytest.param("ftp://example.com/x.jpg", "no valid base64", id="ftp"),
        pytest.param("s3://results/default/x", "no valid base64", id="s3"),
        pytest.param("http://example.com/x.jpg", "must be an https URL, not http", id="http"),
        pytest.param("HTTP://127.0.0.1/", "must be an https URL, not http", id="HTTP"),
        pytest.param("https://example.com/" + "x" * 5000, "at most 4096 characters", id="a long URL"),
    ],
)
def test_a_text_that_names_no_image(system, image, detail):
    assert_refused(system, lambda: create(system, good(image=image)), 400, "invalid_request", "image", detail)


@pytest.mark.parametrize(
    "url",
    [
        *("https://127.0.0.1/", "https://127.1/x.jpg", "https://2130706433/", "https://0x7f000001/", "https://0/"),
        *("https://[::1]/", "https://[::ffff:127.0.0.1]/", "https://[::ffff:a00:1]/", "https://[64:ff9b::a00:1]/"),
        *("https://169.254.169.254/latest/meta-data/", "https://[fd00:ec2::254]/", "https://[fe80::1]/"),
        *("https://10.0.0.1", "https://172.16.0.1/", "https://192.168.1.1/", "https://100.64.0.1/", "https://0.0.0.0/"),
        *("https://224.0.0.1/", "https://255.255.255.255/", "https://192.0.2.1/", "https://localhost/"),
        *("https://user:secret@10.0.0.1/", "https://10.0.0.1:8080/", "https://10.0.0.1:0/", "https://10.0.0.1:99999/"),
        *("https://", "https:///x.jpg", "https://?", "https://[", "https://]/", "https://[::1", "https://a b/"),
        *("https://exa\\mple.com/", "https://b\u00fccher.example/"),
    ],
)
def test_a_url_that_leads_nowhere_public(system, url):
    assert_refused(system, lambda: create(system, good(image=url)), 400, "image_unreachable", "image")


def test_a_text_that_is_none_is_refused_with_an_idempotency_key_as_well(system):
    send = partial(create, system, good(image="https://10.0.0.1/\ud800"), {"Idempotency-Key": "half a pair"})
    assert_refused(system, send, 400, "invalid_request", "image", "must be valid Unicode text")


# Uploads


def _put_upload(system: System, data: bytes, team: str = "default", upload_id: str | None = None) -> str:
    """Store what a browser sends with a presigned POST: any bytes at all."""
    if upload_id is None:
        upload_id = system.api("POST", "/uploads", {"content_type": "image/jpeg"}).json["id"]
    system.s3.put_object(Bucket="uploads", Key=f"uploads/{team}/{upload_id}", Body=data, ContentType="image/jpeg")
    return upload_id


@pytest.mark.parametrize("name", ["text", "SVG", "JPEG cut in half", "HEIC cut in half", "one byte"])
def test_a_presigned_upload_that_is_no_whole_picture(system, name):
    upload_id = _put_upload(system, UNREADABLE[name])
    assert_refused(system, lambda: create(system, good(image=upload_id)), 415, "unsupported_image", "image", READABLE)


def test_a_presigned_upload_of_no_bytes(system):
    upload_id = _put_upload(system, b"")
    assert_refused(system, lambda: create(system, good(image=upload_id)), 415, "unsupported_image", "image", READABLE)


def test_a_presigned_upload_that_is_a_decompression_bomb(system):
    upload_id = _put_upload(system, TOO_LARGE["PNG that unpacks to 81 megapixels"])
    assert_refused(system, lambda: create(system, good(image=upload_id)), 413, "too_large", "image", "pixels")


def test_a_presigned_upload_of_too_many_bytes(system):
    limit = system.services.settings.max_image_bytes
    upload_id = _put_upload(system, png() + bytes(limit))
    assert_refused(system, lambda: create(system, good(image=upload_id)), 413, "too_large", "image", f"{limit} bytes")


def test_an_upload_of_too_many_bytes(system):
    limit = system.services.settings.max_image_bytes
    send = partial(system.api, "POST", "/uploads", bytes(limit + 1), {"Content-Type": "image/png"})
    assert_refused(system, send, 413, "too_large", "body", f"at most {limit} bytes")


def test_an_upload_of_no_bytes(system):
    send = partial(system.api, "POST", "/uploads", b"", {"Content-Type": "image/png"})
    assert_refused(system, send, 415, "unsupported_image", "image", READABLE)


def test_an_upload_of_another_team(system):
    upload_id = _put_upload(system, png(), team="other", upload_id="upl_01ARZ3NDEKTSV4RRFFQ69G5FAX")
    assert_refused(system, lambda: create(system, good(image=upload_id)), 404, "not_found", "image", upload_id)


def test_an_upload_that_was_announced_and_never_sent(system):
    upload_id = system.api("POST", "/uploads", {}).json["id"]
    assert_refused(system, lambda: create(system, good(image=upload_id)), 404, "not_found", "image", upload_id)


def test_an_upload_that_never_was(system):
    assert_refused(system, lambda: create(system, good(image=UPLOAD_ID)), 404, "not_found", "image", UPLOAD_ID)


@pytest.mark.parametrize(
    "upload_id",
    [
        *("upl_", UPLOAD_ID[:-1], UPLOAD_ID + "0", UPLOAD_ID.lower(), UPLOAD_ID[:-1] + "U", UPLOAD_ID[:-1] + "/"),
        *("upl_../../other/x", f"other/{UPLOAD_ID}", f"uploads/other/{UPLOAD_ID}", f"../other/{UPLOAD_ID}"),
    ],
)
def test_an_upload_id_that_is_none(system, upload_id):
    assert_refused(
        system, lambda: create(system, good(image=upload_id)), 400, "invalid_request", "image", "must be an upload id"
    )


@pytest.mark.parametrize(
    ("body", "field", "detail"),
    [
        ({"content_type": "image/svg+xml"}, "content_type", "must be one of image/jpeg, image/png"),
        ({"content_type": "text/plain"}, "content_type", "must be one of"),
        ({"content_type": "IMAGE/JPEG\r\nx: y"}, "content_type", "must be one of"),
        ({"content_type": 5}, "content_type", "must be one of"),
        ({"content_type": None}, "content_type", "must be one of"),
        ({"content_type": ["image/png"]}, "content_type", "must be one of"),
        ({"content_type": {}}, "content_type", "must be one of"),
        ({"name": "x.jpg"}, "name", "is not known; known are content_type"),
        ({"n" * 5000: 1}, "n" * 100, "is not known"),
        ([], "body", "must be a JSON object"),
        ("text", "body", "must be valid JSON"),
        ("null", "body", "must be a JSON object"),
        (b"\xff\xd8", "body", "must be valid JSON"),
        ("", "body", "must be valid JSON"),
    ],
)
def test_an_announcement_of_an_upload(system, body, field, detail):
    send = partial(system.api, "POST", "/uploads", body, {"Content-Type": "application/json"})
    assert_refused(system, send, 400, "invalid_request", field, detail)


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data; boundary=x", "video/mp4"])
def test_an_upload_of_another_content_type(system, content_type):
    send = partial(system.api, "POST", "/uploads", png(), {"Content-Type": content_type})
    assert_refused(system, send, 415, "unsupported_media_type", "Content-Type", "must be application/json")


# Reading

QUERIES = [
    *[("limit", value, "an integer from 1 to 100") for value in ("0", "101", "-1", "ten", "", "1.5", "9" * 5000)],
    *[
        ("status", value, "must be one of awaiting_upload, queued, processing")
        for value in ("done", "", "QUEUED", "queued,failed")
    ],
    *[("cursor", value, "the cursor of an earlier answer") for value in ("", "x", JOB_ID.lower(), JOB_ID + "0")],
    *[
        (name, value, "ISO 8601 time with its offset")
        for name in ("created_after", "created_before")
        for value in ("yesterday", "", "2026-01-01", "2026-01-01T00:00:00", "2026-13-01T00:00:00Z", "1767225600", "\0")
    ],
    *[(name, "x", "is not known; known are limit, cursor") for name in ("page", "", "Limit", "team")],
]


@pytest.mark.parametrize(("name", "value", "detail"), QUERIES)
def test_a_query_of_the_list(system, name, value, detail):
    assert_refused(
        system, lambda: system.api("GET", "/jobs", query={name: value}), 400, "invalid_request", name, detail
    )


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "1969-01-01T00:00:00Z"])
@pytest.mark.parametrize("name", ["created_after", "created_before"])
def test_a_time_at_the_ends_of_the_calendar_is_a_time(system, name, moment):
    assert system.api("GET", "/jobs", query={name: moment}).status == 200


JOB_IDS = [
    *(JOB_ID, JOB_ID.lower(), JOB_ID[:-1], JOB_ID + "0", JOB_ID[:-1] + "U", "8" + JOB_ID[1:], "x", "%00", "..", "'"),
    *("y" * 5000, "é", "JOB#" + JOB_ID, "<script>", "null"),
]


@pytest.mark.parametrize(
    ("method", "tail", "job_id"),
    [
        *[("GET", "", job_id) for job_id in JOB_IDS],
        *itertools.product(["DELETE"], [""], JOB_IDS[:4]),
        *itertools.product(["POST"], ["/cancel"], JOB_IDS[:4]),
        *itertools.product(["GET"], ["/outputs/0"], JOB_IDS[:4]),
    ],
)
def test_a_job_that_is_not_there(system, method, tail, job_id):
    send = partial(system.api, method, f"/jobs/{job_id}{tail}")
    assert_refused(system, send, 404, "not_found", None, "There is no")
    assert len(send().content) < 1000


@pytest.mark.parametrize("index", ["1", "3", "4", "-1", "00", "0.0", "x", "", "9" * 5000, "\u0660", "0 ", "%30"])
def test_an_output_that_is_not_there(system, finished_job, index):
    send = partial(system.api, "GET", f"/jobs/{finished_job}/outputs/{index}")
    assert_refused(system, send, 404, "not_found", None, " no ")
    assert len(send().content) < 1000


def test_an_output_of_a_job_that_is_not_done(system):
    job_id = create(system, good()).json["id"]
    assert_refused(system, lambda: system.api("GET", f"/jobs/{job_id}/outputs/0"), 404, "not_found", None, "no output")


# Anything

ANY_TEXT = st.text(max_size=30) | st.text(st.characters(categories=["Cs", "Cc", "L", "Nd"]), max_size=5)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
IMAGES = st.sampled_from(
    [
        *(encoded(png()), encoded(TEXT), encoded(_cut("palette.gif")), "data:image/png;base64," + encoded(png())),
        *(UPLOAD_ID, "https://127.0.0.1/", "http://127.0.0.1/", "", encoded(TOO_LARGE["PNG that says 2^62 pixels"])),
    ]
)
NEAR_MISSES = st.fixed_dictionaries(
    {},
    optional={
        "image": IMAGES | ANY_JSON,
        "prompt": st.just("a castle") | ANY_JSON,
        "samples": st.integers(-1, 6) | ANY_JSON,
        "seed": st.integers(-2, 10**16) | st.integers().map(str) | ANY_JSON,
        "strength": st.floats(-1, 2) | st.floats(0, 1).map(str) | ANY_JSON,
        "img_width": st.sampled_from([512, 768, "512", 640]) | ANY_JSON,
        "scheduler": st.sampled_from([*SCHEDULERS, "none"]) | ANY_JSON,
        "metadata": st.dictionaries(ANY_TEXT, ANY_TEXT | st.integers(), max_size=3) | ANY_JSON,
        "base64": st.booleans() | ANY_JSON,
    },
)


def test_any_body_is_refused_with_a_problem_or_makes_a_job(system):
    accepted = price = 0
    before, books = state(system), system.books()

    # The same bodies everywhere: a build does not fail by chance.
    @settings(max_examples=examples(200), deadline=None, derandomize=True, database=None)
    @given(
        body=st.one_of(
            NEAR_MISSES.map(lambda fields: good(**fields)),
            st.builds(
                lambda near, more: {**near, **more}, NEAR_MISSES, st.dictionaries(ANY_TEXT, ANY_JSON, max_size=2)
            ),
            ANY_JSON,
        ).map(json.dumps)
        | st.binary(max_size=40)
    )
    @example(body=json.dumps(good()))
    def check(body: Any) -> None:
        nonlocal accepted, price
        answer = create(system, body)
        if answer.status == 202:
            accepted += 1
            price += answer.json["credits"]["reserved"]
        else:
            assert answer.status in (400, 404, 413, 415), answer.content
            assert_problem(answer, answer.status, answer.json["code"])

    check()
    after = state(system)
    assert accepted, "the bodies have become too far from good ones"
    # Each a job and its entry of the ledger.
    assert len(after["items"]) - len(before["items"]) == 2 * accepted
    assert system.books().balance == books.balance - price
    assert len(after["uploads"]) - len(before["uploads"]) == accepted
    assert after["messages"] - before["messages"] == accepted
    assert after["calls"] == before["calls"]
