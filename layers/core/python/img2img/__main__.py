"""`python -m img2img`."""

from __future__ import annotations

import sys

from img2img.admin.cli import main

if __name__ == "__main__":
    sys.exit(main())
