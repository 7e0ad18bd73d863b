"""What makes a picture out of a picture. A backend speaks HTTP or boto3 only and knows no job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from img2img.params import Img2ImgParams


@dataclass(frozen=True)
class GeneratedImage:
    """One generated picture, in the bytes that the backend sent.

    `seconds` is the backend's own figure, or what the call took; `remaining_credits` is what is left of the
    operator's account where the backend says so.
    """

    data: bytes
    seconds: float
    remaining_credits: float | None = None


class Backend(Protocol):
    """Generates one sample per call."""

    def generate(self, image: bytes, params: Img2ImgParams, seed: int) -> GeneratedImage:
        """Return the picture made of `image`, a PNG of `img_width` x `img_height`, with this seed.

        Raises a `JobError`; its `retryable` says whether the same call may be made again, `retry_after` when.
        """
        ...
