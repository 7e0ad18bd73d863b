"""What makes a picture out of a picture. A backend speaks HTTP or boto3 only and knows no job."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from img2img.params import PARAMETERS, Img2ImgParams
from img2img.stored import StoredEnum


@dataclass(frozen=True)
class GeneratedImage:
    """One generated picture, in the bytes that `backend` sent.

    `seconds` is the backend's own figure, or what the call took; `remaining_credits` is what is left of the
    operator's account where the backend says so. `flagged`: its safety checker withheld the picture, and there are no
    bytes. `reason` is the code of the error for which another backend did not serve it.
    """

    data: bytes
    seconds: float
    backend: str
    remaining_credits: float | None = None
    flagged: bool = False
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Pending:
    """One sample that `backend` works on by itself. `notes` are what it has to know to find its answer.

    `reason` as in `GeneratedImage`.
    """

    backend: str
    reason: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What a backend says, unasked, of a call that is over.

    `name` is the call's own, which ends in the number of its sample, `call` the id that the backend knows it by;
    `output` is where its answer lies, None where it failed, of `failure_reason`.
    """

    backend: str
    name: str
    call: str
    output: str | None
    failure_reason: str = ""

    @property
    def index(self) -> int:
        """The sample's number."""
        return int(self.name.rpartition("/")[2])


class Wait(StoredEnum):
    """What a job that is being processed waits for."""

    BACKEND_BUSY = "backend_busy"
    ENDPOINT_BUSY = "endpoint_busy"
    ENDPOINT_STARTING = "endpoint_starting"

    @property
    def detail(self) -> str:
        """What it means, for people."""
        return _WAITS.get(self, "")


_WAITS = {
    Wait.BACKEND_BUSY: "The backend has the job, and is asked again and again whether it is done",
    Wait.ENDPOINT_BUSY: "The GPU endpoint has the job, and answers by itself",
    Wait.ENDPOINT_STARTING: "The GPU endpoint was scaled to zero and is starting, which takes 5 to 10 minutes",
}


# What Segmind is told, and what an endpoint of our own is told, which may know more.
SEGMIND_FIELDS = tuple(item.name for item in PARAMETERS.values() if item.sent and item.segmind)
ENDPOINT_FIELDS = tuple(item.name for item in PARAMETERS.values() if item.sent)


def request_body(
    image: bytes, params: Img2ImgParams, seed: int, names: Iterable[str], *, as_json: bool
) -> dict[str, Any]:
    """Return the body of one call for one sample, in the format that Segmind and the endpoint share.

    Each of `names` is sent, also at its default: Segmind's own default of `strength`, 1, ignores the image. `as_json`
    asks for the picture inside JSON.
    """
    return {
        "image": base64.b64encode(image).decode(),
        **{name: getattr(params, name) for name in names},
        "samples": 1,
        "seed": seed,
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


class AsyncBackend(Backend, Protocol):
    """A backend that may give back a `Pending`, which names it, and answers later."""

    def answer(self, pending: Pending | None, notice: Notice | None) -> GeneratedImage | None:
        """Return the picture of a call, None while there is none.

        `pending` is the call whose sample is waited for, None when only a notice tells of one; `notice` is what came of
        this sample, maybe of an earlier call for it. All calls for a sample ask for the same picture, so a picture
        counts whichever call it came from, a failure only of the pending one. A look that fails gives None, for there
        will be another. Raises the `JobError` of a call that failed, and botocore's `ClientError` and `BotoCoreError`.
        """
        ...

    def look_after(self, pending: Pending) -> float | None:
        """Return the seconds until the next look at a call, None where the backend gives notice by itself."""
        ...

    def waits_for(self, *, answering: bool) -> Wait:
        """Return what a pending sample waits for; `answering`: the backend has just been heard of."""
        ...
