"""The local S3 holds a presigned form to its policy, as S3 does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from botocore.config import Config

from local.upload_forms import Refused, check, read_form

BUCKET = "uploads"


@pytest.fixture(scope="module")
def form() -> dict[str, str]:
    conditions: list[Any] = [
        {"Content-Type": "image/jpeg"},
        ["content-length-range", 1, 10],
        ["starts-with", "$name", "a"],
    ]
    presigned = boto3.client("s3", config=Config(signature_version="s3v4")).generate_presigned_post(
        BUCKET, "uploads/default/upl_1", Fields={"Content-Type": "image/jpeg"}, Conditions=conditions, ExpiresIn=60
    )
    return {**presigned["fields"], "name": "abc"}


def sent(fields: Any, data: bytes | None = b"12345", *, file_first: bool = False) -> tuple[bytes, str]:
    """Return a multipart body and its boundary."""
    parts = [f'form-data; name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
    if data is not None:
        file = b'form-data; name="file"; filename="photo.jpg"\r\nContent-Type: image/jpeg\r\n\r\n' + data
        parts.insert(0 if file_first else len(parts), file)
    body = b"".join(b"--limit\r\nContent-Disposition: " + part + b"\r\n" for part in parts)
    return body + b"--limit--\r\n", "limit"


def refused(fields: Any, data: bytes | None = b"12345", later: float = 0) -> str:
    with pytest.raises(Refused) as caught:
        check(read_form(*sent(fields, data)), BUCKET, datetime.now(UTC) + timedelta(seconds=later))
    return caught.value.code


@pytest.mark.parametrize("size", [1, 10])
def test_a_form_sent_as_it_was_given(form, size):
    check(read_form(*sent(form, b"x" * size)), BUCKET, datetime.now(UTC))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"key": "uploads/other/upl_1"}, "AccessDenied"),
        ({"Content-Type": "text/html"}, "AccessDenied"),
        ({"name": "xyz"}, "AccessDenied"),
        ({"acl": "public-read"}, "AccessDenied"),
        ({"policy": "bm9uZQ=="}, "AccessDenied"),
    ],
)
def test_a_changed_form(form, change, code):
    assert refused({**form, **change}) == code


def test_a_form_without_its_fields(form):
    assert refused({}) == "AccessDenied"
    assert refused({name: value for name, value in form.items() if name != "key"}) == "AccessDenied"


def test_sizes_and_times(form):
    assert refused(form, b"") == "EntityTooSmall"
    assert refused(form, b"x" * 11) == "EntityTooLarge"
    assert refused(form, later=61) == "AccessDenied"
    assert refused(form, None) == "InvalidArgument"


def test_another_bucket(form):
    with pytest.raises(Refused):
        check(read_form(*sent(form)), "results", datetime.now(UTC))


def test_what_follows_the_file_does_not_count(form):
    with pytest.raises(Refused):
        check(read_form(*sent(form, file_first=True)), BUCKET, datetime.now(UTC))
