"""`python -m local.leash COMMAND...`: runs a command that ends with this process's starter, however that ends.

The starter holds the other end of our standard input, and never writes to it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def _end_with_parent() -> None:
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    # The terminal's Ctrl-C reaches the starter, which ends this group when it is done with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return process.wait()


if __name__ == "__main__":
    sys.exit(main())
