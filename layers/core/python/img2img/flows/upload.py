"""Take an image in: straight to S3 with a presigned POST, or in a request body."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from img2img import images
from img2img.errors import FieldError, InvalidRequest
from img2img.flows.intake import Caller, RemainingTime, Submission, create, guard_of, new_job, once
from img2img.ids import new_id
from img2img.jobs.job import Job, Status
from img2img.params import Choice
from img2img.requests import Img2ImgRequest, parse_request
from img2img.values import checked_fields, parser_of

if TYPE_CHECKING:
    from img2img.bootstrap import Services


# An upload may end when its form does; S3's notice of it may take minutes more.
NOTICE_SECONDS = 600


@dataclass(frozen=True)
class StoredUpload:
    """An upload that is stored and known to be an image."""

    id: str
    image: images.ImageInfo
    bytes: int


def _new_upload_id(services: Services) -> str:
    return f"upl_{new_id(int(services.clock() * 1000))}"


@dataclass(frozen=True)
class Announced:
    """A form to send an image with: `id` is that of the upload, `submission` the job that the upload will start."""

    form: Mapping[str, Any]
    id: str = ""
    submission: Submission | None = None


def _form(services: Services, presigned: Mapping[str, Any], *, seconds: int) -> dict[str, Any]:
    return {"method": "POST", **presigned, "max_bytes": services.settings.max_image_bytes, "expires_in": seconds}


def announce(
    services: Services, caller: Caller, body: Any, *, idempotency_key: str | None, context: RemainingTime
) -> Announced:
    """Return a presigned POST of one image, its `content_type` named in the body or JPEG.

    With a `job` object in the body the upload itself starts that job, whose price is reserved now and released if
    nothing comes. An earlier request's job that waits no more has no form. Raises `InvalidRequest` and, with a job,
    what `submit` raises about keys and the team.
    """
    if not isinstance(body, dict):
        raise InvalidRequest.of_field("body", "must be a JSON object")
    parsers = {"content_type": parser_of(Choice(images.ACCEPTED_CONTENT_TYPES)), "job": lambda value: value}
    values = checked_fields(body, parsers)
    content_type = values.get("content_type", "image/jpeg")
    if "job" not in values:
        upload_id = _new_upload_id(services)
        presigned = services.storage.presigned_upload(caller.team, upload_id, content_type)
        return Announced(_form(services, presigned, seconds=services.settings.upload_url_ttl), id=upload_id)
    request = _request_of(services, caller.team, values["job"])
    guard = guard_of(caller, idempotency_key, request.fingerprint)

    def make() -> Submission:
        return create(services, _awaiting(services, caller, request), None, guard)

    submission = once(services, guard, context, make, prefix="create") if guard else make()
    return Announced(_form_of(services, submission.job, content_type), submission=submission)


def _form_of(services: Services, job: Job, content_type: str) -> dict[str, Any]:
    """Return the form that starts a job, for as long as the job waits for it; none once it waits no more."""
    left = job.deadline_at - NOTICE_SECONDS - int(services.clock())
    if job.status is not Status.AWAITING_UPLOAD or job.source is None or left <= 0:
        return {}
    return _form(services, services.storage.presigned_source(job.source, content_type, seconds=left), seconds=left)


def _request_of(services: Services, team: str, job: Any) -> Img2ImgRequest:
    try:
        request = parse_request(job, services.presets.fields_of(team), required=("prompt",))
    except InvalidRequest as error:
        named = [FieldError("job" if e.field == "body" else f"job.{e.field}", e.detail) for e in error.errors]
        raise InvalidRequest.of_fields(named) from None
    if request.image:
        raise InvalidRequest.of_field("job.image", "must not be there: the image is what is uploaded")
    return request


def _awaiting(services: Services, caller: Caller, request: Img2ImgRequest) -> Job:
    job = new_job(services, caller, request, status=Status.AWAITING_UPLOAD)
    gives_up_at = int(services.clock()) + services.settings.upload_url_ttl + NOTICE_SECONDS
    source = services.storage.awaited_source(caller.team, job.id, request.preset)
    return replace(job, source=source, due_at=gives_up_at, deadline_at=gives_up_at)


def store(services: Services, team: str, data: bytes) -> StoredUpload:
    """Store an image that came in a request body. Raises `TooLarge` and `UnsupportedImage`."""
    images.refuse_larger(len(data), services.settings.max_image_bytes, field="body")
    info = images.inspect(data, max_pixels=services.settings.max_image_pixels)
    upload_id = _new_upload_id(services)
    services.storage.put_upload(team, upload_id, data, info.content_type)
    return StoredUpload(upload_id, info, len(data))
