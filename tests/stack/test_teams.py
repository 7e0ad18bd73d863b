"""Teams, their keys and their credits, over HTTP through the whole system on one machine."""

from __future__ import annotations

import csv
import io
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
import requests

from img2img.admin.audit import audit
from tests.stack.client import Client, wait_until
from tests.system import ROOT

PRICE = 1000  # of one sample of 20 steps and 512 x 512
PAID_FOR, ASKED_FOR = 20, 50


@pytest.fixture(autouse=True)
def _calm(stack):
    stack.segmind.reset()


def refused(client) -> tuple[int, str]:
    answer = client.get("/balance")
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["code"]


def test_a_new_key_works_at_once_and_shows_nothing_of_other_teams(stack, new_team):
    first = new_team("first", 10 * PRICE)
    job = first.create().json()
    photo = (ROOT / "events" / "sample.jpg").read_bytes()
    upload = first.session.post(
        f"{first.url}/uploads", photo, headers={"Content-Type": "image/jpeg"}, timeout=10
    ).json()
    path = f"/jobs/{job['id']}"

    second = new_team("second", 10 * PRICE)
    answer = second.get("/balance")
    assert (answer.status_code, answer.json()["team"], answer.json()["balance"]) == (200, "second", 10 * PRICE)
    assert second.get("/jobs").json()["jobs"] == []
    assert second.get("/usage").json()["rows"] == []
    for method, place in [
        ("GET", path),
        ("GET", f"{path}/outputs/0"),
        ("POST", f"{path}/cancel"),
        ("DELETE", path),
    ]:
        assert second.session.request(method, second.url + place, timeout=10).status_code == 404
    assert second.create(image=upload["id"]).status_code == 404
    assert second.get("/balance").json()["balance"] == 10 * PRICE

    assert [listed["id"] for listed in first.get("/jobs").json()["jobs"]] == [job["id"]]
    assert first.get(path).json()["status"] == "succeeded"
    assert first.create(image=upload["id"]).json()["status"] == "succeeded"


def test_two_keys_of_a_team_share_what_it_has(new_team, new_key):
    one = new_team("sharing", 2 * PRICE)
    other = new_key("sharing")
    job = one.create(num_inference_steps=20).json()
    assert other.get(f"/jobs/{job['id']}").json()["status"] == "succeeded"
    assert other.get("/balance").json()["balance"] == PRICE


def test_what_the_operator_disables_is_refused(stack, admin, new_team, new_key):
    new_team("half-open")
    disabled, enabled = new_key("half-open"), new_key("half-open")
    admin.teams.enable_key(disabled.key_id, enabled=False)
    assert refused(disabled) == (403, "key_disabled")
    assert enabled.get("/balance").status_code == 200

    nobody = new_team("closed")
    admin.teams.enable("closed", enabled=False)
    assert refused(nobody) == (403, "team_disabled")

    with admin.keys.new("of no team") as key:
        assert refused(Client(stack.url, key.value)) == (403, "key_unknown")


def test_what_is_closed_at_the_gateway_is_refused_there(stack, new_team, new_key):
    deleted, disabled, removed = new_team("shut"), new_key("shut"), new_key("shut")
    closed = (deleted, disabled, removed)
    assert {client.get("/balance").status_code for client in closed} == {200}
    gateway = stack.client("apigateway")
    gateway.delete_api_key(apiKey=deleted.key_id)
    switched_off = [{"op": "replace", "path": "/enabled", "value": "false"}]
    gateway.update_api_key(apiKey=disabled.key_id, patchOperations=switched_off)
    gateway.delete_usage_plan_key(usagePlanId=stack.resources["UsagePlan"], keyId=removed.key_id)
    # The gateway asks again after a second.
    wait_until(lambda: {client.get("/balance").status_code for client in closed} == {403})
    assert {refused(client) for client in closed} == {(403, "forbidden")}


def test_a_key_works_at_once_while_wrong_ones_are_tried(stack, new_team, new_key):
    new_team("patient")
    enough = threading.Event()

    def guess(number: int) -> Counter[int]:
        statuses: Counter[int] = Counter()
        with requests.Session() as session:
            while not enough.is_set():
                key = f"wrong-{number}-{statuses.total()}"
                answer = session.get(f"{stack.url}/balance", headers={"x-api-key": key}, timeout=10)
                statuses[answer.status_code] += 1
        return statuses

    with ThreadPoolExecutor(8) as pool:
        guesses = [pool.submit(guess, number) for number in range(8)]
        try:
            assert [new_key("patient").get("/balance").status_code for _ in range(5)] == [200] * 5
        finally:
            enough.set()
    assert {status for guess in guesses for status in guess.result()} == {403}


@dataclass
class Rush:
    """Many creates at once by a team that can pay for some of them, and what it saw before the first job ended."""

    client: Client
    day: str
    answers: list[requests.Response]
    meanwhile: dict[str, int]


@pytest.fixture(scope="module")
def rush(stack, new_team):
    client = new_team("rush", PAID_FOR * PRICE)
    day = str(datetime.now(UTC).date())
    stack.segmind.reset()
    stack.segmind.latency = 60
    start = threading.Barrier(ASKED_FOR)

    def create(number: int) -> requests.Response:
        caller = Client(client.url, client.session.headers["x-api-key"])
        start.wait()
        return caller.create(headers={"Prefer": "respond-async"}, num_inference_steps=20, seed=number)

    with ThreadPoolExecutor(ASKED_FOR) as pool:
        answers = list(pool.map(create, range(ASKED_FOR)))
    meanwhile = client.get("/balance").json()
    stack.segmind.latency = 0
    stack.segmind.release()
    return Rush(client, day, answers, meanwhile)


def test_of_fifty_creates_at_once_those_succeed_that_are_paid_for(rush, admin):
    assert Counter(answer.status_code for answer in rush.answers) == {202: PAID_FOR, 402: ASKED_FOR - PAID_FOR}
    for answer in rush.answers:
        if answer.status_code == 402:
            assert answer.headers["content-type"] == "application/problem+json"
            problem = answer.json()
            assert (problem["code"], problem["price"], problem["balance"]) == ("insufficient_credits", PRICE, 0)
    all_of_it = PAID_FOR * PRICE
    assert (rush.meanwhile["balance"], rush.meanwhile["reserved"], rush.meanwhile["charged"]) == (0, all_of_it, 0)

    jobs = [rush.client.ended(answer.json()["id"]) for answer in rush.answers if answer.status_code == 202]
    assert len({job["id"] for job in jobs}) == PAID_FOR
    assert {job["status"] for job in jobs} == {"succeeded"}
    assert {(job["credits"]["charged"], job["credits"]["released"]) for job in jobs} == {(PRICE, 0)}
    account = rush.client.get("/balance").json()
    assert (account["balance"], account["reserved"], account["charged"]) == (0, 0, all_of_it)
    found = audit(admin.credits, admin.jobs, "rush")
    assert (found.still, found.differences) == (True, ())


def test_usage_counts_them_as_json_and_as_csv(rush):
    for answer in rush.answers:
        if answer.status_code == 202:
            rush.client.ended(answer.json()["id"])
    query = {"from": rush.day, "group_by": "key,backend"}
    counts = {"jobs": 20, "succeeded": 20, "failed": 0, "canceled": 0, "images": 20, "charged": PAID_FOR * PRICE}
    row = {"key": rush.client.key_id, "label": "key of rush", "backend": "segmind", **counts}
    report = rush.client.get("/usage", params=query).json()
    assert (report["rows"], report["total"]) == ([row], counts)

    table = rush.client.get("/usage", params=query, headers={"Accept": "text/csv"})
    assert table.headers["content-type"] == "text/csv; charset=utf-8"
    assert table.headers["content-disposition"].startswith('attachment; filename="usage-rush-')
    assert list(csv.DictReader(io.StringIO(table.text))) == [{name: str(value) for name, value in row.items()}]
