"""What a team sees: the one JSON form of everything that is shown, wherever it is shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from aws_lambda_powertools import Logger

from img2img.errors import NotUnderstood, ServiceError
from img2img.jobs.job import Job, Output, OutputStatus
from img2img.jobs.store import Page
from img2img.money.credits import Account
from img2img.money.prices import Receipt
from img2img.money.usage import Row, UsageQuery, as_records, total
from img2img.params import Img2ImgParams
from img2img.teams.presets import Preset, PresetPage

if TYPE_CHECKING:
    from img2img.bootstrap import Services
    from img2img.images import ImageInfo


logger = Logger(child=True)

UNIT = "1/1000 credit"
MAX_PAGE_BYTES = 4_000_000


def _iso(ms: float | None) -> str | None:
    if ms is None:
        return None
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _between(start: int | None, end: int | None) -> int | None:
    return None if start is None or end is None else end - start


def _output(output: Output) -> dict[str, Any]:
    shown: dict[str, Any] = {"index": output.index, "status": output.status, "seed": output.seed}
    if output.status is OutputStatus.SUCCEEDED:
        names = ("content_type", "width", "height", "bytes", "sha256")
        shown |= {name: getattr(output, name) for name in names}
    if output.error_code:
        shown["error"] = {"code": output.error_code, "detail": output.error_detail}
    return shown


def pipeline_document(job: Job) -> dict[str, Any]:
    """Return an ended job as it lies beside its results: without URLs, which would go stale."""
    return {
        "id": job.id,
        "status": job.status,
        "created_at": _iso(job.created_ms),
        "started_at": _iso(job.started_ms),
        "completed_at": _iso(job.completed_ms),
        "input": job.params.as_dict(),
        "backend": job.backend,
        "backend_reason": job.backend_reason or None,
        "outputs": [] if job.status.is_open else [_output(output) for output in job.outputs],
        "error": {"code": job.error_code, "detail": job.error_detail} if job.error_code else None,
        "metrics": {
            "queue_ms": _between(job.created_ms, job.started_ms),
            "backend_ms": round(job.generation_seconds * 1000) if job.outputs else None,
            "total_ms": _between(job.created_ms, job.completed_ms),
        },
        "credits": asdict(job.credits),
        "via": job.via,
        "source": asdict(job.source) if job.source else None,
        "metadata": dict(job.metadata),
    }


def job_document(services: Services, job: Job, base_url: str) -> dict[str, Any]:
    """Return the job's JSON form with fresh presigned URLs. Signing asks nothing of AWS.

    `base_url` is the API's address up to its stage, without a slash at its end. Raises `NotUnderstood`.
    """
    try:
        return _job_document(services, job, base_url)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        raise NotUnderstood(f"The job {job.id} holds what this version of the service cannot show") from None


def _job_document(services: Services, job: Job, base_url: str) -> dict[str, Any]:
    url = job_url(base_url, job.id)
    document = pipeline_document(job)
    expires = _iso((services.clock() + services.settings.result_url_ttl) * 1000)
    for shown in document["outputs"]:
        output = job.output(shown["index"])
        if output and output.key:
            shown |= {"url": services.storage.output_url(output), "url_expires_at": expires}
    document["status_detail"] = {"code": job.waits_for, "detail": job.waits_for.detail} if job.waits_for else None
    return document | {"urls": {"get": url, "cancel": f"{url}/cancel"}}


def upload_document(upload_id: str, image: ImageInfo, size: int) -> dict[str, Any]:
    """Return an upload of so many bytes that came in a request body."""
    return {
        "id": upload_id,
        "content_type": image.content_type,
        "width": image.width,
        "height": image.height,
        "bytes": size,
    }


def page_document(services: Services, page: Page, base_url: str) -> dict[str, Any]:
    """Return one page of a list; what would not fit into Lambda's answer of 6 MB is left to the next page."""
    shown: list[dict[str, Any]] = []
    size = 0
    for job in page.jobs:
        try:
            document = job_document(services, job, base_url)
        except NotUnderstood:
            logger.error("unreadable job", job_id=job.id)
            continue
        # As Lambda counts: the body is a string inside the function's own JSON.
        size += len(json.dumps(json.dumps(document)))
        if shown and size > MAX_PAGE_BYTES:
            return {"jobs": shown, "cursor": shown[-1]["id"]}
        shown.append(document)
    return {"jobs": shown, "cursor": page.cursor}


def problem_document(error: ServiceError, **members: Any) -> dict[str, Any]:
    """Return an error as a problem (RFC 9457), with `members` of its own."""
    return {
        "type": "about:blank",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        # Where Segmind's clients look for it.
        "error": error.detail,
        "code": error.code,
        "errors": [{"field": item.field, "detail": item.detail} for item in error.errors],
        **error.members,
        **members,
    }


def account_document(team: str, account: Account) -> dict[str, Any]:
    """Return where a team stands."""
    amounts = {"balance": account.balance, "reserved": account.reserved, "charged": account.charged}
    return {"team": team, **amounts, "unit": UNIT}


def cost_document(params: Img2ImgParams, backend: str, credits: Receipt) -> dict[str, Any]:  # noqa: A002
    """Return what a job would cost, and the parameters it would have."""
    return {
        "price": credits.reserved,
        "price_version": credits.price_version,
        "unit": UNIT,
        "backend": backend,
        "input": params.as_dict(),
    }


def usage_document(query: UsageQuery, rows: Sequence[Row], labels: Mapping[str, str]) -> dict[str, Any]:
    """Return a usage report; `labels` are those of the keys, by id."""
    return {
        "from": str(query.since),
        "to": str(query.until),
        "group_by": list(query.group_by),
        "unit": UNIT,
        "rows": as_records(rows, query.group_by, labels),
        "total": asdict(total(rows)),
    }


def preset_document(preset: Preset) -> dict[str, Any]:
    """Return a preset."""
    return {"name": preset.name, "updated_at": _iso(preset.updated_ms), "fields": dict(preset.fields)}


def presets_document(page: PresetPage) -> dict[str, Any]:
    """Return one page of presets."""
    return {"presets": [preset_document(preset) for preset in page.presets], "cursor": page.cursor}


def job_url(base_url: str, job_id: str) -> str:
    """Return where a job is read."""
    return f"{base_url}/jobs/{job_id}"
