"""Jobs as Segmind's own clients know them: one request that waits for its picture (v1), or a request id that is polled
(v2). Shapes and statuses are those of https://docs.segmind.com; the jobs are the same as everywhere.
"""

from __future__ import annotations

from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING

from aws_lambda_powertools import Logger

from img2img.aws import AwsError
from img2img.errors import (
    AnswerTooLarge,
    Forbidden,
    Gone,
    InsufficientCredits,
    JobError,
    NotFound,
    NotUnderstood,
    ServiceError,
    UnsupportedImage,
    UnsupportedMediaType,
)
from img2img.flows.answer import Answer, fits, in_base64, one_or_all
from img2img.flows.intake import Caller, Submission
from img2img.flows.submit import make
from img2img.flows.watch import balance, pictures
from img2img.jobs.guards import Guard
from img2img.jobs.job import Job, Status
from img2img.money.prices import in_credits
from img2img.requests import Img2ImgRequest

if TYPE_CHECKING:
    from img2img.bootstrap import Services

logger = Logger(child=True)

MODEL = "sd1.5-img2img"
# A caller who was told to try again does so soon. With a random seed the same request may also ask for another picture.
_REPEATED_WITHIN = 600
_STATES = {Status.SUCCEEDED: "COMPLETED", Status.FAILED: "FAILED", Status.CANCELED: "FAILED"}


def require_model(name: str) -> None:
    """Raise `NotFound` for a model that is not served here."""
    if name != MODEL:
        raise NotFound(f"There is no model {name[:60]} here, only {MODEL}")


def _repeat_of(caller: Caller, request: Img2ImgRequest) -> Guard:
    fingerprint = request.fingerprint
    return Guard(caller.team, f"{caller.key_id}#{fingerprint}", fingerprint, kind="REPEAT")


def submit_or_attach(services: Services, caller: Caller, request: Img2ImgRequest, *, waits: float) -> Submission:
    """Create a job, or find the one that the same request of the same key made and was never given.

    Raises as `submit` does, but for what is about idempotency keys.
    """
    repeat = _repeat_of(caller, request)
    if earlier := services.repeats.find(repeat):
        try:
            job = services.jobs.get(caller.team, earlier)
        except NotFound:
            job = None
        if job and job.status is not Status.CANCELED:
            return Submission(job, replayed=True)
        services.repeats.untie(repeat, earlier)
    try:
        # Without a seed the same request may come twice at once, for two pictures.
        return make(services, caller, request, repeat if request.params.seed >= 0 else None, waits=waits)
    except Gone:
        # Made by the same request a moment ago, and deleted since.
        return make(services, caller, request, waits=waits)


def waited(services: Services, caller: Caller, request: Img2ImgRequest, job: Job, *, seconds: float) -> Answer:
    """Return v1's answer to who has waited for a job for so long, and see to it that a repeat finds or leaves it."""
    repeat = _repeat_of(caller, request)
    answer, delivered = _of_ended(services, request, job) if job.status.is_terminal else (_late(job, seconds), False)
    try:
        if delivered:
            services.repeats.untie(repeat, job.id)
        elif request.params.seed < 0:
            services.repeats.tie(replace(repeat, ttl=_REPEATED_WITHIN), job.id)
    except AwsError as error:
        # The job is paid for, so its answer goes out; a repeat may find it once more, or not.
        logger.warning("repeat not noted", error=type(error).__name__, job_id=job.id)
    return answer


def _late(job: Job, seconds: float) -> Answer:
    return _error(
        HTTPStatus.GATEWAY_TIMEOUT,
        f"No picture after {seconds:.0f} s. The request {job.id} goes on: send the same request again to wait for it, "
        f"or read /v2/requests/{job.id}",
        job,
    )


def _of_ended(services: Services, request: Img2ImgRequest, job: Job) -> tuple[Answer, bool]:
    """Return the answer of an ended job, and whether it hands over what the job came to."""
    if job.status is not Status.SUCCEEDED:
        return _error(HTTPStatus.INTERNAL_SERVER_ERROR, _failure(job), job), True
    shown = job.delivered
    wanted = shown if request.base64 else shown[:1]
    if not fits(wanted):
        detail = f"The picture does not fit into one answer; read it from /v2/requests/{job.id}"
        return _error(AnswerTooLarge.status, detail, job), False
    data = pictures(services, wanted)
    if data is None:
        detail = f"The picture could not be read now; send the same request again, or read /v2/requests/{job.id}"
        return _error(HTTPStatus.SERVICE_UNAVAILABLE, detail, job), False
    headers = {
        "x-request-id": job.id,
        "x-generation-time": f"{job.generation_seconds:.3f}",
        "x-seed-value": str(shown[0].seed),
        "x-cost": in_credits(job.credits.charged),
    }
    left = balance(services, job.team)
    if left is not None:
        headers["x-remaining-credits"] = in_credits(left)
    if not request.base64:
        return Answer(HTTPStatus.OK, data[0], shown[0].content_type, headers), True
    return Answer(HTTPStatus.OK, {"image": in_base64(job, data)}, headers=headers), True


def _failure(job: Job) -> str:
    return job.error.detail if job.error else "The request was canceled"


def _error(status: int, text: str, job: Job) -> Answer:
    return Answer(status, {"error": text}, headers={"x-request-id": job.id})


def problem(error: ServiceError) -> Answer:
    """Return an error with Segmind's status for it, in Segmind's envelope."""
    status, text = error.status, error.detail
    match error:
        case InsufficientCredits():
            status, text = HTTPStatus.NOT_ACCEPTABLE, f"Insufficient credits: {error.detail}"
        case UnsupportedImage():
            status = HTTPStatus.BAD_REQUEST
        case UnsupportedMediaType():
            status, text = HTTPStatus.NOT_ACCEPTABLE, f"Invalid content type: {error.detail}"
        case Forbidden():
            status = HTTPStatus.UNAUTHORIZED
        case JobError() | NotUnderstood():
            # Whatever ran out at the backend: it is not the caller's own.
            status = HTTPStatus.INTERNAL_SERVER_ERROR
    return Answer(status, {"error": text})


def _urls(job: Job, base_url: str) -> dict[str, str]:
    where = f"{base_url}/v2/requests/{job.id}"
    return {"status_url": f"{where}/status", "response_url": where}


def submitted(job: Job, base_url: str) -> Answer:
    """Return v2's answer to a new job. `base_url` ends before the version."""
    poll_url = {"poll_url": f"{base_url}/v1/requests/{job.id}"}
    body = {"request_id": job.id, "status": "QUEUED", **poll_url, **_urls(job, base_url)}
    return Answer(HTTPStatus.OK, body, headers={"x-request-id": job.id})


def state(job: Job, base_url: str) -> Answer:
    """Return where a job stands, as v2 says it: of one that failed with 422."""
    name = _STATES.get(job.status, "PROCESSING" if job.status is Status.PROCESSING else "QUEUED")
    headers = {"x-request-id": job.id}
    if name == "FAILED":
        body = {"status": name, "request_id": job.id, "error": _failure(job), "metrics": _times(job)}
        return Answer(HTTPStatus.UNPROCESSABLE_ENTITY, body, headers=headers)
    if name == "COMPLETED":
        metrics = {"inference_time": job.generation_seconds}
        return Answer(HTTPStatus.OK, {"status": name, "request_id": job.id, "metrics": metrics}, headers=headers)
    body = {"status": name, "request_id": job.id, **_urls(job, base_url), "metrics": {}}
    return Answer(HTTPStatus.OK, body, headers={**headers, "Retry-After": "1"})


def result(services: Services, job: Job, base_url: str) -> Answer:
    """Return what a job came to, as v2 says it: `output` is a fresh presigned URL, or one for each of several samples,
    and null while there is none.
    """
    answer = state(job, base_url)
    body = {**answer.body, "output": None}
    if job.status is Status.SUCCEEDED:
        left = balance(services, job.team)
        money = {
            "cost": float(in_credits(job.credits.charged)),
            "remaining_credits": None if left is None else float(in_credits(left)),
        }
        urls = [services.storage.output_url(output) for output in job.delivered]
        body |= {"output": one_or_all(job, urls), "metrics": {**money, **_times(job), "retry_count": _retries(job)}}
    return replace(answer, body=body)


def _times(job: Job) -> dict[str, float]:
    """Return how long a job that has ended took, in seconds."""
    ended = job.completed_ms or job.created_ms
    started = job.started_ms or ended
    return {
        "inference_time": job.generation_seconds,
        "queue_time": (started - job.created_ms) / 1000,
        "total_time": (ended - job.created_ms) / 1000,
    }


def _retries(job: Job) -> int:
    return sum(job.failures.values())


def credits_left(services: Services, team: str) -> Answer:
    """Return what a team has left, as Segmind's `get-user-credits` does."""
    return Answer(HTTPStatus.OK, {"credits": float(in_credits(services.credits.account(team).balance))})
