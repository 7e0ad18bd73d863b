"""What SAM's own checks and, by `--lint`, CloudFormation's say."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAM = os.environ.get("SAM", str(ROOT / ".venv-sam/bin/sam"))


def run(*command: str) -> str:
    environment = {"AWS_DEFAULT_REGION": "eu-west-1", "SAM_CLI_TELEMETRY": "0"}
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
    done = subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_sam_validate():
    assert Path(SAM).exists(), "run `make install`"
    assert "is a valid SAM Template" in run(SAM, "validate", "--lint", "--region", "eu-west-1")
