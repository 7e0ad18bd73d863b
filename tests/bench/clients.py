"""The least that a function on AWS has to do before it can answer: import boto3 and make its clients."""

from __future__ import annotations

from typing import Any

import boto3
from botocore.config import Config

_CONFIG = Config(connect_timeout=3, read_timeout=10, retries={"mode": "standard", "total_max_attempts": 4})
_S3_CONFIG = _CONFIG.merge(Config(signature_version="s3v4", s3={"addressing_style": "virtual"}))


def clients() -> dict[str, Any]:
    """Return the clients that `img2img.bootstrap` makes for the API function, by service."""
    session = boto3.Session()
    configs = {"dynamodb": _CONFIG, "s3": _S3_CONFIG, "sqs": _CONFIG}
    return {service: session.client(service, config=config) for service, config in configs.items()}
