"""The HTTP routes of the Segmind-compatible API."""

from __future__ import annotations

import json
from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext


def handler(_event: dict[str, Any], _context: LambdaContext) -> dict[str, Any]:
    """Answer in Segmind's envelope that there is no model yet."""
    headers = {"Content-Type": "application/json"}
    return {"statusCode": 404, "headers": headers, "body": json.dumps({"error": "There is no model here yet"})}
