"""Every route with a key that must not get in: to another team's nothing is there, and a refused one is told so."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from PIL import Image

from img2img import __version__
from img2img.admin.audit import audit
from img2img.bootstrap import Services
from img2img.ids import new_id
from img2img.jobs.job import Status
from tests.system import Answer, System, function
from tests.template.conftest import Template, read_template, translate

Route = tuple[str, str]

OPEN_ROUTES = {("GET", "/health")}
OWNER, OWNERS_KEY, OWNERS_OTHER_KEY = "aardvark", "key-of-aardvark", "key-of-bandicoot"
STRANGER, STRANGERS_KEY = "quokka", "key-of-quokka"
OWNERS_PRESET, STRANGERS_PRESET = "wallaby", "plain"
IDEMPOTENCY = {"Idempotency-Key": "order-4711-of-the-zoo"}
ASYNC = {"Prefer": "respond-async"}


@cache
def routes() -> frozenset[Route]:
    """Return every route of the OpenAPI schema and of the code, with parameters called `id`, `index` and `name`."""
    operations = Template(translate(read_template())).operations()
    api = function("api").app
    # Powertools has no public list of them but a schema that leaves out what is not documented.
    coded = [(route.method, route.path) for route in (*api._static_routes, *api._dynamic_routes)]
    found = [(method, path) for method, path, _ in operations if method != "OPTIONS"] + coded
    return frozenset((method.upper(), re.sub(r"[<{](?:job_)?(\w+)[>}]", r"{\1}", path)) for method, path in found)


def picture(*colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return buffer.getvalue()


OWNERS, STRANGERS = picture(120, 60, 30), picture(30, 60, 120)


def body(image: str | bytes, **others: Any) -> dict[str, Any]:
    encoded = base64.b64encode(image).decode() if isinstance(image, bytes) else image
    return {"image": encoded, "prompt": "a castle on a hill", "seed": 7, **others}


@dataclass
class Zoo:
    """An owner with something of everything, and a stranger with a job of its own."""

    system: System
    jobs: dict[str, str] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    strangers_job: str = ""
    secrets: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        # Not the functions' own clients and what they remember: an operator's.
        self.operator = Services(self.system.services.settings, clock=self.system.clock)

    def fill(self) -> None:
        """Give the stranger a job and a preset, the owner two keys, a balance, uploads, presets and a job at every
        stage, of every way in.
        """
        # S3's test event.
        assert self.system.take_in() == 1
        teams = self.operator.teams
        for team, key, label in ((STRANGER, STRANGERS_KEY, "web"), (OWNER, OWNERS_KEY, "numbat laptop")):
            teams.create(team)
            teams.add_key(key, team, label=label)
        teams.add_key(OWNERS_OTHER_KEY, OWNER, label="bilby, nightly")
        self.operator.credits.add(STRANGER, 20_000)
        self.operator.credits.add(OWNER, 76_543_219, note="invoice of the wombat", reference="dingo-17")
        self.strangers_job = self.job(STRANGERS_KEY, body(STRANGERS))
        self.uploads = [self.owner("POST", "/uploads", OWNERS, {"Content-Type": "image/png"}).json["id"]]
        self.uploads.append(self.owner("POST", "/uploads", {}).json["id"])
        private = body(OWNERS, negative_prompt="no echidna", metadata={"kowari": "quoll"}) | {"prompt": "a platypus"}
        self.jobs["delivered"] = self.job(OWNERS_KEY, private | {"samples": 2})
        self.system.segmind.behave("400")
        self.jobs["failed"] = self.job(OWNERS_KEY, private)
        for stage in ("canceled", "processing"):
            self.jobs[stage] = self.job(OWNERS_KEY, private, run=False)
        self.owner("POST", f"/jobs/{self.jobs['canceled']}/cancel")
        self.system.services.jobs.claim(OWNER, self.jobs["processing"], lease_seconds=130)
        self.jobs["queued"] = self.job(OWNERS_KEY, body(OWNERS), IDEMPOTENCY, run=False)
        private_fields = {"prompt": "a platypus", "negative_prompt": "no echidna", "strength": 0.4321}
        assert self.owner("PUT", f"/presets/{OWNERS_PRESET}", private_fields).status == 201
        assert self.stranger("PUT", f"/presets/{STRANGERS_PRESET}", {"prompt": "a boat"}).status == 201
        awaiting = self.owner("POST", "/uploads", {"job": {"prompt": "a platypus"}})
        self.jobs["awaiting_upload"] = awaiting.json["job"]["id"]
        self.jobs["delivered inbox"] = self.drop()
        outputs = self.owner("GET", f"/jobs/{self.jobs['delivered']}").json["outputs"]
        self.secrets = {
            *self.jobs.values(),
            *self.uploads,
            *(output["sha256"] for output in outputs),
            str(self.owner("GET", "/balance").json["balance"]),
            *(OWNER, OWNERS_KEY, OWNERS_OTHER_KEY, IDEMPOTENCY["Idempotency-Key"]),
            *(
                OWNERS_PRESET,
                "0.4321",
                "potoroo",
                "numbat",
                "bilby",
                "wombat",
                "dingo",
                "platypus",
                "echidna",
                "kowari",
                "quoll",
            ),
        }

    def job(self, key: str, asked: dict[str, Any], headers: dict[str, str] | None = None, *, run: bool = True) -> str:
        """Create a job and, if told so, run it."""
        created = self.system.api("POST", "/sd1.5-img2img", asked, {**ASYNC, **(headers or {})}, key_id=key)
        assert created.status == 202, created.content
        if run:
            [record] = [r for r in self.system.receive() if created.json["id"] in r["body"]]
            assert self.system.work(record)
        return str(created.json["id"])

    def drop(self) -> str:
        """Put a file into the owner's inbox, and run its job."""
        key = f"inbox/{OWNER}/{OWNERS_PRESET}/potoroo.png"
        self.system.s3.put_object(Bucket="uploads", Key=key, Body=OWNERS)
        assert self.system.take_in() == 1
        newest = str(self.owner("GET", "/jobs", query={"limit": "1"}).json["jobs"][0]["id"])
        [record] = [r for r in self.system.receive() if newest in r["body"]]
        assert self.system.work(record)
        return newest

    def owner(self, method: str, path: str, body: Any = None, headers: Any = None, query: Any = None) -> Answer:
        """Ask with the owner's key."""
        return self.system.api(method, path, body, headers, query, key_id=OWNERS_KEY)

    def stranger(self, method: str, path: str, body: Any = None, headers: Any = None, query: Any = None) -> Answer:
        """Ask with the stranger's key: the answer tells nothing of the owner's that the request did not hold."""
        answer = self.system.api(method, path, body, headers, query, key_id=STRANGERS_KEY)
        sent = json.dumps([path, body if isinstance(body, dict) else "", headers, query])
        shown = json.dumps(dict(answer.headers)).encode() + answer.content
        # The policy of an upload form is JSON in base64.
        for policy in re.findall(rb'"policy":"([^"]+)"', answer.content):
            shown += base64.b64decode(policy)
        told = [secret for secret in self.secrets if secret.encode() in shown and secret not in sent]
        assert told == [], f"{method} {path} tells {told}"
        return answer

    def kept(self) -> dict[Any, Any]:
        """Return every item, object and message, by where it is."""
        kept: dict[Any, Any] = {}
        for table in ("jobs", "idempotency"):
            for item in self.system.dynamodb.scan(TableName=table)["Items"]:
                kept[table, *(item[name]["S"] for name in ("pk", "sk", "id") if name in item)] = item
        for bucket in ("uploads", "results"):
            for key in self.system.objects(bucket):
                found = self.system.s3.get_object(Bucket=bucket, Key=key)
                about = [found[name] for name in ("ContentType", "Metadata", "LastModified")]
                kept[bucket, key] = (found["Body"].read(), *about)
        for queue in ("jobs", "uploads"):
            for record in self.system.receive(queue):
                kept["message", record["messageId"]] = record["body"]
        return kept


@pytest.fixture
def zoo(system) -> Zoo:
    filled = Zoo(system)
    filled.fill()
    return filled


def is_strangers(where: tuple[str, ...], what: object) -> bool:
    return STRANGER in repr((where, what))


# The walk: what a stranger may try on each route


def find_no_job(method: str, path: str) -> Callable[[Zoo], None]:
    """Return the attempt on a route of one job: it is as if the job had never been."""

    def attempt(zoo: Zoo) -> None:
        never = new_id(0)
        for job_id in zoo.jobs.values():
            for index in "01":
                foreign = zoo.stranger(method, path.format(id=job_id, index=index))
                unknown = zoo.stranger(method, path.format(id=never, index=index))
                assert (foreign.status, foreign.json["code"]) == (404, "not_found")
                assert (foreign.status, foreign.headers) == (unknown.status, unknown.headers)
                assert foreign.content == unknown.content.replace(never.encode(), job_id.encode())

    return attempt


def assert_no_preset(zoo: Zoo, ask: Callable[[dict[str, Any]], Answer], field: str = "preset") -> None:
    """Check that a request with the owner's preset is answered as one with a preset that never was."""
    foreign, unknown = ask({"preset": OWNERS_PRESET}), ask({"preset": "never"})
    assert (foreign.status, [error["field"] for error in foreign.json["errors"]]) == (400, [field])
    assert foreign.content == unknown.content.replace(b"never", OWNERS_PRESET.encode())


def create(zoo: Zoo) -> None:
    for upload in zoo.uploads:
        foreign = zoo.stranger("POST", "/sd1.5-img2img", body(upload), ASYNC)
        assert (foreign.status, [error["field"] for error in foreign.json["errors"]]) == (404, ["image"])
        never = f"upl_{new_id(0)}"
        unknown = zoo.stranger("POST", "/sd1.5-img2img", body(never), ASYNC)
        assert foreign.content == unknown.content.replace(never.encode(), upload.encode())
        for address in (f"uploads/{OWNER}/{upload}", f"../{OWNER}/{upload}", f"s3://uploads/uploads/{OWNER}/{upload}"):
            assert zoo.stranger("POST", "/sd1.5-img2img", body(address), ASYNC).status == 400
    for job_id in zoo.jobs.values():
        assert zoo.stranger("POST", "/sd1.5-img2img", body(f"inputs/{OWNER}/{job_id}.png"), ASYNC).status == 400
    assert_no_preset(zoo, lambda fields: zoo.stranger("POST", "/sd1.5-img2img", body(STRANGERS) | fields, ASYNC))
    # The same key is another key, with the owner's own payload as well.
    for image in (OWNERS, STRANGERS):
        headers = ASYNC | {"Idempotency-Key": f"{IDEMPOTENCY['Idempotency-Key']}{'' if image is OWNERS else '-2'}"}
        made = [zoo.stranger("POST", "/sd1.5-img2img", body(image), headers) for _ in range(2)]
        assert [answer.status for answer in made] == [202, 202]
        assert made[0].json["id"] == made[1].json["id"] not in zoo.jobs.values()
        assert zoo.operator.jobs.get(STRANGER, made[0].json["id"]).key_id == STRANGERS_KEY
    other = zoo.stranger("POST", "/sd1.5-img2img", body(STRANGERS), ASYNC | IDEMPOTENCY)
    assert (other.status, other.json["code"]) == (422, "idempotency_key_reused")


def upload(zoo: Zoo) -> None:
    form = zoo.stranger("POST", "/uploads", {"content_type": "image/png"})
    assert form.status == 201
    assert form.json["fields"]["key"] == f"uploads/{STRANGER}/{form.json['id']}"
    policy = json.loads(base64.b64decode(form.json["fields"]["policy"]))
    assert {"key": f"uploads/{STRANGER}/{form.json['id']}"} in policy["conditions"]
    stored = zoo.stranger("POST", "/uploads", OWNERS, {"Content-Type": "image/png"})
    assert (stored.status, stored.json["id"] in zoo.uploads) == (201, False)
    for name, value in (("id", zoo.uploads[0]), ("team", OWNER), ("key", f"uploads/{OWNER}/{zoo.uploads[0]}")):
        for sent in ({name: value}, {name: value, "job": {"prompt": "a boat"}}):
            refused = zoo.stranger("POST", "/uploads", sent)
            assert (refused.status, [error["field"] for error in refused.json["errors"]]) == (400, [name])
    assert_no_preset(
        zoo, lambda fields: zoo.stranger("POST", "/uploads", {"job": {"prompt": "a boat"} | fields}), "job.preset"
    )
    # The owner's idempotency key is the stranger's own.
    announced = [zoo.stranger("POST", "/uploads", {"job": {"prompt": "a platypus"}}, IDEMPOTENCY) for _ in range(2)]
    assert [answer.status for answer in announced] == [201, 201]
    assert announced[0].json["job"]["id"] == announced[1].json["job"]["id"] not in zoo.jobs.values()
    for answer in announced:
        assert answer.json["fields"]["key"] == f"awaited/{STRANGER}/{answer.json['job']['id']}"


def cost(zoo: Zoo) -> None:
    for foreign in zoo.uploads:
        quoted = zoo.stranger("POST", "/cost", body(foreign))
        # The image is not looked at: the answer is the same for one that never was.
        unknown = zoo.stranger("POST", "/cost", body(f"upl_{new_id(0)}"))
        assert (quoted.status, quoted.content) == (200, unknown.content)
    assert zoo.stranger("POST", "/cost", {"team": OWNER}).status == 400
    assert_no_preset(zoo, lambda fields: zoo.stranger("POST", "/cost", fields))


def list_presets(zoo: Zoo) -> None:
    for query in (None, {"limit": "1"}, {"limit": "100"}):
        found = zoo.stranger("GET", "/presets", query=query).json["presets"]
        assert [(preset["name"], preset["fields"]) for preset in found] == [(STRANGERS_PRESET, {"prompt": "a boat"})]
    assert zoo.stranger("GET", "/presets", query={"cursor": OWNERS_PRESET}).json == {"presets": [], "cursor": None}
    assert zoo.stranger("GET", "/presets", query={"team": OWNER}).status == 400


def read_preset(zoo: Zoo) -> None:
    foreign, unknown = (zoo.stranger("GET", f"/presets/{name}") for name in (OWNERS_PRESET, "never"))
    assert (foreign.status, foreign.json["code"]) == (404, "preset_unknown")
    assert (foreign.status, foreign.headers) == (unknown.status, unknown.headers)
    assert foreign.content == unknown.content.replace(b"never", OWNERS_PRESET.encode())
    for address in (f"{OWNER}/{OWNERS_PRESET}", f"../{OWNER}", f"TEAM#{OWNER}#{OWNERS_PRESET}"):
        assert zoo.stranger("GET", f"/presets/{address}").status == 404


def save_preset(zoo: Zoo) -> None:
    saved = zoo.stranger("PUT", f"/presets/{OWNERS_PRESET}", {"seed": 7})
    assert (saved.status, saved.json["fields"]) == (201, {"seed": 7})
    assert zoo.owner("GET", f"/presets/{OWNERS_PRESET}").json["fields"]["strength"] == 0.4321
    assert zoo.stranger("PUT", "/presets/another", {"team": OWNER}).status == 400


def delete_preset(zoo: Zoo) -> None:
    foreign, unknown = (zoo.stranger("DELETE", f"/presets/{name}") for name in (OWNERS_PRESET, "never"))
    assert (foreign.status, foreign.content, foreign.headers) == (204, unknown.content, unknown.headers)
    assert zoo.owner("GET", f"/presets/{OWNERS_PRESET}").status == 200


def balance(zoo: Zoo) -> None:
    for query in (None, {"team": OWNER}, {"key": OWNERS_KEY}):
        found = zoo.stranger("GET", "/balance", query=query).json
        assert (found["team"], found["balance"], found["reserved"], found["charged"]) == (STRANGER, 19_000, 0, 1000)


def usage(zoo: Zoo) -> None:
    for group_by in ("day,key,backend", "day", "key", "backend"):
        query = {"group_by": group_by}
        found = zoo.stranger("GET", "/usage", query=query).json
        assert (len(found["rows"]), found["total"]["jobs"], found["total"]["charged"]) == (1, 1, 1000)
        text = zoo.stranger("GET", "/usage", headers={"Accept": "text/csv"}, query=query).content.decode()
        assert [row["jobs"] for row in csv.DictReader(io.StringIO(text, newline=""))] == ["1"]
    for query in ({"team": OWNER}, {"key": OWNERS_KEY}, {"group_by": "team"}, {"from": f"2026-11-22#{OWNERS_KEY}"}):
        assert zoo.stranger("GET", "/usage", query=query).status == 400


def list_jobs(zoo: Zoo) -> None:
    def listed(**query: str) -> list[str]:
        answer = zoo.stranger("GET", "/jobs", query=query)
        assert answer.status == 200
        return [job["id"] for job in answer.json["jobs"]]

    for limit in ("1", "100"):
        assert listed(limit=limit) == [zoo.strangers_job]
    for job_id in zoo.jobs.values():
        assert listed(cursor=job_id) == [zoo.strangers_job]
    assert listed(cursor=zoo.strangers_job) == []
    for status in Status:
        assert listed(status=status) == ([zoo.strangers_job] if status is Status.SUCCEEDED else [])
    assert listed(created_after="2020-01-01T00:00:00Z") == [zoo.strangers_job]
    assert listed(created_before="2020-01-01T00:00:00Z") == []
    assert zoo.stranger("GET", "/jobs", query={"team": OWNER}).status == 400


def health(zoo: Zoo) -> None:
    assert zoo.stranger("GET", "/health").json == {"status": "ok", "version": __version__}


OF_ONE_JOB = [
    ("GET", "/jobs/{id}"),
    ("GET", "/jobs/{id}/outputs/{index}"),
    ("POST", "/jobs/{id}/cancel"),
    ("DELETE", "/jobs/{id}"),
]
WALK: dict[Route, Callable[[Zoo], None]] = {
    ("POST", "/sd1.5-img2img"): create,
    ("POST", "/uploads"): upload,
    ("POST", "/cost"): cost,
    ("GET", "/presets"): list_presets,
    ("GET", "/presets/{name}"): read_preset,
    ("PUT", "/presets/{name}"): save_preset,
    ("DELETE", "/presets/{name}"): delete_preset,
    ("GET", "/balance"): balance,
    ("GET", "/usage"): usage,
    ("GET", "/jobs"): list_jobs,
    ("GET", "/health"): health,
    **{route: find_no_job(*route) for route in OF_ONE_JOB},
}


def name(route: Route) -> str:
    return " ".join(route)


def test_the_walk_leaves_no_route_out():
    assert sorted(map(name, routes() - WALK.keys())) == []
    assert sorted(map(name, WALK.keys() - routes())) == []


@pytest.mark.parametrize("route", WALK, ids=name)
def test_a_stranger_finds_and_changes_nothing_of_the_owners(zoo, route):
    before = zoo.kept()
    WALK[route](zoo)
    after = zoo.kept()
    assert {where: after.get(where) for where in before if not is_strangers(where, before[where])} == {
        where: what for where, what in before.items() if not is_strangers(where, what)
    }
    added = {where: what for where, what in after.items() if where not in before}
    for where, what in added.items():
        assert where[0] == "idempotency" or is_strangers(where, what), f"{where} is nobody's"
        assert not any(job_id in repr(what) for job_id in (*zoo.jobs.values(), *zoo.uploads))
    for team in (OWNER, STRANGER):
        assert audit(zoo.operator.credits, zoo.operator.jobs, team).differences == ()


def test_all_this_is_there_for_the_owner(zoo):
    """And so for every key of the owner's: what the stranger did not find exists."""

    def ask(method: str, path: str, body: Any = None, headers: Any = None, query: Any = None) -> Answer:
        return zoo.system.api(method, path, body, headers, query, key_id=OWNERS_OTHER_KEY)

    for stage, job_id in zoo.jobs.items():
        assert ask("GET", f"/jobs/{job_id}").json["status"] == stage.split()[0].replace("delivered", "succeeded")
    assert [job["id"] for job in ask("GET", "/jobs").json["jobs"]] == [*zoo.jobs.values()][::-1]
    for index in "01":
        assert ask("GET", f"/jobs/{zoo.jobs['delivered']}/outputs/{index}").status == 302
    assert ask("GET", "/usage").json["total"]["jobs"] == 4
    assert [preset["name"] for preset in ask("GET", "/presets").json["presets"]] == [OWNERS_PRESET]
    assert ask("GET", f"/presets/{OWNERS_PRESET}").json["fields"]["strength"] == 0.4321
    assert ask("POST", "/cost", {"preset": OWNERS_PRESET}).json["input"]["strength"] == 0.4321
    assert ask("POST", "/sd1.5-img2img", body(OWNERS, preset=OWNERS_PRESET), ASYNC).status == 202
    assert ask("POST", "/sd1.5-img2img", body(zoo.uploads[0]), ASYNC).status == 202
    again = ask("POST", "/sd1.5-img2img", body(OWNERS), ASYNC | IDEMPOTENCY)
    assert (again.status, again.json["id"]) == (202, zoo.jobs["queued"])
    assert ask("POST", f"/jobs/{zoo.jobs['queued']}/cancel").json["status"] == "canceled"
    assert ask("DELETE", f"/jobs/{zoo.jobs['delivered']}").status == 204
    assert ask("GET", "/balance").json["team"] == OWNER


def test_a_key_used_by_the_stranger_first_is_the_owners_still(zoo):
    key = {"Idempotency-Key": "first-come"}
    theirs = zoo.job(STRANGERS_KEY, body(STRANGERS), key, run=False)
    ours = zoo.owner("POST", "/sd1.5-img2img", body(OWNERS), ASYNC | key)
    assert ours.status == 202
    assert ours.json["id"] != theirs
    assert zoo.owner("POST", "/sd1.5-img2img", body(OWNERS), ASYNC | key).json["id"] == ours.json["id"]


def test_a_file_in_the_owners_inbox_is_the_owners(zoo):
    """Whoever may write to the bucket: its key says whose it is, and a stranger's preset of the name does not count."""
    before = zoo.kept()
    zoo.stranger("PUT", f"/presets/{OWNERS_PRESET}", {"prompt": "a boat"})
    job_id = zoo.drop()
    assert zoo.owner("GET", f"/jobs/{job_id}").json["input"]["prompt"] == "a platypus"
    zoo.secrets.add(job_id)
    list_jobs(zoo)
    balance(zoo)
    theirs = {where: what for where, what in zoo.kept().items() if is_strangers(where, what)}
    assert [where for where in theirs if where not in before] == [
        ("jobs", f"TEAM#{STRANGER}", f"PRESET#{OWNERS_PRESET}")
    ]


# Keys that open nothing


def unknown(zoo: Zoo) -> str:
    return "key-of-nobody"


def none(zoo: Zoo) -> str:
    return ""


def disabled(zoo: Zoo) -> str:
    zoo.operator.teams.enable_key(OWNERS_OTHER_KEY, enabled=False)
    return OWNERS_OTHER_KEY


def of_a_disabled_team(zoo: Zoo) -> str:
    zoo.operator.teams.enable(OWNER, enabled=False)
    return OWNERS_OTHER_KEY


REFUSED = {unknown: "key_unknown", none: "key_unknown", disabled: "key_disabled", of_a_disabled_team: "team_disabled"}


@pytest.mark.parametrize("key", REFUSED, ids=lambda key: key.__name__)
def test_every_route_refuses_a_key_that_opens_nothing(zoo, key):
    key_id = key(zoo)
    before = zoo.kept()
    for method, path in sorted(routes() - OPEN_ROUTES):
        sent: list[tuple[Any, dict[str, str]]] = [({}, {}), ("{", {}), (None, {"Accept": "text/csv"})]
        if path == "/sd1.5-img2img":
            sent += [(body(OWNERS), ASYNC), (body(zoo.uploads[0]), ASYNC | IDEMPOTENCY)]
        if path == "/uploads":
            sent += [(OWNERS, {"Content-Type": "image/png"}), ({"job": {"prompt": "a boat"}}, IDEMPOTENCY)]
        for sent_body, headers in sent:
            where = path.format(id=zoo.jobs["delivered"], index=0, name=OWNERS_PRESET)
            answer = zoo.system.api(method, where, sent_body, headers, key_id=key_id)
            assert (answer.status, answer.headers["content-type"]) == (403, "application/problem+json"), (method, path)
            problem = answer.json
            assert (problem["status"], problem["code"], problem["title"]) == (403, REFUSED[key], "API key refused")
            assert problem["detail"]
    assert zoo.kept() == before


def test_the_open_routes_need_no_key(zoo):
    for method, path in OPEN_ROUTES:
        assert zoo.system.api(method, path, key_id="").status == 200
