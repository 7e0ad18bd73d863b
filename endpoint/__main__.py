"""`python -m endpoint`: what SageMaker starts, and a model to try it with."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from endpoint import logs
from endpoint.settings import Settings, WrongSetting


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the process's exit status."""
    # Read when it is imported, which is when it would go on about a package that nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    options = _parser().parse_args(arguments)
    return int(options.action(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m endpoint",
        description="Stable Diffusion 1.5, image to image, behind SageMaker's container contract.",
    )
    commands = parser.add_subparsers(required=True, metavar="serve|tiny")
    serve = commands.add_parser(
        "serve",
        help="answer /ping, /invocations and /metrics until SIGTERM",
        epilog=f"environment variables:\n{Settings.describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.set_defaults(action=_serve)
    serve.add_argument("--model", help="folder or hub name (default: MODEL_DIR)")
    serve.add_argument("--host", help="address to listen on (default: HOST)")
    serve.add_argument("--port", help="port to listen on, 0 for any free one (default: PORT)")
    tiny = commands.add_parser("tiny", help="write a small model of random weights: its pictures are noise")
    tiny.set_defaults(action=_tiny)
    tiny.add_argument("folder", type=Path)
    return parser


def _serve(options: argparse.Namespace) -> int:
    # Until the server listens to it. The first process of a container would ignore it otherwise.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    given = {"MODEL_DIR": options.model, "HOST": options.host, "PORT": options.port}
    try:
        settings = Settings.from_env({**os.environ, **{name: value for name, value in given.items() if value}})
    except WrongSetting as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    logs.configure()
    # Here: torch takes seconds to import, and nothing above needs it.
    from endpoint import process

    process.leave(process.serve(settings))
    return 0


def _tiny(options: argparse.Namespace) -> int:
    from endpoint.model import save_tiny

    save_tiny(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
