"""From a fresh interpreter to the first answer. Child of `__main__`, one process for each figure.

The clock starts once Python itself has started, which is the same for all.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time

from tests.bench.setting import CREATE_FILE, Context, report, rest_event, silence


def _clients() -> int:
    from tests.bench.clients import clients

    return 200 if clients() else 500


def _handwritten(event: dict[str, object]) -> int:
    from tests.bench.clients import clients
    from tests.bench.handwritten import create

    return int(create(clients(), event)["statusCode"])


def _ours(event: dict[str, object]) -> int:
    from functions.api.app import handler, make_clients

    make_clients()
    return int(handler(event, Context())["statusCode"])  # type: ignore[arg-type]


def main(what: str, folder: pathlib.Path) -> None:
    silence()
    health, create = rest_event("GET", "/health"), json.loads((folder / CREATE_FILE).read_text())
    wall, cpu = time.perf_counter(), time.process_time()
    match what:
        case "clients":
            status = _clients()
        case "handwritten-create":
            status = _handwritten(create)
        case "health":
            status = _ours(health)
        case "create":
            status = _ours(create)
        case _:
            raise SystemExit(f"no such figure: {what}")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if status not in (200, 202):
        raise SystemExit(f"{what} answered {status}")
    report({"wall": wall * 1000, "cpu": cpu * 1000})


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
