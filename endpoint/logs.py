"""The process's logs: one JSON object a line, on standard output."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any


class JsonLines(logging.Formatter):
    """Of an error it names the type and the place: its text and its frames may hold a prompt."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1]:
            line |= describe(record.exc_info[1])
        return json.dumps(line, default=str)


def describe(error: BaseException) -> dict[str, str]:
    """Return an error's type and the place it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    return {"error": type(error).__name__, **({"at": f"{frames[-1].filename}:{frames[-1].lineno}"} if frames else {})}


def configure() -> None:
    """Send our own news, and whatever other packages have to warn of, through `JsonLines`."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("endpoint").setLevel(logging.INFO)
    logging.captureWarnings(capture=True)
