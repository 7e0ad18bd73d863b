"""What the tests of this folder do to a deployment and ask of it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import pathlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from img2img.admin.audit import audit
from img2img.jobs.items import to_job
from img2img.jobs.job import Job, OutputStatus, Status
from img2img.jobs.store import JobStore
from img2img.money.credits import Account, Credits, Entry, Phase
from img2img.money.usage import UsageStore, total
from img2img.params import Img2ImgParams
from tests.faults.calls import SEED, Calls, Kill, Killed, Step
from tests.system import API_KEY_ID, Answer, Context, System, create_team, function, queue_url, rest_event

TEAM = "default"
# What a sample of every job here costs, in thousandths of a credit.
PRICE = 1000
LEASE = 130
VISIBILITY = 720
# When a job whose upload has not come is given up: the life of its form, and what S3's notice may take.
IN_VAIN = 900 + 600
PRESET = "portrait"
FILE = "photo.png"
# Two samples run in threads of their own: these are the ways their calls can fall.
ONE_BY_ONE = ("POST 0", "PutObject 0", "POST 1", "PutObject 1")
SIDE_BY_SIDE = ("POST 0", "POST 1", "PutObject 0", "PutObject 1")
# What the sweep looks at. The index has four shards, and a job may be in any of them: where its own calls come in
# between differs. The teams come last: their list, then they themselves.
LOOKS = ("Query", "Query #2", "Query #3", "Query #4", "Query #5", "BatchGetItem")


@cache
def picture() -> bytes:
    """Return a small PNG."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").save(buffer, "PNG")
    return buffer.getvalue()


@cache
def fitted_picture() -> bytes:
    """Return a PNG of the size that jobs ask for."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((512, 512)).save(buffer, "PNG")
    return buffer.getvalue()


def request_body(**fields: Any) -> dict[str, Any]:
    """Return the body of a good request."""
    image = base64.b64encode(picture()).decode()
    return {"image": image, "prompt": "a castle on a hill", "seed": SEED, **fields}


@dataclass
class Deployment:
    """A system, its calls, and the messages and S3's notices that its queues have handed out and not had deleted."""

    system: System
    calls: Calls
    held: dict[str, dict[str, Any]] = field(default_factory=dict)
    noticed: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # With a client that was made before any was watched, so that looking at the books is no call of a process.
        client, clock = self.system.dynamodb, self.system.clock
        self._credits = Credits(client, "jobs", clock=clock)
        self._jobs = JobStore(client, "jobs", retention_days=0, clock=clock)
        self._usage = UsageStore(client, "jobs")
        # The table as it was when the books were last in order: they need no second look before it changes.
        self._in_order: list[dict[str, Any]] = []

    def fresh(self) -> None:
        """Start a test: a team that has paid, nothing else stored or sent, an unused backend, a new process."""
        gone = [{"DeleteRequest": {"Key": {name: item[name] for name in ("pk", "sk")}}} for item in self._items()]
        for start in range(0, len(gone), 25):
            self.system.dynamodb.batch_write_item(RequestItems={"jobs": gone[start : start + 25]})
        for bucket in ("uploads", "results"):
            if keys := self.system.objects(bucket):
                self.system.s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys]})
        self.lose_messages()
        self.system.segmind.reset()
        self.system.clock.ahead = 0.0
        create_team(self.system.services, TEAM)
        self.system.services.presets.save(TEAM, PRESET, {"prompt": "a castle on a hill", "seed": SEED})
        self.restart()

    def lose_messages(self) -> None:
        """Empty the queues."""
        # Not with PurgeQueue, which is allowed once a minute.
        self.receive()
        for record in self.held.values():
            self.system.sqs.delete_message(QueueUrl=self.system.queue_url, ReceiptHandle=record["receiptHandle"])
        self.held.clear()
        for record in self.noticed + self.system.receive("uploads"):
            self.system.sqs.delete_message(QueueUrl=queue_url("uploads"), ReceiptHandle=record["receiptHandle"])
        self.noticed.clear()

    def restart(self) -> None:
        """Put a new process in place of a dead one, which left the books in order: it knows only its environment."""
        self.assert_books_balance()
        self.system.restart()

    def warm(self) -> None:
        """Have the worker know the Segmind key already: else each thread of a first job reads it, or does not."""
        params = Img2ImgParams(prompt="warm", seed=SEED)
        self.system.services.backend.generate(fitted_picture(), params, SEED, name="warm", until=math.inf)
        self.system.segmind.reset()

    def warm_api(self) -> None:
        """Have the API know the caller already: else its first call looks up key and team."""
        self.system.services.teams.team_of(API_KEY_ID)

    def new_job(self, **fields: Any) -> str:
        """Create a job and hold its message."""
        created = self.system.api("POST", "/sd1.5-img2img", request_body(**fields), {"Prefer": "wait=0"})
        assert created.status == 202, created.json
        self.receive()
        return str(created.json["id"])

    def end(self, how: str, job_id: str) -> None:
        """End a job as its owner does: "cancel" or "delete"."""
        if how == "cancel":
            assert self.system.api("POST", f"/jobs/{job_id}/cancel").status == 200
        else:
            assert self.system.api("DELETE", f"/jobs/{job_id}").status == 204

    def upload(self) -> str:
        """Store a picture in a request of its own and return the upload's id."""
        answer = self.system.api("POST", "/uploads", picture(), {"Content-Type": "image/png"})
        assert answer.status == 201, answer.json
        return str(answer.json["id"])

    def receive(self) -> list[str]:
        """Hold what came into the queue since the last time; return the new messages' ids."""
        new = {record["messageId"]: record for record in self.system.receive()}
        ids = [message_id for message_id in new if message_id not in self.held]
        # What SQS would keep invisible comes again here: then only its receipt is new.
        self.held |= new
        return ids

    def work(self, message_ids: Iterable[str] | None = None) -> None:
        """Hand the held messages to the worker, all or those named; one that is done with is deleted."""
        for message_id in list(self.held if message_ids is None else message_ids):
            if self.system.work(self.held[message_id]):
                del self.held[message_id]
            self.assert_books_balance()

    def run(self, step: Step, message_id: str | None = None) -> None:
        """Hand one message to the worker while its calls are shown to `step`. Its message stays in the queue."""
        record = self.held[message_id or next(iter(self.held))]
        with self.calls.shown_to(step):
            function("worker").handler({"Records": [record]}, Context(120))
        self.assert_books_balance()

    def kill_worker(self, name: str, moment: str, order: Sequence[str] = ()) -> None:
        """Have the worker die at one of its calls, and another one take its place."""
        kill = Kill(name, moment, order)
        try:
            self.run(kill)
        except Killed:
            self.restart()
        assert kill.dead, f"{name} was never reached: {self.calls.made}"

    def put_file(self, data: bytes | None = None, *, preset: str = PRESET, **metadata: str) -> None:
        """Put a file into the inbox, as a pipeline does, and hold S3's notice of it."""
        key = f"inbox/{TEAM}/{preset}/{FILE}"
        self._put(key, picture() if data is None else data, {k.replace("_", "-"): v for k, v in metadata.items()})

    def new_awaiting_job(self, **fields: Any) -> str:
        """Announce an upload that is to start a job."""
        job = {"prompt": "a castle on a hill", "seed": SEED, **fields}
        announced = self.system.api("POST", "/uploads", {"job": job})
        assert announced.status == 201, announced.json
        return str(announced.json["job"]["id"])

    def put_awaited(self, job_id: str, data: bytes | None = None) -> None:
        """Upload what a job waits for, and hold S3's notice of it."""
        self._put(f"awaited/{TEAM}/{job_id}", picture() if data is None else data, {})

    def _put(self, key: str, data: bytes, metadata: dict[str, str]) -> None:
        self.system.s3.put_object(Bucket="uploads", Key=key, Body=data, Metadata=metadata)
        self.noticed += self.system.receive("uploads")

    def ingest(self, step: Step | None = None, context: Context | None = None) -> bool:
        """Hand the last notice to the ingest function; return whether it is done with. It comes again all the same."""
        with self.calls.shown_to(step) if step else nullcontext():
            answer = function("ingest").handler({"Records": [self.noticed[-1]]}, context or Context(60))
        return not answer["batchItemFailures"]

    def kill_ingest(self, name: str, moment: str, context: Context | None = None) -> None:
        """Have the ingest function die at one of its calls, and another one take its place."""
        kill = Kill(name, moment)
        try:
            self.ingest(kill, context or short_lived())
        except Killed:
            self.restart()
        assert kill.dead, f"{name} was never reached: {self.calls.made}"

    def forget_claims(self) -> None:
        """Let every record of Powertools' idempotency expire."""
        for item in self.system.dynamodb.scan(TableName="idempotency", ProjectionExpression="id")["Items"]:
            self.system.dynamodb.delete_item(TableName="idempotency", Key=item)

    def outbox(self, preset: str = PRESET) -> dict[str, bytes]:
        """Return what lies in the outbox of a preset, by what its names have after the file's."""
        prefix = f"outbox/{TEAM}/{preset}/"
        found = self.system.s3.list_objects_v2(Bucket="results", Prefix=prefix).get("Contents", [])
        return {
            item["Key"].removeprefix(f"{prefix}{FILE}"): self.system.s3.get_object(Bucket="results", Key=item["Key"])[
                "Body"
            ].read()
            for item in found
        }

    def assert_published(self, job_id: str, *indexes: int, preset: str = PRESET) -> None:
        """Check that the outbox holds what the job came to, and nothing else: these pictures, or an error for none."""
        job, outbox = self.system.job(job_id), self.outbox(preset)
        pictures = {f"-{pathlib.PurePath(urlsplit(o['url']).path).name}": o for o in job["outputs"] if "url" in o}
        assert sorted(o["index"] for o in pictures.values()) == list(indexes)
        assert set(outbox) == ({*pictures, ".json"} if indexes else {".error.json"})
        for name, output in pictures.items():
            assert hashlib.sha256(outbox[name]).hexdigest() == output["sha256"]
        document = json.loads(outbox[".json" if indexes else ".error.json"])
        assert (document["id"], document["status"], document["error"]) == (job_id, job["status"], job["error"])
        # As its client reads it, but for what goes stale.
        assert [o["index"] for o in document["outputs"]] == [o["index"] for o in job["outputs"]]

    def sweep(self, step: Step) -> None:
        """Sweep while the calls are shown to `step`."""
        with self.calls.shown_to(step):
            self.system.sweep()
        self.assert_books_balance()

    def return_messages(self) -> None:
        """Let the messages of a dead worker come back."""
        self.system.clock.advance(VISIBILITY)
        self.work()

    def outlive_lease(self) -> None:
        """Wait until a dead worker's lease has run out."""
        self.system.clock.advance(LEASE + 1)

    def settle(self) -> None:
        """Let the queue and the schedule work on, as they would, until no message is left."""
        self.receive()
        for _ in range(5):
            if not self.held:
                return
            self.work()
            self.system.clock.advance(10)
        raise AssertionError(f"{len(self.held)} messages keep coming back")

    def item(self, job_id: str) -> dict[str, Any]:
        """Return the job's item, {} if there is none."""
        return self.system.item(job_id) or {}

    def job_items(self) -> list[dict[str, Any]]:
        """Return every job's item."""
        return _jobs_of(self._items())

    def _items(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.system.dynamodb.scan(TableName="jobs")["Items"]
        return found

    def job_ids(self) -> set[str]:
        """Return the ids of every job in the table."""
        return {item["sk"]["S"].removeprefix("JOB#") for item in self.job_items()}

    def results(self, job_id: str) -> list[str]:
        """Return the keys of a job's stored outputs."""
        found = self.system.s3.list_objects_v2(Bucket="results", Prefix=f"results/default/{job_id}/")
        return [item["Key"] for item in found.get("Contents", [])]

    def inputs(self, job_id: str) -> list[str]:
        """Return the keys of a job's stored input."""
        return [key for key in self.system.objects("uploads") if job_id in key]

    def seeds(self) -> Counter[int]:
        """Return how often the backend was asked for each sample."""
        return Counter(call["body"]["seed"] - SEED for call in self.system.segmind.calls)

    def post(self, body: Any, headers: dict[str, str], context: Context | None = None) -> Answer:
        """Create a job in an invocation of its own kind."""
        raw = function("api").handler(rest_event("POST", "/sd1.5-img2img", body, headers), context or Context())
        content = raw["body"].encode()
        return Answer(
            raw["statusCode"],
            {name.lower(): ", ".join(values) for name, values in raw["multiValueHeaders"].items()},
            base64.b64decode(content) if raw["isBase64Encoded"] else content,
        )

    def assert_succeeded(self, job_id: str, samples: int = 1) -> None:
        """Check a job that is done: each output is there, once, and readable, and nothing is left to do."""
        job = self.system.job(job_id)
        assert job["status"] == "succeeded", job
        assert [(o["index"], o["status"], o["seed"]) for o in job["outputs"]] == [
            (index, "succeeded", SEED + index) for index in range(samples)
        ]
        keys = self.results(job_id)
        assert len(keys) == samples
        for output, key in zip(job["outputs"], sorted(keys), strict=True):
            data = self.system.s3.get_object(Bucket="results", Key=key)["Body"].read()
            assert hashlib.sha256(data).hexdigest() == output["sha256"]
            assert Image.open(io.BytesIO(data)).size == (512, 512)
            assert key in output["url"]
        self.assert_at_rest(job_id)

    def assert_at_rest(self, job_id: str) -> None:
        """Check that nothing will ever touch the job again: no message, no lease, no place in the sweep's index."""
        assert self.system.messages() == 0
        assert not {"lease", "due_at", "open_shard"} & set(self.item(job_id))
        self.assert_books_balance()

    def account(self) -> Account:
        """Return where the team stands."""
        return self._credits.account(TEAM)

    def spent(self) -> int:
        """Return what the team's jobs have taken from its balance, for good or for now."""
        account = self.account()
        return account.added - account.balance

    def leave(self, amount: int) -> None:
        """Take credits back until the team has only so many left."""
        self._credits.add(TEAM, amount - self.account().balance)

    def assert_books_balance(self) -> None:
        """Check the account, the ledger, each job's receipt and the counters of usage against each other."""
        items = self._items()
        if items == self._in_order:
            return
        found = audit(self._credits, self._jobs, TEAM)
        assert (found.still, found.differences) == (True, ())
        account = found.account
        assert account.added == account.balance + account.reserved + account.charged
        assert min(account.balance, account.reserved) >= 0, account

        entries: dict[str, list[Entry]] = defaultdict(list)
        for entry in self._credits.ledger(TEAM):
            if entry.phase is not Phase.TOP_UP:
                entries[entry.about].append(entry)
        jobs = {job.id: job for job in map(to_job, _jobs_of(items))}
        for job_id in entries.keys() | jobs.keys():
            # A job is deleted only after its end.
            over = job_id not in jobs or jobs[job_id].status.is_terminal
            phases = [Phase.RESERVE, Phase.SETTLE] if over else [Phase.RESERVE]
            if job_id in jobs and jobs[job_id].credits.reserved == 0:
                # It failed before it could run, and so takes nothing for a moment.
                phases = [Phase.SETTLE]
            assert [entry.phase for entry in entries[job_id]] == phases, entries[job_id]
        for job in jobs.values():
            _assert_paid(job, entries[job.id])
        assert account.reserved == sum(job.credits.reserved for job in jobs.values() if not job.status.is_terminal)

        settled = [entry for of_job in entries.values() for entry in of_job if entry.phase is Phase.SETTLE]
        assert account.charged == sum(entry.charged for entry in settled)
        used = total(self._usage.rows(TEAM, date.min, date.max))
        assert (used.jobs, used.charged) == (len(settled), account.charged)
        assert used.images * PRICE == used.charged
        assert used.jobs == used.succeeded + used.failed + used.canceled
        self._in_order = items


def _jobs_of(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [item for item in items if item["sk"]["S"].startswith("JOB#")]


def _assert_paid(job: Job, entries: list[Entry]) -> None:
    """Check a job's receipt: once it is over, what was delivered is charged and all else released."""
    unpaid = job.status is Status.FAILED and job.started_ms is None and job.credits.reserved == 0
    reserved = 0 if unpaid else PRICE * job.params.samples
    delivered = sum(output.status is OutputStatus.SUCCEEDED for output in job.outputs)
    charged = PRICE * delivered if job.status is Status.SUCCEEDED else 0
    released = reserved - charged if job.status.is_terminal else 0
    receipt = job.credits
    assert (receipt.reserved, receipt.charged, receipt.released) == (reserved, charged, released)
    booked = [sum(getattr(entry, name) for entry in entries) for name in ("reserved", "charged", "released")]
    assert booked == [reserved, charged, released]


def short_lived() -> Context:
    """Return the context of an invocation that dies now: its idempotency record is in flight for no longer."""

    class Dying(Context):
        def get_remaining_time_in_millis(self) -> int:
            return 1

    return Dying()
