"""What a test has happen at an AWS call, by the fixture `at`, and the picture that it happens to."""

from __future__ import annotations

import io
from functools import cache

from botocore.exceptions import EndpointConnectionError
from PIL import Image

from tests.faults.calls import Killed


def die() -> None:
    raise Killed


def fail() -> None:
    raise EndpointConnectionError(endpoint_url="https://aws.example")


@cache
def picture(shade: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 60, 30)).save(buffer, "PNG")
    return buffer.getvalue()
