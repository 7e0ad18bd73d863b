"""One job, as a client would run it: upload, create, watch, download."""

from __future__ import annotations

import contextlib
import mimetypes
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from local.http_server import HOST
from local.stack import ROOT, Stack

SAMPLE = ROOT / "events" / "sample.jpg"
DEFAULT_PROMPT = "A fantasy landscape, trending on artstation, mystical sky"
_DONE = ("succeeded", "failed", "canceled")
_TYPES = {".heic": "image/heic", ".heif": "image/heif", ".webp": "image/webp", ".avif": "image/avif"}


class DemoFailed(Exception):
    """The API, or the job, said no."""


def demo(
    url: str, api_key: str, image: Path, prompt: str, out: Path, *, fresh_stack: Callable[[], Stack]
) -> list[Path]:
    """Turn `image` into new ones and return where they are saved.

    Raises `DemoFailed`.
    """
    if not image.is_file():
        raise DemoFailed(f"there is no file {image}")
    with _reachable(url, fresh_stack) as base_url, requests.Session() as session:
        session.headers["x-api-key"] = api_key
        job = _watched(session, base_url, _created(session, base_url, image, prompt))
        if job["status"] != "succeeded":
            reason = job.get("error") or {"code": job["status"], "detail": "the job did not end well"}
            raise DemoFailed(f"{reason['code']}: {reason['detail']}")
        out.mkdir(parents=True, exist_ok=True)
        return [
            _saved(output, out / f"{job['id']}-{output['index']}")
            for output in job["outputs"]
            if output["status"] == "succeeded"
        ]


@contextlib.contextmanager
def _reachable(url: str, fresh_stack: Callable[[], Stack]) -> Iterator[str]:
    """Give the address of an API that runs: the one asked for, or a new one while the context lasts."""
    url = url.rstrip("/")
    try:
        requests.get(f"{url}/health", timeout=10)
    except requests.ConnectionError:
        if urlsplit(url).hostname not in (HOST, "localhost"):
            raise DemoFailed(f"{url} cannot be reached") from None
        print(f"Nobody listens at {url}; starting a system for this demo; its URLs end with it", flush=True)
        with fresh_stack() as stack:
            yield stack.url
    else:
        yield url


def _created(session: requests.Session, base_url: str, image: Path, prompt: str) -> dict[str, Any]:
    data = image.read_bytes()
    suffix = image.suffix.lower()
    content_type = _TYPES.get(suffix) or mimetypes.guess_type(image.name)[0] or "application/octet-stream"
    form = _json(session.post(f"{base_url}/uploads", json={"content_type": content_type}, timeout=30))
    # No key here: the form itself is the permission, and goes to S3.
    stored = requests.post(form["url"], data=form["fields"], files={"file": (image.name, data)}, timeout=120)
    if not stored.ok:
        raise DemoFailed(f"the upload was refused with HTTP {stored.status_code}")
    print(f"Uploaded {image} ({len(data) / 1000:.0f} kB) as {form['id']}", flush=True)
    job = _json(
        session.post(
            f"{base_url}/sd1.5-img2img",
            json={"image": form["id"], "prompt": prompt},
            headers={"Prefer": "respond-async"},
            timeout=60,
        )
    )
    print(f"Job      {job['id']}: {prompt}", flush=True)
    return job


def _watched(session: requests.Session, base_url: str, job: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    shown = ""
    while True:
        if job["status"] != shown:
            shown = job["status"]
            print(f"{time.monotonic() - started:6.1f} s {shown}", flush=True)
        if shown in _DONE:
            return job
        time.sleep(0.2)
        job = _json(session.get(f"{base_url}/jobs/{job['id']}", timeout=30))


def _saved(output: dict[str, Any], stem: Path) -> Path:
    picture = requests.get(output["url"], timeout=60)
    if not picture.ok:
        raise DemoFailed(f"the result could not be read: HTTP {picture.status_code}")
    path = stem.with_suffix(f".{output['content_type'].partition('/')[2]}")
    path.write_bytes(picture.content)
    print(f"Saved    {path} ({output['width']} x {output['height']}, {len(picture.content) / 1000:.0f} kB)")
    print(f"URL      {output['url']}", flush=True)
    return path


def _json(response: requests.Response) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = response.json()
    except ValueError:
        answer = {}
    if not response.ok:
        raise DemoFailed(f"HTTP {response.status_code}: {answer.get('detail') or response.reason}")
    return answer
