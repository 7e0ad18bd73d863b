"""Buckets, tables, queues and the secret: private, encrypted, and cleaned up after themselves."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["UploadsBucket", "ResultsBucket"])
def bucket_name(request):
    return request.param


@pytest.fixture
def bucket(bucket_name, template):
    return template.properties(bucket_name)


@pytest.fixture(params=["JobsTable", "IdempotencyTable"])
def table(request, template):
    return template.properties(request.param)


@pytest.fixture(params=["JobsQueue", "JobsDeadLetterQueue"])
def queue_name(request):
    return request.param


def tls_only(statement):
    return (
        statement["Effect"] == "Deny"
        and statement["Principal"] == "*"
        and statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    )


def test_bucket_is_private(bucket):
    access = bucket["PublicAccessBlockConfiguration"]
    assert access == dict.fromkeys(
        ("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"), True
    )
    assert bucket["OwnershipControls"] == {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
    assert "AccessControl" not in bucket


def test_bucket_is_encrypted(bucket):
    (rule,) = bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    assert rule["ServerSideEncryptionByDefault"]["SSEAlgorithm"]


def test_bucket_speaks_tls_only(bucket_name, template):
    policy = template.properties(f"{bucket_name}Policy")
    assert policy["Bucket"] == {"Ref": bucket_name}
    (statement,) = policy["PolicyDocument"]["Statement"]
    assert tls_only(statement)
    assert statement["Action"] == "s3:*"
    assert statement["Resource"] == [
        {"Fn::GetAtt": [bucket_name, "Arn"]},
        {"Fn::Sub": f"${{{bucket_name}.Arn}}/*"},
    ]


def test_everything_in_a_bucket_expires(bucket, bucket_name):
    rules = bucket["LifecycleConfiguration"]["Rules"]
    assert all(rule["Status"] == "Enabled" for rule in rules)
    expiring = {rule["Prefix"]: rule["ExpirationInDays"] for rule in rules if "ExpirationInDays" in rule}
    prefixes = {"UploadsBucket": ("uploads/", "inputs/"), "ResultsBucket": ("results/",)}[bucket_name]
    assert expiring == {prefix: {"Ref": "RetentionDays"} for prefix in prefixes}
    (unfinished,) = [rule for rule in rules if "AbortIncompleteMultipartUpload" in rule]
    assert "Prefix" not in unfinished


def test_bucket_names_are_generated(bucket):
    # A fixed name that outlives its stack cannot be created again.
    assert "BucketName" not in bucket


def test_browsers_upload_from_the_allowed_origin(template):
    (rule,) = template.properties("UploadsBucket")["CorsConfiguration"]["CorsRules"]
    assert rule["AllowedOrigins"] == [{"Ref": "CorsOrigin"}]
    assert rule["AllowedMethods"] == ["POST"]


def test_browsers_read_results_after_a_redirect(template):
    (rule,) = template.properties("ResultsBucket")["CorsConfiguration"]["CorsRules"]
    # After a redirect to another origin the browser sends `Origin: null`.
    assert rule["AllowedOrigins"] == ["*"]
    assert rule["AllowedMethods"] == ["GET", "HEAD"]


def test_users_data_outlives_the_stack(template):
    for name in ("UploadsBucket", "ResultsBucket", "JobsTable"):
        assert template.resources[name]["DeletionPolicy"] == "RetainExceptOnCreate", name
        assert template.resources[name]["UpdateReplacePolicy"] == "Retain", name


def test_table(table):
    assert table["BillingMode"] == "PAY_PER_REQUEST"
    assert table["PointInTimeRecoverySpecification"] == {"PointInTimeRecoveryEnabled": True}
    assert table["TimeToLiveSpecification"]["Enabled"] is True
    assert table["SSESpecification"] == {"SSEEnabled": True}
    assert "TableName" not in table


def test_expiry_attributes(template):
    assert template.properties("JobsTable")["TimeToLiveSpecification"]["AttributeName"] == "expires_at"
    assert template.properties("IdempotencyTable")["TimeToLiveSpecification"]["AttributeName"] == "expiration"


def test_keys(template):
    jobs = template.properties("JobsTable")
    assert {k["KeyType"]: k["AttributeName"] for k in jobs["KeySchema"]} == {"HASH": "pk", "RANGE": "sk"}
    (index,) = jobs["GlobalSecondaryIndexes"]
    assert index["IndexName"] == "open"
    assert {k["KeyType"]: k["AttributeName"] for k in index["KeySchema"]} == {"HASH": "open_shard", "RANGE": "due_at"}
    assert index["Projection"] == {"ProjectionType": "ALL"}
    types = {a["AttributeName"]: a["AttributeType"] for a in jobs["AttributeDefinitions"]}
    assert types == {"pk": "S", "sk": "S", "open_shard": "S", "due_at": "N"}
    (key,) = template.properties("IdempotencyTable")["KeySchema"]
    assert key == {"AttributeName": "id", "KeyType": "HASH"}


def test_queue_is_encrypted_and_speaks_tls_only(queue_name, template):
    assert template.properties(queue_name)["SqsManagedSseEnabled"] is True
    (policy,) = [p for p in template.of_type("AWS::SQS::QueuePolicy").values() if {"Ref": queue_name} in p["Queues"]]
    (statement,) = policy["PolicyDocument"]["Statement"]
    assert tls_only(statement)
    # SQS refuses a statement that names a second queue.
    assert policy["Queues"] == [{"Ref": queue_name}]
    assert statement["Resource"] == {"Fn::GetAtt": [queue_name, "Arn"]}


def test_dead_letters(template):
    redrive = template.properties("JobsQueue")["RedrivePolicy"]
    assert redrive["deadLetterTargetArn"] == {"Fn::GetAtt": ["JobsDeadLetterQueue", "Arn"]}
    # Waits for the backend's rate limit count as receives.
    assert redrive["maxReceiveCount"] >= 20
    dead, alive = (template.properties(n)["MessageRetentionPeriod"] for n in ("JobsDeadLetterQueue", "JobsQueue"))
    assert dead > alive


def test_secret_is_no_parameter(template, source):
    assert template.properties("SegmindSecret")["SecretString"] == "unset"
    assert not [name for name in source["Parameters"] if "secret" in name.lower() or name.lower().endswith("key")]
    assert "Name" not in template.properties("SegmindSecret")
