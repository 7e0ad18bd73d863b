"""The routes of the Segmind-compatible API: parse the event, call one use case, shape the answer."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from aws_lambda_powertools import Logger
from aws_lambda_powertools.event_handler import APIGatewayRestResolver, Response
from aws_lambda_powertools.logging import correlation_paths
from aws_lambda_powertools.utilities.typing import LambdaContext
from snapshot_restore_py import register_before_snapshot

from img2img import negotiation, observe
from img2img.bootstrap import Services, services
from img2img.errors import InternalError, NotFound, ServiceError
from img2img.flows import compatible
from img2img.flows.answer import Answer
from img2img.flows.intake import Caller, Submission
from img2img.flows.submit import make
from img2img.flows.watch import watch
from img2img.ids import ULID
from img2img.jobs.job import Job, Via
from img2img.requests import Img2ImgRequest, body_bytes, parse_json, parse_lenient_request

logger = Logger()
app = APIGatewayRestResolver()

_UNEXPECTED = "Something went wrong here. Look at GET /jobs of the main API before sending it again"
_MOST_NAMED = 20


@register_before_snapshot  # type: ignore[untyped-decorator]
def make_clients() -> None:
    """Make the clients before SnapStart takes its snapshot; nothing connects or reads a secret yet."""
    ready = services()
    _ = ready.jobs, ready.teams, ready.credits, ready.storage, ready.queue, ready.repeats


def _header(name: str) -> str:
    # A header may come several times; HTTP joins them with commas.
    return ", ".join(app.current_event.resolved_headers_field.get(name.lower(), []))


def _caller(use: Services) -> Caller:
    context = app.current_event.request_context
    key_id = context.identity.api_key_id or ""
    logger.append_keys(key_id=key_id)
    caller = Caller(use.teams.team_of(key_id), key_id, context.request_id, Via.SEGMIND)
    logger.append_keys(team=caller.team)
    return caller


def _base_url() -> str:
    event = app.current_event
    # What stands in front of the version: the stage, or a custom domain's mapping.
    prefix = event.request_context.path.removesuffix(event.path)
    return negotiation.base_url(forwarded_proto=_header("x-forwarded-proto"), host=_header("host"), prefix=prefix)


def _request(use: Services, caller: Caller) -> tuple[Img2ImgRequest, dict[str, str]]:
    """Return the request, and the headers that say what of it was left out."""
    data = body_bytes(app.current_event.body or "", is_base64=app.current_event.is_base64_encoded)
    body = parse_json(data, _header("content-type"))
    request, ignored = parse_lenient_request(body, use.presets.fields_of(caller.team))
    names = ", ".join(quote(name[:40], safe="", errors="replace") for name in ignored[:_MOST_NAMED])
    return request, {"x-ignored-parameters": names} if names else {}


def _job(use: Services, job_id: str) -> Job:
    if not ULID.fullmatch(job_id):
        raise NotFound(f"Request {job_id[:40]} not found")
    logger.append_keys(job_id=job_id)
    return use.jobs.get(_caller(use).team, job_id)


def _sent(answer: Answer, headers: dict[str, str] | None = None) -> Response[Any]:
    body = answer.body if isinstance(answer.body, bytes) else answer.text
    known = {"x-request-id": app.current_event.request_context.request_id}
    return Response(answer.status, answer.content_type, body, {**known, **answer.headers, **(headers or {})})


@app.exception_handler(ServiceError)  # type: ignore[untyped-decorator]
def on_service_error(error: ServiceError) -> Response[Any]:
    """Answer what the caller can know."""
    observe.refused(error, correlation_id=app.current_event.request_context.request_id)
    return _sent(compatible.problem(error))


@app.exception_handler(Exception)  # type: ignore[untyped-decorator]
def on_unexpected(error: Exception) -> Response[Any]:
    """Answer a bug or AWS trouble."""
    observe.log_unexpected(error)
    return _sent(compatible.problem(InternalError(_UNEXPECTED)))


@app.not_found
def on_not_found(_error: Exception) -> Response[Any]:
    """Answer an unknown route; on AWS the gateway does so first."""
    return _sent(compatible.problem(NotFound("There is no such route")))


def _note(submission: Submission) -> None:
    logger.append_keys(job_id=submission.job.id)
    submission.note()


@app.post("/v1/<model>")
def run(model: str) -> Response[Any]:
    """Create a job, or attach to the one of a request sent again, and wait for its picture."""
    compatible.require_model(model)
    use = services()
    caller = _caller(use)
    request, ignored = _request(use, caller)
    submission = compatible.submit_or_attach(use, caller, request, waits=negotiation.MAX_WAIT)
    _note(submission)
    remaining = app.lambda_context.get_remaining_time_in_millis()
    patience = negotiation.time_to_wait(negotiation.MAX_WAIT, remaining)
    job = watch(use, submission.job, patience)
    return _sent(compatible.waited(use, caller, request, job, seconds=patience), ignored)


@app.post("/v2/<model>")
def submit(model: str) -> Response[Any]:
    """Create a job."""
    compatible.require_model(model)
    use = services()
    caller = _caller(use)
    request, ignored = _request(use, caller)
    submission = make(use, caller, request)
    _note(submission)
    return _sent(compatible.submitted(submission.job, _base_url()), ignored)


@app.get("/v2/requests/<job_id>/status")
def read_state(job_id: str) -> Response[Any]:
    """Read where a job stands."""
    return _sent(compatible.state(_job(services(), job_id), _base_url()))


@app.get("/v2/requests/<job_id>")
@app.get("/v1/requests/<job_id>")
def read_result(job_id: str) -> Response[Any]:
    """Read what a job came to, with fresh URLs."""
    use = services()
    return _sent(compatible.result(use, _job(use, job_id), _base_url()))


@app.get("/v1/get-user-credits")
def read_credits() -> Response[Any]:
    """Read the team's balance."""
    use = services()
    return _sent(compatible.credits_left(use, _caller(use).team))


@logger.inject_lambda_context(correlation_id_path=correlation_paths.API_GATEWAY_REST, clear_state=True)
@observe.flushed()
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Answer one REST proxy event."""
    # Not its own `path`, which contains a custom domain's base path.
    path = negotiation.route(event["resource"], event.get("pathParameters") or {})
    answered: dict[str, Any] = app.resolve({**event, "path": path}, context)
    logger.info("answered", route=event.get("resource"), method=event.get("httpMethod"), status=answered["statusCode"])
    return answered
