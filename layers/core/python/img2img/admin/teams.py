"""The commands `team` and `key`: who may use the API."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from img2img.admin.commands import AMOUNTS, Options, add_command, add_group, amounts, print_table, shown_time, state
from img2img.admin.stack import Operator
from img2img.teams.store import CACHE_SECONDS, ApiKey, check_label

_FELT = f"It takes up to {CACHE_SECONDS} seconds to be felt everywhere."


def add_commands(commands: Any) -> None:
    """Declare the commands."""
    _add_team_commands(add_group(commands, "team", "create, list, show, disable and enable teams"))
    _add_key_commands(add_group(commands, "key", "create, list, disable and enable API keys"))


def _add_team_commands(commands: Any) -> None:
    parser = add_command(commands, "create", _create_team, "create a team, without keys and credits")
    parser.add_argument("team", metavar="ID", help="up to 32 lower-case letters, digits, - and _; stays as it is")
    parser.add_argument("--name", default="", metavar="TEXT", help="what people call the team (default: its id)")
    add_command(commands, "list", _list_teams, "list all teams, with their credits")
    parser = add_command(commands, "show", _show_team, "show a team: its account and its keys")
    parser.add_argument("team", metavar="ID", help="as `team list` shows it")
    parser = add_command(commands, "disable", _enable_team, "refuse all requests of a team", _FELT, enabled=False)
    parser.add_argument("team", metavar="ID", help="as `team list` shows it")
    parser = add_command(commands, "enable", _enable_team, "serve a disabled team again", _FELT, enabled=True)
    parser.add_argument("team", metavar="ID", help="as `team list` shows it")


def _add_key_commands(commands: Any) -> None:
    more = "Its value alone is written to stdout, this one time; nothing else here ever shows it."
    parser = add_command(commands, "create", _create_key, "make an API key for a team", more)
    parser.add_argument("team", metavar="TEAM", help="id of the team")
    parser.add_argument("--label", required=True, metavar="TEXT", help="what the key is for; stands in usage reports")
    parser = add_command(commands, "list", _list_keys, "list a team's keys, without their values")
    parser.add_argument("team", metavar="TEAM", help="id of the team")
    parser = add_command(commands, "disable", _enable_key, "refuse all requests with a key", _FELT, enabled=False)
    parser.add_argument("key", metavar="KEY_ID", help="as `key list` shows it")
    parser = add_command(commands, "enable", _enable_key, "accept a disabled key again", _FELT, enabled=True)
    parser.add_argument("key", metavar="KEY_ID", help="as `key list` shows it")


def _create_team(use: Operator, options: Options) -> int:
    team = use.teams.create(options.team, name=options.name)
    print(f"Team {team.id} is created; it has no keys and no credits yet")
    return 0


def _list_teams(use: Operator, _options: Options) -> int:
    rows = [(team.id, team.name, state(team.enabled), *amounts(team.account)) for team in use.teams.all()]
    print_table(("team", "name", "state", *AMOUNTS), rows, words=3)
    return 0


def _show_team(use: Operator, options: Options) -> int:
    team = use.teams.get(options.team)
    values = (team.id, team.name, state(team.enabled), shown_time(team.created_ms), *amounts(team.account))
    for name, value in zip(("team", "name", "state", "created", *AMOUNTS), values, strict=True):
        print(f"{name:<9} {value}")
    print()
    _print_keys(use.teams.keys(team.id))
    return 0


def _enable_team(use: Operator, options: Options) -> int:
    use.teams.enable(options.team, enabled=options.enabled)
    print(f"Team {options.team} is {state(options.enabled)}. {_FELT}")
    return 0


def _print_keys(keys: Iterable[ApiKey]) -> None:
    rows = [(key.id, key.label, state(key.enabled), shown_time(key.created_ms)) for key in keys]
    print_table(("key", "label", "state", "created"), rows, words=4)


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
    print(f"Key {key.id} ({key.label}) of team {key.team} is {state(key.enabled)}. {_FELT}")
    return 0
