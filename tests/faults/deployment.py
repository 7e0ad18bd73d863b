"""What the tests of this folder do to a deployment and ask of it."""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from PIL import Image

from img2img import bootstrap
from img2img.params import Img2ImgParams
from tests.faults.calls import SEED, Calls, Kill, Killed, Step
from tests.system import Answer, Context, System, function, rest_event

LEASE = 130
VISIBILITY = 720
# Two samples run in threads of their own: these are the ways their calls can fall.
ONE_BY_ONE = ("POST 0", "PutObject 0", "POST 1", "PutObject 1")
SIDE_BY_SIDE = ("POST 0", "POST 1", "PutObject 0", "PutObject 1")


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
    """A system, its calls, and the messages that its queue has handed out and not had deleted."""

    system: System
    calls: Calls
    held: dict[str, dict[str, Any]] = field(default_factory=dict)

    def fresh(self) -> None:
        """Start a test: an empty table and queue, a backend that has seen nothing, a new process."""
        for item in self.system.dynamodb.scan(TableName="jobs", ProjectionExpression="pk, sk")["Items"]:
            self.system.dynamodb.delete_item(TableName="jobs", Key={name: item[name] for name in ("pk", "sk")})
        self.lose_messages()
        self.system.segmind.reset()
        self.system.clock.ahead = 0.0
        self.restart()

    def lose_messages(self) -> None:
        """Empty the queue."""
        # Not with PurgeQueue, which is allowed once a minute.
        self.receive()
        for record in self.held.values():
            self.system.sqs.delete_message(QueueUrl=self.system.queue_url, ReceiptHandle=record["receiptHandle"])
        self.held.clear()

    def restart(self) -> None:
        """Put a new process in place of a dead one: it knows nothing but its environment."""
        bootstrap.services.cache_clear()
        self.system.services = bootstrap.services()
        self.system.services.clock = self.system.clock

    def warm(self) -> None:
        """Have the worker know the Segmind key already: else each thread of a first job reads it, or does not."""
        self.system.services.backend.generate(fitted_picture(), Img2ImgParams(prompt="warm", seed=SEED), SEED)
        self.system.segmind.reset()

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

    def run(self, step: Step, message_id: str | None = None) -> None:
        """Hand one message to the worker while its calls are shown to `step`. Its message stays in the queue."""
        record = self.held[message_id or next(iter(self.held))]
        with self.calls.shown_to(step):
            function("worker").handler({"Records": [record]}, Context(120))

    def kill_worker(self, name: str, moment: str, order: Sequence[str] = ()) -> None:
        """Have the worker die at one of its calls, and another one take its place."""
        kill = Kill(name, moment, order)
        try:
            self.run(kill)
        except Killed:
            self.restart()
        assert kill.dead, f"{name} was never reached: {self.calls.made}"

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
        key = {"pk": {"S": "TEAM#default"}, "sk": {"S": f"JOB#{job_id}"}}
        found: dict[str, Any] = self.system.dynamodb.get_item(TableName="jobs", Key=key).get("Item", {})
        return found

    def job_ids(self) -> set[str]:
        """Return the ids of every job in the table."""
        items = self.system.dynamodb.scan(TableName="jobs", ProjectionExpression="pk, sk")["Items"]
        return {item["sk"]["S"].removeprefix("JOB#") for item in items if item["sk"]["S"].startswith("JOB#")}

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


def short_lived() -> Context:
    """Return the context of an invocation that dies now: its idempotency record is in flight for no longer."""

    class Dying(Context):
        def get_remaining_time_in_millis(self) -> int:
            return 1

    return Dying()
