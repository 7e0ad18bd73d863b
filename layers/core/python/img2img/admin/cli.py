"""`python -m img2img`: the operator sets a deployed stack up and manages its teams, API keys, credits and usage."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError

from img2img.admin import image, model, secret
from img2img.admin.audit import Audit, audit
from img2img.admin.stack import Operator
from img2img.aws import AwsError
from img2img.documents import usage_document
from img2img.errors import ServiceError
from img2img.money.credits import Account
from img2img.money.prices import from_credits, in_credits
from img2img.money.usage import COUNTED, OPERATOR_GROUPS, Row, as_csv, as_records, grouped, parse_usage_query, total
from img2img.teams.store import CACHE_SECONDS, ApiKey, check_label

Options = argparse.Namespace
Action = Callable[[Operator, Options], int]

# What a shell reports of a program that a closed pipe or Ctrl-C ended.
_PIPE_CLOSED = 128 + 13
_INTERRUPTED = 128 + 2
_FELT = f"It takes up to {CACHE_SECONDS} seconds to be felt everywhere."
_AMOUNTS = ("balance", "reserved", "charged", "added")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit status."""
    options = _parser().parse_args(arguments)
    action: Action = options.action
    try:
        status = action(Operator(options.stack, region_name=options.region or None), options)
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
    _add_team_commands(_add_group(commands, "team", "create, list, show, disable and enable teams"))
    _add_key_commands(_add_group(commands, "key", "create, list, disable and enable API keys"))
    _add_credits_commands(_add_group(commands, "credits", "top teams up"))
    _add_reports(commands)
    _add_setup(commands)
    return parser


def _add_group(commands: Any, name: str, help: str) -> Any:  # noqa: A002 (argparse's name for it)
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    return parser.add_subparsers(required=True, title="commands", metavar="COMMAND")


def _add(commands: Any, name: str, action: Action, help: str, more: str = "", **defaults: Any) -> Any:  # noqa: A002
    description = f"{help[0].upper()}{help[1:]}. {more}".strip()
    parser = commands.add_parser(name, help=help, description=description)
    parser.set_defaults(action=action, **defaults)
    return parser


def _add_team_commands(commands: Any) -> None:
    parser = _add(commands, "create", _create_team, "create a team, without keys and credits")
    parser.add_argument("team", metavar="ID", help="up to 32 lower-case letters, digits, - and _; stays as it is")
    parser.add_argument("--name", default="", metavar="TEXT", help="what people call the team (default: its id)")
    _add(commands, "list", _list_teams, "list all teams, with their credits")
    parser = _add(commands, "show", _show_team, "show a team: its account and its keys")
    parser.add_argument("team", metavar="ID", help="as `team list` shows it")
    parser = _add(commands, "disable", _enable_team, "refuse all requests of a team", _FELT, enabled=False)
    parser.add_argument("team", metavar="ID", help="as `team list` shows it")
    parser = _add(commands, "enable", _enable_team, "serve a disabled team again", _FELT, enabled=True)
    parser.add_argument("team", metavar="ID", help="as `team list` shows it")


def _add_key_commands(commands: Any) -> None:
    more = "Its value alone is written to stdout, this one time; nothing else here ever shows it."
    parser = _add(commands, "create", _create_key, "make an API key for a team", more)
    parser.add_argument("team", metavar="TEAM", help="id of the team")
    parser.add_argument("--label", required=True, metavar="TEXT", help="what the key is for; stands in usage reports")
    parser = _add(commands, "list", _list_keys, "list a team's keys, without their values")
    parser.add_argument("team", metavar="TEAM", help="id of the team")
    parser = _add(commands, "disable", _enable_key, "refuse all requests with a key", _FELT, enabled=False)
    parser.add_argument("key", metavar="KEY_ID", help="as `key list` shows it")
    parser = _add(commands, "enable", _enable_key, "accept a disabled key again", _FELT, enabled=True)
    parser.add_argument("key", metavar="KEY_ID", help="as `key list` shows it")


def _add_credits_commands(commands: Any) -> None:
    parser = _add(commands, "add", _add_credits, "top a team up, or take back what was added by mistake")
    parser.add_argument("team", metavar="TEAM", help="id of the team")
    parser.add_argument(
        "amount", type=_amount, metavar="AMOUNT", help="credits with up to three decimals; negative takes back"
    )
    parser.add_argument(
        "--reference", default="", metavar="REF", help="an invoice's number, say: booked once, a repeat adds nothing"
    )
    parser.add_argument("--note", default="", metavar="TEXT", help="kept in the ledger (default: the reference)")


def _add_reports(commands: Any) -> None:
    more = "Exit status: 1 when something differs, 2 when a ledger was written to all the time and nothing compared."
    parser = _add(commands, "audit", _audit, "recompute balances from the ledger and name every difference", more)
    parser.add_argument("team", nargs="?", metavar="TEAM", help="id of a team (default: all teams)")
    parser = _add(
        commands,
        "usage",
        _usage,
        "report jobs, images and credits of all teams",
        "Days are UTC; a job counts on the day it ended.",
    )
    parser.add_argument("--team", metavar="ID", help="this team only")
    parser.add_argument(
        "--from", dest="since", metavar="DAY", help="first day (default: the first of the last day's month)"
    )
    parser.add_argument("--to", dest="until", metavar="DAY", help="last day, included (default: today)")
    parser.add_argument(
        "--group-by",
        metavar="NAMES",
        help=f"what to tell apart, with commas between (default: {','.join(OPERATOR_GROUPS)})",
    )
    parser.add_argument(
        "--format",
        choices=("table", "json", "csv"),
        default="table",
        help="default: %(default)s, in credits; json and csv are in thousandths of a credit, as the API answers",
    )


def _add_setup(commands: Any) -> None:
    more = "Asks for it at a terminal, or reads one line from a pipe."
    _add(commands, "secret", secret.run, "store the Segmind key of the stack", more)
    more = "The prefix is named after the content. After an interruption a repeat uploads what is missing."
    parser = _add(commands, "model", model.run, "put the endpoint's model into S3 and print its ModelDataUri", more)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what `python -m endpoint.weights` wrote")
    parser.add_argument("uri", metavar="URI", help="where to make the prefix: s3://bucket/prefix/")
    more = "Needs Docker; run it at the root of the repository."
    parser = _add(commands, "image", image.run, "push the endpoint's image to ECR and print its EndpointImageUri", more)
    parser.add_argument("repository", metavar="REPOSITORY", help="name at ECR, without a slash; made when missing")
    parser.add_argument("tag", metavar="TAG", help="a new one: the stack would not see that an image has changed")


def _amount(text: str) -> int:
    try:
        return from_credits(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# ------------------------------------------------------------------------------------------------------ teams


def _state(enabled: bool) -> str:
    return "enabled" if enabled else "disabled"


def _shown_time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _amounts(account: Account) -> list[str]:
    return [in_credits(getattr(account, name)) for name in _AMOUNTS]


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int) -> None:
    """Print rows under a header; after the first `words` columns come numbers."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(line, widths, strict=True)
        shown = [cell.ljust(width) if i < words else cell.rjust(width) for i, (cell, width) in enumerate(cells)]
        print("  ".join(shown).rstrip())


def _create_team(use: Operator, options: Options) -> int:
    team = use.teams.create(options.team, name=options.name)
    print(f"Team {team.id} is created; it has no keys and no credits yet")
    return 0


def _list_teams(use: Operator, _options: Options) -> int:
    rows = [(team.id, team.name, _state(team.enabled), *_amounts(team.account)) for team in use.teams.all()]
    _print_table(("team", "name", "state", *_AMOUNTS), rows, words=3)
    return 0


def _show_team(use: Operator, options: Options) -> int:
    team = use.teams.get(options.team)
    values = (team.id, team.name, _state(team.enabled), _shown_time(team.created_ms), *_amounts(team.account))
    for name, value in zip(("team", "name", "state", "created", *_AMOUNTS), values, strict=True):
        print(f"{name:<9} {value}")
    print()
    _print_keys(use.teams.keys(team.id))
    return 0


def _enable_team(use: Operator, options: Options) -> int:
    use.teams.enable(options.team, enabled=options.enabled)
    print(f"Team {options.team} is {_state(options.enabled)}. {_FELT}")
    return 0


# ------------------------------------------------------------------------------------------------------- keys


def _print_keys(keys: Iterable[ApiKey]) -> None:
    rows = [(key.id, key.label, _state(key.enabled), _shown_time(key.created_ms)) for key in keys]
    _print_table(("key", "label", "state", "created"), rows, words=4)


def _create_key(use: Operator, options: Options) -> int:
    # Checked again when the key is added; here so that a slip makes nothing at the gateway.
    check_label(options.label)
    team = use.teams.get(options.team)
    with use.keys.new(f"{use.stack} {team.id} {options.label}") as made:
        # First: a key whose value nobody saw is gone again.
        print(f"Key {made.id} ({options.label}) of team {team.id}. Its value, shown only now:", file=sys.stderr)
        print(made.value, flush=True)
        use.teams.add_key(made.id, team.id, label=options.label)
    return 0


def _list_keys(use: Operator, options: Options) -> int:
    _print_keys(use.teams.keys(use.teams.get(options.team).id))
    return 0


def _enable_key(use: Operator, options: Options) -> int:
    key = use.teams.enable_key(options.key, enabled=options.enabled)
    print(f"Key {key.id} ({key.label}) of team {key.team} is {_state(key.enabled)}. {_FELT}")
    return 0


# ----------------------------------------------------------------------------------------- credits and reports


def _add_credits(use: Operator, options: Options) -> int:
    # Found before: without a stack nothing can have been booked.
    accounts = use.credits
    try:
        accounts.add(options.team, options.amount, reference=options.reference, note=options.note)
    except BotoCoreError:
        print(
            "Whether it was booked is not known: `team show` tells. With a --reference it can be repeated.",
            file=sys.stderr,
        )
        raise
    # On its own, before the balance is read: whoever sees it does not add again.
    print(f"Added {in_credits(options.amount)} credits to team {options.team}", flush=True)
    print(f"Its balance is {in_credits(accounts.account(options.team).balance)} credits")
    return 0


def _finding(found: Audit) -> str:
    if not found.still:
        return "was written to all the time, nothing compared; try again later"
    if found.differences:
        return "DIFFERS: " + "; ".join(found.differences)
    amounts = zip(_AMOUNTS, _amounts(found.account), strict=True)
    return f"ok, {', '.join(map(' '.join, amounts))} by {found.account.entries} entries"


def _audit(use: Operator, options: Options) -> int:
    status = 0
    for team in [options.team] if options.team else [team.id for team in use.teams.all()]:
        found = audit(use.credits, use.jobs, team)
        print(f"{team}: {_finding(found)}", flush=True)
        if found.differences:
            status = 1
        elif not found.still:
            status = status or 2
    return status


def _usage(use: Operator, options: Options) -> int:
    given = {"from": options.since, "to": options.until, "group_by": options.group_by}
    asked = {name: value for name, value in given.items() if value is not None}
    query = parse_usage_query(asked, now=time.time(), groups=OPERATOR_GROUPS)
    teams = [use.teams.get(options.team)] if options.team else list(use.teams.all())
    counters = [row for team in teams for row in use.usage.rows(team.id, query.since, query.until)]
    rows = grouped(counters, query.group_by)
    shows_keys = "key" in query.group_by
    labels = {key.id: key.label for team in teams for key in use.teams.keys(team.id)} if shows_keys else {}
    if options.format == "json":
        print(json.dumps(usage_document(query, rows, labels), indent=2))
    elif options.format == "csv":
        sys.stdout.write(as_csv(as_records(rows, query.group_by, labels), query.group_by))
    else:
        _print_usage(rows, query.group_by, labels)
    return 0


def _print_usage(rows: Sequence[Row], group_by: Sequence[str], labels: Mapping[str, str]) -> None:
    [sums] = as_records([Row("", "", "", "", total(rows))], group_by, {})
    sums[group_by[0]] = "total"
    records = [*as_records(rows, group_by, labels), sums]
    lines = [
        [in_credits(value) if name == "charged" else str(value) for name, value in record.items()] for record in records
    ]
    _print_table(list(sums), lines, words=len(sums) - len(COUNTED))
