"""Create a job, once for each idempotency key, and watch it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from aws_lambda_powertools import Logger
from botocore.exceptions import BotoCoreError, ClientError

from img2img import images
from img2img.errors import Gone, IdempotencyInFlight, IdempotencyKeyReused, InvalidRequest, NotFound, ServiceError
from img2img.ids import new_id
from img2img.jobs import Job, Output, Status
from img2img.params import ImageUrl, Img2ImgRequest, InlineImage
from img2img.store import GUARD_TTL, Guard

if TYPE_CHECKING:
    from img2img.bootstrap import Services

logger = Logger(child=True)

# A message is on its way within milliseconds; later than this, `sweep` sends another.
RESEND_AFTER = 60
MAX_IDEMPOTENCY_KEY = 255
BACKEND = "segmind"


@dataclass(frozen=True)
class Caller:
    """Who asks: a team, through one of its API keys, in one HTTP request."""

    team: str
    key_id: str
    correlation_id: str


class RemainingTime(Protocol):
    """Lambda's context, as far as idempotency needs it."""

    def get_remaining_time_in_millis(self) -> int:
        """Return the milliseconds until this invocation is stopped."""
        ...


@dataclass(frozen=True)
class Submission:
    """A job as created, or as it stands now if an earlier request with the same key had created it."""

    job: Job
    replayed: bool


def _image_bytes(services: Services, team: str, request: Img2ImgRequest) -> bytes:
    if isinstance(request.image, InlineImage):
        images.refuse_larger(len(request.image.data), services.settings.max_image_bytes)
        return request.image.data
    if isinstance(request.image, ImageUrl):
        return services.fetcher.fetch(request.image.url)
    return services.storage.get_upload(team, request.image.id)


def _create(services: Services, caller: Caller, request: Img2ImgRequest, key: str | None) -> tuple[Job, bool]:
    """Make the job and ask for its run. Returns the job and whether it had existed.

    The picture is prepared before the job exists: an unreadable image makes no job, and no retry of a job decodes
    it again.
    """
    params = request.params.resolved()
    png = images.prepare(
        _image_bytes(services, caller.team, request),
        width=params.img_width,
        height=params.img_height,
        fit=params.fit,
        max_pixels=services.settings.max_image_pixels,
    )
    now = services.clock()
    deadline_at = int(now) + services.settings.job_deadline
    job = Job(
        id=new_id(int(now * 1000)),
        team=caller.team,
        key_id=caller.key_id,
        correlation_id=caller.correlation_id,
        status=Status.QUEUED,
        params=params,
        metadata=request.metadata,
        backend=BACKEND,
        credits=services.prices.quote(params, BACKEND),
        created_ms=int(now * 1000),
        due_at=min(int(now) + RESEND_AFTER, deadline_at),
        deadline_at=deadline_at,
    )
    services.storage.put_input(job.team, job.id, png)
    guard = Guard(job.team, key, request.fingerprint) if key else None
    try:
        guarded = services.jobs.create(job, guard)
    except ServiceError:
        with suppress(BotoCoreError, ClientError):
            services.storage.delete_input(job.team, job.id)
        raise
    if guarded:
        # An earlier request crashed between this transaction and the idempotency record's completion.
        services.storage.delete_input(job.team, job.id)
        if guarded.fingerprint != request.fingerprint:
            raise IdempotencyKeyReused("The Idempotency-Key was used with another payload")
        job = _earlier_job(services, job.team, guarded.job_id)
    if not job.status.is_terminal:
        try:
            services.queue.send(job)
        except (BotoCoreError, ClientError) as error:
            # The job exists and would run anyway: failing now would tell the caller otherwise.
            logger.warning("job not sent, sweep will send it", error=type(error).__name__, job_id=job.id)
    return job, guarded is not None


def submit(
    services: Services, caller: Caller, request: Img2ImgRequest, *, idempotency_key: str | None, context: RemainingTime
) -> Submission:
    """Create a job, or find the one that an earlier request with the same `Idempotency-Key` created.

    Raises `InvalidRequest`, `UnsupportedImage`, `TooLarge` and `NotFound` about the request, `IdempotencyInFlight`
    while another request with the key is being worked on, `IdempotencyKeyReused` for another payload,
    `InsufficientCredits` and `TeamDisabled` about the team.
    """
    if idempotency_key is None:
        return Submission(_create(services, caller, request, None)[0], replayed=False)
    if not 1 <= len(idempotency_key) <= MAX_IDEMPOTENCY_KEY or not idempotency_key.isprintable():
        raise InvalidRequest.of_field("Idempotency-Key", f"must have 1 to {MAX_IDEMPOTENCY_KEY} printable characters")
    return _submit_once(services, caller, request, idempotency_key, context)


def _submit_once(services: Services, caller: Caller, request: Img2ImgRequest, key: str, context: Any) -> Submission:
    from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig, idempotent_function
    from aws_lambda_powertools.utilities.idempotency.exceptions import (
        IdempotencyAlreadyInProgressError,
        IdempotencyValidationError,
    )

    created: list[Submission] = []
    config = IdempotencyConfig(
        event_key_jmespath="[team, key]",
        payload_validation_jmespath="fingerprint",
        expires_after_seconds=GUARD_TTL,
        hash_function="sha256",
        raise_on_no_idempotency_key=True,
        # Without it a run that timed out would block its key for a day.
        lambda_context=context,
    )

    @idempotent_function(  # type: ignore[untyped-decorator]
        data_keyword_argument="claim", persistence_store=services.idempotency, config=config, key_prefix="create"
    )
    def create_once(*, claim: dict[str, str]) -> dict[str, str]:
        job, existed = _create(services, caller, request, claim["key"])
        created.append(Submission(job, replayed=existed))
        return {"job_id": job.id}

    try:
        record = create_once(claim={"team": caller.team, "key": key, "fingerprint": request.fingerprint})
    except IdempotencyAlreadyInProgressError:
        raise IdempotencyInFlight("Another request with this Idempotency-Key is in flight", retry_after=1) from None
    except IdempotencyValidationError:
        raise IdempotencyKeyReused("The Idempotency-Key was used with another payload") from None
    if created:
        return created[0]
    return Submission(_earlier_job(services, caller.team, record["job_id"]), replayed=True)


def _earlier_job(services: Services, team: str, job_id: str) -> Job:
    try:
        return services.jobs.get(team, job_id)
    except NotFound:
        raise Gone("The job that this Idempotency-Key created was deleted") from None


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
