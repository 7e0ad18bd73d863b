"""Finds the parts of a deployed stack, for its operator. Beside bootstrap.py alone it makes boto3 clients."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import boto3

from img2img.bootstrap import CONFIG
from img2img.errors import NotFound
from img2img.jobs.store import JobStore
from img2img.money.credits import Credits
from img2img.money.usage import UsageStore
from img2img.teams.gateway_keys import GatewayKeys
from img2img.teams.store import TeamStore


@dataclass(frozen=True)
class Operator:
    """What an operator of a deployed stack works with."""

    stack: str
    teams: TeamStore
    keys: GatewayKeys
    credits: Credits
    usage: UsageStore
    jobs: JobStore


def operator(stack: str, *, clock: Callable[[], float] = time.time, **options: Any) -> Operator:
    """Find a stack's parts by its outputs. `options` are passed to `boto3.client`: a region, say.

    Raises botocore's `ClientError` when there is no such stack, and `NotFound` when it is another application's.
    """

    def client(service: str) -> Any:
        return boto3.client(service, config=CONFIG, **options)  # type: ignore[call-overload]

    found = client("cloudformation").describe_stacks(StackName=stack)["Stacks"][0]
    outputs = {output["OutputKey"]: output["OutputValue"] for output in found.get("Outputs", [])}
    if not {"JobsTableName", "UsagePlanId"} <= set(outputs):
        raise NotFound(f"The stack {stack} is not one of this application")
    dynamodb, table = client("dynamodb"), outputs["JobsTableName"]
    return Operator(
        stack=stack,
        teams=TeamStore(dynamodb, table, clock=clock),
        keys=GatewayKeys(client("apigateway"), outputs["UsagePlanId"]),
        credits=Credits(dynamodb, table, clock=clock),
        usage=UsageStore(dynamodb, table),
        # It only reads jobs here: how long they are kept is the functions' business.
        jobs=JobStore(dynamodb, table, retention_days=0, clock=clock),
    )
