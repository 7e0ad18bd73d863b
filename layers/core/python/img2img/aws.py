"""The errors that calls of AWS raise."""

from __future__ import annotations

from botocore.exceptions import BotoCoreError, ClientError

# For `except`: no answer, or one that says no.
AwsError = (BotoCoreError, ClientError)


def error_code(error: ClientError) -> str:
    """Return the name that AWS gives an error."""
    return str(error.response.get("Error", {}).get("Code"))
