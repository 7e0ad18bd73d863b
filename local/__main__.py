"""`python -m local run` and `python -m local demo`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import NoReturn

# What the functions get from their layer is also used here.
_CORE = Path(__file__).resolve().parents[1] / "layers" / "core" / "python"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _end(_number: int, _frame: object) -> NoReturn:
    # One is enough: a second Ctrl-C would cut the cleaning up short.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    for number in _SIGNALS:
        signal.signal(number, _end)
    sys.path.append(str(_CORE))
    try:
        # Only now: what it imports takes a second, in which Ctrl-C should be quiet too.
        from local.commands import main as run_command

        return run_command()
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
