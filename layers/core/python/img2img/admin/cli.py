"""`python -m img2img`: what the operator of a deployed stack does. Each command stands in a module of its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from img2img.admin import books, image, model, secret, segmind, teams
from img2img.admin.commands import Action
from img2img.admin.stack import Operator
from img2img.aws import AwsError
from img2img.errors import ServiceError

# What a shell reports of a program that a closed pipe or Ctrl-C ended.
_PIPE_CLOSED = 128 + 13
_INTERRUPTED = 128 + 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit status."""
    options = _parser().parse_args(arguments)
    action: Action = options.action
    try:
        status = action(Operator(options.stack, region_name=options.region or None), options)
        if sys.stdout:  # None where a shell has closed it
            sys.stdout.flush()
    except (ServiceError, *AwsError) as error:
        # botocore's messages may have several lines.
        print("error:", *str(error).split(), file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Python flushes again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m img2img",
        description="Set a deployed stack up, manage its teams, API keys and credits, and report what was used.",
        epilog="`COMMAND --help` tells more. Exit status: 0, 1 after an error, 2 when the command line is wrong.",
    )
    parser.add_argument("--stack", default="img2img", metavar="NAME", help="name of the stack (default: %(default)s)")
    parser.add_argument("--region", help="AWS region of the stack (default: that of the AWS profile)")
    commands = parser.add_subparsers(required=True, title="commands", metavar="COMMAND")
    for group in (teams, books, secret, segmind, model, image):
        group.add_commands(commands)
    return parser
