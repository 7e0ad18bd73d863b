"""Fake credentials and the environment of a deployment, set before anything makes a boto3 client."""

from __future__ import annotations

import os
import signal

os.environ.update(
    {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_SESSION_TOKEN": "testing",
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_REGION": "eu-west-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "POWERTOOLS_SERVICE_NAME": "img2img",
        "POWERTOOLS_METRICS_NAMESPACE": "Img2Img",
        "JOBS_TABLE": "jobs",
        "IDEMPOTENCY_TABLE": "idempotency",
        "UPLOADS_BUCKET": "uploads",
        "RESULTS_BUCKET": "results",
        "SEGMIND_SECRET_ID": "segmind",
        "UPLOADS_QUEUE_URL": "https://sqs.eu-west-1.amazonaws.com/123456789012/uploads",
        "JOBS_QUEUE_URL": "https://sqs.eu-west-1.amazonaws.com/123456789012/jobs",
        "RESULTS_QUEUE_URL": "https://sqs.eu-west-1.amazonaws.com/123456789012/results",
    }
)

# Before any client is made: moto patches botocore when it is imported.
import moto  # noqa: F401
import pytest

from tests.system import running_system

# A shell that starts the tests in the background has them ignore Ctrl-C, and so all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def system():
    """The functions over moto and the Segmind stand-in, with a clock that the test moves."""
    with running_system() as started:
        yield started
