"""Create a job from a request, once for each idempotency key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from img2img import images
from img2img.flows.intake import Caller, RemainingTime, Submission, create, guard_of, input_of, new_job, once, send
from img2img.jobs.guards import Guard
from img2img.requests import Img2ImgRequest
from img2img.values import ImageUrl, InlineImage, UploadId

if TYPE_CHECKING:
    from img2img.bootstrap import Services


def _image_bytes(services: Services, team: str, request: Img2ImgRequest) -> bytes:
    match request.image:
        case InlineImage(data):
            images.refuse_larger(len(data), services.settings.max_image_bytes)
            return data
        case ImageUrl(url):
            return services.fetcher.fetch(url)
        case UploadId(upload_id):
            return services.storage.get_upload(team, upload_id)
    raise AssertionError("a request names its image")


def submit(
    services: Services,
    caller: Caller,
    request: Img2ImgRequest,
    *,
    idempotency_key: str | None,
    context: RemainingTime,
    waits: float = 0,
) -> Submission:
    """Create a job, or find the one that an earlier request with the same `Idempotency-Key` created.

    `waits` is for how many seconds the caller waits for it.

    The picture is prepared before the job exists: an unreadable image makes no job, and no retry of a job decodes it
    again. Raises `InvalidRequest`, `UnsupportedImage`, `TooLarge` and `NotFound` about the request,
    `IdempotencyInFlight` while another request with the key is being worked on, `IdempotencyKeyReused` for another
    payload, `InsufficientCredits` and `TeamDisabled` about the team.
    """
    guard = guard_of(caller, idempotency_key, request.fingerprint)
    if guard is None:
        return make(services, caller, request, waits=waits)
    return once(services, guard, context, lambda: make(services, caller, request, guard, waits=waits), prefix="create")


def make(
    services: Services, caller: Caller, request: Img2ImgRequest, guard: Guard | None = None, *, waits: float = 0
) -> Submission:
    """Create a job and ask a worker to run it, or find the one that the guard holds; raises as `submit` does."""
    job = new_job(services, caller, request, waits=waits)
    made = create(services, job, input_of(services, job, _image_bytes(services, caller.team, request)), guard)
    if not made.job.status.is_terminal:
        send(services, made.job)
    return made
