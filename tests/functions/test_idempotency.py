"""One key, one job: replays, reuse, crashes and crowds, and the AWS calls that each flow may make."""

from __future__ import annotations

import base64
import io
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import boto3
import pytest
from PIL import Image

from img2img.errors import IdempotencyInFlight, InsufficientCredits
from img2img.flows.intake import Caller, Submission
from img2img.flows.submit import submit
from img2img.requests import parse_request
from tests.faults.calls import Killed
from tests.functions.interruptions import die, fail
from tests.system import API_KEY_ID, Answer, Context, System, create_team, function, running_system

KEY = "order-17"
CREATE = {"PutObject": 1, "TransactWriteItems": 1, "SendMessage": 1}
PRICE = 1000


class Aws:
    """The AWS calls that the functions make, and a step to take before and after each."""

    def __init__(self) -> None:
        self.made: Counter[str] = Counter()
        self.step: Callable[[str], None] | None = None

    def before(self, model: Any, **_: Any) -> None:
        self.made[model.name] += 1
        if self.step:
            self.step(f"before {model.name}")

    def after(self, model: Any, **_: Any) -> None:
        if self.step:
            self.step(f"after {model.name}")

    def once_at(self, place: str, happens: Callable[[], Any]) -> None:
        """Have something happen at one place, once."""

        def step(name: str) -> None:
            if name == place:
                self.step = None
                happens()

        self.step = step


@contextmanager
def watched(system: System) -> Iterator[Aws]:
    calls = Aws()
    # The functions make their clients, each with a copy of these events, when they first need them.
    events = boto3.DEFAULT_SESSION.events
    events.register("before-call", calls.before)
    events.register("after-call", calls.after)
    # A key is looked up once a minute; one test below counts that.
    system.services.teams.team_of(API_KEY_ID)
    yield calls
    events.unregister("before-call", calls.before)
    events.unregister("after-call", calls.after)


@pytest.fixture
def aws(system) -> Iterator[Aws]:
    with watched(system) as calls:
        yield calls


@pytest.fixture
def endpoint() -> Iterator[tuple[System, Aws]]:
    """A deployment with an asynchronous SageMaker endpoint, and its AWS calls."""
    with running_system("sagemaker") as system, watched(system) as calls:
        yield system, calls


@cache
def picture(shade: int = 90) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 60, 30)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def ask(system: System, key: str | None = KEY, wait: int = 0, header: str = "Idempotency-Key", **fields: Any) -> Answer:
    """Send one and the same request, but for `fields`."""
    headers = {} if key is None else {header: key}
    return system.create(wait=wait, headers=headers, **{"image": picture(), **fields})


def leave(system: System, balance: int) -> None:
    """Leave the team so many thousandths of a credit."""
    system.services.credits.add("default", balance - system.books().balance)


def assert_charged(system: System, images: int) -> None:
    """Check that nothing is held any more, and that so many images have been paid for."""
    books = system.books()
    assert (books.reserved, books.charged) == (0, images * PRICE)


def ask_elsewhere(system: System, key: str = KEY, **fields: Any) -> Submission:
    """Make the same request as another instance of the function does, without its own HTTP side."""
    request = parse_request({"image": picture(), "prompt": "a castle on a hill", **fields}, {}.__getitem__)
    caller = Caller("default", API_KEY_ID, "another-request")
    return submit(system.services, caller, request, idempotency_key=key, context=Context())


def jobs(system: System) -> list[Any]:
    found: list[Any] = system.api("GET", "/jobs").json["jobs"]
    return found


def let_the_crashed_request_expire(system: System) -> None:
    """Put the end of a request that never completed into the past, as 29 seconds would."""
    for item in system.dynamodb.scan(TableName="idempotency")["Items"]:
        assert item["status"]["S"] == "INPROGRESS"
        system.dynamodb.update_item(
            TableName="idempotency",
            Key={"id": item["id"]},
            UpdateExpression="SET in_progress_expiration = :past",
            ExpressionAttributeValues={":past": {"N": str(int(time.time() * 1000) - 1000)}},
        )


# Replays


def test_a_replay_after_the_end_answers_with_the_finished_job(system):
    job_id = ask(system).json["id"]
    assert system.deliver() == 1
    replayed = ask(system)
    assert replayed.status == 200
    assert replayed.headers["idempotent-replayed"] == "true"
    assert (replayed.json["id"], replayed.json["status"]) == (job_id, "succeeded")
    assert replayed.headers["location"].endswith(job_id)
    assert system.messages() == 0
    assert len(jobs(system)) == len(system.segmind.calls) == 1
    assert_charged(system, 1)


def test_a_replay_needs_no_credits(system):
    leave(system, PRICE)
    created = ask(system)
    assert system.books().balance == 0
    assert ask(system, KEY + "1").status == 402
    assert (ask(system).status, ask(system).json["id"]) == (202, created.json["id"])
    system.deliver()
    replayed = ask(system)
    assert (replayed.status, replayed.json["id"]) == (200, created.json["id"])
    assert replayed.headers["x-remaining-credits"] == "0"
    assert_charged(system, 1)


def test_a_replay_of_a_failed_job_is_the_same_problem(system):
    system.segmind.behave("400")
    job_id = ask(system).json["id"]
    system.deliver()
    replayed = ask(system)
    assert (replayed.status, replayed.json["code"], replayed.json["job_id"]) == (502, "backend_refused", job_id)
    assert replayed.headers["idempotent-replayed"] == "true"
    assert len(system.segmind.calls) == 1
    assert_charged(system, 0)


def test_a_replay_of_a_canceled_job_is_that_job(system):
    job_id = ask(system).json["id"]
    system.api("POST", f"/jobs/{job_id}/cancel")
    replayed = ask(system)
    assert (replayed.status, replayed.json["id"], replayed.json["status"]) == (200, job_id, "canceled")


def test_a_replay_while_the_job_waits_makes_no_second_one(system):
    first, second = ask(system), ask(system)
    assert (second.status, second.json["id"]) == (202, first.json["id"])
    assert "idempotent-replayed" not in second.headers
    assert len(jobs(system)) == system.messages() == 1


def test_a_replay_can_wait_for_the_job(system):
    job_id = ask(system).json["id"]
    system.services.sleep = lambda _: system.deliver()
    replayed = ask(system, wait=25)
    assert (replayed.status, replayed.json["id"], replayed.json["status"]) == (200, job_id, "succeeded")
    assert replayed.headers["idempotent-replayed"] == "true"


def test_a_replay_while_the_job_runs_makes_no_second_one(system, aws):
    seen = []
    job_id = ask(system).json["id"]
    [record] = system.receive()
    aws.once_at("before GetObject", lambda: seen.append(ask_elsewhere(system)))
    assert system.work(record)
    assert [(submission.job.id, submission.job.status, submission.replayed) for submission in seen] == [
        (job_id, "processing", True)
    ]
    assert len(jobs(system)) == len(system.segmind.calls) == 1
    assert system.messages() == 0


def test_a_random_seed_is_drawn_once(system):
    first, second = ask(system, seed=-1), ask(system, seed="-1")
    assert second.json["id"] == first.json["id"]
    assert second.json["input"]["seed"] == first.json["input"]["seed"] >= 0
    assert ask(system).json["id"] == first.json["id"]


@pytest.mark.parametrize(
    "same",
    [
        {"samples": "2"},
        {"samples": 2.0, "strength": "1.0"},
        {"negative_prompt": "", "scheduler": None},
        {"image": f"data:image/png;base64,{picture()}"},
        {"image": "\n".join((picture()[:76], picture()[76:]))},
        {"base64": True},
    ],
    ids=lambda same: ",".join(same),
)
def test_what_means_the_same_is_the_same(system, same):
    first = ask(system, samples=2)
    assert ask(system, **{"samples": 2, **same}).json["id"] == first.json["id"]


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "a castle on a hill "},
        {"seed": 0},
        {"samples": 2},
        {"strength": 0.5},
        {"fit": "contain"},
        {"output_format": "png"},
        {"metadata": {"order": "18"}},
        {"image": picture(91)},
    ],
    ids=lambda other: ",".join(other),
)
def test_another_payload_is_refused(system, other):
    job_id = ask(system).json["id"]
    for _ in range(2):
        refused = ask(system, **other)
        assert (refused.status, refused.json["code"]) == (422, "idempotency_key_reused")
        assert refused.headers["content-type"] == "application/problem+json"
    assert [job["id"] for job in jobs(system)] == [job_id]
    assert ask(system).json["id"] == job_id
    assert system.messages() == 1


@pytest.mark.parametrize("header", ["idempotency-key", "IDEMPOTENCY-KEY", "Idempotency-key"])
def test_the_headers_case_does_not_matter(system, header):
    assert ask(system).json["id"] == ask(system, header=header).json["id"]


def test_keys_are_told_apart_exactly(system):
    found = [ask(system, key).json["id"] for key in ("a", "A", "a b", "a  b", "a" * 255, "a" * 254, "\u00e4")]
    assert len(set(found)) == len(found)


def test_without_a_key_every_request_is_a_job(system):
    assert ask(system, None).json["id"] != ask(system, None).json["id"]


@pytest.mark.parametrize("key", ["", "a" * 256, "a\tb", "a\x7f"])
def test_a_key_that_is_none_is_refused(system, key):
    refused = ask(system, key)
    assert refused.status == 400
    assert [error["field"] for error in refused.json["errors"]] == ["Idempotency-Key"]
    assert jobs(system) == []


def test_another_teams_key_is_another_key(system):
    create_team(system.services, "other", "key-of-the-other")

    def ask_as_other() -> Answer:
        body = {"image": picture(), "prompt": "a boat"}
        headers = {"Prefer": "wait=0", "Idempotency-Key": KEY}
        return system.api("POST", "/sd1.5-img2img", body, headers, key_id="key-of-the-other")

    first, other = ask(system), ask_as_other()
    assert other.status == 202
    assert other.json["id"] != first.json["id"]
    assert ask_as_other().json["id"] == other.json["id"]
    assert ask(system).json["id"] == first.json["id"]
    assert system.books().reserved == system.books("other").reserved == PRICE


def test_a_teams_second_api_key_finds_what_the_first_one_made(system):
    system.services.teams.add_key("second-key", "default", label="second")
    first = ask(system)
    body = {"image": picture(), "prompt": "a castle on a hill"}
    headers = {"Prefer": "wait=0", "Idempotency-Key": KEY}
    again = system.api("POST", "/sd1.5-img2img", body, headers, key_id="second-key")
    assert (again.status, again.json["id"]) == (202, first.json["id"])
    assert system.books().reserved == PRICE


def test_a_key_is_forgotten_after_a_day(system):
    first = ask(system)
    past = {"N": str(int(time.time()) - 1)}
    for table, name in (("idempotency", "expiration"), ("jobs", "expires_at")):
        for item in system.dynamodb.scan(TableName=table)["Items"]:
            if item.get("sk", {"S": "GUARD"})["S"] == "GUARD":
                system.dynamodb.put_item(TableName=table, Item={**item, name: past})
    second = ask(system, prompt="a boat")
    assert second.status == 202
    assert second.json["id"] != first.json["id"]


# Requests that fail


BROKEN = base64.b64encode(b"this is no image at all").decode()


@pytest.mark.parametrize(
    ("wrong", "status"),
    [({"image": BROKEN}, 415), ({"image": "upl_" + "0" * 26}, 404), ({"samples": 5}, 400), ({"prompt": ""}, 400)],
    ids=["no image", "no upload", "out of range", "empty"],
)
def test_a_refused_request_leaves_its_key_free(system, wrong, status):
    for _ in range(2):
        assert ask(system, **wrong).status == status
    created = ask(system)
    assert created.status == 202
    assert ask(system).json["id"] == created.json["id"]
    assert len(jobs(system)) == 1


def test_a_request_that_the_team_could_not_pay_leaves_its_key_free_and_nothing_else(system):
    leave(system, PRICE - 1)
    for _ in range(2):
        refused = ask(system)
        assert (refused.status, refused.json["code"]) == (402, "insufficient_credits")
        assert (refused.json["price"], refused.json["balance"]) == (PRICE, PRICE - 1)
    assert jobs(system) == system.objects("uploads") == []
    assert system.messages() == 0
    assert system.books().balance == PRICE - 1
    leave(system, PRICE)
    created = ask(system)
    assert created.status == 202
    assert ask(system).json["id"] == created.json["id"]
    assert len(jobs(system)) == system.messages() == 1


def test_a_team_that_was_disabled_a_moment_ago_creates_nothing(system):
    assert ask(system, None).status == 202
    system.services.teams.enable("default", enabled=False)
    refused = ask(system)
    assert (refused.status, refused.json["code"]) == (403, "team_disabled")
    system.services.teams.enable("default", enabled=True)
    assert len(jobs(system)) == system.messages() == len(system.objects("uploads")) == 1
    assert ask(system).status == 202


@pytest.mark.parametrize("operation", ["PutObject", "TransactWriteItems"])
def test_a_request_that_aws_failed_can_be_sent_again(system, aws, operation):
    aws.once_at(f"before {operation}", fail)
    failed = ask(system)
    assert (failed.status, failed.json["code"]) == (500, "internal_error")
    assert ask(system).status == 202
    assert len(jobs(system)) == system.messages() == 1
    assert system.books().reserved == PRICE


def test_a_job_that_could_not_be_sent_is_a_job_still(system, aws):
    aws.once_at("before SendMessage", fail)
    created = ask(system)
    assert created.status == 202
    assert ask(system).json["id"] == created.json["id"]
    assert system.messages() == 0
    system.clock.advance(61)
    assert system.sweep() == {"resent": 1}
    assert system.deliver() == 1
    assert ask(system).json["status"] == "succeeded"


# Crashes


@pytest.mark.parametrize(
    "place", ["after TransactWriteItems", "before SendMessage", "after SendMessage", "before UpdateItem"]
)
def test_a_crash_after_the_job_was_written_leads_back_to_that_job(system, aws, place):
    aws.once_at(place, die)
    with pytest.raises(Killed):
        ask(system)
    [job] = jobs(system)
    sent = system.messages()
    in_flight = ask(system)
    assert (in_flight.status, in_flight.json["code"]) == (409, "idempotency_in_flight")
    let_the_crashed_request_expire(system)
    refused = ask(system, prompt="a boat")
    assert (refused.status, refused.json["code"]) == (422, "idempotency_key_reused")
    found = ask(system)
    assert (found.status, found.json["id"], found.json["input"]) == (202, job["id"], job["input"])
    assert system.messages() == sent + 1
    assert system.objects("uploads") == [f"inputs/default/{job['id']}.png"], "no input of a job that never was"
    system.deliver()
    assert ask(system).json["id"] == job["id"]
    assert len(jobs(system)) == len(system.segmind.calls) == 1
    assert system.messages() == 0
    assert_charged(system, 1)


def test_a_crash_after_the_last_credits_were_reserved_leads_back_to_that_job(system, aws):
    leave(system, PRICE)
    aws.once_at("after TransactWriteItems", die)
    with pytest.raises(Killed):
        ask(system)
    [job] = jobs(system)
    assert system.books().balance == 0
    let_the_crashed_request_expire(system)
    assert ask(system, prompt="a boat").json["code"] == "idempotency_key_reused"
    found = ask(system)
    assert (found.status, found.json["id"]) == (202, job["id"])
    system.deliver()
    assert ask(system).json["status"] == "succeeded"
    assert_charged(system, 1)


def test_a_job_that_ended_before_its_request_was_repeated_is_not_sent_again(system, aws):
    aws.once_at("before UpdateItem", die)
    with pytest.raises(Killed):
        ask(system)
    system.deliver()
    let_the_crashed_request_expire(system)
    found = ask(system)
    assert (found.status, found.json["status"]) == (200, "succeeded")
    assert found.headers["idempotent-replayed"] == "true"
    assert system.messages() == 0


@pytest.mark.parametrize("place", ["after PutItem", "before PutObject", "after PutObject", "before TransactWriteItems"])
def test_a_crash_before_the_job_was_written_leaves_none(system, aws, place):
    aws.once_at(place, die)
    with pytest.raises(Killed):
        ask(system)
    assert jobs(system) == []
    assert ask(system).status == 409
    let_the_crashed_request_expire(system)
    assert system.books().reserved == 0
    assert ask(system).status == 202
    assert len(jobs(system)) == system.messages() == 1
    assert system.books().reserved == PRICE


# Crowds


PLACES = [
    f"{moment} {operation}"
    for operation in ("PutItem", "PutObject", "TransactWriteItems", "SendMessage", "UpdateItem")
    for moment in ("before", "after")
]


@pytest.mark.parametrize("place", PLACES)
def test_a_second_request_between_any_two_steps_of_the_first(system, aws, place):
    answers: list[Answer] = []
    aws.once_at(place, lambda: answers.append(ask(system)))
    first = ask_elsewhere(system)
    [second] = answers
    if place == "before PutItem":
        # The second has come first.
        assert (first.replayed, second.status, second.json["id"]) == (True, 202, first.job.id)
    elif place == "after UpdateItem":
        assert (first.replayed, second.status, second.json["id"]) == (False, 202, first.job.id)
    else:
        assert not first.replayed
        assert (second.status, second.json["code"]) == (409, "idempotency_in_flight")
        assert int(second.headers["retry-after"]) >= 1
    assert [job["id"] for job in jobs(system)] == [first.job.id]
    assert system.messages() == 1
    system.deliver()
    assert ask(system).json["status"] == "succeeded"
    assert len(system.segmind.calls) == 1
    assert_charged(system, 1)


def test_of_two_requests_for_the_last_credits_one_is_refused(system, aws):
    leave(system, PRICE)
    others: list[Answer] = []
    aws.once_at("before TransactWriteItems", lambda: others.append(ask(system, "another")))
    with pytest.raises(InsufficientCredits) as refused:
        ask_elsewhere(system)
    assert [answer.status for answer in others] == [202]
    assert (refused.value.price, refused.value.balance) == (PRICE, 0)
    assert len(jobs(system)) == system.messages() == len(system.objects("uploads")) == 1
    assert system.books().reserved == PRICE


def test_twenty_requests_between_the_steps_of_the_first_one(system, aws):
    answers: list[Answer] = []

    def step(place: str) -> None:
        if place != "before PutItem":
            aws.step = None
            answers.extend([ask(system), ask(system)])
            aws.step = step

    aws.step = step
    first = ask_elsewhere(system)
    aws.step = None
    answers += [ask(system) for _ in range(20 - len(answers))]
    assert Counter(answer.status for answer in answers) == {409: 16, 202: 4}
    assert {answer.json["id"] for answer in answers if answer.status == 202} == {first.job.id}
    assert len(jobs(system)) == system.messages() == 1
    system.deliver()
    assert len(system.segmind.calls) == 1
    assert_charged(system, 1)


def test_another_payload_in_flight_is_never_taken_for_the_first(system, aws):
    refused = []

    def other() -> None:
        refused.append(ask(system, prompt="a boat"))

    aws.once_at("after TransactWriteItems", other)
    first = ask_elsewhere(system)
    assert [answer.status for answer in refused] in ([409], [422])
    assert [job["id"] for job in jobs(system)] == [first.job.id]


def test_two_requests_after_a_crash_find_the_same_job(system, aws):
    aws.once_at("before SendMessage", die)
    with pytest.raises(Killed):
        ask(system)
    let_the_crashed_request_expire(system)
    late: list[Submission | str] = []

    def another() -> None:
        try:
            late.append(ask_elsewhere(system))
        except IdempotencyInFlight:
            late.append("in flight")

    aws.once_at("after TransactWriteItems", another)
    found = ask(system)
    assert found.status == 202
    assert late == ["in flight"]
    assert [job["id"] for job in jobs(system)] == [found.json["id"]]


# AWS calls


def calls_of(aws: Aws, what: Callable[[], Any]) -> dict[str, int]:
    aws.made.clear()
    what()
    return dict(aws.made)


def test_a_key_is_looked_up_once_a_minute(system, aws):
    for _ in range(2):
        assert calls_of(aws, lambda: system.api("GET", "/jobs")) == {"Query": 1}
        system.clock.advance(60)
        assert calls_of(aws, lambda: system.api("GET", "/jobs")) == {"GetItem": 2, "Query": 1}
        system.clock.advance(30)
    assert calls_of(aws, lambda: system.api("GET", "/jobs", key_id="unknown")) == {"GetItem": 1}


def test_the_calls_of_a_create(system, aws):
    assert calls_of(aws, lambda: ask(system, None)) == CREATE


def test_the_calls_of_a_create_that_is_waited_for(system, aws):
    ask(system, None)
    system.deliver()

    def sleep(_: float) -> None:
        made = aws.made.copy()
        system.deliver()
        aws.made = made

    system.services.sleep = sleep
    # The job as it has ended, then the balance.
    assert calls_of(aws, lambda: ask(system, None, wait=25)) == CREATE | {"GetItem": 2}


def test_the_calls_of_a_create_that_the_team_cannot_pay(system, aws):
    leave(system, 0)
    refused = {"PutObject": 1, "TransactWriteItems": 1, "DeleteObject": 1}
    assert calls_of(aws, lambda: ask(system, None)) == refused
    assert calls_of(aws, lambda: ask(system)) == refused | {"PutItem": 1, "DeleteItem": 1}


def test_the_calls_of_a_create_with_a_key(system, aws):
    assert calls_of(aws, lambda: ask(system)) == CREATE | {"PutItem": 1, "UpdateItem": 1}
    assert calls_of(aws, lambda: ask(system)) == {"PutItem": 1, "GetItem": 1}
    assert calls_of(aws, lambda: ask(system, prompt="a boat")) == {"PutItem": 1}
    system.deliver()
    assert calls_of(aws, lambda: ask(system)) == {"PutItem": 1, "GetItem": 2}


def test_the_calls_of_a_create_from_an_upload(system, aws):
    uploaded = system.api("POST", "/uploads", base64.b64decode(picture()), {"Content-Type": "image/png"}).json["id"]
    assert calls_of(aws, lambda: ask(system, None, image=uploaded)) == CREATE | {"GetObject": 1}


def test_a_refused_request_makes_no_call(system, aws):
    assert calls_of(aws, lambda: ask(system, None, samples=9)) == {}
    assert calls_of(aws, lambda: ask(system, None, image=BROKEN)) == {}
    assert calls_of(aws, lambda: system.api("GET", "/health")) == {}


def test_each_look_of_a_waiting_caller_is_one_read(system, aws):
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        system.clock.advance(seconds)

    system.services.sleep = sleep
    assert calls_of(aws, lambda: ask(system, None, wait=25)) == CREATE | {"GetItem": len(pauses)}
    assert sum(pauses) == pytest.approx(25, abs=0.5)
    assert len(pauses) < 40


def test_the_calls_of_reading(system, aws):
    job_id = ask(system, None, samples=4).json["id"]
    system.deliver()
    assert calls_of(aws, lambda: system.job(job_id)) == {"GetItem": 1}
    assert calls_of(aws, lambda: system.api("GET", f"/jobs/{job_id}/outputs/3")) == {"GetItem": 1}
    assert calls_of(aws, lambda: system.api("GET", "/jobs")) == {"Query": 1}
    assert calls_of(aws, lambda: system.api("POST", f"/jobs/{job_id}/cancel")) == {"GetItem": 1}
    assert calls_of(aws, lambda: system.api("GET", "/balance")) == {"GetItem": 1}
    assert calls_of(aws, lambda: system.api("GET", "/usage")) == {"Query": 2}
    assert calls_of(aws, lambda: system.api("GET", "/usage", query={"group_by": "day"})) == {"Query": 1}
    assert calls_of(aws, lambda: system.api("POST", "/cost", {})) == {}


def test_the_calls_of_a_cancel(system, aws):
    job_id = ask(system, None).json["id"]
    cancel = {"GetItem": 1, "TransactWriteItems": 1}
    assert calls_of(aws, lambda: system.api("POST", f"/jobs/{job_id}/cancel")) == cancel
    assert calls_of(aws, lambda: system.api("POST", f"/jobs/{job_id}/cancel")) == {"GetItem": 1}


@pytest.mark.parametrize("samples", [1, 4])
def test_the_calls_of_a_run(system, aws, samples):
    ask(system, None)
    assert calls_of(aws, system.deliver)["GetSecretValue"] == 1
    ask(system, None, samples=samples)
    run = {"UpdateItem": 1, "GetObject": 1, "PutObject": samples, "TransactWriteItems": 1}
    assert calls_of(aws, system.deliver) == run


def test_the_calls_of_a_run_that_has_to_wait(system, aws):
    ask(system, None)
    system.deliver()
    ask(system, None, samples=2)
    system.segmind.behave("503")
    [record] = system.receive()
    waits = {"UpdateItem": 2, "GetObject": 1, "PutObject": 1, "ChangeMessageVisibility": 1}
    assert calls_of(aws, lambda: system.work(record)) == waits
    ends = {"UpdateItem": 1, "GetObject": 1, "PutObject": 1}
    assert calls_of(aws, lambda: system.work(record)) == ends | {"TransactWriteItems": 1}


def test_a_message_that_comes_again_makes_one_call(system, aws):
    ask(system, None)
    [record] = system.receive()
    assert system.work(record)
    assert calls_of(aws, lambda: system.work(record)) == {"UpdateItem": 1}


@pytest.mark.parametrize("samples", [1, 4])
def test_the_calls_of_a_run_on_the_endpoint(endpoint, samples):
    system, aws = endpoint
    ask(system, None, samples=samples)
    asks = {"UpdateItem": 2, "GetObject": 1, "PutObject": samples, "InvokeEndpointAsync": samples}
    assert calls_of(aws, system.deliver) == asks | {"DescribeEndpoint": 1}
    system.settle()
    first, *others = system.receive("results")
    takes = {"UpdateItem": 1, "GetObject": samples, "PutObject": samples, "TransactWriteItems": 1}
    assert calls_of(aws, lambda: system.collect(first)) == takes
    for late in others:
        assert calls_of(aws, lambda late=late: system.collect(late)) == {"UpdateItem": 1}
    # What is known of the endpoint's instances is fresh still.
    ask(system, None, samples=samples, seed=70)
    assert calls_of(aws, system.deliver) == asks


def test_the_calls_of_a_notice_while_another_sample_is_being_made(endpoint):
    system, aws = endpoint
    system.container.next.append("hang")
    ask(system, None, samples=2)
    system.deliver()
    assert system.sagemaker.wait_for(lambda: system.sagemaker.notices == 1)
    [notice] = system.receive("results")
    # Neither the other sample's answer nor its failure is there yet.
    looks = {"UpdateItem": 2, "GetObject": 1 + 2, "PutObject": 1}
    assert calls_of(aws, lambda: system.collect(notice)) == looks
    system.clock.advance(61)
    system.sweep()
    [record] = system.receive()
    assert calls_of(aws, lambda: system.work(record)) == {"UpdateItem": 2, "GetObject": 2, "DescribeEndpoint": 1}
    system.container.release()


def test_what_is_no_notice_makes_one_call(endpoint):
    system, aws = endpoint
    ask(system, None)
    system.deliver()
    system.settle()
    [notice] = system.receive("results")
    assert calls_of(aws, lambda: system.collect({**notice, "body": "{}"})) == {"ChangeMessageVisibility": 1}


@pytest.mark.parametrize("samples", [1, 4])
def test_the_calls_of_a_run_on_an_endpoint_in_real_time(samples):
    with running_system("sagemaker", asynchronous=False) as system, watched(system) as aws:
        ask(system, None, samples=samples)
        run = {"UpdateItem": 1, "GetObject": 1, "InvokeEndpoint": samples, "PutObject": samples}
        assert calls_of(aws, system.deliver) == run | {"TransactWriteItems": 1}


def test_the_calls_of_a_sweep(system, aws):
    # The four shards of what is open, and the teams' balances.
    looks = {"Query": 4 + 1, "BatchGetItem": 1}
    assert calls_of(aws, system.sweep) == looks
    ask(system, None)
    system.clock.advance(61)
    assert calls_of(aws, system.sweep) == looks | {"UpdateItem": 1, "SendMessage": 1}
    system.clock.advance(1800)
    assert calls_of(aws, system.sweep) == looks | {"TransactWriteItems": 1}


def ingest(system: System, record: Any) -> None:
    """Run the ingest function without what a queue does before and after."""
    answer = function("ingest").handler({"Records": [record]}, Context(60))
    assert answer == {"batchItemFailures": []}


def dropped(system: System, **metadata: str) -> Any:
    """Put a file into the inbox, and return the record of S3's notice."""
    data = base64.b64decode(picture())
    system.s3.put_object(Bucket="uploads", Key="inbox/default/art/a.png", Body=data, Metadata=metadata)
    [*_, record] = system.receive("uploads")
    return record


@pytest.fixture
def preset(system, aws) -> None:
    """The team's preset, by a client that is not counted."""
    system.services.presets.save("default", "art", {"prompt": "a watercolour"})


# The team, the preset and what Powertools keeps.
LOOKED_UP = {"GetItem": 2, "GetObject": 1, "PutItem": 1, "UpdateItem": 1}


@pytest.mark.usefixtures("preset")
def test_the_calls_of_a_file_in_the_inbox(system, aws):
    record = dropped(system)
    assert calls_of(aws, lambda: ingest(system, record)) == CREATE | LOOKED_UP
    # The team, Powertools' record, the job.
    assert calls_of(aws, lambda: ingest(system, record)) == {"GetItem": 2, "PutItem": 1}


@pytest.mark.usefixtures("preset")
def test_the_calls_of_a_file_that_cannot_be_run(system, aws):
    record = dropped(system, strength="2")
    # The put is that of the error in the outbox, the second update notes which version is shown there, and the last
    # read finds that none has overtaken it.
    failed = {"PutObject": 1, "TransactWriteItems": 1, "UpdateItem": 2, "GetItem": LOOKED_UP["GetItem"] + 1}
    assert calls_of(aws, lambda: ingest(system, record)) == LOOKED_UP | failed


@pytest.mark.usefixtures("preset")
def test_the_calls_of_a_file_that_is_gone(system, aws):
    record = dropped(system)
    system.s3.delete_object(Bucket="uploads", Key="inbox/default/art/a.png")
    gone = {"GetItem": 1, "PutItem": 1, "GetObject": 1, "DeleteItem": 1}
    assert calls_of(aws, lambda: ingest(system, record)) == gone


@pytest.mark.usefixtures("preset")
def test_a_notice_that_names_nothing_makes_no_call(system, aws):
    body = '{"Service": "Amazon S3", "Event": "s3:TestEvent"}'
    record = {**dropped(system), "body": body}
    assert calls_of(aws, lambda: ingest(system, record)) == {}


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.usefixtures("preset")
def test_the_calls_of_a_run_that_is_published(system, aws, samples):
    ask(system, None)
    system.deliver()
    ingest(system, dropped(system, samples=str(samples)))
    [record] = system.receive()
    # The claim, and the note of which version is shown.
    run = {"UpdateItem": 2, "GetObject": 1, "PutObject": samples + 1, "TransactWriteItems": 1, "CopyObject": samples}
    run |= {"GetItem": 1}
    assert calls_of(aws, lambda: system.work(record)) == run
    again = {"UpdateItem": 2, "PutObject": 1, "CopyObject": samples, "GetItem": 1}
    assert calls_of(aws, lambda: system.work(record)) == again


@pytest.mark.usefixtures("preset")
def test_the_calls_of_a_run_that_takes_the_place_of_an_earlier_version(system, aws):
    for samples in ("4", "1"):
        ingest(system, dropped(system, samples=samples))
    first, second = system.receive()
    assert calls_of(aws, lambda: system.work(first))["CopyObject"] == 4
    replaced = {"CopyObject": 1, "DeleteObject": 3, "UpdateItem": 3, "GetItem": 1}
    run = {"GetObject": 1, "PutObject": 2, "TransactWriteItems": 1}
    assert calls_of(aws, lambda: system.work(second)) == run | replaced
    # It has been overtaken: nothing of it is shown any more.
    assert calls_of(aws, lambda: system.work(first)) == {"UpdateItem": 2}


@pytest.mark.usefixtures("preset")
def test_the_calls_of_a_preset(system, aws):
    assert calls_of(aws, lambda: ask(system, None, preset="art")) == CREATE | {"GetItem": 1}
    assert calls_of(aws, lambda: system.api("POST", "/cost", {"preset": "art"})) == {"GetItem": 1}
    assert calls_of(aws, lambda: system.api("GET", "/presets/art")) == {"GetItem": 1}
    assert calls_of(aws, lambda: system.api("GET", "/presets")) == {"Query": 1}
    assert calls_of(aws, lambda: system.api("PUT", "/presets/art", {})) == {"PutItem": 1}
    assert calls_of(aws, lambda: system.api("PUT", "/presets/art", {"samples": 9})) == {}
    assert calls_of(aws, lambda: system.api("DELETE", "/presets/art")) == {"DeleteItem": 1}


def test_the_calls_of_upload_and_forget(system, aws):
    job = {"job": {"prompt": "a castle"}}
    key = {"Idempotency-Key": KEY}
    assert calls_of(aws, lambda: system.api("POST", "/uploads", {})) == {}
    assert calls_of(aws, lambda: system.api("POST", "/uploads", job)) == {"TransactWriteItems": 1}
    announced = {"TransactWriteItems": 1, "PutItem": 1, "UpdateItem": 1}
    assert calls_of(aws, lambda: system.api("POST", "/uploads", job, key)) == announced
    form = system.api("POST", "/uploads", job, key).json
    system.s3.put_object(Bucket="uploads", Key=form["fields"]["key"], Body=base64.b64decode(picture()))
    [*_, record] = system.receive("uploads")
    started = {"GetItem": 1, "GetObject": 1, "PutObject": 1, "UpdateItem": 1, "SendMessage": 1}
    assert calls_of(aws, lambda: ingest(system, record)) == started
    # Whether the first delivery sent it is not known.
    assert calls_of(aws, lambda: ingest(system, record)) == {"GetItem": 1, "SendMessage": 1}
    system.deliver()
    assert calls_of(aws, lambda: ingest(system, record)) == {"GetItem": 1}


def test_the_calls_of_a_sweep_that_finds_no_upload(system, aws):
    system.api("POST", "/uploads", {"job": {"prompt": "a castle"}})
    system.clock.advance(900 + 601)
    looks = {"Query": 4 + 1, "BatchGetItem": 1}
    assert calls_of(aws, system.sweep) == looks | {"TransactWriteItems": 1}
