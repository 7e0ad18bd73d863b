"""What makes a picture out of a picture. A backend speaks HTTP or boto3 only and knows no job."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Protocol

from img2img.params import Img2ImgParams


@dataclass(frozen=True)
class GeneratedImage:
    """One generated picture, in the bytes that the backend sent.

    `seconds` is the backend's own figure, or what the call took; `remaining_credits` is what is left of the
    operator's account where the backend says so. `flagged`: its safety checker withheld the picture, and there are no
    bytes. `reason` is the code of the error for which another backend did not serve it.
    """

    data: bytes
    seconds: float
    remaining_credits: float | None = None
    flagged: bool = False
    backend: str = "segmind"
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Pending:
    """One sample that a backend works on by itself.

    `output` or `failure` will be there when `endpoint` is done, as S3 URIs. `reason` as in `GeneratedImage`.
    """

    inference_id: str
    endpoint: str
    output: str
    failure: str
    backend: str = "sagemaker"
    reason: str = ""


def request_body(image: bytes, params: Img2ImgParams, seed: int, *, as_json: bool) -> dict[str, Any]:
    """Return the body of one call for one sample, in the format that Segmind and the endpoint share.

    `as_json` asks for the picture inside JSON.
    """
    return {
        "image": base64.b64encode(image).decode(),
        "prompt": params.prompt,
        "negative_prompt": params.negative_prompt,
        "samples": 1,
        "scheduler": params.scheduler,
        "num_inference_steps": params.num_inference_steps,
        "guidance_scale": params.guidance_scale,
        # Never left out: Segmind's default of 1 ignores the image.
        "strength": params.strength,
        "seed": seed,
        "img_width": params.img_width,
        "img_height": params.img_height,
        "base64": as_json,
    }


class Backend(Protocol):
    """Generates one sample per call."""

    def generate(
        self, image: bytes, params: Img2ImgParams, seed: int, *, name: str, until: float
    ) -> GeneratedImage | Pending:
        """Return the picture made of `image`, a PNG of `img_width` x `img_height`, with this seed, or where it will be.

        `name` is the call's own, a path such as `team/job/1/0`; after `until`, in epoch seconds, nobody wants the
        picture any more. Raises a `JobError`; its `retryable` says whether the same call may be made again, and
        `retry_after` when.
        """
        ...
