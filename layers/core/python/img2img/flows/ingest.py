"""An object came into the uploads bucket: make a job of it, or start the one that waits for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from img2img.errors import (
    Gone,
    InsufficientCredits,
    InvalidRequest,
    NotFound,
    NotUnderstood,
    PresetUnknown,
    TeamDisabled,
    TooLarge,
    UnsupportedImage,
)
from img2img.flows import ending
from img2img.flows.intake import Caller, RemainingTime, Submission, create, input_of, new_job, once, send
from img2img.flows.outbox import outbox_of
from img2img.jobs.guards import OBJECT_GUARD_TTL, Guard
from img2img.jobs.inbox import AwaitedUpload, InboxFile, NewObject, NotAttributable, parameters_in, place_of
from img2img.jobs.job import RESEND_AFTER, Job, Source, Status, Via, given_up
from img2img.params import Img2ImgParams
from img2img.requests import Img2ImgRequest, parse_request

if TYPE_CHECKING:
    from img2img.bootstrap import Services

# Stands where the API key's id stands for a job that came over HTTP, also in usage reports.
INBOX_KEY = "inbox"
# What is known of a file that asks for something wrong.
_NOTHING = Img2ImgRequest(Img2ImgParams(prompt=""), None, base64=False, metadata={})


def ingest(services: Services, new: NewObject, *, correlation_id: str, context: RemainingTime) -> Submission | None:
    """Act on one notice of a new object, however often and however late it comes.

    Returns the job, `replayed` when an earlier notice did the same, or None when there is nothing to do: the object was
    replaced or deleted meanwhile, or nobody waits for it. Raises `NotAttributable` when it belongs to no team,
    `IdempotencyInFlight` while the same notice is being worked on, `NotUnderstood` for a job of a newer version of the
    service, botocore's errors when AWS is in trouble: then the notice has to come again.
    """
    place = place_of(new.key)
    if isinstance(place, AwaitedUpload):
        return _start(services, place, new)
    try:
        services.teams.get(place.team)
    except NotFound:
        raise NotAttributable("there is no such team") from None
    caller = Caller(place.team, INBOX_KEY, correlation_id, Via.INBOX)
    guard = Guard(place.team, f"{new.key}#{new.version}", "", kind="OBJECT", ttl=OBJECT_GUARD_TTL)
    try:
        return once(services, guard, context, lambda: _make(services, caller, place, new, guard), prefix="object")
    except (_Superseded, Gone):
        return None


class _Superseded(Exception):
    """The object is gone, or another version stands in its place, of which there is a notice of its own."""


def _make(services: Services, caller: Caller, file: InboxFile, new: NewObject, guard: Guard) -> Submission:
    """Make a job of a file in the inbox; one that can't be run is made as failed, for its team to see."""
    source = Source(bucket=new.bucket, key=new.key, version=new.version, preset=file.preset)
    request = _NOTHING
    try:
        data, metadata = _read(services, new)
        preset = services.presets.get(file.team, file.preset)
        asked = {**parameters_in(metadata), "preset": preset.name}
        request = parse_request(asked, lambda _: preset.fields, required=("prompt",))
        if outbox_of(file) is None:
            raise InvalidRequest.of_field("key", "is too long for the keys of its results")
        job = new_job(services, caller, request, source=source)
        made = create(services, job, input_of(services, job, data), guard)
    except (InvalidRequest, PresetUnknown, UnsupportedImage, TooLarge, InsufficientCredits, TeamDisabled) as error:
        made = ending.create_failed(services, new_job(services, caller, request, source=source), error, guard)
    if not made.job.status.is_terminal:
        send(services, made.job)
    elif made.replayed:
        ending.catch_up(services, made.job)
    return made


def _read(services: Services, new: NewObject) -> tuple[bytes, Mapping[str, str]]:
    found = services.storage.get_new_object(new.key, etag=new.etag, version_id=new.version_id)
    if found is None:
        raise _Superseded
    return found


def _start(services: Services, place: AwaitedUpload, new: NewObject) -> Submission | None:
    """Start the job that waited for this upload; of a repeated upload, or a repeated notice, the first one counts."""
    try:
        job = services.jobs.get(place.team, place.job_id)
    except NotFound:
        return None
    if job.status is Status.QUEUED:
        # An earlier delivery may have crashed before it sent the job.
        send(services, job)
        return Submission(job, replayed=True)
    if not services.understands(job):
        raise NotUnderstood("The job that waits for this upload was stored by a newer version of the service")
    if job.status is not Status.AWAITING_UPLOAD:
        return None
    try:
        data, _ = _read(services, new)
        png = input_of(services, job, data)
    except _Superseded:
        return None
    except (UnsupportedImage, TooLarge) as error:
        failed = ending.finish(services, given_up(job, error))
        return Submission(failed, replayed=False) if failed else None
    services.storage.put_input(job.team, job.id, png)
    now = int(services.clock())
    deadline_at = now + services.settings.job_deadline
    if not services.jobs.start(job, due_at=min(now + RESEND_AFTER, deadline_at), deadline_at=deadline_at):
        _forget_input(services, job)
        return None
    send(services, job)
    return Submission(job, replayed=False)


def _forget_input(services: Services, job: Job) -> None:
    """Remove the picture of a job that was deleted while it was started."""
    try:
        services.jobs.get(job.team, job.id)
    except NotFound:
        services.storage.delete_input(job.team, job.id)
