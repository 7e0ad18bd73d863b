"""What every way into the service shares: a new job, made once for each idempotency key or version of an object."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from aws_lambda_powertools import Logger

from img2img import images, observe
from img2img.aws import AwsError
from img2img.errors import (
    Gone,
    IdempotencyInFlight,
    IdempotencyKeyReused,
    InvalidRequest,
    NotFound,
    ServiceError,
)
from img2img.ids import new_id
from img2img.jobs.guards import GUARD_TTL, EarlierJob, Guard
from img2img.jobs.job import RESEND_AFTER, Job, Source, Status, Via

if TYPE_CHECKING:
    from img2img.bootstrap import Services
    from img2img.requests import Img2ImgRequest

logger = Logger(child=True)

MAX_IDEMPOTENCY_KEY = 255


@dataclass(frozen=True)
class Caller:
    """Who asks: a team, through one of its API keys or its inbox, in one request."""

    team: str
    key_id: str
    correlation_id: str
    via: Via = Via.API


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

    def note(self) -> None:
        """Log and count it."""
        observe.job_created(
            correlation_id=self.job.correlation_id,
            job_id=self.job.id,
            samples=self.job.params.samples,
            replayed=self.replayed,
        )


def guard_of(caller: Caller, key: str | None, fingerprint: str) -> Guard | None:
    """Return what ties an `Idempotency-Key` to its job. Raises `InvalidRequest`."""
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY or not key.isprintable():
        raise InvalidRequest.of_field("Idempotency-Key", f"must have 1 to {MAX_IDEMPOTENCY_KEY} printable characters")
    return Guard(caller.team, key, fingerprint)


def new_job(
    services: Services,
    caller: Caller,
    request: Img2ImgRequest,
    *,
    status: Status = Status.QUEUED,
    source: Source | None = None,
    waits: float = 0,
) -> Job:
    """Return a job that is nowhere yet, with its price; `waits` is for how many seconds its caller waits for it."""
    now = services.clock()
    params = request.params.resolved()
    deadline_at = int(now) + services.settings.job_deadline
    return Job(
        id=new_id(int(now * 1000)),
        team=caller.team,
        key_id=caller.key_id,
        correlation_id=caller.correlation_id,
        status=status,
        params=params,
        metadata=request.metadata,
        backend=services.settings.first_backend,
        via=caller.via,
        source=source,
        credits=services.prices.quote(params, services.settings.first_backend),
        created_ms=int(now * 1000),
        due_at=min(int(now) + RESEND_AFTER, deadline_at),
        deadline_at=deadline_at,
        waited_until=math.ceil(now + waits) if waits > 0 else None,
    )


def input_of(services: Services, job: Job, image: bytes) -> bytes:
    """Return the picture that the job sends to its backend. Raises `UnsupportedImage` and `TooLarge`."""
    return images.prepare(
        image,
        width=job.params.img_width,
        height=job.params.img_height,
        fit=job.params.fit,
        max_pixels=services.settings.max_image_pixels,
    )


def create(services: Services, job: Job, png: bytes | None, guard: Guard | None) -> Submission:
    """Write a job with the picture that it sends, or find the one that the guard holds.

    Raises `IdempotencyKeyReused`, `Gone`, `InsufficientCredits` and `TeamDisabled`; then nothing is left behind.
    """
    if png:
        services.storage.put_input(job.team, job.id, png)
    try:
        services.jobs.create(job, guard)
    except EarlierJob as earlier:
        # An earlier request crashed between this transaction and the idempotency record's completion.
        if png:
            services.storage.delete_input(job.team, job.id)
        if guard and guard.fingerprint != earlier.fingerprint:
            raise _reused() from None
        return _replay(services, job.team, earlier.job_id)
    except ServiceError:
        with suppress(*AwsError):
            services.storage.delete_input(job.team, job.id)
        raise
    except AwsError:
        # The answer may be lost and the job be there, to be run and charged: then it is as good as answered.
        if not _is_there(services, job):
            raise
    return Submission(job, replayed=False)


def _is_there(services: Services, job: Job) -> bool:
    with suppress(NotFound, *AwsError):
        services.jobs.get(job.team, job.id)
        return True
    return False


def send(services: Services, job: Job, *, after: int = 0, look: bool = False) -> None:
    """Ask a worker to run a job that exists. It would be run anyway, so a queue that takes nothing is no error."""
    try:
        services.queue.send(job, after=after, look=look)
    except AwsError as error:
        logger.warning("job not sent, sweep will send it", error=type(error).__name__, job_id=job.id)


def once(services: Services, guard: Guard, context: Any, make: Callable[[], Submission], *, prefix: str) -> Submission:
    """Make a submission, or find the one that was made for the same guard before.

    Raises `IdempotencyInFlight` while another request with the key is being worked on, `IdempotencyKeyReused` for
    another payload, `Gone`, and what `make` raises.
    """
    from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig, idempotent_function
    from aws_lambda_powertools.utilities.idempotency.exceptions import (
        IdempotencyAlreadyInProgressError,
        IdempotencyValidationError,
    )
    from aws_lambda_powertools.utilities.idempotency.serialization.custom_dict import CustomDictSerializer

    config = IdempotencyConfig(
        event_key_jmespath="[team, key]",
        payload_validation_jmespath="fingerprint",
        expires_after_seconds=GUARD_TTL,
        hash_function="sha256",
        raise_on_no_idempotency_key=True,
        # Without it a run that timed out would block its key for a day.
        lambda_context=context,
    )
    names_its_job = CustomDictSerializer(
        to_dict=lambda made: {"job_id": made.job.id},
        from_dict=lambda stored: _replay(services, guard.team, stored["job_id"]),
    )

    @idempotent_function(  # type: ignore[untyped-decorator]
        data_keyword_argument="claim",
        persistence_store=services.idempotency,
        config=config,
        output_serializer=names_its_job,
        key_prefix=prefix,
    )
    def make_once(*, claim: dict[str, str]) -> Submission:  # noqa: ARG001 (Powertools reads it)
        return make()

    try:
        made: Submission = make_once(claim={"team": guard.team, "key": guard.key, "fingerprint": guard.fingerprint})
    except IdempotencyAlreadyInProgressError:
        raise IdempotencyInFlight("Another request with this Idempotency-Key is in flight", retry_after=1) from None
    except IdempotencyValidationError:
        raise _reused() from None
    return made


def _reused() -> IdempotencyKeyReused:
    return IdempotencyKeyReused("The Idempotency-Key was used with another payload")


def _replay(services: Services, team: str, job_id: str) -> Submission:
    """Return the job that an earlier request made, as it stands now. Raises `Gone`."""
    try:
        return Submission(services.jobs.get(team, job_id), replayed=True)
    except NotFound:
        raise Gone("The job that this Idempotency-Key created was deleted") from None
