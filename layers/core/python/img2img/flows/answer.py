"""The answers that take more than a document: of a new job, of what was used, and of what went wrong."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from img2img.documents import job_document, job_url, problem_document, usage_document
from img2img.errors import AnswerTooLarge, NotFound, ServiceError
from img2img.flows.watch import balance, pictures
from img2img.jobs.job import Job, Output, OutputStatus
from img2img.money.prices import in_credits
from img2img.money.usage import UsageQuery, as_csv, as_records, grouped
from img2img.negotiation import MAX_ANSWER

if TYPE_CHECKING:
    from img2img.bootstrap import Services
    from img2img.flows.intake import Submission


@dataclass(frozen=True)
class Answer:
    """One answer: `body` is bytes, text, or what is written as JSON."""

    status: int
    body: Any
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The body of an answer that has no bytes."""
        if isinstance(self.body, str):
            return self.body
        return json.dumps(self.body, ensure_ascii=False, separators=(",", ":"))


def problem(error: ServiceError, headers: Mapping[str, str] | None = None, **members: Any) -> Answer:
    """Return an error as RFC 9457 has it, with `members` of its own."""
    retry = {} if error.retry_after is None else {"Retry-After": str(int(error.retry_after))}
    return Answer(
        error.status, problem_document(error, **members), "application/problem+json", {**(headers or {}), **retry}
    )


def created(
    services: Services,
    submission: Submission,
    job: Job,
    *,
    base_url: str,
    request_id: str,
    applied: str,
    as_bytes: bool,
    in_json: bool,
) -> Answer:
    """Return the answer to a caller who created `job` and waited for it, as far as `applied` says.

    `as_bytes` asks for the first picture itself, `in_json` for all of them in base64 beside the document; either is
    left out when S3 does not give them now, for their URLs remain.
    """
    headers = {"Location": job_url(base_url, job.id), "Preference-Applied": applied, "x-request-id": request_id}
    if not job.status.is_terminal:
        document = job_document(services, job, base_url)
        return Answer(HTTPStatus.ACCEPTED, document, headers={**headers, "Retry-After": "1"})
    if submission.replayed:
        headers["Idempotent-Replayed"] = "true"
    left = balance(services, job.team)
    if left is not None:
        headers["x-remaining-credits"] = in_credits(left)
    if job.error:
        return problem(job.error, headers, job_id=job.id)
    if job.outputs:
        headers["x-generation-time"] = f"{job.generation_seconds:.3f}"
    shown = job.delivered
    wanted = shown[:1] if as_bytes else shown if in_json else []
    if not fits(wanted):
        too_large = AnswerTooLarge("The pictures do not fit into one answer; read them from their URLs")
        return problem(too_large, headers, job_id=job.id)
    data = pictures(services, wanted) if wanted else None
    if data and as_bytes:
        headers["Content-Location"] = headers["Location"]
        return Answer(HTTPStatus.OK, data[0], shown[0].content_type, headers)
    document = job_document(services, job, base_url)
    if data:
        document["image"] = in_base64(job, data)
    return Answer(HTTPStatus.OK, document, headers=headers)


def fits(outputs: Sequence[Output]) -> bool:
    """Whether pictures fit into one answer, which Lambda takes as base64."""
    return sum(output.bytes for output in outputs) * 4 / 3 <= MAX_ANSWER


def one_or_all(job: Job, values: list[str]) -> str | list[str]:
    """Return what Segmind's format has of a job's pictures: one where one was asked for, else a list."""
    return values[0] if job.params.samples == 1 else values


def in_base64(job: Job, data: Sequence[bytes]) -> str | list[str]:
    """Return Segmind's `image` of a job's pictures."""
    return one_or_all(job, [base64.b64encode(picture).decode() for picture in data])


def output(services: Services, job: Job, index: str) -> Answer:
    """Return the redirection to a picture of an ended job. Raises `NotFound`."""
    found = job.output(int(index)) if re.fullmatch("[0-3]", index) and job.status.is_terminal else None
    if found is None or found.status is not OutputStatus.SUCCEEDED:
        raise NotFound(f"The job has no output {index[:10]} to show")
    headers = {"Location": services.storage.output_url(found), "Cache-Control": "no-store"}
    return Answer(HTTPStatus.FOUND, "", headers=headers)


def usage(services: Services, team: str, query: UsageQuery, *, in_csv: bool) -> Answer:
    """Return the answer to who asks what a team used. Raises `AnswerTooLarge`."""
    rows = grouped(services.usage.rows(team, query.since, query.until), query.group_by)
    labels = {key.id: key.label for key in services.teams.keys(team)} if "key" in query.group_by else {}
    if in_csv:
        text = as_csv(as_records(rows, query.group_by, labels), query.group_by)
        name = f"usage-{team}-{query.since}-{query.until}.csv"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        report = Answer(HTTPStatus.OK, text, "text/csv; charset=utf-8", headers)
    else:
        report = Answer(HTTPStatus.OK, usage_document(query, rows, labels))
    # As Lambda counts: the body is a string inside the function's own JSON.
    if len(json.dumps(report.text)) > MAX_ANSWER:
        raise AnswerTooLarge("The report does not fit into one answer; ask for fewer days or group by less")
    return report
