"""S3's notices of new objects: what they name, where it belongs, and what its metadata asks for.

inbox/<team>/<preset>/<name>   a file of a pipeline; its results go to outbox/<team>/<preset>/<name>-<index>.<ext>
awaited/<team>/<job>           the upload that a job in `awaiting_upload` waits for
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from typing import Any
from urllib.parse import unquote, unquote_plus

from img2img.ids import ULID
from img2img.params import PARAMETERS


class NotAttributable(Exception):
    """An object that belongs to no team: nobody could see a job of it, so the operator has to look."""


@dataclass(frozen=True, kw_only=True)
class NewObject:
    """One version of an object in the uploads bucket. `sequencer` orders the versions of one key."""

    bucket: str
    key: str
    etag: str
    version_id: str = ""
    sequencer: str = ""

    @property
    def version(self) -> str:
        """What tells this version from an earlier one of the same bytes."""
        return f"{self.version_id or self.etag}:{self.sequencer}"


@dataclass(frozen=True)
class InboxFile:
    """A place in the inbox."""

    team: str
    preset: str
    name: str


@dataclass(frozen=True)
class AwaitedUpload:
    """The place that a job waits for."""

    team: str
    job_id: str


def read_notices(body: str) -> list[NewObject]:
    """Return the objects that an S3 notification names; folder markers and S3's test event name none.

    Raises `ValueError`, `KeyError` or `TypeError` for anything that is no notification of S3's.
    Source: https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html
    """
    message = json.loads(body)
    if message.get("Event") == "s3:TestEvent":
        return []
    found = []
    for record in message["Records"]:
        if not record["eventName"].startswith("ObjectCreated:"):
            continue
        item = record["s3"]["object"]
        new = NewObject(
            bucket=record["s3"]["bucket"]["name"],
            key=unquote_plus(item["key"]),
            etag=item["eTag"],
            version_id=item.get("versionId", ""),
            sequencer=item.get("sequencer", ""),
        )
        if not new.key.endswith("/"):
            found.append(new)
    return found


def place_of(key: str) -> InboxFile | AwaitedUpload:
    """Return where an object belongs. Raises `NotAttributable`."""
    match key.split("/", 3):
        case ["inbox", team, preset, name] if team and preset and name:
            return InboxFile(team, preset, name)
        case ["awaited", team, job_id] if team and ULID.fullmatch(job_id):
            return AwaitedUpload(team, job_id)
    raise NotAttributable("the key is not of the form inbox/<team>/<preset>/<name>")


def _decoded(value: str) -> str:
    """Return metadata as its sender meant it: as raw UTF-8, as S3 gives that back (RFC 2047), or URL-encoded."""
    with suppress(UnicodeError):
        # HTTP libraries read header bytes as Latin-1.
        value = value.encode("latin-1").decode()
    if "=?" in value:
        with suppress(HeaderParseError, LookupError, ValueError):
            value = str(make_header(decode_header(value)))
    return unquote(value)


def parameters_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the request fields in an object's `x-amz-meta-` headers. Others are left out: tools add their own."""
    named = {name.lower().replace("-", "_"): value for name, value in metadata.items()}
    return {name: _decoded(value) for name, value in named.items() if name in PARAMETERS}
