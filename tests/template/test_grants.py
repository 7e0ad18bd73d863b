"""Each function's role grants what the function asks of AWS, and nothing else."""

from __future__ import annotations

import pytest

from tests.system import ENDPOINT
from tests.template.flows import FUNCTIONS

# What Lambda does itself, to feed a function from its queue.
FEED = ("sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes")
# The functions that are not called as their folders are.
NAMES = {"segmind": "Compatible"}
# Granted for what no call of a function shows.
# Asked for only when the outbox shows an earlier version of the file.
STALE = ("s3:DeleteObject", "ResultsBucket/outbox/*")
# Nothing is listed: it makes S3 say that an answer is not there yet.
NO_ANSWER = ("s3:ListBucket", "UploadsBucket")
UNSEEN = {
    "api": {
        # Nothing is listed: it makes S3 say that an upload is missing.
        ("s3:ListBucket", "UploadsBucket"),
        # Powertools reads a record only when DynamoDB did not send it along with its refusal.
        ("dynamodb:GetItem", "IdempotencyTable"),
        # What the form of an upload that starts a job is signed with.
        ("s3:PutObject", "UploadsBucket/awaited/*"),
    },
    "worker": {STALE, NO_ANSWER, *((action, "JobsQueue") for action in FEED)},
    # Of a job that one backend left half to the other.
    "collect": {STALE, NO_ANSWER, ("sqs:SendMessage", "JobsQueue"), *((action, "ResultsQueue") for action in FEED)},
    "ingest": {
        ("s3:ListBucket", "UploadsBucket"),
        ("dynamodb:GetItem", "IdempotencyTable"),
        STALE,
        *((action, "UploadsQueue") for action in FEED),
    },
    "sweep": {STALE},
    # Nothing is listed: it makes S3 say that an upload is missing.
    "segmind": {("s3:ListBucket", "UploadsBucket")},
}


def in_iams_words(call):
    """Yield the actions that a call needs, each with what it is done to."""
    parameters = call.parameters
    match call.service, call.operation:
        case "dynamodb", "TransactWriteItems":
            for write in parameters["TransactItems"]:
                yield from ((f"dynamodb:{kind}Item", item["TableName"], "") for kind, item in write.items())
        case "dynamodb", "BatchGetItem":
            yield from (("dynamodb:BatchGetItem", table, "") for table in parameters["RequestItems"])
        case "dynamodb", operation:
            index = f"/index/{parameters['IndexName']}" if "IndexName" in parameters else ""
            yield f"dynamodb:{operation}", parameters["TableName"], index
        case "s3", "ListObjectsV2":
            yield "s3:ListBucket", parameters["Bucket"], ""
        case "s3", "CopyObject":
            source = parameters["CopySource"]
            yield "s3:GetObject", source["Bucket"], below(source["Key"])
            yield "s3:PutObject", parameters["Bucket"], below(parameters["Key"])
        case "s3", operation:
            action = "GetObject" if operation == "HeadObject" else operation
            version = "Version" if "VersionId" in parameters else ""
            yield f"s3:{action}{version}", parameters["Bucket"], below(parameters["Key"])
        case "sqs", operation:
            yield f"sqs:{operation}", parameters["QueueUrl"], ""
        case "secretsmanager", operation:
            yield f"secretsmanager:{operation}", parameters["SecretId"], ""
        case "sagemaker" | "sagemaker-runtime" | "runtime.sagemaker", operation:
            yield f"sagemaker:{operation}", parameters["EndpointName"], ""
        case service, operation:
            yield f"{service}:{operation}", "", ""


def below(key):
    return f"/{key.partition('/')[0]}/*"


def asked_for(template, calls, name):
    things = template.names_of_settings() | {ENDPOINT: "Endpoint"}
    return {
        (action, things[thing] + part)
        for call in calls
        if call.function == name
        for action, thing, part in in_iams_words(call)
    }


def granted(template, name):
    return {
        (action, resource)
        for role, action, resource, sid in template.grants()
        if role == f"{NAMES.get(name, name.title())}FunctionRole" and sid not in ("Logs", "Traces")
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_role_grants_what_the_function_asks_for(template, calls, name):
    seen = asked_for(template, calls, name)
    assert granted(template, name) == seen | UNSEEN[name]
    assert not seen & UNSEEN[name]


@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - {"collect"}))
def test_role_grants_what_the_function_asks_for_with_segmind_alone(segmind, calls, name):
    seen = asked_for(segmind, [call for call in calls if call.backend == "segmind"], name)
    assert granted(segmind, name) == seen | (UNSEEN[name] - ({NO_ANSWER} if name == "worker" else set()))
