"""What the operator's commands share: how one is declared, and how tables are printed."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from img2img.admin.stack import Operator
from img2img.money.credits import Account
from img2img.money.prices import in_credits

Options = Namespace
Action = Callable[[Operator, Options], int]

AMOUNTS = ("balance", "reserved", "charged", "added")


def add_group(commands: Any, name: str, help: str) -> Any:  # noqa: A002 (argparse's name for it)
    """Declare a word that commands follow, and return what takes them."""
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    return parser.add_subparsers(required=True, title="commands", metavar="COMMAND")


def add_command(commands: Any, name: str, action: Action, help: str, more: str = "", **defaults: Any) -> Any:  # noqa: A002
    """Declare a command, and return what takes its arguments."""
    description = f"{help[0].upper()}{help[1:]}. {more}".strip()
    parser = commands.add_parser(name, help=help, description=description)
    parser.set_defaults(action=action, **defaults)
    return parser


def state(enabled: bool) -> str:
    """Return what a team or key is."""
    return "enabled" if enabled else "disabled"


def shown_time(ms: int) -> str:
    """Return a time of epoch milliseconds."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def amounts(account: Account) -> list[str]:
    """Return the `AMOUNTS` of an account, in credits."""
    return [in_credits(getattr(account, name)) for name in AMOUNTS]


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int) -> None:
    """Print rows under a header; after the first `words` columns come numbers."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(line, widths, strict=True)
        shown = [cell.ljust(width) if i < words else cell.rjust(width) for i, (cell, width) in enumerate(cells)]
        print("  ".join(shown).rstrip())
