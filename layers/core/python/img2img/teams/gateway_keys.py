"""API keys at API Gateway: their values, and the usage plan that opens the API to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from img2img.aws import AwsError

if TYPE_CHECKING:
    from mypy_boto3_apigateway import APIGatewayClient


@dataclass(frozen=True)
class NewKey:
    """A key that was just made. Nobody but its owner should ever see `value`."""

    id: str
    value: str = field(repr=False)


class GatewayKeys:
    """Makes keys that open one API."""

    def __init__(self, client: APIGatewayClient, usage_plan_id: str) -> None:
        self._client = client
        self._usage_plan_id = usage_plan_id

    @contextmanager
    def new(self, name: str, *, value: str = "") -> Iterator[NewKey]:
        """Make a key that opens the API. If the block that gives it to a team fails, the key is gone again.

        Without a `value` API Gateway makes one up.
        """
        given: dict[str, Any] = {"value": value} if value else {}
        made = self._client.create_api_key(name=name, enabled=True, **given)
        key = NewKey(made["id"], made["value"])
        try:
            self._client.create_usage_plan_key(usagePlanId=self._usage_plan_id, keyId=key.id, keyType="API_KEY")
            yield key
        except BaseException:
            with suppress(*AwsError):
                self._client.delete_api_key(apiKey=key.id)
            raise
