"""Whether tests take their time: with `LONG=1`, as in `LONG=1 make test`."""

from __future__ import annotations

import os

LONG = bool(os.environ.get("LONG"))
