"""The command `secret`: Segmind's key goes into the secret of a deployed stack."""

from __future__ import annotations

import sys
from getpass import getpass
from typing import TYPE_CHECKING, Any, TextIO

from img2img.admin.commands import Options, add_command
from img2img.errors import InvalidRequest

if TYPE_CHECKING:
    from mypy_boto3_cloudformation import CloudFormationClient
    from mypy_boto3_secretsmanager import SecretsManagerClient

    from img2img.admin.stack import Operator


def add_commands(commands: Any) -> None:
    """Declare the command."""
    more = "Asks for it at a terminal, or reads one line from a pipe."
    add_command(commands, "secret", run, "store the Segmind key of the stack", more)


def run(use: Operator, _options: Options) -> int:
    """Ask for the key and store it."""
    # Looked up first: nobody is asked for a key that then has no place.
    secret = find_secret(use.client("cloudformation"), use.stack)
    store_key(use.client("secretsmanager"), secret, read_key())
    print("Stored; running workers pick it up with their next job, within five minutes at most")
    return 0


def find_secret(cloudformation: CloudFormationClient, stack: str) -> str:
    """Return the id of a stack's secret. Raises botocore's `ClientError` when there is no such stack or secret."""
    found = cloudformation.describe_stack_resource(StackName=stack, LogicalResourceId="SegmindSecret")
    return found["StackResourceDetail"]["PhysicalResourceId"]


def read_key() -> str:
    """Ask for the key at a terminal, or read the first line of a pipe.

    It never stands on a command line, where `ps` would show it. Raises `InvalidRequest` when it is none.
    """
    try:
        # None where a shell has closed it.
        stdin: TextIO | None = sys.stdin
        terminal = stdin is not None and stdin.isatty()
        key = getpass("Segmind API key: ") if terminal else stdin.readline() if stdin else ""
    except EOFError:
        key = ""
    except UnicodeDecodeError:
        raise InvalidRequest("The key is not plain text, nothing stored") from None
    key = key.strip()
    if not key:
        raise InvalidRequest("No key, nothing stored")
    # It becomes an HTTP header. A file that begins with a byte order mark, say, would fail every job.
    if not (key.isascii() and key.isprintable()):
        raise InvalidRequest("The key is not plain ASCII, nothing stored")
    return key


def store_key(secrets: SecretsManagerClient, secret: str, key: str) -> None:
    """Make `key` the secret's current value. Raises botocore's errors."""
    secrets.put_secret_value(SecretId=secret, SecretString=key)
