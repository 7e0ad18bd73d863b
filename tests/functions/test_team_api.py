"""Pay per use through the handlers: prices, balances, receipts, reports, and keys that are kept out."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from PIL import Image

from img2img.admin.audit import audit
from img2img.bootstrap import Services
from img2img.money.credits import Phase
from img2img.money.prices import PriceTable
from tests.system import API_KEY_ID, SEGMIND_KEY, Answer, System

RICH = 1_000_000_000
DAY = 86_400
NOON = DAY // 2
BUYER = "key-of-the-buyer"
PROBLEM = "application/problem+json"


def picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (120, 60, 30)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PICTURE = picture()


class Team:
    """A team of its own, and what it asks for."""

    def __init__(self, system: System, balance: int) -> None:
        self.system = system
        # No test sees midnight.
        system.clock.advance((NOON - system.clock()) % DAY)
        # Not the functions' own clients and what they remember: an operator's.
        self.of = Services(system.services.settings, clock=system.clock)
        self.of.teams.create("buyer")
        self.of.teams.add_key(BUYER, "buyer", label="web")
        self.top_up(balance)

    def top_up(self, amount: int) -> None:
        if amount:
            self.of.credits.add("buyer", amount)

    def ask(self, method: str, path: str, body: Any = None, headers: Any = None, query: Any = None) -> Answer:
        return self.system.api(method, path, body, headers, query, key_id=BUYER)

    def create(self, headers: dict[str, str] | None = None, wait: int = 0, **fields: Any) -> Answer:
        body = {"image": PICTURE, "prompt": "a castle on a hill", "seed": 7, **fields}
        return self.ask("POST", "/sd1.5-img2img", body, {"Prefer": f"wait={wait}", **(headers or {})})

    def job(self, job_id: str) -> Any:
        return self.ask("GET", f"/jobs/{job_id}").json

    def balance(self) -> dict[str, Any]:
        answer = self.ask("GET", "/balance")
        assert answer.status == 200
        found: dict[str, Any] = answer.json
        return found

    def audited(self) -> tuple[str, ...]:
        found = audit(self.of.credits, self.of.jobs, "buyer")
        assert found.still
        return found.differences


@pytest.fixture
def rich(system) -> Team:
    return Team(system, RICH)


@pytest.fixture
def poor(system) -> Team:
    return Team(system, 0)


@pytest.fixture
def calls(system) -> Iterator[Counter[str]]:
    """The AWS calls that the functions make."""
    made: Counter[str] = Counter()

    def count(model: Any, **_: Any) -> None:
        made[model.name] += 1

    # The functions make their clients, each with a copy of these events, when they first need them.
    events = boto3.DEFAULT_SESSION.events
    events.register("before-call", count)
    yield made
    events.unregister("before-call", count)


def everything(system: System) -> dict[str, Any]:
    """Return all that a deployment keeps."""
    tables = {name: system.dynamodb.scan(TableName=name)["Items"] for name in ("jobs", "idempotency")}
    return {**tables, **{name: system.objects(name) for name in ("uploads", "results")}, "sent": system.messages()}


# What would it cost?

ASKED = [
    {},
    {"samples": 4},
    {"samples": "3", "num_inference_steps": "33"},
    {"img_width": 768, "img_height": 768, "num_inference_steps": 21, "samples": 3},
    {"strength": 0.1, "guidance_scale": 25, "scheduler": "Heun", "seed": 1, "fit": "contain", "output_format": "png"},
]


@pytest.mark.parametrize("fields", ASKED)
def test_a_price_is_what_the_job_then_reserves(rich, fields):
    quoted = rich.ask("POST", "/cost", fields)
    assert quoted.status == 200
    created = rich.create(**fields).json
    assert quoted.json["price"] == created["credits"]["reserved"] == RICH - rich.balance()["balance"]
    assert quoted.json["price_version"] == created["credits"]["price_version"]
    assert quoted.json["backend"] == created["backend"]
    asked_for = {"prompt": created["input"]["prompt"], "seed": created["input"]["seed"]}
    assert quoted.json["input"] | asked_for == created["input"]


def test_a_price_shows_the_checked_parameters(rich):
    quoted = rich.ask("POST", "/cost", {"samples": "2", "image": PICTURE, "prompt": "p", "metadata": {"a": "b"}}).json
    assert (quoted["price"], quoted["unit"]) == (2000, "1/1000 credit")
    shown = quoted["input"]
    assert (shown["samples"], shown["prompt"], shown["seed"]) == (2, "p", -1)
    assert shown["img_width"] == shown["img_height"] == 512


def test_a_price_creates_nothing(rich, calls):
    rich.balance()
    calls.clear()
    before = everything(rich.system)
    for body in ({}, {"image": PICTURE, "prompt": "p", "samples": 4}, {"samples": 9}):
        rich.ask("POST", "/cost", body, {"Idempotency-Key": "k"})
    assert calls == {}
    assert everything(rich.system) == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": 5},
        {"samples": None, "strength": 2, "img_width": 640},
        {"unknown": 1, "samples": "x"},
        {"image": "no base64!"},
        {"image": "http://plain.example/a.png"},
        {"prompt": ""},
        {"scheduler": "none", "metadata": {"a": 1}, "base64": "perhaps"},
    ],
)
def test_what_is_wrong_is_named_as_for_a_create(rich, wrong):
    refused = rich.ask("POST", "/cost", wrong)
    created = rich.create(**wrong)
    assert (refused.status, refused.headers["content-type"]) == (400, PROBLEM)
    assert refused.json == created.json
    assert refused.json["errors"]


def test_a_price_of_what_is_no_json_object(rich):
    plain = {"Content-Type": "text/plain"}
    for body, headers, status in (("{", {}, 400), ("[]", {}, 400), ("1", {}, 400), ("prompt=p", plain, 415)):
        answers = [rich.ask("POST", path, body, headers) for path in ("/cost", "/sd1.5-img2img")]
        assert [answer.status for answer in answers] == [status] * 2
        assert answers[0].json == answers[1].json


def test_the_base_price_is_a_parameter(rich):
    old = rich.create(samples=2).json
    rich.system.services.prices = PriceTable.parse("1200,segmind=300")
    assert rich.ask("POST", "/cost", {"samples": 2}).json["price"] == 600
    new = rich.create(samples=2).json
    rich.system.deliver()
    versions = {}
    for job, price in ((old, 2000), (new, 600)):
        receipt = rich.job(job["id"])["credits"]
        assert receipt["reserved"] == receipt["charged"] == price
        versions[job["id"]] = receipt["price_version"]
    assert versions == {old["id"]: "1:1000", new["id"]: "1:1200,segmind=300"}


# Too few credits


def test_a_job_that_is_too_dear_is_refused_with_its_price(poor):
    poor.top_up(2500)
    refused = poor.create(samples=3)
    assert (refused.status, refused.headers["content-type"]) == (402, PROBLEM)
    problem = refused.json
    assert (problem["code"], problem["status"], problem["title"]) == ("insufficient_credits", 402, "Not enough credits")
    assert (problem["price"], problem["balance"]) == (3000, 2500)
    assert "3 credits" in problem["detail"]
    assert "2.5" in problem["detail"]


@pytest.mark.parametrize("balance", [0, 999])
@pytest.mark.parametrize("key", [None, "order-17"])
def test_nothing_is_left_of_a_job_that_was_too_dear(poor, key, balance):
    poor.top_up(balance)
    before = everything(poor.system)
    headers = {"Idempotency-Key": key} if key else {}
    for _ in range(2):
        assert poor.create(headers).status == 402
    assert everything(poor.system) == before
    assert poor.system.sweep() == {}
    poor.top_up(1000 - balance)
    created = poor.create(headers)
    assert created.status == 202
    assert poor.balance() == {"team": "buyer", "balance": 0, "reserved": 1000, "charged": 0, "unit": "1/1000 credit"}
    assert poor.system.deliver() == 1
    assert poor.job(created.json["id"])["status"] == "succeeded"
    if key:
        replayed = poor.create(headers, wait=5)
        assert (replayed.status, replayed.json["id"]) == (200, created.json["id"])
    assert poor.audited() == ()


def test_an_upload_outlives_a_job_that_was_too_dear(poor):
    uploaded = poor.ask("POST", "/uploads", base64.b64decode(PICTURE), {"Content-Type": "image/png"}).json["id"]
    before = everything(poor.system)
    assert poor.create(image=uploaded).status == 402
    assert everything(poor.system) == before
    poor.top_up(1000)
    assert poor.create(image=uploaded).status == 202


def test_what_was_too_dear_for_one_payload_leaves_the_key_to_another(poor):
    key = {"Idempotency-Key": "order-17"}
    poor.top_up(1000)
    assert poor.create(key, samples=4).status == 402
    assert poor.create(key).status == 202


def test_what_is_released_can_be_spent_again(poor):
    poor.top_up(1000)
    first = poor.create()
    assert (first.status, poor.create().status) == (202, 402)
    poor.ask("POST", f"/jobs/{first.json['id']}/cancel")
    assert (poor.create().status, poor.create().status) == (202, 402)


def test_a_request_that_is_wrong_is_not_called_too_dear(poor):
    assert poor.create(samples=9).status == 400
    assert poor.create(image=base64.b64encode(b"no image").decode()).status == 415


# Receipts


def receipts(team: Team, job_id: str) -> list[Any]:
    """Return a job's receipt wherever it is shown."""
    [listed] = [job for job in team.ask("GET", "/jobs").json["jobs"] if job["id"] == job_id]
    return [team.job(job_id)["credits"], listed["credits"]]


def receipt(reserved: int, charged: int, released: int) -> dict[str, Any]:
    return {"reserved": reserved, "charged": charged, "released": released, "price_version": "1:1000"}


def test_a_receipt_from_the_start_to_the_end(rich):
    created = rich.create(samples=2).json
    assert created["credits"] == receipt(2000, 0, 0)
    assert receipts(rich, created["id"]) == [receipt(2000, 0, 0)] * 2
    rich.of.jobs.claim("buyer", created["id"], lease_seconds=0)
    assert receipts(rich, created["id"]) == [receipt(2000, 0, 0)] * 2
    rich.system.deliver()
    assert rich.job(created["id"])["status"] == "succeeded"
    assert receipts(rich, created["id"]) == [receipt(2000, 2000, 0)] * 2
    assert rich.balance()["charged"] == 2000


ENDS: dict[str, tuple[list[str], str, int]] = {
    "delivered": ([], "succeeded", 3),
    "one blocked": (["black"], "succeeded", 2),
    "one refused": (["400"], "succeeded", 2),
    "one of each": (["black", "400"], "succeeded", 1),
    "all blocked": (["black"] * 3, "failed", 0),
    "all refused": (["400"] * 3, "failed", 0),
    "no answers": (["garbage", "html", "cut"], "failed", 0),
    "Segmind is out of credits": (["406-credits"] * 3, "failed", 0),
}


@pytest.mark.parametrize("end", ENDS)
def test_outputs_that_were_delivered_are_charged_and_no_others(rich, end):
    behaviours, status, delivered = ENDS[end]
    for behaviour in behaviours:
        rich.system.segmind.behave(behaviour)
    job_id = rich.create(samples=3).json["id"]
    rich.system.deliver()
    assert rich.job(job_id)["status"] == status
    charged, released = 1000 * delivered, 1000 * (3 - delivered)
    assert receipts(rich, job_id) == [receipt(3000, charged, released)] * 2
    assert rich.balance() | {"unit": ""} == {
        "team": "buyer",
        "balance": RICH - charged,
        "reserved": 0,
        "charged": charged,
        "unit": "",
    }
    assert rich.audited() == ()


def test_a_canceled_job_costs_nothing(rich):
    job_id = rich.create(samples=2).json["id"]
    for _ in range(2):
        assert rich.ask("POST", f"/jobs/{job_id}/cancel").json["credits"] == receipt(2000, 0, 2000)
    rich.system.deliver()
    assert receipts(rich, job_id) == [receipt(2000, 0, 2000)] * 2
    assert rich.balance()["balance"] == RICH
    assert rich.audited() == ()


def test_an_expired_job_costs_nothing(rich):
    job_id = rich.create(samples=2).json["id"]
    rich.system.clock.advance(1801)
    assert rich.system.sweep() == {"failed": 1}
    assert receipts(rich, job_id) == [receipt(2000, 0, 2000)] * 2
    rich.system.deliver()
    assert rich.balance()["balance"] == RICH
    assert rich.audited() == ()


def test_what_a_job_had_delivered_when_it_expired_is_charged(rich):
    rich.system.segmind.behave("503")
    job_id = rich.create(samples=2).json["id"]
    assert rich.system.deliver() == 0
    rich.system.clock.advance(1801 + 130)
    assert rich.system.sweep() == {"succeeded": 1}
    assert receipts(rich, job_id) == [receipt(2000, 1000, 1000)] * 2
    assert rich.balance()["charged"] == 1000


def test_a_deleted_job_is_paid_for_only_if_it_was_delivered(rich):
    open_job, delivered = rich.create().json["id"], None
    rich.ask("DELETE", f"/jobs/{open_job}")
    rich.system.deliver()
    assert rich.balance()["balance"] == RICH
    delivered = rich.create().json["id"]
    rich.system.deliver()
    rich.ask("DELETE", f"/jobs/{delivered}")
    assert (rich.balance()["balance"], rich.balance()["reserved"]) == (RICH - 1000, 0)
    assert rich.audited() == ()


def test_a_retried_job_is_paid_once(rich):
    rich.system.segmind.behave("503")
    job_id = rich.create().json["id"]
    [record] = rich.system.receive()
    assert not rich.system.work(record)
    assert rich.balance()["reserved"] == 1000
    assert rich.system.work(record)
    rich.system.work(record)
    rich.system.clock.advance(3600)
    rich.system.sweep()
    ledger = rich.of.credits.ledger("buyer", about=job_id)
    assert [entry.phase for entry in ledger] == [Phase.RESERVE, Phase.SETTLE]
    assert rich.balance()["balance"] == RICH - 1000


def test_a_replay_is_not_paid_for(rich):
    key = {"Idempotency-Key": "order-17"}
    rich.create(key)
    rich.create(key)
    rich.system.deliver()
    assert rich.create(key, wait=5).headers["idempotent-replayed"] == "true"
    assert rich.balance()["balance"] == RICH - 1000


# x-remaining-credits


@pytest.mark.parametrize(
    ("balance", "shown"), [(12_345, "11.345"), (1000, "0"), (101_000, "100"), (1001, "0.001"), (RICH, "999999")]
)
def test_a_finished_answer_says_what_is_left(poor, balance, shown):
    poor.top_up(balance)
    key = {"Idempotency-Key": "k"}
    assert "x-remaining-credits" not in poor.create(key).headers
    poor.system.deliver()
    for accept in ("*/*", "image/*"):
        answer = poor.create({**key, "Accept": accept}, wait=5)
        assert (answer.status, answer.headers["x-remaining-credits"]) == (200, shown)
    assert "x-remaining-credits" in answer.headers["access-control-expose-headers"]


def test_a_failed_answer_says_that_nothing_was_spent(poor):
    poor.top_up(2500)
    poor.system.segmind.behave("400")
    key = {"Idempotency-Key": "k"}
    poor.create(key)
    poor.system.deliver()
    answer = poor.create(key, wait=5)
    assert (answer.status, answer.headers["x-remaining-credits"]) == (502, "2.5")


def test_what_is_left_is_the_teams_and_now(poor):
    poor.top_up(1000)
    key = {"Idempotency-Key": "k"}
    poor.create(key)
    poor.system.deliver()
    poor.top_up(500)
    assert poor.create(key, wait=5).headers["x-remaining-credits"] == "0.5"


# Other transactions


@pytest.fixture
def conflicts(system, monkeypatch) -> Iterator[Callable[[str, int], None]]:
    """Have the next writes of an operation meet other transactions."""
    left: Counter[str] = Counter()
    monkeypatch.setattr("img2img.dynamo.time", SimpleNamespace(sleep=lambda _: None))

    def refuse(model: Any, params: Any, **_: Any) -> tuple[AWSResponse, Any] | None:
        if json.loads(params["body"]).get("TableName") == "idempotency" or left[model.name] <= 0:
            return None
        left[model.name] -= 1
        answer: dict[str, Any] = {"ResponseMetadata": {"HTTPStatusCode": 400}}
        if model.name == "TransactWriteItems":
            answer["Error"] = {"Code": "TransactionCanceledException", "Message": "canceled"}
            writes = len(json.loads(params["body"])["TransactItems"])
            codes = ["None"] * writes
            codes[left[model.name] % writes] = "TransactionConflict"
            answer["CancellationReasons"] = [{"Code": code} for code in codes]
        else:
            answer["Error"] = {"Code": "TransactionConflictException", "Message": "in use"}
        return AWSResponse("https://dynamodb", 400, {}, None), answer

    # The functions make their clients, each with a copy of these events, when they first need them.
    events = boto3.DEFAULT_SESSION.events
    events.register("before-call.dynamodb", refuse)
    yield lambda operation, times: left.update({operation: times})
    events.unregister("before-call.dynamodb", refuse)
    assert +left == {}, "every conflict was met"


@pytest.mark.parametrize("times", [2, 15])
@pytest.mark.parametrize("key", [None, "order-17"])
def test_a_caller_never_sees_a_conflict(rich, conflicts, key, times):
    conflicts("TransactWriteItems", times)
    created = rich.create({"Idempotency-Key": key} if key else {})
    assert created.status == 202
    conflicts("TransactWriteItems", times)
    assert rich.ask("POST", f"/jobs/{created.json['id']}/cancel").json["status"] == "canceled"
    other = rich.create().json["id"]
    conflicts("TransactWriteItems", times)
    conflicts("DeleteItem", times)
    assert rich.ask("DELETE", f"/jobs/{other}").status == 204
    assert rich.balance()["balance"] == RICH
    assert rich.audited() == ()


@pytest.mark.parametrize("times", [2, 15])
def test_a_worker_waits_conflicts_out(rich, conflicts, times):
    rich.system.segmind.behave("503")
    job_id = rich.create(samples=2).json["id"]
    conflicts("UpdateItem", times)
    [record] = rich.system.receive()
    assert not rich.system.work(record)
    conflicts("UpdateItem", times)
    conflicts("TransactWriteItems", times)
    assert rich.system.work(record)
    assert rich.job(job_id)["credits"]["charged"] == 2000
    assert len(rich.system.segmind.calls) == 3
    assert rich.audited() == ()


@pytest.mark.parametrize("times", [2, 15])
def test_a_sweep_waits_conflicts_out(rich, conflicts, times):
    rich.create()
    rich.system.clock.advance(61)
    conflicts("UpdateItem", times)
    assert rich.system.sweep() == {"resent": 1}
    rich.system.clock.advance(1800)
    conflicts("TransactWriteItems", times)
    assert rich.system.sweep() == {"failed": 1}
    assert rich.audited() == ()


# Balance and usage


def test_a_balance_follows_every_step(rich):
    rich.create(samples=2)
    assert rich.balance() == {
        "team": "buyer",
        "balance": RICH - 2000,
        "reserved": 2000,
        "charged": 0,
        "unit": "1/1000 credit",
    }
    rich.system.segmind.behave("black")
    rich.system.deliver()
    after = rich.balance()
    assert (after["balance"], after["reserved"], after["charged"]) == (RICH - 1000, 0, 1000)


def test_a_report_of_what_was_used(rich):
    rich.of.teams.add_key("key-of-the-batch", "buyer", label="batch, nightly")
    today = datetime.fromtimestamp(rich.system.clock(), UTC).date()
    for samples in (1, 3):
        rich.create(samples=samples)
        rich.system.deliver()
    body = {"image": PICTURE, "prompt": "p"}
    rich.system.api("POST", "/sd1.5-img2img", body, {"Prefer": "wait=0"}, key_id="key-of-the-batch")
    rich.system.segmind.behave("black")
    rich.system.deliver()
    rich.system.create()
    rich.system.deliver()
    rich.of.teams.enable_key("key-of-the-batch", enabled=False)

    web = {"jobs": 2, "succeeded": 2, "failed": 0, "canceled": 0, "images": 4, "charged": 4000}
    batch = {"jobs": 1, "succeeded": 0, "failed": 1, "canceled": 0, "images": 0, "charged": 0}
    answer = rich.ask("GET", "/usage")
    assert answer.status == 200
    where = {"day": str(today), "backend": "segmind"}
    assert answer.json == {
        "from": str(today.replace(day=1)),
        "to": str(today),
        "group_by": ["day", "key", "backend"],
        "unit": "1/1000 credit",
        "rows": [
            {**where, "key": "key-of-the-batch", "label": "batch, nightly", **batch},
            {**where, "key": BUYER, "label": "web", **web},
        ],
        "total": {"jobs": 3, "succeeded": 2, "failed": 1, "canceled": 0, "images": 4, "charged": 4000},
    }

    by_day = rich.ask("GET", "/usage", query={"group_by": "day"}).json
    assert by_day["rows"] == [{"day": str(today), **answer.json["total"]}]
    assert by_day["total"] == answer.json["total"]
    assert rich.ask("GET", "/usage", query={"to": "2020-01-31"}).json["rows"] == []
    assert rich.balance()["charged"] == answer.json["total"]["charged"]


@pytest.mark.parametrize("accept", ["text/csv", "text/csv; charset=utf-8, application/json;q=0.5", "TEXT/CSV"])
def test_a_report_as_csv_is_the_same_report(rich, accept):
    rich.create()
    rich.system.deliver()
    for group_by in ("day,key,backend", "day", "key", "backend", "key,day"):
        query = {"group_by": group_by}
        as_json = rich.ask("GET", "/usage", query=query).json
        answer = rich.ask("GET", "/usage", headers={"Accept": accept}, query=query)
        assert (answer.status, answer.headers["content-type"]) == (200, "text/csv; charset=utf-8")
        assert answer.headers["content-disposition"].startswith("attachment; filename=")
        shown = list(csv.DictReader(io.StringIO(answer.content.decode(), newline="")))
        assert shown == [{name: str(value) for name, value in row.items()} for row in as_json["rows"]]
        assert len(shown) == 1


def test_other_reports_are_json(rich):
    for accept in ("*/*", "application/json", "application/json, text/csv", "text/html", ""):
        assert rich.ask("GET", "/usage", headers={"Accept": accept}).json["rows"] == []


@pytest.mark.parametrize("accept", ["*/*", "text/csv"])
def test_what_is_wrong_with_a_report_is_named_with_what_is_accepted(rich, accept):
    query = {"from": "yesterday", "to": "2026-02-30", "group_by": "team", "month": "5"}
    refused = rich.ask("GET", "/usage", headers={"Accept": accept}, query=query)
    assert (refused.status, refused.headers["content-type"]) == (400, PROBLEM)
    errors = {error["field"]: error["detail"] for error in refused.json["errors"]}
    assert set(errors) == set(query)
    assert "2026-11-22" in errors["from"]
    assert "day,key,backend" in errors["group_by"]
    assert "from, to, group_by" in errors["month"]


@pytest.mark.parametrize(
    "query", [{"from": "2024-01-01", "to": "2025-01-01"}, {"from": "2026-01-02", "to": "2026-01-01"}]
)
def test_a_period_that_cannot_be_reported_is_refused(rich, query):
    refused = rich.ask("GET", "/usage", query=query)
    assert (refused.status, [error["field"] for error in refused.json["errors"]]) == (400, ["from"])


def test_a_report_reads_counters_and_labels(rich, calls):
    rich.create()
    rich.system.deliver()
    rich.balance()
    calls.clear()
    rich.ask("GET", "/usage")
    assert calls == {"Query": 2}
    rich.ask("GET", "/usage", query={"group_by": "day,backend"})
    assert calls == {"Query": 3}
    rich.balance()
    assert calls == {"Query": 3, "GetItem": 1}


# Keys


def test_a_key_is_looked_up_once_a_minute(rich, calls):
    for _ in range(3):
        rich.ask("POST", "/cost", {})
    assert calls == {"GetItem": 2}
    rich.system.clock.advance(61)
    rich.ask("POST", "/cost", {})
    assert calls == {"GetItem": 4}


def test_a_new_key_works_at_once(rich):
    def ask() -> Answer:
        return rich.system.api("GET", "/balance", key_id="key-of-tomorrow")

    assert (ask().status, ask().json["code"]) == (403, "key_unknown")
    rich.of.teams.add_key("key-of-tomorrow", "buyer", label="new")
    assert (ask().status, ask().json["team"]) == (200, "buyer")


def test_two_keys_of_one_team_share_its_jobs_and_balance(rich):
    rich.of.teams.add_key("second", "buyer", label="batch")
    job_id = rich.create().json["id"]
    assert rich.system.api("GET", f"/jobs/{job_id}", key_id="second").status == 200
    assert rich.system.api("GET", "/balance", key_id="second").json == rich.balance()
    rich.of.teams.enable_key(BUYER, enabled=False)
    rich.system.clock.advance(60)
    refused = rich.ask("GET", f"/jobs/{job_id}")
    assert (refused.status, refused.json["code"]) == (403, "key_disabled")
    assert rich.system.api("GET", f"/jobs/{job_id}", key_id="second").status == 200


def test_a_disabled_team_creates_nothing_from_that_moment_on(rich):
    assert rich.create().status == 202
    rich.of.teams.enable("buyer", enabled=False)
    before = everything(rich.system)
    for headers in ({}, {"Idempotency-Key": "order-17"}):
        refused = rich.create(headers)
        assert (refused.status, refused.json["code"]) == (403, "team_disabled")
        assert refused.headers["content-type"] == PROBLEM
    assert everything(rich.system) == before
    rich.system.deliver()
    assert rich.of.credits.account("buyer").charged == 1000
    rich.of.teams.enable("buyer", enabled=True)
    assert rich.create({"Idempotency-Key": "order-17"}).status == 202


# Metrics


def metrics(out: str, name: str) -> list[float]:
    """Return the values of a metric in what was written."""
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    found = [line for line in lines if name in line]
    for line in found:
        [written] = line["_aws"]["CloudWatchMetrics"]
        assert written["Namespace"] == "Img2Img"
        assert [metric["Unit"] for metric in written["Metrics"] if metric["Name"] == name] == ["Count"]
    return [value for line in found for value in line[name]]


def test_a_refusal_for_lack_of_credits_is_counted(poor, capsys):
    for _ in range(2):
        poor.create()
    assert metrics(capsys.readouterr().out, "InsufficientCredits") == [1, 1]
    poor.top_up(1000)
    poor.create()
    poor.create(samples=9)
    written = capsys.readouterr().out
    assert metrics(written, "InsufficientCredits") == []
    assert metrics(written, "JobsCreated") == [1]


def test_a_sweep_counts_the_teams_that_are_low_on_credits(system, calls, capsys):
    operator = Services(system.services.settings)
    for team, balance in (("enough", 10_000), ("low", 9999), ("empty", 1000), ("new", 0), ("gone", 500)):
        operator.teams.create(team)
        if balance:
            operator.credits.add(team, balance)
    operator.credits.add("empty", -1000)
    operator.teams.enable("gone", enabled=False)
    calls.clear()
    system.sweep()
    # Added and taken back is as good as never added.
    assert metrics(capsys.readouterr().out, "TeamsLowOnCredits") == [1]
    assert calls == {"Query": 4 + 1, "BatchGetItem": 1}


def test_spending_makes_a_team_low_and_a_top_up_ends_it(poor, capsys):
    poor.top_up(10_000)
    poor.system.sweep()
    poor.create()
    poor.system.sweep()
    poor.top_up(1000)
    poor.system.sweep()
    assert metrics(capsys.readouterr().out, "TeamsLowOnCredits") == [0, 1, 0]


def test_segminds_own_figure_is_a_metric_still(rich, capsys):
    rich.create()
    rich.system.deliver()
    [left] = metrics(capsys.readouterr().out, "SegmindRemainingCredits")
    assert left == rich.system.segmind.credits
    assert SEGMIND_KEY not in json.dumps(rich.balance())


def test_the_teams_of_others_are_not_charged(rich):
    before = rich.of.credits.account("default")
    rich.create()
    rich.system.deliver()
    assert rich.of.credits.account("default") == before
    assert rich.system.api("GET", "/balance", key_id=API_KEY_ID).json["charged"] == 0
