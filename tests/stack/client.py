"""A caller of the API, over HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import requests

from tests.system import sample_base64

FIELDS = {
    "samples": 1,
    "prompt": "A fantasy landscape, trending on artstation, mystical sky",
    "negative_prompt": "nude, disfigured, blurry",
    "scheduler": "DDIM",
    "num_inference_steps": 25,
    "guidance_scale": 10.5,
    "strength": 0.75,
    "seed": 98877465625,
    "img_width": 512,
    "img_height": 512,
    "base64": False,
}
T = TypeVar("T")


def wait_until(condition: Callable[[], T], seconds: float = 15) -> T:
    """Poll a condition and return what it gave once that is true."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    return value


class Client:
    """A caller with a key."""

    def __init__(self, url: str, api_key: str, key_id: str = "") -> None:
        self.url = url
        self.key_id = key_id
        self.session = requests.Session()
        self.session.headers["x-api-key"] = api_key

    def create(self, headers: dict[str, str] | None = None, **fields: Any) -> requests.Response:
        """Create a job of the sample photo."""
        body = {"image": sample_base64(), **FIELDS, **fields}
        return self.session.post(f"{self.url}/sd1.5-img2img", json=body, headers=headers, timeout=40)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.session.get(f"{self.url}{path}", timeout=40, **options)

    def jobs(self) -> list[dict[str, Any]]:
        """Return all jobs of the team, newest first."""
        page = self.get("/jobs", params={"limit": 100}).json()
        found: list[dict[str, Any]] = page["jobs"]
        while page["cursor"]:
            page = self.get("/jobs", params={"limit": 100, "cursor": page["cursor"]}).json()
            found += page["jobs"]
        return found

    def ended(self, job_id: str, seconds: float = 30) -> dict[str, Any]:
        """Poll a job until it has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            job: dict[str, Any] = self.get(f"/jobs/{job_id}").json()
            if job["status"] not in ("awaiting_upload", "queued", "processing"):
                return job
            time.sleep(0.05)
        raise AssertionError(f"the job has not ended: {job}")
