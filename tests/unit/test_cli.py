"""The operator's command line, over moto."""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import EndpointConnectionError

from img2img.admin import cli
from tests.system import API_KEY_ID, sample_base64

ROOT = Path(__file__).parents[2]
COUNTED = ["jobs", "succeeded", "failed", "canceled", "images", "charged"]


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def cells(self) -> list[list[str]]:
        return [line.split() for line in self.lines]


def create_stack(name: str, outputs: dict[str, str]) -> None:
    template = {
        "Resources": {"Queue": {"Type": "AWS::SQS::Queue", "Properties": {"QueueName": name}}},
        "Outputs": {key: {"Value": value} for key, value in outputs.items()},
    }
    boto3.client("cloudformation").create_stack(StackName=name, TemplateBody=json.dumps(template))


@pytest.fixture
def gateway(system):
    return boto3.client("apigateway")


@pytest.fixture
def plan_id(gateway):
    plan = gateway.create_usage_plan(name="plan")["id"]
    create_stack("img2img", {"JobsTableName": "jobs", "UsagePlanId": plan})
    return plan


@pytest.fixture
def run(plan_id, capsys):
    """Return a function that runs one command on the stack."""

    def run(*arguments: str) -> Ran:
        capsys.readouterr()
        status = cli.main(arguments)
        return Ran(status, *capsys.readouterr())

    return run


def no_answer():
    raise EndpointConnectionError(endpoint_url="https://aws.example")


def assert_refused(ran: Ran, *parts: str) -> None:
    assert ran.status == 1
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    for part in parts:
        assert part in ran.err


def key_ids(run, team: str) -> list[str]:
    return [cells[0] for cells in run("key", "list", team).cells[1:]]


def new_key(run, team: str, label: str) -> str:
    """Make a key and return its id."""
    before = key_ids(run, team)
    assert run("key", "create", team, "--label", label).status == 0
    [key_id] = set(key_ids(run, team)) - set(before)
    return key_id


def job(system, key_id: str, samples: int = 1) -> None:
    """Have one job done."""
    body = {"image": sample_base64(), "prompt": "a castle", "samples": samples}
    answer = system.api("POST", "/sd1.5-img2img", body, {"Prefer": "respond-async"}, key_id=key_id)
    assert answer.status == 202
    assert system.deliver() == 1


# ------------------------------------------------------------------------------------------------------ teams


def test_a_team_is_created_listed_and_shown(run):
    assert run("team", "create", "acme", "--name", "Acme Inc.").status == 0
    run("credits", "add", "acme", "2.5")
    key_id = new_key(run, "acme", "web shop")
    assert ["acme", "Acme", "Inc.", "enabled", "2.5", "0", "0", "2.5"] in run("team", "list").cells
    assert [cells[0] for cells in run("team", "list").cells] == ["team", "acme", "default"]
    shown = run("team", "show", "acme")
    facts = dict(line.split(maxsplit=1) for line in shown.lines[:8])
    assert facts.pop("created").endswith("Z")
    assert facts == {
        "team": "acme",
        "name": "Acme Inc.",
        "state": "enabled",
        "balance": "2.5",
        "reserved": "0",
        "charged": "0",
        "added": "2.5",
    }
    assert shown.cells[-1][:4] == [key_id, "web", "shop", "enabled"]


def test_a_team_shows_what_its_jobs_reserve_and_cost(run, system):
    job(system, API_KEY_ID, samples=3)
    system.create()
    facts = dict(line.split(maxsplit=1) for line in run("team", "show", "default").lines[:8])
    assert facts["charged"] == "3"
    assert facts["reserved"] == "1"
    assert facts["balance"] == "999996"
    assert facts["added"] == "1000000"


def test_a_disabled_team_is_refused_within_a_minute_and_served_again(run, system):
    assert system.api("GET", "/balance").status == 200
    disabled = run("team", "disable", "default")
    assert disabled.status == 0
    assert "disabled" in disabled.out
    assert "60 seconds" in disabled.out
    system.clock.advance(60)
    assert system.api("GET", "/balance").json["code"] == "team_disabled"
    assert "disabled" in run("team", "show", "default").out
    assert run("team", "enable", "default").status == 0
    system.clock.advance(60)
    assert system.api("GET", "/balance").status == 200


def test_a_team_cannot_be_created_twice_or_under_any_name(run):
    assert_refused(run("team", "create", "default"), "default already")
    assert_refused(run("team", "create", "Acme"), "lower-case")
    assert_refused(run("team", "create", "acme", "--name", "=1+1"), "name")
    assert [cells[0] for cells in run("team", "list").cells[1:]] == ["default"]


@pytest.mark.parametrize(
    "command",
    [
        *("team show nobody", "team disable nobody", "team enable nobody", "key list nobody", "audit nobody"),
        *("key create nobody --label web", "credits add nobody 5", "usage --team nobody"),
    ],
)
def test_an_unknown_team_is_an_error(run, gateway, command):
    assert_refused(run(*command.split()), "There is no team nobody")
    assert gateway.get_api_keys()["items"] == []


# ------------------------------------------------------------------------------------------------------- keys


def test_a_keys_value_is_shown_once_and_nowhere_else(run, gateway, plan_id, system, caplog):
    # Below that boto3 logs whole answers, if someone asks it to.
    caplog.set_level(logging.INFO)
    made = run("key", "create", "default", "--label", "web shop")
    value = made.out.removesuffix("\n")
    [key] = gateway.get_api_keys(includeValues=True)["items"]
    assert made.status == 0
    assert value == key["value"]
    assert [item["id"] for item in gateway.get_usage_plan_keys(usagePlanId=plan_id)["items"]] == [key["id"]]
    assert key["id"] in made.err
    assert "web shop" in made.err
    assert system.api("GET", "/balance", key_id=key["id"]).json["team"] == "default"
    later = [run("key", "list", "default"), run("team", "show", "default"), run("key", "disable", key["id"])]
    assert all(key["id"] in ran.out for ran in later)
    elsewhere = [made.err, caplog.text, json.dumps(system.dynamodb.scan(TableName="jobs")["Items"])]
    assert value not in "".join([*elsewhere, *(ran.out + ran.err for ran in later)])


def test_a_key_is_rotated_without_a_gap(run, system):
    run("team", "create", "acme")
    old = new_key(run, "acme", "web")
    new = new_key(run, "acme", "web, from June")
    assert [system.api("GET", "/balance", key_id=key).status for key in (old, new)] == [200, 200]
    disabled = run("key", "disable", old)
    assert disabled.status == 0
    assert "60 seconds" in disabled.out
    system.clock.advance(60)
    assert system.api("GET", "/balance", key_id=old).json["code"] == "key_disabled"
    assert system.api("GET", "/balance", key_id=new).status == 200
    assert {cells[0]: "disabled" in cells for cells in run("key", "list", "acme").cells[1:]} == {old: True, new: False}
    run("key", "enable", old)
    system.clock.advance(60)
    assert system.api("GET", "/balance", key_id=old).status == 200


def test_a_wrong_label_makes_no_key_at_the_gateway(run, gateway):
    assert_refused(run("key", "create", "default", "--label", "=cmd()"), "label")
    assert gateway.get_api_keys()["items"] == []


@pytest.mark.parametrize("operation", ["CreateApiKey", "CreateUsagePlanKey", "TransactWriteItems"])
def test_a_key_that_could_not_be_finished_opens_nothing(run, gateway, before_calls, operation):
    before_calls(operation, no_answer)
    ran = run("key", "create", "default", "--label", "web")
    assert ran.status == 1
    assert "aws.example" in ran.err
    assert gateway.get_api_keys()["items"] == []
    assert key_ids(run, "default") == [API_KEY_ID]


def test_a_key_whose_value_nobody_could_read_is_gone(run, gateway, monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        assert cli.main(["key", "create", "default", "--label", "web"]) == 1
    assert gateway.get_api_keys()["items"] == []
    assert key_ids(run, "default") == [API_KEY_ID]


def test_an_unknown_key_is_an_error(run):
    assert_refused(run("key", "disable", "nokey"))
    assert_refused(run("key", "enable", "nokey"))


# ---------------------------------------------------------------------------------------------------- credits


def test_credits_are_added_and_taken_back(run):
    run("team", "create", "acme")
    assert run("credits", "add", "acme", "100").lines[-1] == "Its balance is 100 credits"
    assert run("credits", "add", "acme", "0.125", "--note", "a gift").lines[-1] == "Its balance is 100.125 credits"
    assert run("credits", "add", "acme", "-5").lines[-1] == "Its balance is 95.125 credits"
    assert run("credits", "add", "acme", "-0.125").lines[-1] == "Its balance is 95 credits"
    assert_refused(run("credits", "add", "acme", "-95.001"), "95 credits are left")
    assert_refused(run("credits", "add", "acme", "0"), "amount")
    assert run("audit", "acme").status == 0


def test_a_reference_is_booked_once(run):
    run("team", "create", "acme")
    assert run("credits", "add", "acme", "100", "--reference", "INV-7").status == 0
    assert_refused(run("credits", "add", "acme", "100", "--reference", "INV-7"), "INV-7", "nothing was added")
    assert ["balance", "100"] in run("team", "show", "acme").cells


def test_credits_that_were_added_are_said_to_be_even_if_the_balance_cannot_be_read(run, before_calls):
    before_calls("GetItem", no_answer)
    ran = run("credits", "add", "default", "100")
    assert ran.status == 1
    assert ran.lines == ["Added 100 credits to team default"]
    assert "aws.example" in ran.err


def test_credits_that_cannot_have_been_added_are_not_doubted(run, before_calls):
    before_calls("DescribeStacks", no_answer)
    assert_refused(run("credits", "add", "default", "100"), "aws.example")


@pytest.mark.parametrize("amount", ["many", "1.2345", "1,5", "-", "1e3", "nan"])
def test_an_amount_is_a_decimal_number(run, capsys, amount):
    with pytest.raises(SystemExit) as ended:
        run("credits", "add", "default", amount)
    assert ended.value.code == 2
    assert "three decimals" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ audit


def set_number(system, sk: str, name: str, value: int) -> None:
    system.dynamodb.update_item(
        TableName="jobs",
        Key={"pk": {"S": "TEAM#default"}, "sk": {"S": sk}},
        UpdateExpression="SET #name = :value",
        ExpressionAttributeNames={"#name": name},
        ExpressionAttributeValues={":value": {"N": str(value)}},
    )


def test_books_that_balance_pass_the_audit(run, system):
    run("team", "create", "acme")
    job(system, API_KEY_ID)
    system.create()
    ran = run("audit")
    assert ran.status == 0
    assert [line.split(", ")[0] for line in ran.lines] == [
        "acme: ok",
        "default: ok",
    ]
    assert "balance 999998, reserved 1, charged 1, added 1000000 by 4 entries" in ran.lines[1]


def test_the_audit_names_every_difference(run, system):
    run("team", "create", "acme")
    job(system, API_KEY_ID)
    set_number(system, "TEAM", "balance", 5500)
    set_number(system, "TEAM", "charged", 0)
    ran = run("audit")
    assert ran.status == 1
    assert ran.lines[0].startswith("acme: ok")
    assert ran.lines[1:] == [
        "default: DIFFERS: balance is 5.5, by the ledger 999999; charged is 0, by the ledger 1",
    ]
    assert run("audit", "acme").status == 0
    assert run("audit", "default").lines == ran.lines[1:]


def test_the_audit_finds_a_changed_ledger(run, system):
    job(system, API_KEY_ID)
    [settled] = [entry for entry in system.services.credits.ledger("default") if entry.phase == "settle"]
    set_number(system, f"LEDGER#{settled.about}#settle", "charged", 400)
    ran = run("audit")
    assert ran.status == 1
    assert f"job {settled.about} was settled for 0.4 of 1 reserved" in ran.out


def test_a_ledger_that_never_stands_still_is_not_called_wrong(run, system, before_calls):
    before_calls("GetItem", lambda: system.services.credits.add("default", 1))
    ran = run("audit", "default")
    assert ran.status == 2
    assert "nothing compared" in ran.out
    assert "DIFFERS" not in ran.out


# ------------------------------------------------------------------------------------------------------ usage


DAY = "2026-03-10"
MARCH = ("--from", "2026-03-01", "--to", "2026-03-31")


@pytest.fixture
def spent(run, system):
    """Two teams had jobs done on one day; one of them and its older key are disabled. Return its two keys."""
    run("team", "create", "acme")
    run("credits", "add", "acme", "10")
    old, new = new_key(run, "acme", "old"), new_key(run, "acme", "new")
    system.clock.ahead = datetime.fromisoformat(f"{DAY}T12:00:00+00:00").timestamp() - time.time()
    job(system, API_KEY_ID, samples=2)
    job(system, old)
    job(system, new, samples=4)
    job(system, new)
    run("key", "disable", old)
    run("team", "disable", "acme")
    return old, new


def records(ran: Ran) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(ran.out)))


def test_usage_as_csv(run, spent):
    old, new = spent
    ran = run("usage", *MARCH, "--format", "csv")
    assert ran.err == ""
    assert next(csv.reader(io.StringIO(ran.out))) == ["team", "day", "key", "label", "backend", *COUNTED]
    found = {(row["team"], row["key"], row["label"], row["jobs"], row["charged"]) for row in records(ran)}
    assert found == {
        ("default", API_KEY_ID, "test", "1", "2000"),
        ("acme", old, "old", "1", "1000"),
        ("acme", new, "new", "2", "5000"),
    }
    assert {(row["day"], row["backend"]) for row in records(ran)} == {(DAY, "segmind")}


def test_usage_as_json(run, spent):
    document = json.loads(run("usage", *MARCH, "--format", "json", "--group-by", "key,team").out)
    assert document["group_by"] == ["team", "key"]
    assert document["unit"] == "1/1000 credit"
    assert (document["from"], document["to"]) == ("2026-03-01", "2026-03-31")
    assert [(row["team"], row["label"], row["images"]) for row in document["rows"]] == sorted(
        [("acme", "old", 1), ("acme", "new", 5), ("default", "test", 2)],
        key=lambda row: (row[0], {"old": spent[0], "new": spent[1]}.get(row[1], "")),
    )
    assert document["total"] == {
        "jobs": 4,
        "succeeded": 4,
        "failed": 0,
        "canceled": 0,
        "images": 8,
        "charged": 8000,
    }


def test_usage_as_a_table_in_credits_with_a_total(run, spent):
    assert run("usage", *MARCH, "--group-by", "team").cells == [
        ["team", *COUNTED],
        ["acme", "3", "3", "0", "0", "6", "6"],
        ["default", "1", "1", "0", "0", "2", "2"],
        ["total", "4", "4", "0", "0", "8", "8"],
    ]
    ran = run("usage", *MARCH)
    assert ran.cells[0] == ["team", "day", "key", "label", "backend", *COUNTED]
    assert len(ran.lines) == 5
    assert len(set(map(len, ran.lines))) == 1
    assert ran.cells[-1] == ["total", "4", "4", "0", "0", "8", "8"]


def test_usage_of_one_team(run, spent):
    assert {row["team"] for row in records(run("usage", *MARCH, "--team", "acme", "--format", "csv"))} == {"acme"}


def test_usage_without_the_team_adds_the_teams_up(run, spent):
    for by in ("backend", "day", "day,backend"):
        [row] = records(run("usage", *MARCH, "--group-by", by, "--format", "csv"))
        assert [*row] == [*by.split(","), *COUNTED]
        assert (row["jobs"], row["charged"]) == ("4", "8000")


def test_usage_of_some_days(run, spent):
    assert run("usage", "--from", DAY, "--to", DAY, "--group-by", "team").cells[-1][:2] == ["total", "4"]
    assert len(records(run("usage", "--to", DAY, "--format", "csv"))) == 3
    assert records(run("usage", "--from", "2026-03-11", "--to", "2026-03-31", "--format", "csv")) == []
    assert run("usage", "--to", "2026-03-09").cells[1:] == [["total", *"000000"]]


def test_usage_is_that_of_the_current_month_unless_asked_otherwise(run):
    document = json.loads(run("usage", "--format", "json").out)
    assert document["from"] == document["to"][:-2] + "01"
    assert datetime.now(UTC).date() - date.fromisoformat(document["to"]) <= timedelta(days=1)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--from", "yesterday"), ("--to", "2026-02-30"), ("--group-by", "colour"), ("--group-by", "")],
)
def test_wrong_days_and_groups_are_errors(run, option, value):
    assert_refused(run("usage", option, value), option.strip("-").replace("-", "_"))


# ----------------------------------------------------------------------------------------------------- errors


def test_a_stack_that_is_not_there_is_an_error(run):
    assert_refused(run("--stack", "elsewhere", "team", "list"), "elsewhere does not exist")
    assert_refused(run("--region", "us-east-1", "team", "list"), "img2img does not exist")
    assert_refused(run("--region", "no region", "team", "list"), "region")
    assert run("--stack", "img2img", "--region", "eu-west-1", "team", "list").status == 0


def test_another_applications_stack_is_an_error(run):
    create_stack("other", {"JobsTableName": "jobs"})
    assert_refused(run("--stack", "other", "team", "list"), "other")


@pytest.mark.parametrize(
    "arguments",
    [[], ["team"], ["team", "drop"], ["key", "create", "default"], ["usage", "--format", "xml"], ["credits", "add"]],
)
def test_a_wrong_command_line_is_explained(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m img2img" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        *("", "team", "team create", "team list", "team show", "team disable", "team enable"),
        *("key", "key create", "key list", "key disable", "key enable", "credits", "credits add", "audit", "usage"),
        *("secret", "model", "image"),
    ],
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert not ended.value.code
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(f"usage: python -m img2img {command}".strip())
    assert ("60 seconds" in shown) == command.endswith("able")


def test_a_reader_that_has_seen_enough_is_no_error(run, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["team", "list"]) == 141
    assert capsys.readouterr().err == ""


def as_a_program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "img2img", *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "layers/core/python"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_it_runs_as_a_program():
    ended = as_a_program("--help")
    assert ended.returncode == 0
    assert ended.stderr == ""
    for command in ("team", "key", "credits", "audit", "usage", "secret", "model", "image"):
        assert command in ended.stdout


def test_missing_credentials_are_an_error():
    nothing = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    ended = as_a_program(
        "--region", "eu-west-1", "team", "list", **nothing, AWS_EC2_METADATA_DISABLED="true", HOME="/nonexistent"
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr == "error: Unable to locate credentials\n"
