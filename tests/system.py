"""The functions in one process: moto for AWS, the Segmind stand-in over a real socket, a clock that tests move.

`System.api()` sends one REST proxy event, `System.deliver()` hands the queued messages to the worker once, as Lambda
does: a message that is reported as failed stays, one that is not is deleted. With another backend there is a SageMaker
front with a container behind it as well, and `System.hear()` hands its notices to the collect function.
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import boto3
import pytest
from moto import mock_aws
from moto.core.base_backend import BackendDict
from moto.moto_api._internal import moto_api_backend
from moto.moto_api._internal.models import MotoAPIBackend
from moto.sqs.models import Message

from img2img import bootstrap
from img2img.admin.audit import audit
from img2img.money.credits import Account, Credits
from img2img.teams.store import TeamStore
from local.moto_speed import make_fast
from local.s3_notices import add_sequencers
from local.sagemaker import SageMaker
from local.segmind import SegmindStandIn
from local.template import AsyncSpec, EndpointSpec
from tests.container import FakeContainer

ROOT = pathlib.Path(__file__).parents[1]
SEGMIND_KEY = "SG_0123456789abcdef"
API_KEY_ID = "key-of-the-test"
ENDPOINT = "img2img-endpoint"
ACCOUNT, REGION = "123456789012", "eu-west-1"
QUEUES = ("jobs", "uploads", "results")


class Context:
    """Lambda's context object."""

    function_name = "img2img"
    memory_limit_in_mb = 1769
    invoked_function_arn = "arn:aws:lambda:eu-west-1:123456789012:function:img2img"
    aws_request_id = "00000000-0000-0000-0000-000000000000"

    def __init__(self, seconds: float = 29) -> None:
        self._until = time.monotonic() + seconds

    def get_remaining_time_in_millis(self) -> int:
        return int((self._until - time.monotonic()) * 1000)


class Clock:
    """The wall clock, ahead by as much as a test has moved it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead

    def advance(self, seconds: float) -> None:
        self.ahead += seconds


@dataclass(frozen=True)
class Answer:
    """What a client gets."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


def rest_event(
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    query: Mapping[str, str] | None = None,
    key_id: str = API_KEY_ID,
    stage: str = "v1",
) -> dict[str, Any]:
    """Return the event that API Gateway makes of a request. A dict is sent as JSON, bytes as a binary body."""
    sent = {"Host": "api.example", "X-Forwarded-Proto": "https", "Accept": "*/*", **(headers or {})}
    if isinstance(body, dict | list):
        sent.setdefault("Content-Type", "application/json")
        body = json.dumps(body)
    binary = isinstance(body, bytes)
    request_id = str(uuid.uuid4())
    return {
        "resource": path,
        "path": path,
        "httpMethod": method,
        "headers": sent,
        "multiValueHeaders": {name: [value] for name, value in sent.items()},
        "queryStringParameters": dict(query) if query else None,
        "multiValueQueryStringParameters": {name: [value] for name, value in query.items()} if query else None,
        "pathParameters": None,
        "stageVariables": None,
        "requestContext": {
            "requestId": request_id,
            "extendedRequestId": request_id,
            "stage": stage,
            "path": f"/{stage}{path}",
            "resourcePath": path,
            "httpMethod": method,
            "domainName": "api.example",
            "identity": {"sourceIp": "203.0.113.1", "apiKeyId": key_id, "apiKey": "the-api-key"},
        },
        "body": base64.b64encode(body).decode() if binary else body,
        "isBase64Encoded": binary,
    }


@cache
def function(name: str) -> ModuleType:
    """Import `functions/<name>/app.py` once, as `functions.<name>.app`."""
    import importlib

    return importlib.import_module(f"functions.{name}.app")


@dataclass
class System:
    """A deployment in memory. `container` and `sagemaker` are None where Segmind is the only backend."""

    services: bootstrap.Services
    segmind: SegmindStandIn
    clock: Clock
    container: FakeContainer | None = None
    sagemaker: SageMaker | None = None
    sqs: Any = field(default_factory=lambda: own_client("sqs"))
    s3: Any = field(default_factory=lambda: own_client("s3"))
    dynamodb: Any = field(default_factory=lambda: own_client("dynamodb"))
    secrets: Any = field(default_factory=lambda: own_client("secretsmanager"))

    @property
    def queue_url(self) -> str:
        return queue_url("jobs")

    def api(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        key_id: str = API_KEY_ID,
    ) -> Answer:
        """Send one request and return its answer. Another `key_id` is another caller."""
        return self._answer("api", rest_event(method, path, body, headers, query, key_id))

    def compatible(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        key_id: str = API_KEY_ID,
    ) -> Answer:
        """Send one request to the Segmind-compatible API, whose gateway takes every body for binary."""
        sent = {"Content-Type": "application/json", **(headers or {})}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._answer("segmind", rest_event(method, path, data, sent, None, key_id, stage="segmind"))

    def _answer(self, name: str, event: dict[str, Any]) -> Answer:
        raw = function(name).handler(event, Context())
        content = raw["body"] or ""
        return Answer(
            raw["statusCode"],
            {name.lower(): ", ".join(values) for name, values in raw["multiValueHeaders"].items()},
            base64.b64decode(content) if raw["isBase64Encoded"] else content.encode(),
        )

    def create(self, wait: int = 0, headers: Mapping[str, str] | None = None, **fields: Any) -> Answer:
        """Create a job of the sample photo."""
        body = {"image": sample_base64(), "prompt": "a castle on a hill", **fields}
        return self.api("POST", "/sd1.5-img2img", body, {"Prefer": f"wait={wait}", **(headers or {})})

    def restart(self) -> None:
        """Put a new process in place of the functions': it knows only its environment."""
        bootstrap.services.cache_clear()
        self.services = bootstrap.services()
        self.services.clock = self.clock

    def redeploy(self, monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
        """Have the functions start anew with other settings."""
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        self.restart()

    def item(self, job_id: str) -> Any:
        """Return the item of a job of the team `default`, None if there is none."""
        key = {"pk": {"S": "TEAM#default"}, "sk": {"S": f"JOB#{job_id}"}}
        return self.dynamodb.get_item(TableName="jobs", Key=key).get("Item")

    def job(self, job_id: str) -> Any:
        """Read a job."""
        return self.api("GET", f"/jobs/{job_id}").json

    def books(self, team: str = "default") -> Account:
        """Return a team's account, once its ledger and jobs have confirmed it."""
        found = audit(self.services.credits, self.services.jobs, team)
        assert found.still
        assert found.differences == ()
        return found.account

    def messages(self, queue: str = "jobs") -> int:
        """Return how many messages a queue holds, in flight or not."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self.sqs.get_queue_attributes(QueueUrl=queue_url(queue), AttributeNames=names)["Attributes"]
        return sum(int(count) for count in found.values())

    def receive(self, queue: str = "jobs") -> list[dict[str, Any]]:
        """Receive what is visible, in the form of Lambda's records."""
        found = self.sqs.receive_message(QueueUrl=queue_url(queue), MaxNumberOfMessages=10).get("Messages", [])
        return [
            {
                "messageId": message["MessageId"],
                "receiptHandle": message["ReceiptHandle"],
                "body": message["Body"],
                "attributes": {},
                "messageAttributes": {},
                "eventSource": "aws:sqs",
                "eventSourceARN": f"arn:aws:sqs:eu-west-1:123456789012:{queue}",
                "awsRegion": "eu-west-1",
            }
            for message in found
        ]

    def work(self, record: dict[str, Any]) -> bool:
        """Run the worker on one record, delete the message when it is done with, and return whether it was."""
        return self._handle("worker", "jobs", record)

    def ingest(self, record: dict[str, Any]) -> bool:
        """Run the ingest function on one of S3's notices, as `work` does."""
        return self._handle("ingest", "uploads", record)

    def collect(self, record: dict[str, Any]) -> bool:
        """Run the collect function on one of SageMaker's notices, as `work` does."""
        return self._handle("collect", "results", record)

    def _handle(self, name: str, queue: str, record: dict[str, Any]) -> bool:
        answer = function(name).handler({"Records": [record]}, Context(60))
        if answer["batchItemFailures"]:
            return False
        self.sqs.delete_message(QueueUrl=queue_url(queue), ReceiptHandle=record["receiptHandle"])
        return True

    def take_in(self) -> int:
        """Hand every visible notice to the ingest function once; return how many are done with."""
        return sum(self.ingest(record) for record in self.receive("uploads"))

    def settle(self) -> None:
        """Wait until the endpoint has answered, and given notice of, everything that it was asked."""
        assert self.sagemaker
        for invocation in list(self.sagemaker.invocations):
            assert invocation.done.wait(30), "the endpoint does not answer"

    def hear(self) -> int:
        """Wait for the endpoint, and hand every visible notice to the collect function once; return how many are done
        with."""
        self.settle()
        return sum(self.collect(record) for record in self.receive("results"))

    def deliver(self) -> int:
        """Hand every visible message to the worker once; return how many are done with."""
        return sum(self.work(record) for record in self.receive())

    def sweep(self) -> dict[str, int]:
        """Run the sweep function."""
        found: dict[str, int] = function("sweep").handler({"id": "sweep-event", "source": "aws.events"}, Context(60))
        return found

    def objects(self, bucket: str) -> list[str]:
        """Return the keys in a bucket."""
        return [item["Key"] for item in self.s3.list_objects_v2(Bucket=bucket).get("Contents", [])]


def queue_url(queue: str) -> str:
    """Return the address of the queue `jobs`, `uploads` or `results`."""
    return os.environ[f"{queue.upper()}_QUEUE_URL"]


@cache
def sample_base64() -> str:
    """Return the sample photo as a request carries it."""
    return base64.b64encode((ROOT / "events" / "sample.jpg").read_bytes()).decode()


@cache
def own_client(service: str) -> Any:
    """Return a client of the tests' own: making one is slow, and theirs are no calls of the functions."""
    return boto3.Session().client(service)


def _create_resources() -> None:
    """Create the tables, queues and topics in moto, as `template.yaml` has them.

    That is, but for the queues, whose messages are visible at once, and again at once.
    """
    text = [{"AttributeName": name, "AttributeType": "S"} for name in ("pk", "sk", "open_shard")]
    own_client("dynamodb").create_table(
        TableName="jobs",
        BillingMode="PAY_PER_REQUEST",
        AttributeDefinitions=[*text, {"AttributeName": "due_at", "AttributeType": "N"}],
        KeySchema=[{"AttributeName": "pk", "KeyType": "HASH"}, {"AttributeName": "sk", "KeyType": "RANGE"}],
        GlobalSecondaryIndexes=[
            {
                "IndexName": "open",
                "KeySchema": [
                    {"AttributeName": "open_shard", "KeyType": "HASH"},
                    {"AttributeName": "due_at", "KeyType": "RANGE"},
                ],
                "Projection": {"ProjectionType": "ALL"},
            }
        ],
    )
    own_client("dynamodb").create_table(
        TableName="idempotency",
        BillingMode="PAY_PER_REQUEST",
        AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
        KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
    )
    for queue in QUEUES:
        own_client("sqs").create_queue(QueueName=queue, Attributes={"VisibilityTimeout": "0"})
    for topic in ("succeeded", "failed"):
        arn = own_client("sns").create_topic(Name=topic)["TopicArn"]
        own_client("sns").subscribe(TopicArn=arn, Protocol="sqs", Endpoint="arn:aws:sqs:eu-west-1:123456789012:results")


def _create_buckets_and_secret() -> None:
    for bucket in ("uploads", "results"):
        own_client("s3").create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    arn = "arn:aws:sqs:eu-west-1:123456789012:uploads"
    noticed = [
        {
            "QueueArn": arn,
            "Events": ["s3:ObjectCreated:*"],
            "Filter": {"Key": {"FilterRules": [{"Name": "prefix", "Value": prefix}]}},
        }
        for prefix in ("inbox/", "awaited/")
    ]
    own_client("s3").put_bucket_notification_configuration(
        Bucket="uploads", NotificationConfiguration={"QueueConfigurations": noticed}
    )
    own_client("secretsmanager").create_secret(Name="segmind", SecretString=SEGMIND_KEY)


@cache
def _moto() -> MotoAPIBackend:
    """Put moto in place of AWS for this process."""
    mock_aws().start()
    # The functions' session, there before they make a client of it.
    boto3.setup_default_session()
    add_sequencers()
    make_fast()
    # Tests move the clock, which is not SQS's.
    Message.delay = lambda message, delay_seconds: None
    return moto_api_backend


def fresh_aws() -> None:
    """Empty moto, and have the resources in it. Tables, queues and topics, slow to make, stay from test to test."""
    everything = _moto()
    used = {backends.service_name: backends for backends in BackendDict._instances}
    if not _empty(used):
        everything.reset()
        _create_resources()
    _create_buckets_and_secret()


def _empty(used: Mapping[str, Any]) -> bool:
    """Empty the resources that stay, and forget all others. Returns False when they are not as they were made."""
    if not {"dynamodb", "sqs", "sns"} <= set(used):
        return False
    tables = used["dynamodb"][ACCOUNT][REGION].tables
    sqs = used["sqs"][ACCOUNT][REGION]
    if {*tables} != {"jobs", "idempotency"} or {*sqs.queues} != set(QUEUES):
        return False
    for name, backends in used.items():
        if name not in ("dynamodb", "sqs", "sns"):
            for backend in backends.values():
                backend.reset()
    for table in tables.values():
        table.items.clear()
    for name, queue in sqs.queues.items():
        queue.last_purged_at = None
        sqs.purge_queue(name)
        # Otherwise a test may not do so within a minute.
        queue.last_purged_at = None
    return True


def create_team(services: bootstrap.Services, team: str = "default", key_id: str = API_KEY_ID) -> None:
    """Create a team with a million credits and one API key."""
    _create_team(services.teams, services.credits, team, key_id)


def _create_team(teams: TeamStore, books: Credits, team: str, key_id: str) -> None:
    teams.create(team)
    teams.add_key(key_id, team, label="test")
    books.add(team, 1_000_000_000)


def _endpoint(*, asynchronous: bool) -> EndpointSpec:
    topics = (f"arn:aws:sns:eu-west-1:123456789012:{name}" for name in ("succeeded", "failed"))
    spec = AsyncSpec(4, "s3://uploads/answers/", "s3://uploads/failures/", *topics)
    return EndpointSpec(ENDPOINT, "main", spec if asynchronous else None)


@contextmanager
def running_system(backend: str = "segmind", *, asynchronous: bool = True, segmind_api: str = "v1") -> Iterator[System]:
    """Start a deployment in memory, empty."""
    fresh_aws()
    with ExitStack() as ending:
        segmind = ending.enter_context(SegmindStandIn(SEGMIND_KEY))
        environment = {
            "SEGMIND_BASE_URL": segmind.url,
            "SEGMIND_OUTPUT_ORIGINS": segmind.origin,
            "SEGMIND_API": segmind_api,
            "BACKEND": backend,
        }
        container = front = None
        if backend != "segmind":
            container = ending.enter_context(FakeContainer())
            spec = _endpoint(asynchronous=asynchronous)
            # With a session of its own: its calls of AWS are none of the functions'.
            front = ending.enter_context(SageMaker(spec, container.url, boto3.Session().client))
            # Before the front goes: it waits for what the container has not answered.
            ending.callback(container.release)
            environment |= {
                **front.environment,
                "SAGEMAKER_ENDPOINT": ENDPOINT,
                "SAGEMAKER_INVOCATION": "async" if asynchronous else "realtime",
            }
        patch = ending.enter_context(pytest.MonkeyPatch.context())
        for name, value in environment.items():
            patch.setenv(name, value)
        bootstrap.services.cache_clear()
        services = bootstrap.services()
        clock = Clock()
        services.clock = clock
        # By other clients than the functions', which are made when they are first needed, as in production.
        ours = own_client("dynamodb")
        books = Credits(ours, "jobs", clock=time.time)
        _create_team(TeamStore(ours, "jobs", clock=time.time), books, "default", API_KEY_ID)
        yield System(services, segmind, clock, container, front)
        bootstrap.services.cache_clear()
