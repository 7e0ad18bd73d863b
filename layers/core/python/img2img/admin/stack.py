"""A deployed stack as its operator sees it: its clients, and its parts found by its outputs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config

from img2img.errors import NotFound
from img2img.jobs.store import JobStore
from img2img.money.credits import Credits
from img2img.money.usage import UsageStore
from img2img.teams.gateway_keys import GatewayKeys
from img2img.teams.store import TeamStore

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

# Nobody waits at API Gateway here, and a part of gigabytes takes its time on a slow line.
_CONFIG = Config(connect_timeout=10, read_timeout=60, retries={"mode": "standard", "total_max_attempts": 3})


class Operator:
    """What an operator of a deployed stack works with. Each part is made when it is first asked for.

    `options` are passed to `boto3.client`: a region, say. The parts raise botocore's `ClientError` when there is no
    such stack, and `NotFound` when it is another application's.
    """

    def __init__(self, stack: str, *, clock: Callable[[], float] = time.time, **options: Any) -> None:
        self.stack = stack
        self._clock = clock
        self._options = options

    def client(self, service: str) -> Any:
        """Return a boto3 client; it needs no stack."""
        return boto3.client(service, config=_CONFIG, **self._options)  # type: ignore[call-overload]

    @cached_property
    def _outputs(self) -> dict[str, str]:
        found = self.client("cloudformation").describe_stacks(StackName=self.stack)["Stacks"][0]
        outputs = {output["OutputKey"]: output["OutputValue"] for output in found.get("Outputs", [])}
        if not {"JobsTableName", "UsagePlanId"} <= set(outputs):
            raise NotFound(f"The stack {self.stack} is not one of this application")
        return outputs

    @property
    def table(self) -> str:
        """The name of the table that holds teams, jobs and books."""
        return self._outputs["JobsTableName"]

    @cached_property
    def dynamodb(self) -> DynamoDBClient:
        """The client of that table."""
        client: DynamoDBClient = self.client("dynamodb")
        return client

    @cached_property
    def teams(self) -> TeamStore:
        """The teams and their API keys."""
        return TeamStore(self.dynamodb, self.table, clock=self._clock)

    @cached_property
    def keys(self) -> GatewayKeys:
        """The keys that open the API."""
        return GatewayKeys(self.client("apigateway"), self._outputs["UsagePlanId"])

    @cached_property
    def credits(self) -> Credits:
        """The teams' accounts."""
        return Credits(self.dynamodb, self.table, clock=self._clock)

    @cached_property
    def usage(self) -> UsageStore:
        """The counters of what was used."""
        return UsageStore(self.dynamodb, self.table)

    @cached_property
    def jobs(self) -> JobStore:
        """The table of jobs, to read them: how long they are kept is the functions' business."""
        return JobStore(self.dynamodb, self.table, retention_days=0, clock=self._clock)
