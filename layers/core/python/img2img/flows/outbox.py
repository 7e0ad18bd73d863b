"""What a job of the inbox leaves for its pipeline, which then needs no HTTP call.

outbox/<team>/<preset>/<name>-<index>.<extension>   each picture, with the job's id and the seed as metadata
outbox/<team>/<preset>/<name>.json                  the job
outbox/<team>/<preset>/<name>.error.json            the job, if it failed
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from img2img.documents import pipeline_document
from img2img.errors import NotFound
from img2img.jobs.inbox import InboxFile, place_of
from img2img.jobs.job import Job, Status
from img2img.jobs.outbox_index import Shown

if TYPE_CHECKING:
    from img2img.bootstrap import Services

# S3's limit, in bytes of UTF-8 (https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html).
MAX_KEY = 1024
_ROOM = len("-0.jpeg.error.json")


def outbox_of(file: InboxFile) -> str | None:
    """Return what the keys of a file's results begin with, or None when the file's name leaves no room for them."""
    prefix = f"outbox/{file.team}/{file.preset}/{file.name}"
    return prefix if len(prefix.encode()) + _ROOM <= MAX_KEY else None


def publish(services: Services, job: Job) -> None:
    """Put an ended job's results, or its error, where its pipeline looks for them, in place of an earlier version's.

    Doing it again changes nothing. A job that came over HTTP has no such place, one that its team canceled leaves
    nothing there, and neither does one of a version that was replaced meanwhile and has been overtaken. What a newer
    version of the service stored stays as that one published it.
    """
    if job.source is None or job.status not in (Status.SUCCEEDED, Status.FAILED) or not job.is_understood:
        return
    file = place_of(job.source.key)
    prefix = outbox_of(file) if isinstance(file, InboxFile) else None
    if prefix is None:
        return
    delivered = job.delivered
    pictures = {f"{prefix}-{output.index}.{output.key.rpartition('.')[2]}": output for output in delivered}
    document = f"{prefix}.error.json" if job.status is Status.FAILED else f"{prefix}.json"
    keys = {*pictures, document}
    stale = services.outbox_index.replace(job.source, job.id, keys)
    if stale is None:
        return
    for key, output in pictures.items():
        metadata = {"job-id": job.id, "seed": str(output.seed), "index": str(output.index)}
        services.storage.copy_output(output, key, metadata)
    # After the pictures: whoever sees it finds them.
    services.storage.put_document(document, pipeline_document(job))
    for key in sorted(stale):
        services.storage.delete_document(key)
    if stale:
        services.outbox_index.forget(job.source, stale)
    shown = services.outbox_index.shown(job.source)
    if shown.job_id != job.id:
        _restore(services, job, shown, keys)


def _restore(services: Services, job: Job, shown: Shown, keys: set[str]) -> None:
    """Put back a later version that was published while this one was written over it."""
    for key in sorted(keys - shown.keys):
        services.storage.delete_document(key)
    with suppress(NotFound):
        publish(services, services.jobs.get(job.team, shown.job_id))
