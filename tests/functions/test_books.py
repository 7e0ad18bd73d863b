"""The books of two teams, whatever comes in whatever order: requests and retries, deliveries, crashes, top-ups.

Hypothesis makes up the steps, and where in one of them a process dies or another one comes in between. After each, the
table's own items are compared with each other and with what the test knows to have done.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import random
import secrets
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from functools import cache
from typing import Any, TypeVar

import boto3
import pytest
from aws_lambda_powertools.event_handler.api_gateway import BaseRouter
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import engine
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from moto.backends import get_backend
from PIL import Image

from img2img import bootstrap
from img2img.admin.audit import audit
from img2img.errors import AlreadyExists, InsufficientCredits
from img2img.flows import generate as samples
from local import segmind_server
from tests.faults.calls import MOMENTS, SEED, Calls, Kill, Killed
from tests.faults.deployment import LEASE, short_lived
from tests.long import examples
from tests.system import Clock, Context, System, fresh_aws, function, rest_event, running_system

T = TypeVar("T")
TEAMS = ("ants", "bees")
KEYS = {team: (f"{team}-1", f"{team}-2") for team in TEAMS}
KEY_CACHE = 60
DEADLINE = 1800
# An idempotency key counts for a day.
LONGEST = 15 * 3600
AMOUNTS = ("balance", "reserved", "charged")
RECEIPT = ("reserved", "charged", "released")
COUNTS = ("jobs", "succeeded", "failed", "canceled", "images", "charged")
READS = ("BatchGet", "Get", "Head", "List", "Query")
ENDED = ("succeeded", "failed", "canceled")


@cache
def picture() -> bytes:
    """Return a PNG that is quickly read."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(buffer, "PNG")
    return buffer.getvalue()


@cache
def drawn(size: tuple[int, int]) -> bytes:
    """Return a picture of the backend's."""
    buffer = io.BytesIO()
    Image.new("RGB", size, "olive").save(buffer, "JPEG")
    return buffer.getvalue()


def newest(things: Iterable[T], pick: int) -> T | None:
    """Return one of the things, the last for 0; None if there are none."""
    those = list(things)
    return those[-1 - pick % len(those)] if those else None


class Ticking(Clock):
    """A clock that moves only when it is read or told to, so that a failure can be repeated."""

    def __call__(self) -> float:
        self.ahead += 0.001
        return 1_800_000_000 + self.ahead


@dataclass(frozen=True)
class Act:
    """What a process does: the method's name, what it is called with, and what happens meanwhile."""

    name: str
    given: Mapping[str, Any]
    mishaps: Sequence[Mishap] = ()


@dataclass(frozen=True)
class Mishap:
    """At the n-th call that changes something, just before or after it, a process dies or another one comes in."""

    call: int
    moment: str
    another: Act | None


class Disturbed(Kill):
    """Has mishaps happen to a process."""

    def __init__(self, mishaps: Sequence[Mishap], meanwhile: Callable[[Act], None]) -> None:
        super().__init__("nowhere", "")
        self._due = {(mishap.call, mishap.moment): mishap for mishap in mishaps}
        self._meanwhile = meanwhile
        self._numbers: dict[str, int] = {}

    def at(self, name: str, moment: str) -> None:
        if name.startswith(READS):
            super().at(name, moment)
            return
        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        mishap = None if self.dead else self._due.pop((number, moment), None)
        if mishap and mishap.another:
            self._meanwhile(mishap.another)
        elif mishap:
            self.dead = True
        super().at(name, moment)


@dataclass(frozen=True)
class Request:
    """A request for a job; its number travels in the metadata."""

    number: int
    team: str
    key: str | None
    samples: int
    steps: int
    width: int
    height: int
    image: str

    @property
    def price(self) -> int:
        """What it costs, in thousandths of a credit."""
        one = Fraction(1000 * self.steps * self.width * self.height, 20 * 512 * 512)
        return self.samples * math.ceil(one)

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        return {
            "image": self.image,
            "prompt": "a castle on a hill",
            "seed": SEED,
            "samples": self.samples,
            "num_inference_steps": self.steps,
            "img_width": self.width,
            "img_height": self.height,
            "metadata": {"request": str(self.number)},
        }


@dataclass
class TopUp:
    """An amount that was to be added; `booked` is unknown while nobody was told."""

    team: str
    amount: int
    reference: str
    booked: bool | None = None


@dataclass
class Job:
    """A job that was seen in the table. `end` is its item once it has ended, {} if it was deleted before."""

    id: str
    key_id: str
    request: Request
    end: Mapping[str, Any] | None = None
    deleted: bool = False

    @property
    def status(self) -> str:
        """How it ended, "" if it has not."""
        return "" if self.end is None else self.end.get("status", "canceled")

    @property
    def delivered(self) -> int:
        """How many of its samples were delivered."""
        if self.status != "succeeded":
            return 0
        return sum(output["status"] == "succeeded" for output in json.loads(self.end["outputs"]))


@dataclass
class Books:
    """What the table holds of a team's money: whatever is no job."""

    account: dict[str, int] = field(default_factory=dict)
    entries: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    usage: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict)


def items() -> list[dict[str, Any]]:
    """Return every item of the table. To scan it through botocore would take half of the test's time."""
    table = get_backend("dynamodb")["123456789012"]["eu-west-1"].get_table("jobs")
    return [item.to_json()["Attributes"] for item in table.all_items()]


def plain(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return an item's values."""
    return {name: int(value["N"]) if "N" in value else next(iter(value.values())) for name, value in item.items()}


@contextmanager
def own_request() -> Iterator[None]:
    """Keep the request of an API function apart from another process's: Powertools has one for all of them."""
    names = ("current_event", "lambda_context")
    kept = {name: getattr(BaseRouter, name, None) for name in names}
    yield
    for name, value in kept.items():
        setattr(BaseRouter, name, value)


# Which job, request or message, counted back from the last one; 0 is rather one that something is to happen to, or that
# another process is at.
PICK = st.sampled_from([0] * 8 + [*range(8)])
TEAM = st.sampled_from(TEAMS)
# Through which of the team's API keys, and by an invocation whose claim on an idempotency key runs out at once.
CALLER = {"through": st.integers(0, 1), "hurried": st.sampled_from([True, True, False])}
SIDE = st.sampled_from([512, 768])
# What the backend answers, sample by sample; "json" is a picture.
GOOD, TRY_AGAIN, NEVER = ["json"], ["429", "503", "504"], ["black", "400", "406-credits", "cut"]
ANSWERS = st.sampled_from([*GOOD * 5, *TRY_AGAIN * 2, *NEVER])


def repeated(act: Act) -> Act:
    """Return how something is done again."""
    if act.name != "create":
        return act
    return Act("resend", {"pick": 0, **{name: act.given[name] for name in CALLER}})


GIVEN: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "create": {
        "team": TEAM,
        "key": st.none() | st.sampled_from("abcd"),
        "samples": st.integers(1, 4),
        "steps": st.sampled_from([20, 21, 41]),
        "width": SIDE,
        "height": SIDE,
        "upload": st.booleans(),
        **CALLER,
    },
    "resend": {"pick": PICK, **CALLER},
    "deliver": {
        "pick": PICK,
        "after": st.sampled_from([0, 0, LEASE + 1]),
        "again": st.sampled_from([False, False, True]),
        "answers": st.lists(ANSWERS, max_size=4),
    },
    "deliver_all": {},
    "cancel": {"pick": PICK},
    "delete": {"pick": PICK},
    "read": {"pick": PICK},
    "trespass": {"pick": PICK, "how": st.sampled_from(["read", "cancel", "delete"])},
    "sweep": {"after": st.sampled_from([0, KEY_CACHE + 1, LEASE + 1, LEASE + 1, DEADLINE + LEASE])},
    "top_up": {
        "team": TEAM,
        "amount": st.sampled_from([1, 999, 1000, 5000, 20_000, -1, -1000, -20_000]),
        "reference": st.sampled_from(["", "", "order-1", "order-2"]),
    },
    # "" is a team that another process works for.
    "disable": {"whom": st.just("") | st.sampled_from([*TEAMS, *KEYS["ants"], *KEYS["bees"]])},
    "enable": {},
}
NO_MISHAPS: st.SearchStrategy[Sequence[Mishap]] = st.just(())
# How many calls that change something it makes.
CALLS = {"create": 5, "resend": 5, "deliver": 7, "cancel": 1, "delete": 3, "sweep": 2, "top_up": 1, "disable": 1}
OFTEN = [*GIVEN] + ["create", "deliver"] * 5 + ["resend", "cancel", "sweep"] * 2 + ["top_up", "enable", "enable"]
# What gets in the way of a new job, and of one that is there.
OF_NEW = ["create", "resend", "resend", "top_up", "disable", "deliver", "sweep"]
OF_OLD = ["create", "delete", "top_up"] + ["sweep"] * 2 + ["cancel", "deliver"] * 4


def acts(names: Sequence[str], mishaps: Callable[[str], st.SearchStrategy[Sequence[Mishap]]]) -> st.SearchStrategy[Act]:
    """Return the ways to do any of these; `mishaps` returns what may happen to one."""
    return st.sampled_from(names).flatmap(
        lambda name: st.builds(Act, st.just(name), st.fixed_dictionaries(GIVEN[name]), mishaps(name))
    )


def some_mishaps(name: str) -> st.SearchStrategy[Sequence[Mishap]]:
    """Return what may happen to a process that does something."""
    if name not in CALLS:
        return NO_MISHAPS
    makes_one = name in ("create", "resend")
    place = {"call": st.integers(1, CALLS[name]), "moment": st.sampled_from(MOMENTS)}
    dies = st.builds(Mishap, **place, another=st.none())
    meets = st.builds(Mishap, **place, another=acts(OF_NEW if makes_one else OF_OLD, lambda _: NO_MISHAPS))
    # Undisturbed, some have answers to check.
    return st.lists(dies | meets, min_size=0 if makes_one or name == "top_up" else 1, max_size=2)


BALANCE = st.integers(0, 40).map(lambda amount: amount * 1000)


class Machine(RuleBasedStateMachine):
    """The steps that may be taken, what the test knows of them, and what must hold after each."""

    system: System
    calls: Calls

    def __init__(self) -> None:
        super().__init__()
        fresh_aws()
        self.system.segmind.reset()
        self.clock = Ticking()
        self._restart()
        # What has been received comes again when the test says so.
        self.held: dict[str, dict[str, Any]] = {}
        self.system.sqs.set_queue_attributes(QueueUrl=self.system.queue_url, Attributes={"VisibilityTimeout": "43200"})
        self.requests: list[Request] = []
        self.unanswered: Counter[int] = Counter()
        self.promised: defaultdict[int, set[str]] = defaultdict(set)
        self.top_ups: dict[str, TopUp] = {}
        self.jobs: dict[str, Job] = {}
        self.deletions: set[str] = set()
        self.switched: dict[str, float] = {}
        self.enabled: dict[str, bool] = {}
        self.books = {team: Books() for team in TEAMS}
        self.touched: set[str] = set()
        # What is at hand: a request's number, a job's id.
        self.sent = 0
        self.subject = ""
        self.trouble: list[BaseException] = []
        self.before: dict[str, Books] | None = None
        self.sound = False

    @initialize(balances=st.tuples(BALANCE, BALANCE))
    def found(self, balances: tuple[int, int]) -> None:
        """Create the teams; each has two API keys and one upload."""
        self.uploads = {}
        for team, balance in zip(TEAMS, balances, strict=True):
            self.system.services.teams.create(team)
            for key_id in KEYS[team]:
                self.system.services.teams.add_key(key_id, team, label=key_id)
            if balance:
                self._top_up(team=team, amount=balance, reference="")
            upload = self.system.api("POST", "/uploads", picture(), {"Content-Type": "image/png"}, key_id=f"{team}-1")
            self.uploads[team] = upload.json["id"]

    @rule(act=acts(OFTEN, some_mishaps), insists=st.booleans())
    def step(self, act: Act, insists: bool) -> None:
        """Have a process do something, mishaps included; whoever insists does it again after a crash."""
        self.sound = False
        self.touched, self.trouble, self.subject = set(), [], ""
        # With nothing in between, the answer follows from what the books were.
        self.before = None if act.mishaps else self.books
        try:
            with self.calls.shown_to(Disturbed(act.mishaps, self._meanwhile)):
                self._do(act)
        except Killed:
            self._restart()
            if insists:
                self._do(repeated(act))
        # The functions answer or log what went wrong in them, here what did in between.
        if self.trouble:
            raise self.trouble[0]

    def _do(self, act: Act) -> None:
        getattr(self, f"_{act.name}")(**act.given)

    def _restart(self) -> None:
        bootstrap.services.cache_clear()
        self.system.services = bootstrap.services()
        self.system.services.clock = self.clock

    def _meanwhile(self, act: Act) -> None:
        with self.calls.unseen(), own_request():
            self._restart()
            try:
                self.the_books_are_right()
                self._do(act)
                self.the_books_are_right()
            except Exception as trouble:  # noqa: BLE001
                self.trouble.append(trouble)

    # What processes do

    def _job(self, pick: int) -> Job | None:
        unfinished = [job for job in self.jobs.values() if not job.status]
        found = self.jobs.get(self.subject) or newest(unfinished, 0) if pick == 0 else None
        job = found or newest(self.jobs.values(), pick)
        self.subject = job.id if job else ""
        return job

    def _message(self, pick: int) -> dict[str, Any] | None:
        job = self._job(0)
        about_it = [record for record in self.held.values() if job and job.id in record["body"]]
        found = newest(about_it, 0) if pick == 0 else None
        return found or newest(self.held.values(), pick)

    def _api(
        self, method: str, path: str, key_id: str, body: Any = None, key: str | None = None, *, hurried: bool = False
    ) -> tuple[int, Any]:
        headers = {"Prefer": "wait=0"} | ({"Idempotency-Key": key} if key else {})
        event = rest_event(method, path, body, headers, key_id=key_id)
        answer = function("api").handler(event, short_lived() if hurried else Context())
        return answer["statusCode"], json.loads(answer["body"] or "null")

    def _create(self, *, team: str, upload: bool, through: int, hurried: bool, **given: Any) -> None:
        image = self.uploads[team] if upload else base64.b64encode(picture()).decode()
        self.requests.append(Request(len(self.requests), team, image=image, **given))
        self._send(self.requests[-1], through=through, hurried=hurried)

    def _resend(self, *, pick: int, through: int, hurried: bool) -> None:
        if self.requests:
            request = self.requests[self.sent] if pick == 0 else newest(self.requests, pick)
            self._send(request, through=through, hurried=hurried)

    def _send(self, request: Request, *, through: int, hurried: bool) -> None:
        self.sent = request.number
        self.touched.add(request.team)
        key_id = KEYS[request.team][through]
        self.unanswered[request.number] += 1
        status, body = self._api("POST", "/sd1.5-img2img", key_id, request.body, request.key, hurried=hurried)
        self.unanswered[request.number] -= 1
        if status in (200, 202):
            self.promised[request.number].add(body["id"])
        # An earlier job's own error names the job.
        assert status != 500 or "job_id" in body, body
        if self.before:
            self._judge(request, key_id, self.before[request.team].account["balance"], status, body)

    def _judge(self, request: Request, key_id: str, balance: int, status: int, body: Any) -> None:
        """Check the answer to a create that nothing came in between of."""
        same_key = [r for r in self.requests if request.key and (r.team, r.key) == (request.team, request.key)]
        if status == 403:
            assert not all(self.enabled[name] for name in (request.team, key_id)) or self._lately(request.team, key_id)
        elif any(job.request in same_key for job in self.jobs.values()):
            assert status != 402, body
        elif status == 402:
            assert (body["code"], body["price"], body["balance"]) == ("insufficient_credits", request.price, balance)
            assert balance < request.price
        elif status == 202:
            assert balance >= request.price
        else:
            assert status in (409, 422), body
            assert any(self.unanswered[r.number] for r in same_key)

    def _lately(self, *names: str) -> bool:
        return any(self.clock.ahead - self.switched[name] <= KEY_CACHE for name in names if name in self.switched)

    def _deliver(self, *, pick: int, after: int, again: bool, answers: Sequence[str]) -> None:
        record = self._message(pick)
        if record is None:
            return
        self._wait(after)
        self.system.segmind.reset()
        for answer in answers:
            self.system.segmind.behave(answer)
        message = json.loads(record["body"])
        self.touched.add(message["team"])
        self.subject = message["job_id"]
        done = not function("worker").handler({"Records": [record]}, Context(120))["batchItemFailures"]
        if done and not again:
            self.held.pop(record["messageId"], None)

    def _deliver_all(self) -> None:
        for _ in range(len(self.held)):
            self._deliver(pick=-1, after=0, again=False, answers=[])

    def _cancel(self, *, pick: int) -> None:
        self._end(self._job(pick), "POST", "/cancel", 200)

    def _delete(self, *, pick: int) -> None:
        job = self._job(pick)
        if job:
            self.deletions.add(job.id)
        self._end(job, "DELETE", "", 204)

    def _end(self, job: Job | None, method: str, path: str, good: int) -> None:
        if job is None:
            return
        self.touched.add(job.request.team)
        status, body = self._api(method, f"/jobs/{job.id}{path}", job.key_id)
        if self.before and status != 403:
            assert status == (404 if job.deleted else good), body

    def _read(self, *, pick: int) -> None:
        job = self._job(pick)
        if job is None:
            return
        status, shown = self._api("GET", f"/jobs/{job.id}", job.key_id)
        _, account = self._api("GET", "/balance", job.key_id)
        if self.before is None or status == 403:
            return
        books = self.before[job.request.team]
        assert {name: account[name] for name in AMOUNTS} == {name: books.account[name] for name in AMOUNTS}
        assert status == (404 if job.deleted else 200)
        if status == 200:
            booked = books.entries[job.id, "reserve"] | books.entries.get((job.id, "settle"), {})
            assert {name: shown["credits"][name] for name in RECEIPT} == {name: booked.get(name, 0) for name in RECEIPT}

    def _trespass(self, *, pick: int, how: str) -> None:
        job = self._job(pick)
        if job is None:
            return
        stranger = next(team for team in TEAMS if team != job.request.team)
        method, path = {"read": ("GET", ""), "cancel": ("POST", "/cancel"), "delete": ("DELETE", "")}[how]
        assert self._api(method, f"/jobs/{job.id}{path}", f"{stranger}-1")[0] in (403, 404)

    def _wait(self, seconds: int) -> None:
        if self.clock.ahead < LONGEST:
            self.clock.advance(seconds)

    def _sweep(self, *, after: int) -> None:
        self._wait(after)
        self.touched |= set(TEAMS)
        self.system.sweep()

    def _top_up(self, *, team: str, amount: int, reference: str) -> None:
        self.touched.add(team)
        note = f"top-up {len(self.top_ups)}"
        top_up = self.top_ups[note] = TopUp(team, amount, reference)
        try:
            self.system.services.credits.add(team, amount, reference=reference, note=note)
        except AlreadyExists:
            top_up.booked = False
            assert any(
                (other.team, other.reference) == (team, reference) and other.booked is not False
                for other in self.top_ups.values()
            )
        except InsufficientCredits:
            top_up.booked = False
            assert not self.before or self.before[team].account["balance"] + amount < 0
        else:
            top_up.booked = True

    def _disable(self, *, whom: str) -> None:
        self._switch(whom or min(self.touched, default="ants"), enabled=False)

    def _enable(self) -> None:
        for name, enabled in list(self.enabled.items()):
            if not enabled:
                self._switch(name, enabled=True)

    def _switch(self, name: str, *, enabled: bool) -> None:
        self.switched[name] = self.clock.ahead
        teams = self.system.services.teams
        if name in TEAMS:
            teams.enable(name, enabled=enabled)
        else:
            teams.enable_key(name, enabled=enabled)

    # What must hold

    @invariant()
    def the_books_are_right(self) -> None:
        """Read the table, and compare all it says of money."""
        self.sound = False
        earlier, self.books = self.books, {team: Books() for team in TEAMS}
        self._look()
        for team, books in self.books.items():
            assert team in self.touched or not earlier[team].account or books == earlier[team]
            # The ledger only grows.
            assert earlier[team].entries.items() <= books.entries.items()
            self._check_top_ups(team, books)
            self._check_jobs(team, books)
            self._check_account(books)
            self._check_usage(team, books)
        self._check_requests()
        self.sound = True

    def _look(self) -> None:
        while records := self.system.receive():
            self.held |= {record["messageId"]: record for record in records}
        was_enabled = dict(self.enabled)
        found: dict[str, dict[str, Any]] = {}
        for item in map(plain, items()):
            kind, _, team = item.pop("pk").partition("#")
            what, _, name = item.pop("sk").partition("#")
            match kind, what:
                case "TEAM", "TEAM":
                    self.enabled[team] = item["enabled"]
                    self.books[team].account = {name: item[name] for name in (*AMOUNTS, "added", "entries")}
                case "TEAM", "LEDGER":
                    about, phase = name.split("#")
                    self.books[team].entries[about, phase] = item
                case "TEAM", "USAGE":
                    day, key_id, _ = name.split("#")
                    self.books[team].usage[day, key_id] = item
                case "TEAM", "JOB":
                    found[name] = {"team": team, **item}
                case "KEY", "KEY":
                    self.enabled[item["key_id"]] = item["enabled"]
        for job_id, item in found.items():
            if job_id not in self.jobs:
                request = self.requests[int(json.loads(item["metadata"])["request"])]
                self.jobs[job_id] = Job(job_id, item["key_id"], request)
                # Neither was switched more than once since the last look.
                assert was_enabled[request.team] or self.enabled[request.team]
                assert was_enabled[item["key_id"]] or self.enabled[item["key_id"]] or self._lately(item["key_id"])
        for job in self.jobs.values():
            self._compare(job, found.get(job.id))

    def _compare(self, job: Job, item: dict[str, Any] | None) -> None:
        if item is None:
            assert job.id in self.deletions
            job.deleted = True
            job.end = {} if job.end is None else job.end
            return
        assert not job.deleted
        assert item["team"] == job.request.team
        assert item["key_id"] in KEYS[job.request.team]
        assert job.end is None or job.end == item
        if item["status"] in ENDED:
            job.end = item

    def _check_top_ups(self, team: str, books: Books) -> None:
        notes = Counter(entry["note"] for (_, phase), entry in books.entries.items() if phase == "top_up")
        references: Counter[str] = Counter()
        for note, top_up in self.top_ups.items():
            if top_up.team == team:
                assert top_up.booked is None or notes[note] == int(top_up.booked)
                references[top_up.reference] += notes[note]
            else:
                assert note not in notes
        assert set(notes.values()) <= {1}
        assert all(times == 1 for reference, times in references.items() if reference and times)
        for entry in books.entries.values():
            assert entry.get("added", 0) == (self.top_ups[entry["note"]].amount if "note" in entry else 0)
        assert books.account["added"] == sum(self.top_ups[note].amount for note in notes)

    def _check_jobs(self, team: str, books: Books) -> None:
        phases = defaultdict(set)
        for about, phase in books.entries:
            if phase != "top_up":
                phases[about].add(phase)
        jobs = [job for job in self.jobs.values() if job.request.team == team]
        assert phases == {job.id: {"reserve", "settle"} if job.status else {"reserve"} for job in jobs}
        for job in jobs:
            price = job.request.price
            reserve, settle = (books.entries.get((job.id, phase)) for phase in ("reserve", "settle"))
            assert reserve["reserved"] == price
            assert not {"added", "charged", "released"} & set(reserve)
            if settle:
                charged = price // job.request.samples * job.delivered
                assert settle.get("charged", 0) == charged
                assert settle.get("released", 0) == price - charged
                assert not {"added", "reserved"} & set(settle)
            if job.end:
                assert [job.end[name] for name in RECEIPT] == [price, charged, price - charged]
        assert books.account["reserved"] == sum(job.request.price for job in jobs if not job.status)
        assert books.account["charged"] == sum(job.request.price // job.request.samples * job.delivered for job in jobs)

    def _check_account(self, books: Books) -> None:
        account = books.account
        assert account["added"] == account["balance"] + account["reserved"] + account["charged"]
        assert account["balance"] >= 0
        assert account["reserved"] >= 0
        assert account["entries"] == len(books.entries)

    def _check_usage(self, team: str, books: Books) -> None:
        due: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for (about, phase), entry in books.entries.items():
            if phase == "settle":
                job = self.jobs[about]
                day = datetime.fromtimestamp(entry["at_ms"] / 1000, UTC).date().isoformat()
                due[day, job.key_id].update(
                    {"jobs": 1, job.status: 1, "images": job.delivered, "charged": entry.get("charged", 0)}
                )
        assert {place: {name: counts[name] for name in COUNTS} for place, counts in due.items()} == books.usage

    def _check_requests(self) -> None:
        made: dict[int, set[str]] = defaultdict(set)
        once = Counter()
        for job in self.jobs.values():
            made[job.request.number].add(job.id)
            once[job.request.team, job.request.key] += 1
        for request in self.requests:
            promised, jobs = self.promised[request.number], made[request.number]
            assert promised <= jobs
            if request.key:
                assert once[request.team, request.key] <= 1
            else:
                assert len(jobs - promised) <= self.unanswered[request.number]

    def teardown(self) -> None:
        """Let everything come to its end."""
        if not self.sound:
            return
        self.before = None
        self.touched = set(TEAMS)
        for _ in range((DEADLINE + LEASE) // LEASE + 2):
            self._sweep(after=LEASE + 1)
            self.the_books_are_right()
            self._deliver_all()
            self.the_books_are_right()
            if not self.held and all(job.status for job in self.jobs.values()):
                break
        for team in TEAMS:
            assert self.books[team].account["reserved"] == 0
            found = audit(self.system.services.credits, self.system.services.jobs, team)
            assert found.still
            assert found.differences == ()


@pytest.fixture
def deployment(monkeypatch):
    """The functions in one process, in which nothing is left to chance."""
    # Samples one after the other: else which of them meets the backend's trouble is a race.
    monkeypatch.setattr(samples, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))
    # What they show is no matter, and to draw them takes long.
    monkeypatch.setattr(segmind_server, "simulate", lambda _image, size, _seed, _strength: drawn(size))
    # Hypothesis seeds this one.
    monkeypatch.setattr(secrets, "randbits", random.getrandbits)
    # Else pytest's own limit ends a failing test before it has told what failed.
    monkeypatch.setattr(engine, "MAX_SHRINKING_SECONDS", 60)
    # What a thousand steps logged would hide the one failure.
    logging.disable()
    with running_system() as system, Calls().watched() as calls:
        # To make clients for every new process would take long.
        monkeypatch.setattr(boto3, "client", cache(boto3.client))
        yield system, calls
    logging.disable(logging.NOTSET)


def test_whatever_happens_the_books_are_right(deployment):
    class Run(Machine):
        system, calls = deployment

    run_state_machine_as_test(
        Run,
        settings=settings(
            max_examples=examples(10),
            stateful_step_count=40,
            deadline=None,
            database=None,
            print_blob=True,
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
