"""The HTTP routes: parse the event, call one use case, shape the answer."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from aws_lambda_powertools import Logger
from aws_lambda_powertools.event_handler import APIGatewayRestResolver, Response
from aws_lambda_powertools.logging import correlation_paths
from aws_lambda_powertools.utilities.typing import LambdaContext
from snapshot_restore_py import register_before_snapshot

from img2img import __version__, documents, negotiation, observe
from img2img.bootstrap import Services, services
from img2img.errors import InternalError, NotFound, ServiceError
from img2img.flows import answer, ending, upload
from img2img.flows.intake import Caller, Submission
from img2img.flows.submit import submit
from img2img.flows.watch import watch
from img2img.ids import ULID
from img2img.jobs.listing import parse_filter
from img2img.money.usage import parse_usage_query
from img2img.requests import body_bytes, parse_json, parse_request
from img2img.teams.presets import parse_preset_page

logger = Logger()
app = APIGatewayRestResolver()

_UNEXPECTED = "Something went wrong here. Look at GET /jobs before sending it again without an Idempotency-Key"


@register_before_snapshot  # type: ignore[untyped-decorator]
def make_clients() -> None:
    """Make the clients before SnapStart takes its snapshot; nothing connects or reads a secret yet."""
    ready = services()
    _ = ready.jobs, ready.teams, ready.credits, ready.storage, ready.queue, ready.idempotency


def _header(name: str) -> str:
    # A header may come several times; HTTP joins them with commas.
    return ", ".join(app.current_event.resolved_headers_field.get(name.lower(), []))


def _query() -> dict[str, str]:
    return app.current_event.query_string_parameters


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
    return negotiation.base_url(forwarded_proto=_header("x-forwarded-proto"), host=_header("host"), prefix=prefix)


def _idempotency_key() -> str | None:
    return _header("idempotency-key") if "idempotency-key" in app.current_event.resolved_headers_field else None


def _body() -> bytes:
    return body_bytes(app.current_event.body or "", is_base64=app.current_event.is_base64_encoded)


def _json(**options: Any) -> Any:
    return parse_json(_body(), _header("content-type"), **options)


def _job_id(text: str) -> str:
    if not ULID.fullmatch(text):
        raise NotFound(f"There is no job {text[:40]}")
    logger.append_keys(job_id=text)
    return text


def _sent(given: answer.Answer) -> Response[Any]:
    body = given.body if isinstance(given.body, bytes) else given.text
    return Response(given.status, given.content_type, body, dict(given.headers))


def _answer(status: int, body: Any, **more: Any) -> Response[Any]:
    return _sent(answer.Answer(status, body, **more))


@app.exception_handler(ServiceError)  # type: ignore[untyped-decorator]
def on_service_error(error: ServiceError) -> Response[Any]:
    """Answer what the caller can know."""
    observe.refused(error, correlation_id=app.current_event.request_context.request_id)
    return _sent(answer.problem(error))


@app.exception_handler(Exception)  # type: ignore[untyped-decorator]
def on_unexpected(error: Exception) -> Response[Any]:
    """Answer a bug or AWS trouble."""
    observe.log_unexpected(error)
    return _sent(answer.problem(InternalError(_UNEXPECTED)))


@app.not_found
def on_not_found(_error: Exception) -> Response[Any]:
    """Answer an unknown route; on AWS the gateway does so first."""
    return _sent(answer.problem(NotFound("There is no such route")))


def _note(submission: Submission) -> None:
    logger.append_keys(job_id=submission.job.id)
    submission.note()


@app.post("/sd1.5-img2img")
def create() -> Response[Any]:
    """Create a job and, unless asked not to, wait for it."""
    use = services()
    caller = _caller(use)
    request = parse_request(_json(), use.presets.fields_of(caller.team))
    patience = negotiation.patience(_header("prefer"))
    submission = submit(
        use, caller, request, idempotency_key=_idempotency_key(), context=app.lambda_context, waits=patience.seconds
    )
    _note(submission)
    remaining = app.lambda_context.get_remaining_time_in_millis()
    job = watch(use, submission.job, negotiation.time_to_wait(patience.seconds, remaining))
    return _sent(
        answer.created(
            use,
            submission,
            job,
            base_url=_base_url(),
            request_id=caller.correlation_id,
            applied=patience.applied,
            as_bytes=negotiation.wants_bytes(_header("accept")),
            in_json=request.base64,
        )
    )


@app.post("/uploads")
def create_upload() -> Response[Any]:
    """Announce an upload to S3, with or without the job that it starts, or take the image in the body."""
    use = services()
    caller = _caller(use)
    content_type = negotiation.media_type(_header("content-type"))
    if content_type.startswith("image/") or content_type == "application/octet-stream":
        stored = upload.store(use, caller.team, _body())
        return _answer(HTTPStatus.CREATED, documents.upload_document(stored.id, stored.image, stored.bytes))
    body = _json(accepted="application/json, image/* or application/octet-stream")
    announced = upload.announce(use, caller, body, idempotency_key=_idempotency_key(), context=app.lambda_context)
    if announced.submission is None:
        return _answer(HTTPStatus.CREATED, {"id": announced.id, **announced.form})
    _note(announced.submission)
    document = documents.job_document(use, announced.submission.job, _base_url())
    headers = {"Location": document["urls"]["get"]}
    if announced.submission.replayed:
        headers["Idempotent-Replayed"] = "true"
    return _answer(HTTPStatus.CREATED, {**announced.form, "job": document}, headers=headers)


@app.get("/presets")
def list_presets() -> Response[Any]:
    """List the team's presets, by name."""
    use = services()
    return _answer(200, documents.presets_document(use.presets.list(_caller(use).team, parse_preset_page(_query()))))


@app.get("/presets/<name>")
def read_preset(name: str) -> Response[Any]:
    """Read a preset."""
    use = services()
    return _answer(200, documents.preset_document(use.presets.get(_caller(use).team, name)))


@app.put("/presets/<name>")
def save_preset(name: str) -> Response[Any]:
    """Save a preset, in place of the one of this name."""
    use = services()
    preset, new = use.presets.save(_caller(use).team, name, _json())
    return _answer(201 if new else 200, documents.preset_document(preset))


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
    params = parse_request(_json(), use.presets.fields_of(team), required=()).params
    backend = use.settings.first_backend
    return _answer(200, documents.cost_document(params, backend, use.prices.quote(params, backend)))


@app.get("/balance")
def read_balance() -> Response[Any]:
    """Read the team's account."""
    use = services()
    team = _caller(use).team
    return _answer(200, documents.account_document(team, use.credits.account(team)))


@app.get("/usage")
def read_usage() -> Response[Any]:
    """Report what the team used, as JSON or CSV."""
    use = services()
    team = _caller(use).team
    query = parse_usage_query(_query(), now=use.clock())
    in_csv = negotiation.first_accepted(_header("accept")) == "text/csv"
    return _sent(answer.usage(use, team, query, in_csv=in_csv))


@app.get("/jobs")
def list_jobs() -> Response[Any]:
    """List the team's jobs, newest first."""
    use = services()
    page = use.jobs.list(_caller(use).team, parse_filter(_query()))
    return _answer(200, documents.page_document(use, page, _base_url()))


@app.get("/jobs/<job_id>")
def read_job(job_id: str) -> Response[Any]:
    """Read a job, with fresh URLs."""
    use = services()
    job = use.jobs.get(_caller(use).team, _job_id(job_id))
    headers = {} if job.status.is_terminal else {"Retry-After": "1"}
    return _answer(200, documents.job_document(use, job, _base_url()), headers=headers)


@app.get("/jobs/<job_id>/outputs/<index>")
def read_output(job_id: str, index: str) -> Response[Any]:
    """Redirect to a fresh presigned URL."""
    use = services()
    job = use.jobs.get(_caller(use).team, _job_id(job_id))
    return _sent(answer.output(use, job, index))


@app.post("/jobs/<job_id>/cancel")
def cancel_job(job_id: str) -> Response[Any]:
    """Cancel a job; one that has ended stays as it is."""
    use = services()
    job = ending.cancel(use, _caller(use).team, _job_id(job_id))
    return _answer(200, documents.job_document(use, job, _base_url()))


@app.delete("/jobs/<job_id>")
def delete_job(job_id: str) -> Response[Any]:
    """Delete a job and its pictures."""
    use = services()
    ending.delete(use, _caller(use).team, _job_id(job_id))
    return _answer(HTTPStatus.NO_CONTENT, "")


@app.get("/health")
def health() -> Response[Any]:
    """Answer that the function runs, and which version it is."""
    return _answer(200, {"status": "ok", "version": __version__})


@logger.inject_lambda_context(correlation_id_path=correlation_paths.API_GATEWAY_REST, clear_state=True)
@observe.flushed()
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Answer one REST proxy event."""
    # Not its own `path`, which contains a custom domain's base path.
    path = negotiation.route(event["resource"], event.get("pathParameters") or {})
    answered = app.resolve({**event, "path": path}, context)
    answered["multiValueHeaders"] |= {
        "Access-Control-Allow-Origin": [services().settings.cors_origin],
        "Access-Control-Expose-Headers": [negotiation.EXPOSED_HEADERS],
    }
    logger.info("answered", route=event.get("resource"), method=event.get("httpMethod"), status=answered["statusCode"])
    return answered
