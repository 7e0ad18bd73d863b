"""The AWS of one machine: moto in a process of its own, and the template's data resources created in it."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from local.template import REGION, Blueprint, Json

_ROOT = Path(__file__).resolve().parent.parent
STACK_NAME = "local"


class Aws:
    """moto's server. `client()` makes boto3 clients of it, `close()` ends it."""

    def __init__(self, log: Path) -> None:
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "local.moto_server"],
                cwd=_ROOT,
                stdin=subprocess.PIPE,  # never written to: its end tells the server that this process is gone
                stdout=subprocess.PIPE,
                stderr=sink,
                start_new_session=True,
            )
        self._session: Any = boto3.Session()
        self._clients: dict[str, Any] = {}
        self._making = threading.Lock()
        self._port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs so that an unchanged boto3 talks to this AWS and to no other."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_SESSION_TOKEN": "local",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def client_options(self) -> dict[str, Any]:
        """Keyword arguments that make `boto3.client` talk to this AWS."""
        return {
            "endpoint_url": self.endpoint,
            "region_name": REGION,
            "aws_access_key_id": "local",
            "aws_secret_access_key": "local",
        }

    def wait_until_ready(self) -> None:
        """Wait for the server to say where it listens."""
        line = self._process.stdout.readline() if self._process.stdout else b""
        if not line:
            raise RuntimeError(f"moto did not start (exit status {self._process.wait()})")
        self._port = int(line)

    def client(self, service: str) -> Any:
        """Return a boto3 client, made once; it is safe to share between threads."""
        # A session reads some files once, and makes one client at a time.
        with self._making:
            if service not in self._clients:
                config = Config(max_pool_connections=50, retries={"total_max_attempts": 1}, proxies={})
                self._clients[service] = self._session.client(service, config=config, **self.client_options)
            return self._clients[service]

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """End the server; calls that wait for it fail."""
        self._process.kill()
        self._process.communicate()

    def close(self) -> None:
        self.kill()
        for client in self._clients.values():
            client.close()


def provision(aws: Aws, blueprint: Blueprint) -> tuple[dict[str, str], Json]:
    """Create the data resources; return physical ids by logical id, and the blueprint's parts without intrinsics."""
    stand_ins = _create_secrets(aws, blueprint) | _create_usage_plans(aws, blueprint)
    outputs: dict[str, Any] = {}
    parts = _swap_intrinsics(blueprint.parts, outputs)
    # What CloudFormation does not make here can be referred to all the same: a `Ref` finds a parameter.
    made_here = {name: {"Type": "String", "Default": value} for name, value in stand_ins.items()}
    template = {
        **blueprint.stack,
        "Parameters": {**blueprint.stack.get("Parameters", {}), **made_here},
        "Outputs": {**blueprint.stack["Outputs"], **{name: {"Value": value} for name, value in outputs.items()}},
    }
    cloudformation = aws.client("cloudformation")
    cloudformation.create_stack(StackName=STACK_NAME, TemplateBody=json.dumps(template))
    stack = cloudformation.describe_stacks(StackName=STACK_NAME)["Stacks"][0]
    if stack["StackStatus"] != "CREATE_COMPLETE":
        raise RuntimeError(
            f"the data resources could not be created: {stack.get('StackStatusReason', 'no reason given')}"
        )
    values = {output["OutputKey"]: output["OutputValue"] for output in stack.get("Outputs", [])}
    resolved: Json = _fill_in(parts, values)
    described = cloudformation.describe_stack_resources(StackName=STACK_NAME)["StackResources"]
    ids = stand_ins | {r["LogicalResourceId"]: r["PhysicalResourceId"] for r in described}
    _finish(aws, ids, resolved)
    return ids, resolved


def _create_secrets(aws: Aws, blueprint: Blueprint) -> dict[str, str]:
    arns: dict[str, str] = {}
    for name, properties in blueprint.secrets.items():
        given = properties.get("Name")
        value = properties.get("SecretString")
        arns[name] = aws.client("secretsmanager").create_secret(
            Name=given if isinstance(given, str) else name,
            SecretString=value if isinstance(value, str) else secrets.token_urlsafe(32),
        )["ARN"]
    return arns


def _create_usage_plans(aws: Aws, blueprint: Blueprint) -> dict[str, str]:
    # Without limits: nobody here enforces them.
    client = aws.client("apigateway")
    return {name: client.create_usage_plan(name=name)["id"] for name in blueprint.usage_plans}


def _swap_intrinsics(value: Any, outputs: dict[str, Any]) -> Any:
    """Replace every intrinsic by a mark, and note under the mark's name what CloudFormation is to resolve."""
    match value:
        case {"Ref": _} if len(value) == 1:
            pass
        case dict() if len(value) == 1 and next(iter(value)).startswith("Fn::"):
            pass
        case dict():
            return {key: _swap_intrinsics(item, outputs) for key, item in value.items()}
        case list():
            return [_swap_intrinsics(item, outputs) for item in value]
        case _:
            return value
    name = f"Value{len(outputs)}"
    outputs[name] = value
    return _Mark(name)


class _Mark(str):
    __slots__ = ()


def _fill_in(value: Any, values: Mapping[str, str]) -> Any:
    match value:
        case _Mark():
            return values.get(value, "")
        case dict():
            return {key: _fill_in(item, values) for key, item in value.items()}
        case list():
            return [_fill_in(item, values) for item in value]
        case _:
            return value


def _finish(aws: Aws, ids: Mapping[str, str], resolved: Json) -> None:
    """Do by API call what moto's CloudFormation leaves out."""
    for name, specification in resolved["ttl"].items():
        aws.client("dynamodb").update_time_to_live(
            TableName=ids[name],
            TimeToLiveSpecification={"AttributeName": specification["AttributeName"], "Enabled": True},
        )
    for subscription in resolved["subscriptions"].values():
        raw = subscription.get("RawMessageDelivery")
        aws.client("sns").subscribe(
            TopicArn=subscription["TopicArn"],
            Protocol=subscription["Protocol"],
            Endpoint=subscription["Endpoint"],
            # moto takes any text for a yes.
            Attributes={"RawMessageDelivery": "true"} if str(raw).lower() == "true" else {},
        )
    s3 = aws.client("s3")
    for name, properties in resolved["buckets"].items():
        if rules := properties.get("CorsConfiguration", {}).get("CorsRules"):
            s3.put_bucket_cors(
                Bucket=ids[name], CORSConfiguration={"CORSRules": [dict(_cors_rule(rule)) for rule in rules]}
            )
        if queues := properties.get("NotificationConfiguration", {}).get("QueueConfigurations"):
            s3.put_bucket_notification_configuration(
                Bucket=ids[name],
                NotificationConfiguration={"QueueConfigurations": [_notification(queue) for queue in queues]},
            )


def _cors_rule(rule: Json) -> Iterator[tuple[str, Any]]:
    # CloudFormation and the API differ in two names.
    names = {"Id": "ID", "ExposedHeaders": "ExposeHeaders", "MaxAge": "MaxAgeSeconds"}
    for key, value in rule.items():
        yield names.get(key, key), int(value) if key == "MaxAge" else value


def _notification(queue: Json) -> Json:
    answer: Json = {"QueueArn": queue["Queue"], "Events": [queue["Event"]]}
    if rules := queue.get("Filter", {}).get("S3Key", {}).get("Rules"):
        answer["Filter"] = {"Key": {"FilterRules": rules}}
    return answer
