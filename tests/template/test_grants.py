"""Each function's role grants what the function asks of AWS, and nothing else."""

from __future__ import annotations

import base64
import os
import threading
from collections import defaultdict

import boto3
import pytest

from tests.system import fresh_aws, function, running_system, sample_base64

# Granted for what no call of a function shows.
UNSEEN = {
    "api": {
        # Nothing is listed: it makes S3 say that an upload is missing.
        ("s3:ListBucket", "UploadsBucket"),
        # Powertools reads a record only when DynamoDB did not send it along with its refusal.
        ("dynamodb:GetItem", "IdempotencyTable"),
    },
    # What Lambda does itself, to feed the worker.
    "worker": {(f"sqs:{action}", "JobsQueue") for action in ("ReceiveMessage", "DeleteMessage", "GetQueueAttributes")},
    "sweep": set(),
}


def in_iams_words(service, operation, parameters):
    """Yield the actions that a call needs, each with what it is done to."""
    match service, operation:
        case "dynamodb", "TransactWriteItems":
            for write in parameters["TransactItems"]:
                yield from ((f"dynamodb:{kind}Item", item["TableName"], "") for kind, item in write.items())
        case "dynamodb", "BatchGetItem":
            yield from (("dynamodb:BatchGetItem", table, "") for table in parameters["RequestItems"])
        case "dynamodb", _:
            index = f"/index/{parameters['IndexName']}" if "IndexName" in parameters else ""
            yield f"dynamodb:{operation}", parameters["TableName"], index
        case "s3", "ListObjectsV2":
            yield "s3:ListBucket", parameters["Bucket"], ""
        case "s3", _:
            action = "GetObject" if operation == "HeadObject" else operation
            yield f"s3:{action}", parameters["Bucket"], f"/{parameters['Key'].partition('/')[0]}/*"
        case "sqs", _:
            yield f"sqs:{operation}", parameters["QueueUrl"], ""
        case "secretsmanager", _:
            yield f"secretsmanager:{operation}", parameters["SecretId"], ""
        case _:
            yield f"{service}:{operation}", "", ""


def use_every_route(system):
    photo = base64.b64decode(sample_base64())
    upload = system.api("POST", "/uploads", photo, {"Content-Type": "image/jpeg"}).json["id"]
    key = {"Idempotency-Key": "once"}
    job_id = system.create(image=upload, headers=key).json["id"]
    assert system.create(image=upload, headers=key).json["id"] == job_id
    assert system.create(image="upl_01ARZ3NDEKTSV4RRFFQ69G5FAV", headers={"Idempotency-Key": "other"}).status == 404
    assert system.deliver() == 1
    reads = ("/jobs", f"/jobs/{job_id}", "/balance", "/usage")
    assert {system.api("GET", path).status for path in reads} == {200}
    assert system.api("POST", "/cost", {}).status == 200
    assert system.api("GET", f"/jobs/{job_id}/outputs/0").status == 302
    assert system.api("DELETE", f"/jobs/{job_id}").status == 204
    assert system.api("POST", f"/jobs/{system.create().json['id']}/cancel").json["status"] == "canceled"
    system.deliver()


def need_a_second_attempt(system):
    system.segmind.behave("500")
    job_id = system.create(samples=2).json["id"]
    [record] = system.receive()
    assert not system.work(record)
    assert system.work(record)
    assert system.job(job_id)["status"] == "succeeded"


def cancel_between_two_attempts(system):
    system.segmind.behave("500")
    job_id = system.create(samples=2).json["id"]
    [record] = system.receive()
    assert not system.work(record)
    system.api("POST", f"/jobs/{job_id}/cancel")
    assert system.work(record)


def cancel_while_it_runs(system):
    asked_before = len(system.segmind.calls)
    system.segmind.behave("hang")
    job_id = system.create().json["id"]
    worker = threading.Thread(target=system.work, args=system.receive())
    worker.start()
    while len(system.segmind.calls) == asked_before:
        pass
    system.api("POST", f"/jobs/{job_id}/cancel")
    system.segmind.release()
    worker.join()


def forget_a_job(system):
    system.create()
    for record in system.receive():
        system.sqs.delete_message(QueueUrl=system.queue_url, ReceiptHandle=record["receiptHandle"])
    system.clock.advance(60)
    assert system.sweep() == {"resent": 1}
    system.clock.advance(1800)
    assert system.sweep() == {"failed": 1}


@pytest.fixture(scope="module")
def asked():
    """What each function asks of AWS while everything happens to it that ever does: action, thing, part of it."""
    found = defaultdict(set)
    running = []

    def note(params, model, **_):
        if running:
            found[running[-1]].update(in_iams_words(model.service_model.service_name, model.name, params))

    def watched(name, handler):
        def handle(event, context):
            running.append(name)
            try:
                return handler(event, context)
            finally:
                running.pop()

        return handle

    # Moto forgets the default session when it starts.
    fresh_aws()
    session = boto3.Session()
    session.events.register("provide-client-params", note)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boto3, "DEFAULT_SESSION", session)
        for name in UNSEEN:
            patch.setattr(function(name), "handler", watched(name, function(name).handler))
        with running_system() as system:
            use_every_route(system)
            need_a_second_attempt(system)
            cancel_between_two_attempts(system)
            cancel_while_it_runs(system)
            forget_a_job(system)
    return found


def place(resource):
    match resource:
        case {"Ref": str(name)} | {"Fn::GetAtt": [str(name), "Arn"]}:
            return name
        case {"Fn::Sub": str(text)}:
            return text.replace("${", "").replace(".Arn}", "")
    raise AssertionError(resource)


def granted(template, role):
    return {
        (action, place(resource))
        for name, statement in template.statements()
        if name == role and statement["Sid"] not in ("Logs", "Traces")
        for action in (statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]])
        for resource in (statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]])
    }


@pytest.mark.parametrize("name", UNSEEN)
def test_role_grants_what_the_function_asks_for(template, asked, name):
    variables = template.properties("ApiFunction")["Environment"]["Variables"]
    things = {
        os.environ[variable]: value["Ref"]
        for variable, value in variables.items()
        if isinstance(value, dict) and value["Ref"] in template.resources
    }
    seen = {(action, things[thing] + part) for action, thing, part in asked[name]}
    assert granted(template, f"{name.title()}FunctionRole") == seen | UNSEEN[name]
