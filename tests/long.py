"""Whether tests take their time: with `LONG=1`, as `make test-long` sets it."""

from __future__ import annotations

import os

LONG = bool(os.environ.get("LONG"))
