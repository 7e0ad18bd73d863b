"""The HTTP routes: parse the event, call one use case, shape the answer."""

from __future__ import annotations

import base64
import json
import re
from http import HTTPStatus
from typing import Any

from aws_lambda_powertools import Logger, Metrics
from aws_lambda_powertools.event_handler import APIGatewayRestResolver, Response
from aws_lambda_powertools.logging import correlation_paths
from aws_lambda_powertools.metrics import MetricUnit
from aws_lambda_powertools.utilities.typing import LambdaContext
from snapshot_restore_py import register_before_snapshot

from img2img import observe, present, uploads
from img2img.bootstrap import Services, services
from img2img.create import Caller, Submission
from img2img.errors import (
    AnswerTooLarge,
    InsufficientCredits,
    InternalError,
    InvalidRequest,
    NotFound,
    ServiceError,
    UnsupportedMediaType,
)
from img2img.ids import ULID
from img2img.jobs import Job, OutputStatus
from img2img.listing import parse_filter
from img2img.params import Img2ImgRequest, parse_request
from img2img.presets import parse_preset_page
from img2img.prices import in_credits
from img2img.submit import balance, pictures, submit, watch
from img2img.usage import as_csv, as_records, grouped, parse_usage_query

logger = Logger()
metrics = Metrics()
app = APIGatewayRestResolver()

MAX_WAIT = 25
_UNEXPECTED = "Something went wrong here. Look at GET /jobs before sending it again without an Idempotency-Key"
# Lambda answers with at most 6 MB, base64 and JSON included; the rest of the answer stays far below the difference.
MAX_ANSWER = 6_000_000 - 100_000
# The gateway turns an answer binary only if the first type of `Accept` stands in the template's BinaryMediaTypes.
BINARY_TYPES = ("image/*", "image/jpeg", "image/png", "image/webp", "image/avif")
EXPOSED_HEADERS = (
    "Location, Content-Location, Retry-After, Preference-Applied, Idempotent-Replayed, "
    "Content-Disposition, x-remaining-credits, x-generation-time, x-request-id"
)


@register_before_snapshot  # type: ignore[untyped-decorator]
def prepare() -> None:
    """Make the clients before SnapStart takes its snapshot; nothing connects or reads a secret yet."""
    ready = services()
    _ = ready.jobs, ready.teams, ready.credits, ready.storage, ready.queue, ready.idempotency


def _header(name: str) -> str:
    # A header may come several times; HTTP joins them with commas.
    return ", ".join(app.current_event.resolved_headers_field.get(name.lower(), []))


def _caller(use: Services) -> Caller:
    context = app.current_event.request_context
    key_id = context.identity.api_key_id or ""
    logger.append_keys(key_id=key_id)
    caller = Caller(use.teams.team_of(key_id), key_id, context.request_id)
    logger.append_keys(team=caller.team)
    return caller


def _base_url() -> str:
    event = app.current_event
    # What stands in front of the route: the stage, or a custom domain's mapping.
    prefix = event.request_context.path.removesuffix(event.path)
    # The last one is the gateway's own; a caller may have sent others.
    scheme = _header("x-forwarded-proto").rpartition(",")[2].strip() or "https"
    return f"{scheme}://{_header('host')}{prefix}"


def _idempotency_key() -> str | None:
    return _header("idempotency-key") if "idempotency-key" in app.current_event.resolved_headers_field else None


def _first_accepted() -> str:
    return re.split("[,;]", _header("accept").lower())[0].strip()


def _body() -> bytes:
    body: str = app.current_event.body or ""
    if app.current_event.is_base64_encoded:
        return base64.b64decode(body)
    return body.encode(errors="surrogatepass")


def _content_type() -> str:
    return _header("content-type").partition(";")[0].strip().lower()


def _json_body(accepted: str = "application/json") -> Any:
    if _content_type() not in ("application/json", ""):
        raise UnsupportedMediaType.of_field("Content-Type", f"must be {accepted}")
    try:
        return json.loads(_body())
    except (ValueError, RecursionError):
        raise InvalidRequest.of_field("body", "must be valid JSON") from None


def _job_id(text: str) -> str:
    if not ULID.fullmatch(text):
        raise NotFound(f"There is no job {text[:40]}")
    logger.append_keys(job_id=text)
    return text


def _answer(
    status: int, body: Any, *, content_type: str = "application/json", headers: dict[str, str] | None = None
) -> Response[Any]:
    return Response(
        status_code=status,
        content_type=content_type,
        body=body if isinstance(body, bytes | str) else json.dumps(body, ensure_ascii=False, separators=(",", ":")),
        headers=headers or {},
    )


def _problem(error: ServiceError, headers: dict[str, str] | None = None, **members: Any) -> Response[Any]:
    if error.retry_after is not None:
        headers = {**(headers or {}), "Retry-After": str(int(error.retry_after))}
    problem = {
        "type": "about:blank",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        "errors": [{"field": e.field, "detail": e.detail} for e in error.errors],
        **error.members,
        **members,
    }
    return _answer(error.status, problem, content_type="application/problem+json", headers=headers)


@app.exception_handler(ServiceError)  # type: ignore[untyped-decorator]
def on_service_error(error: ServiceError) -> Response[Any]:
    """Answer what the caller can know."""
    logger.info("refused", code=error.code)
    if isinstance(error, InsufficientCredits):
        # For whoever keeps no lower level: the alarm leads to this line.
        logger.warning("too few credits", price=error.price, balance=error.balance)
        metrics.add_metadata("correlation_id", app.current_event.request_context.request_id)
        metrics.add_metric("InsufficientCredits", MetricUnit.Count, 1)
    return _problem(error)


@app.exception_handler(Exception)  # type: ignore[untyped-decorator]
def on_unexpected(error: Exception) -> Response[Any]:
    """Answer a bug or AWS trouble."""
    observe.log_unexpected(logger, error)
    return _problem(InternalError(_UNEXPECTED))


@app.not_found
def on_not_found(_error: Exception) -> Response[Any]:
    """Answer an unknown route; on AWS the gateway does so first."""
    return _problem(NotFound("There is no such route"))


def _preferred_wait() -> tuple[int, str]:
    """Return the seconds to wait and what `Preference-Applied` says (RFC 7240)."""
    preferences = [item.strip() for item in re.split("[,;]", _header("prefer").lower())]
    for item in preferences:
        if match := re.fullmatch(r"wait\s*=\s*\"?(\d{1,9})\"?", item):
            seconds = min(int(match[1]), MAX_WAIT)
            return seconds, f"wait={seconds}"
    if "respond-async" in preferences:
        return 0, "respond-async"
    return MAX_WAIT, f"wait={MAX_WAIT}"


@app.post("/sd1.5-img2img")
def create() -> Response[Any]:
    """Create a job and, unless asked not to, wait for it."""
    use = services()
    caller = _caller(use)
    request = parse_request(_json_body(), use.presets.fields_of(caller.team))
    seconds, applied = _preferred_wait()
    submission = submit(use, caller, request, idempotency_key=_idempotency_key(), context=app.lambda_context)
    job_id = submission.job.id
    logger.append_keys(job_id=job_id)
    logger.info("job created" if not submission.replayed else "job replayed", samples=request.params.samples)
    if not submission.replayed:
        metrics.add_metric("JobsCreated", MetricUnit.Count, 1)
        observe.describe(metrics, correlation_id=submission.job.correlation_id, job_id=job_id)
    # What is left of the time after the image was taken in: the gateway hangs up at 29 s.
    left = app.lambda_context.get_remaining_time_in_millis() / 1000 - 2
    job = watch(use, submission.job, max(min(seconds, left), 0))
    return _created(use, request, submission, job, applied)


def _created(use: Services, request: Img2ImgRequest, submission: Submission, job: Job, applied: str) -> Response[Any]:
    base_url = _base_url()
    headers = {
        "Location": present.job_url(base_url, job.id),
        "Preference-Applied": applied,
        "x-request-id": app.current_event.request_context.request_id,
    }
    if not job.status.is_terminal:
        return _answer(202, present.job_document(use, job, base_url), headers={**headers, "Retry-After": "1"})
    if submission.replayed:
        headers["Idempotent-Replayed"] = "true"
    left = balance(use, job.team)
    if left is not None:
        headers["x-remaining-credits"] = in_credits(left)
    if job.error:
        return _problem(job.error, headers, job_id=job.id)
    if job.outputs:
        headers["x-generation-time"] = f"{job.generation_seconds:.3f}"
    shown = [output for output in job.outputs if output.status is OutputStatus.SUCCEEDED]
    wants_bytes = bool(shown) and _first_accepted() in BINARY_TYPES
    data: list[bytes] | None = None
    if wants_bytes or (shown and request.base64):
        wanted = shown[:1] if wants_bytes else shown
        if sum(output.bytes for output in wanted) * 4 / 3 > MAX_ANSWER:
            too_large = AnswerTooLarge("The pictures do not fit into one answer; read them from their URLs")
            return _problem(too_large, headers, job_id=job.id)
        data = pictures(use, wanted)
    if data and wants_bytes:
        headers["Content-Location"] = headers["Location"]
        return _answer(200, data[0], content_type=shown[0].content_type, headers=headers)
    document = present.job_document(use, job, base_url)
    if data:
        encoded = [base64.b64encode(picture).decode() for picture in data]
        document["image"] = encoded[0] if request.params.samples == 1 else encoded
    return _answer(200, document, headers=headers)


@app.post("/uploads")
def upload() -> Response[Any]:
    """Announce an upload to S3, with or without the job that it starts, or take the image in the body."""
    use = services()
    caller = _caller(use)
    content_type = _content_type()
    if content_type.startswith("image/") or content_type == "application/octet-stream":
        stored = uploads.store(use, caller.team, _body())
        image = {"content_type": stored.image.content_type, "width": stored.image.width, "height": stored.image.height}
        return _answer(201, {"id": stored.id, **image, "bytes": stored.bytes})
    body = _json_body("application/json, image/* or application/octet-stream")
    announced = uploads.announce(use, caller, body, idempotency_key=_idempotency_key(), context=app.lambda_context)
    if announced.submission is None:
        return _answer(201, {"id": announced.id, **announced.form})
    job, replayed = announced.submission.job, announced.submission.replayed
    logger.append_keys(job_id=job.id)
    logger.info("job created" if not replayed else "job replayed", samples=job.params.samples)
    if not replayed:
        metrics.add_metric("JobsCreated", MetricUnit.Count, 1)
        observe.describe(metrics, correlation_id=job.correlation_id, job_id=job.id)
    document = present.job_document(use, job, _base_url())
    headers = {"Location": document["urls"]["get"]} | ({"Idempotent-Replayed": "true"} if replayed else {})
    return _answer(201, {**announced.form, "job": document}, headers=headers)


@app.get("/presets")
def list_presets() -> Response[Any]:
    """List the team's presets, by name."""
    use = services()
    team = _caller(use).team
    page = use.presets.list(team, parse_preset_page(app.current_event.query_string_parameters))
    shown = [present.preset_document(preset) for preset in page.presets]
    return _answer(200, {"presets": shown, "cursor": page.cursor})


@app.get("/presets/<name>")
def read_preset(name: str) -> Response[Any]:
    """Read a preset."""
    use = services()
    return _answer(200, present.preset_document(use.presets.get(_caller(use).team, name)))


@app.put("/presets/<name>")
def save_preset(name: str) -> Response[Any]:
    """Save a preset, in place of the one of this name."""
    use = services()
    team = _caller(use).team
    preset, new = use.presets.save(team, name, _json_body())
    return _answer(201 if new else 200, present.preset_document(preset))


@app.delete("/presets/<name>")
def delete_preset(name: str) -> Response[Any]:
    """Delete a preset; jobs made of it stay as they are."""
    use = services()
    use.presets.delete(_caller(use).team, name)
    return _answer(HTTPStatus.NO_CONTENT, "")


@app.post("/cost")
def cost() -> Response[Any]:
    """Check parameters and name their price; nothing is created."""
    use = services()
    team = _caller(use).team
    params = parse_request(_json_body(), use.presets.fields_of(team), required=()).params
    backend = use.settings.first_backend
    return _answer(200, present.cost_document(params, backend, use.prices.quote(params, backend)))


@app.get("/balance")
def read_balance() -> Response[Any]:
    """Read the team's account."""
    use = services()
    team = _caller(use).team
    return _answer(200, present.account_document(team, use.credits.account(team)))


@app.get("/usage")
def read_usage() -> Response[Any]:
    """Report what the team used, as JSON or CSV."""
    use = services()
    team = _caller(use).team
    query = parse_usage_query(app.current_event.query_string_parameters, now=use.clock())
    rows = grouped(use.usage.rows(team, query.since, query.until), query.group_by)
    labels = {key.id: key.label for key in use.teams.keys(team)} if "key" in query.group_by else {}
    if _first_accepted() == "text/csv":
        text = as_csv(as_records(rows, query.group_by, labels), query.group_by)
        name = f"usage-{team}-{query.since}-{query.until}.csv"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        answer = _answer(200, text, content_type="text/csv; charset=utf-8", headers=headers)
    else:
        answer = _answer(200, present.usage_document(query, rows, labels))
    if len(json.dumps(answer.body)) > MAX_ANSWER:
        raise AnswerTooLarge("The report does not fit into one answer; ask for fewer days or group by less")
    return answer


@app.get("/jobs")
def list_jobs() -> Response[Any]:
    """List the team's jobs, newest first."""
    use = services()
    page = use.jobs.list(_caller(use).team, parse_filter(app.current_event.query_string_parameters))
    return _answer(200, present.page_document(use, page, _base_url()))


@app.get("/jobs/<job_id>")
def read_job(job_id: str) -> Response[Any]:
    """Read a job, with fresh URLs."""
    use = services()
    job = use.jobs.get(_caller(use).team, _job_id(job_id))
    headers = {} if job.status.is_terminal else {"Retry-After": "1"}
    return _answer(200, present.job_document(use, job, _base_url()), headers=headers)


@app.get("/jobs/<job_id>/outputs/<index>")
def read_output(job_id: str, index: str) -> Response[Any]:
    """Redirect to a fresh presigned URL."""
    use = services()
    job = use.jobs.get(_caller(use).team, _job_id(job_id))
    output = job.output(int(index)) if re.fullmatch("[0-3]", index) and job.status.is_terminal else None
    if output is None or output.status is not OutputStatus.SUCCEEDED:
        raise NotFound(f"The job has no output {index[:10]} to show")
    headers = {"Location": use.storage.output_url(output), "Cache-Control": "no-store"}
    return _answer(HTTPStatus.FOUND, "", headers=headers)


@app.post("/jobs/<job_id>/cancel")
def cancel_job(job_id: str) -> Response[Any]:
    """Cancel a job; one that has ended stays as it is."""
    use = services()
    job = use.jobs.cancel(_caller(use).team, _job_id(job_id))
    return _answer(200, present.job_document(use, job, _base_url()))


@app.delete("/jobs/<job_id>")
def delete_job(job_id: str) -> Response[Any]:
    """Delete a job and its pictures."""
    use = services()
    team = _caller(use).team
    # First canceled, so that a worker removes what it stores later; last the item, so that a crash can be repeated.
    job = use.jobs.cancel(team, _job_id(job_id))
    use.storage.delete_job(job)
    use.jobs.delete(team, job.id)
    return _answer(HTTPStatus.NO_CONTENT, "")


@app.get("/health")
def health() -> Response[Any]:
    """Answer that the function runs."""
    return _answer(200, {"status": "ok"})


def _route(event: dict[str, Any]) -> str:
    """Return the path without the base path of a custom domain's mapping, which `path` contains."""
    parameters = event.get("pathParameters") or {}
    return re.sub(r"\{(\w+)\}", lambda name: parameters[name[1]], event["resource"])


@logger.inject_lambda_context(correlation_id_path=correlation_paths.API_GATEWAY_REST, clear_state=True)
@observe.flushed(metrics)
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Answer one REST proxy event."""
    answer = app.resolve({**event, "path": _route(event)}, context)
    answer["multiValueHeaders"] |= {
        "Access-Control-Allow-Origin": [services().settings.cors_origin],
        "Access-Control-Expose-Headers": [EXPOSED_HEADERS],
    }
    logger.info("answered", route=event.get("resource"), method=event.get("httpMethod"), status=answer["statusCode"])
    return answer
