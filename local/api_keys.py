"""Which API keys open the API: those of API Gateway's usage plan that are enabled, as moto knows them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# How long a key that was disabled or deleted is still let in.
FRESH_SECONDS = 1.0
# Between two readings, so that a flood of wrong keys does not become one of calls.
PAUSE_SECONDS = 0.05


@dataclass(frozen=True)
class _Reading:
    began: float = float("-inf")
    ids: Mapping[str, str] = field(default_factory=dict)


class ApiKeys:
    """The keys of one usage plan, read once a second at most for a known key; an unknown one waits for a reading.

    So a new key works at once, and wrong ones, however many are tried, share what is read.
    """

    def __init__(self, apigateway: Any, usage_plan_id: str) -> None:
        self._apigateway = apigateway
        self._usage_plan_id = usage_plan_id
        self._turn = threading.Condition()
        self._busy = False
        self._last = _Reading()

    def id_of(self, value: str) -> str | None:
        """Return the id of the key with this value, None if it opens nothing."""
        now = time.monotonic()
        last = self._last
        if value in last.ids and now < last.began + FRESH_SECONDS:
            return last.ids[value]
        return self._reading_since(now).ids.get(value)

    def _reading_since(self, moment: float) -> _Reading:
        with self._turn:
            # One reads; who came before it began takes what it found.
            self._turn.wait_for(lambda: self._last.began >= moment or not self._busy)
            if self._last.began >= moment:
                return self._last
            self._busy = True
        try:
            time.sleep(max(0.0, self._last.began + PAUSE_SECONDS - time.monotonic()))
            self._last = _Reading(time.monotonic(), self._read())
            return self._last
        finally:
            with self._turn:
                self._busy = False
                self._turn.notify_all()

    def _read(self) -> dict[str, str]:
        # The plan's own list does not say which keys are enabled, and in moto it keeps those that are deleted.
        in_plan = {key["id"] for key in self._all("get_usage_plan_keys", usagePlanId=self._usage_plan_id)}
        keys = self._all("get_api_keys", includeValues=True)
        return {key["value"]: key["id"] for key in keys if key["enabled"] and key["id"] in in_plan}

    def _all(self, operation: str, **parameters: Any) -> list[dict[str, Any]]:
        pages = self._apigateway.get_paginator(operation).paginate(**parameters)
        return [key for page in pages for key in page["items"]]
