"""Create a job from a request, once for each idempotency key, and watch it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from aws_lambda_powertools import Logger
from botocore.exceptions import BotoCoreError, ClientError

from img2img import images
from img2img.create import Caller, RemainingTime, Submission, create, new_job, once, prepare, send
from img2img.errors import InvalidRequest
from img2img.jobs import Job, Output
from img2img.params import ImageUrl, Img2ImgRequest, InlineImage, UploadId
from img2img.store import Guard

if TYPE_CHECKING:
    from img2img.bootstrap import Services

logger = Logger(child=True)

MAX_IDEMPOTENCY_KEY = 255


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


def guard_of(caller: Caller, key: str | None, fingerprint: str) -> Guard | None:
    """Return what ties an `Idempotency-Key` to its job. Raises `InvalidRequest`."""
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY or not key.isprintable():
        raise InvalidRequest.of_field("Idempotency-Key", f"must have 1 to {MAX_IDEMPOTENCY_KEY} printable characters")
    return Guard(caller.team, key, fingerprint)


def submit(
    services: Services, caller: Caller, request: Img2ImgRequest, *, idempotency_key: str | None, context: RemainingTime
) -> Submission:
    """Create a job, or find the one that an earlier request with the same `Idempotency-Key` created.

    The picture is prepared before the job exists: an unreadable image makes no job, and no retry of a job decodes it
    again. Raises `InvalidRequest`, `UnsupportedImage`, `TooLarge` and `NotFound` about the request,
    `IdempotencyInFlight` while another request with the key is being worked on, `IdempotencyKeyReused` for another
    payload, `InsufficientCredits` and `TeamDisabled` about the team.
    """
    guard = guard_of(caller, idempotency_key, request.fingerprint)

    def make() -> Submission:
        job = new_job(services, caller, request)
        made = create(services, job, prepare(services, job, _image_bytes(services, caller.team, request)), guard)
        if not made.job.status.is_terminal:
            send(services, made.job)
        return made

    return once(services, guard, context, make, prefix="create") if guard else make()


def watch(services: Services, job: Job, seconds: float) -> Job:
    """Return the job as soon as it has ended, else as it is after `seconds`.

    Each look is one read; they start close together, for a backend takes 3 to 8 s, and grow apart.
    """
    until = services.clock() + seconds
    pause = 0.2
    while not job.status.is_terminal and (left := until - services.clock()) > 0:
        services.sleep(min(pause, left))
        pause = min(pause * 1.25, 1.0)
        try:
            job = services.jobs.get(job.team, job.id)
        except (BotoCoreError, ClientError) as error:
            # The job exists: an error now would make a caller without an idempotency key create, and pay, another.
            logger.warning("job not read", error=type(error).__name__, job_id=job.id)
    return job


def pictures(services: Services, outputs: Sequence[Output]) -> list[bytes] | None:
    """Return the outputs' bytes, or None when S3 does not give them now: their URLs remain."""
    try:
        return [services.storage.get_output(output) for output in outputs]
    except (BotoCoreError, ClientError) as error:
        logger.warning("output not read", error=type(error).__name__)
        return None


def balance(services: Services, team: str) -> int | None:
    """Return a team's balance, or None when it cannot be read now: an answer that is paid for goes out without it."""
    try:
        return services.credits.account(team).balance
    except (BotoCoreError, ClientError) as error:
        logger.warning("balance not read", error=type(error).__name__)
        return None
