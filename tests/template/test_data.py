"""Buckets, tables, queues and the secret: private, encrypted, and cleaned up after themselves."""

from __future__ import annotations

import json

import pytest

from img2img.jobs.queues import after_trouble

QUEUES = ("Queue", "DeadLetterQueue")


@pytest.fixture(params=["UploadsBucket", "ResultsBucket"])
def bucket_name(request):
    return request.param


@pytest.fixture
def bucket(bucket_name, template):
    return template.properties(bucket_name)


@pytest.fixture(params=["JobsTable", "IdempotencyTable"])
def table(request, template):
    return template.properties(request.param)


@pytest.fixture(params=[f"{kind}{queue}" for kind in ("Jobs", "Uploads", "Results") for queue in QUEUES])
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
    prefixes = {
        "UploadsBucket": ("uploads/", "inputs/", "inbox/", "awaited/"),
        "ResultsBucket": ("results/", "outbox/"),
    }[bucket_name]
    kept_a_day = dict.fromkeys(("requests/", "answers/", "failures/") if bucket_name == "UploadsBucket" else (), 1)
    assert expiring == {prefix: {"Ref": "RetentionDays"} for prefix in prefixes} | kept_a_day
    (unfinished,) = [rule for rule in rules if "AbortIncompleteMultipartUpload" in rule]
    assert "Prefix" not in unfinished


def test_an_answer_lies_there_until_its_job_must_be_over(source):
    assert source["Parameters"]["JobDeadlineSeconds"]["MaxValue"] < 24 * 3600


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
    (statement,) = [s for s in policy["PolicyDocument"]["Statement"] if s["Effect"] == "Deny"]
    assert tls_only(statement)
    # SQS refuses a statement that names a second queue.
    assert policy["Queues"] == [{"Ref": queue_name}]
    assert {str(s["Resource"]) for s in policy["PolicyDocument"]["Statement"]} == {
        str({"Fn::GetAtt": [queue_name, "Arn"]})
    }


@pytest.mark.parametrize(
    ("queue", "least"),
    [
        # Waits for the backend's rate limit count as receives.
        ("JobsQueue", 20),
        # AWS's advice: less would let a moment's throttling lose a message.
        ("UploadsQueue", 5),
        ("ResultsQueue", 5),
    ],
)
def test_dead_letters(template, queue, least):
    dead_letters = queue.replace("Queue", "DeadLetterQueue")
    redrive = template.properties(queue)["RedrivePolicy"]
    assert redrive["deadLetterTargetArn"] == {"Fn::GetAtt": [dead_letters, "Arn"]}
    assert redrive["maxReceiveCount"] >= least
    # A message's age counts from when it was first sent.
    dead, alive = (template.properties(name)["MessageRetentionPeriod"] for name in (dead_letters, queue))
    assert dead > alive


@pytest.mark.parametrize("name", ["UploadsQueue", "ResultsQueue"])
def test_a_notice_outlasts_all_its_pauses(template, name):
    queue = template.properties(name)
    pauses = sum(after_trouble(receives) for receives in range(1, queue["RedrivePolicy"]["maxReceiveCount"]))
    assert 45 * 60 < pauses < queue["MessageRetentionPeriod"]


def senders(template):
    return {name: s for name, s in template.statements() if s["Effect"] == "Allow" and "Principal" in s}


def test_nobody_but_s3_for_this_account_sends_notices(segmind):
    ((name, statement),) = senders(segmind).items()
    assert name == "UploadsQueuePolicy"
    assert statement["Principal"] == {"Service": "s3.amazonaws.com"}
    assert statement["Action"] == "sqs:SendMessage"
    assert statement["Condition"]["StringEquals"] == {"aws:SourceAccount": {"Ref": "AWS::AccountId"}}
    assert set(statement["Condition"]["ArnLike"]) == {"aws:SourceArn"}


def test_the_queue_takes_notices_before_the_bucket_sends_them(template):
    # S3 tries it when the bucket is made. So the queue and its policy may not refer to the bucket.
    assert template.resources["UploadsBucket"]["DependsOn"] == "UploadsQueuePolicy"
    for name in ("UploadsQueue", "UploadsQueuePolicy"):
        assert "UploadsBucket" not in json.dumps(template.resources[name]), name


def test_the_queue_of_notices_is_one_that_s3_can_write_to(template):
    queue = template.properties("UploadsQueue")
    # A queue with AWS's own KMS key takes nothing of S3, nor does a FIFO queue.
    assert not {"KmsMasterKeyId", "FifoQueue"} & set(queue)


def test_secret_is_no_parameter(template, source):
    assert template.properties("SegmindSecret")["SecretString"] == "unset"
    assert not [name for name in source["Parameters"] if "secret" in name.lower() or name.lower().endswith("key")]
    assert "Name" not in template.properties("SegmindSecret")
