"""The command `model`: a converted model goes into S3, where the endpoint takes it from."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from img2img.admin.commands import Options, add_command
from img2img.aws import error_code
from img2img.errors import InvalidRequest

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from img2img.admin.stack import Operator


def add_commands(commands: Any) -> None:
    """Declare the command."""
    more = "The prefix is named after the content. After an interruption a repeat uploads what is missing."
    parser = add_command(commands, "model", run, "put the endpoint's model into S3 and print its ModelDataUri", more)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what `python -m endpoint.weights` wrote")
    parser.add_argument("uri", metavar="URI", help="where to make the prefix: s3://bucket/prefix/")


def run(use: Operator, options: Options) -> int:
    """Upload a folder and print where it lies."""
    print(f"ModelDataUri: {upload(use.client('s3'), options.folder, options.uri)}")
    return 0


def upload(s3: S3Client, folder: Path, uri: str) -> str:
    """Upload the files of a folder below `uri`, and return the URI of the prefix that holds them.

    After an interruption a repeat uploads what is missing. Raises `InvalidRequest` when the URI is none or the folder
    holds no files, `OSError` when a file cannot be read, and botocore's errors.
    """
    bucket, prefix = _parse(uri)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if not files:
        raise InvalidRequest(f"There are no files in {folder}")
    if odd := [name for name in files if not name.isprintable()]:
        raise InvalidRequest(f"A file's name is not plain text: {odd[0]!a}")
    # Named after what lies below it: other weights are another address, which the stack sees, and a file that is there
    # is the same one.
    prefix += f"{_digest(files)}/"
    sizes = {name: path.stat().st_size for name, path in files.items()}
    there = _sizes(s3, bucket, prefix)
    missing = {name: path for name, path in files.items() if there.get(name) != sizes[name]}
    if len(missing) < len(files):
        print(f"{len(files) - len(missing)} of {len(files)} files are there already", file=sys.stderr)
    progress = _Progress(sum(sizes[name] for name in missing))
    for name, path in missing.items():
        with progress.of(name), path.open("rb") as opened:
            # `upload_file` would hide botocore's error in one of its own.
            s3.upload_fileobj(opened, bucket, prefix + name, Callback=progress.add)
    return f"s3://{bucket}/{prefix}"


def _parse(uri: str) -> tuple[str, str]:
    scheme, _, rest = uri.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket or not uri.endswith("/"):
        raise InvalidRequest("The URI must read s3://bucket/prefix/")
    return bucket, prefix


def _digest(files: Mapping[str, Path]) -> str:
    total = hashlib.sha256()
    for name, path in files.items():
        with path.open("rb") as opened:
            total.update(f"{name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:12]


def _sizes(s3: S3Client, bucket: str, prefix: str) -> dict[str, int]:
    """Return the sizes of the objects below a prefix, by the rest of their names."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    try:
        return {item["Key"].removeprefix(prefix): item["Size"] for page in pages for item in page.get("Contents", [])}
    except ClientError as error:
        # Who may only write uploads everything.
        if error_code(error) == "AccessDenied":
            return {}
        raise


class _Progress:
    """Tells on stderr which file goes up, and how much of all is done."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._percent = 0
        self._name = ""
        self._lock = Lock()
        # A line on a terminal is written over; a log gets few lines.
        self._terminal = sys.stderr.isatty()
        self._step = 1 if self._terminal else 10

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Tell of a file, from its beginning on."""
        self._name = name
        self._tell()
        try:
            yield
        finally:
            if self._terminal:
                print(file=sys.stderr)

    def add(self, count: int) -> None:
        """Count bytes that were sent; fewer than none when some must be sent again. Called by several threads."""
        with self._lock:
            self._done += count
            percent = 100 * self._done // max(self._total, 1)
            if percent // self._step > self._percent // self._step:
                self._percent = percent
                self._tell()

    def _tell(self) -> None:
        line = f"{self._name}: {self._percent} % of {self._total / 1e6:,.1f} MB"
        start, end = ("\r", "") if self._terminal else ("", "\n")
        print(start + line, end=end, file=sys.stderr, flush=True)
