"""What moto leaves out of S3's notices: the `sequencer`, which tells one write of a key from the next."""

from __future__ import annotations

import time
from typing import Any

from moto.s3 import notifications


def add_sequencers() -> None:
    """Have moto's notices of this process carry a sequencer from now on."""
    original = notifications._get_s3_event  # noqa: SLF001 (moto has no other place to add it)
    if getattr(original, "adds_sequencers", False):
        return

    def with_sequencer(*args: Any, **options: Any) -> dict[str, Any]:
        event: dict[str, Any] = original(*args, **options)
        for record in event["Records"]:
            record["s3"]["object"]["sequencer"] = f"{time.time_ns():018X}"
        return event

    with_sequencer.adds_sequencers = True  # type: ignore[attr-defined]
    notifications._get_s3_event = with_sequencer  # noqa: SLF001
