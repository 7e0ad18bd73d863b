"""What all measurements share: the environment of a deployment, its events and one job. Imports next to nothing."""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]

REGION = "eu-west-1"
SEGMIND_PATH = "/sd1.5-img2img"
SEED = 1234567890
MAX_PIXELS = 64_000_000
PROMPT = "a castle on a hill, oil painting, evening light"
TEAM, KEY_ID = "default", "key-of-the-bench"
JOB_ID = "01JABCDEFGHJKMNPQRSTVWXYZ0"
REQUEST_ID = "7f1c1f6e-5a43-4c3e-9f56-0d3a4a1e2b3c"

# What `photos.py` leaves in the folder of a run.
CREATE_FILE, INPUT_FILE, OUTPUT_FILE = "create.json", "input.png", "output.jpg"
MEDIUM_FILE = "12-megapixels.jpg"
LARGE_FILES = {"JPEG": "48-megapixels.jpg", "PNG": "48-megapixels.png", "HEIC": "48-megapixels.heic"}


def environment(url: str) -> dict[str, str]:
    """Return the environment of a function whose AWS and Segmind are at `url`."""
    sqs = url or f"https://sqs.{REGION}.amazonaws.com"
    return {
        **{name: value for name, value in os.environ.items() if not name.upper().startswith(("AWS_", "POWERTOOLS_"))},
        "PYTHONPATH": os.pathsep.join([str(ROOT / "layers" / "core" / "python"), str(ROOT)]),
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_SESSION_TOKEN": "testing",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        # No file of the developer's is read.
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "POWERTOOLS_SERVICE_NAME": "img2img",
        "POWERTOOLS_METRICS_NAMESPACE": "Img2Img",
        "POWERTOOLS_LOG_LEVEL": "INFO",
        "JOBS_TABLE": "jobs",
        "IDEMPOTENCY_TABLE": "idempotency",
        "UPLOADS_BUCKET": "uploads",
        "RESULTS_BUCKET": "results",
        "SEGMIND_SECRET_ID": "segmind",
        "VIPS_CONCURRENCY": "1",
        **({"AWS_ENDPOINT_URL": url, "SEGMIND_BASE_URL": f"{url}/v1"} if url else {}),
        "JOBS_QUEUE_URL": f"{sqs}/123456789012/jobs",
        "UPLOADS_QUEUE_URL": f"{sqs}/123456789012/uploads",
    }


class Context:
    """Lambda's context object."""

    function_name = "img2img"
    memory_limit_in_mb = 1769
    invoked_function_arn = f"arn:aws:lambda:{REGION}:123456789012:function:img2img"
    aws_request_id = REQUEST_ID

    def __init__(self) -> None:
        self._until = time.monotonic() + 29

    def get_remaining_time_in_millis(self) -> int:
        return int((self._until - time.monotonic()) * 1000)


def rest_event(method: str, path: str, body: Any = None, **headers: str) -> dict[str, Any]:
    """Return the event that API Gateway makes of a request."""
    sent = {
        "Accept": "*/*",
        "Content-Type": "application/json",
        "Host": "api.example",
        "User-Agent": "bench",
        "X-Forwarded-Proto": "https",
        "x-api-key": "the-api-key",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    return {
        "resource": path,
        "path": path,
        "httpMethod": method,
        "headers": sent,
        "multiValueHeaders": {name: [value] for name, value in sent.items()},
        "queryStringParameters": None,
        "multiValueQueryStringParameters": None,
        "pathParameters": None,
        "stageVariables": None,
        "requestContext": {
            "requestId": REQUEST_ID,
            "extendedRequestId": REQUEST_ID,
            "stage": "v1",
            "path": f"/v1{path}",
            "resourcePath": path,
            "httpMethod": method,
            "domainName": "api.example",
            "identity": {"sourceIp": "203.0.113.1", "apiKeyId": KEY_ID, "apiKey": "the-api-key"},
        },
        "body": None if body is None else json.dumps(body),
        "isBase64Encoded": False,
    }


def queue_event() -> dict[str, Any]:
    """Return the event that SQS's trigger makes of a job's message."""
    return {
        "Records": [
            {
                "messageId": "8a9b0c1d-5a43-4c3e-9f56-0d3a4a1e2b3c",
                "receiptHandle": "receipt",
                "body": json.dumps({"team": TEAM, "job_id": JOB_ID, "correlation_id": REQUEST_ID}),
                "attributes": {},
                "messageAttributes": {},
                "eventSource": "aws:sqs",
                "eventSourceARN": f"arn:aws:sqs:{REGION}:123456789012:jobs",
                "awsRegion": REGION,
            }
        ]
    }


def params() -> dict[str, Any]:
    """Return the parameters of the job."""
    return {
        "prompt": PROMPT,
        "negative_prompt": "",
        "samples": 1,
        "scheduler": "DDIM",
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "strength": 0.75,
        "seed": SEED,
        "img_width": 512,
        "img_height": 512,
        "fit": "cover",
        "output_format": None,
    }


def claimed_item() -> dict[str, Any]:
    """Return the job as the table holds it once it is claimed."""
    now = int(time.time())
    return {
        "pk": {"S": f"TEAM#{TEAM}"},
        "sk": {"S": f"JOB#{JOB_ID}"},
        "key_id": {"S": KEY_ID},
        "correlation_id": {"S": REQUEST_ID},
        "status": {"S": "processing"},
        "params": {"S": json.dumps(params())},
        "metadata": {"S": "{}"},
        "backend": {"S": "segmind"},
        "created_ms": {"N": str(now * 1000)},
        "started_ms": {"N": str(now * 1000)},
        "deadline_at": {"N": str(now + 1800)},
        "due_at": {"N": str(now + 130)},
        "open_shard": {"S": "OPEN#0"},
        "lease": {"S": JOB_ID},
        "attempts": {"N": "1"},
        "reserved": {"N": "1000"},
        "charged": {"N": "0"},
        "released": {"N": "0"},
        "price_version": {"S": "1:1000"},
    }


def key_item() -> dict[str, Any]:
    """Return the API key as the table holds it."""
    return {
        "pk": {"S": f"KEY#{KEY_ID}"},
        "sk": {"S": "KEY"},
        "key_id": {"S": KEY_ID},
        "team": {"S": TEAM},
        "label": {"S": "bench"},
        "enabled": {"BOOL": True},
        "created_ms": {"N": "1767225600000"},
    }


def team_item() -> dict[str, Any]:
    """Return the team as the table holds it."""
    return {
        "pk": {"S": f"TEAM#{TEAM}"},
        "sk": {"S": "TEAM"},
        "name": {"S": TEAM},
        "enabled": {"BOOL": True},
        "created_ms": {"N": "1767225600000"},
        "balance": {"N": "1000000"},
        "reserved": {"N": "0"},
        "charged": {"N": "0"},
        "added": {"N": "1000000"},
        "entries": {"N": "1"},
    }


def report(result: Any) -> None:
    """Print what this process measured, past what the handlers log."""
    print(json.dumps(result), file=sys.__stdout__, flush=True)


def silence() -> None:
    """Let the log lines be written, but nowhere. To be called before a handler is imported."""
    sys.stdout = pathlib.Path(os.devnull).open("w")  # noqa: SIM115 (until the process ends)
