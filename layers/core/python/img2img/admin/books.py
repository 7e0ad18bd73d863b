"""The commands `credits`, `audit` and `usage`: what teams have, and what they used."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from botocore.exceptions import BotoCoreError

from img2img.admin.audit import Audit, audit
from img2img.admin.commands import AMOUNTS, Options, add_command, add_group, amounts, print_table
from img2img.admin.stack import Operator
from img2img.documents import usage_document
from img2img.money.prices import from_credits, in_credits
from img2img.money.usage import COUNTED, OPERATOR_GROUPS, Row, as_csv, as_records, grouped, parse_usage_query, total


def add_commands(commands: Any) -> None:
    """Declare the commands."""
    _add_credits_commands(add_group(commands, "credits", "top teams up"))
    _add_reports(commands)


def _add_credits_commands(commands: Any) -> None:
    parser = add_command(commands, "add", _add_credits, "top a team up, or take back what was added by mistake")
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
    parser = add_command(
        commands, "audit", _audit, "recompute balances from the ledger and name every difference", more
    )
    parser.add_argument("team", nargs="?", metavar="TEAM", help="id of a team (default: all teams)")
    parser = add_command(
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


def _amount(text: str) -> int:
    try:
        return from_credits(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
    held = zip(AMOUNTS, amounts(found.account), strict=True)
    return f"ok, {', '.join(map(' '.join, held))} by {found.account.entries} entries"


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
    print_table(list(sums), lines, words=len(sums) - len(COUNTED))
