"""What the tests of this folder do to a deployment with an asynchronous endpoint, and ask of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from img2img.jobs.items import to_job
from local.sagemaker import SageMaker
from tests.container import FakeContainer
from tests.faults.calls import AFTER, Kill, Killed, Meanwhile, Step
from tests.faults.deployment import Deployment
from tests.system import Context, function, queue_url

# The ways the calls of two samples can fall: asked for, taken, and taken when only the second is there.
ASKED = ("PutObject 0", "InvokeEndpointAsync 0", "PutObject 1", "InvokeEndpointAsync 1")
TAKEN = ("GetObject 0", "PutObject 0", "GetObject 1", "PutObject 1")
TAKEN_SIDE_BY_SIDE = ("GetObject 0", "GetObject 1", "PutObject 0", "PutObject 1")
ONE_TAKEN = ("GetObject 0", "GetObject 0 #2", "GetObject 1", "PutObject 1")


@dataclass
class EndpointDeployment(Deployment):
    """A deployment that also holds the endpoint's notices, as its queue of them would."""

    heard: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def endpoint(self) -> SageMaker:
        assert self.system.sagemaker
        return self.system.sagemaker

    @property
    def container(self) -> FakeContainer:
        assert self.system.container
        return self.system.container

    def fresh(self) -> None:
        # What the last test left under way comes to an end before its traces are removed.
        self.container.reset()
        self.endpoint.release()
        self.system.settle()
        super().fresh()
        self.endpoint.reset()

    def lose_messages(self) -> None:
        super().lose_messages()
        self.lose_notices()

    def lose_notices(self) -> None:
        """Empty the queue of notices."""
        self.listen()
        for record in self.heard.values():
            self.system.sqs.delete_message(QueueUrl=queue_url("results"), ReceiptHandle=record["receiptHandle"])
        self.heard.clear()

    def listen(self) -> None:
        """Wait for the endpoint, and hold its notices."""
        self.system.settle()
        self._hold_notices()

    def _hold_notices(self) -> None:
        self.heard |= {record["messageId"]: record for record in self.system.receive("results")}

    def hear(self) -> None:
        """Hand the held notices to the collect function; one that is done with is deleted."""
        for message_id in list(self.heard):
            if self.system.collect(self.heard[message_id]):
                del self.heard[message_id]
            self.assert_books_balance()

    def ask(self, **fields: Any) -> str:
        """Create a job, have the worker ask for its samples, and hold the notices of them."""
        job_id = self.new_job(**fields)
        self.work()
        self.listen()
        return job_id

    def ask_for_two(self) -> str:
        """As `ask`, but the first sample's answer does not come before `container.release()`."""
        job_id = self.new_job(samples=2)
        self.container.next.append("hang")
        first_has_begun = Meanwhile(
            self.calls, lambda: self.container.wait_for(1), ("InvokeEndpointAsync 0", AFTER), ASKED
        )
        with self.calls.shown_to(first_has_begun):
            self.work()
        assert self.endpoint.invocations[1].done.wait(30)
        self._hold_notices()
        return job_id

    def collect(self, step: Step) -> None:
        """Hand one notice to the collect function while its calls are shown to `step`. It stays in the queue."""
        with self.calls.shown_to(step):
            function("collect").handler({"Records": [next(iter(self.heard.values()))]}, Context(120))
        self.assert_books_balance()

    def kill_collect(self, name: str, moment: str, order: Sequence[str] = ()) -> None:
        """Have the collect function die at one of its calls, and another one take its place."""
        kill = Kill(name, moment, order)
        try:
            self.collect(kill)
        except Killed:
            self.restart()
        assert kill.dead, f"{name} was never reached: {self.calls.made}"

    def settle(self) -> None:
        """Let the queues, the endpoint and the schedule work on, as they would, until nothing is left to do."""
        self.container.release()
        for _ in range(60):
            self.receive()
            self.listen()
            if self.held or self.heard:
                self.work()
                self.hear()
                self.system.clock.advance(30)
            elif self._open_jobs():
                self.system.clock.advance(60)
                self.system.sweep()
            else:
                return
        raise AssertionError(f"left: {len(self.held)} messages, {len(self.heard)} notices, {self.job_items()}")

    def _open_jobs(self) -> int:
        found = self.system.dynamodb.scan(TableName="jobs", FilterExpression="attribute_exists(due_at)", Select="COUNT")
        return int(found["Count"])

    def pending(self, job_id: str) -> set[int]:
        """Return the samples of which the job says where they will be."""
        return {index for job in map(to_job, self.job_items()) if job.id == job_id for index in job.pending}

    def asked(self) -> Counter[int]:
        """Return how often the endpoint was asked for each sample."""
        return Counter(int(call.input.rpartition("/")[2].partition(".")[0]) for call in self.endpoint.invocations)

    def assert_at_rest(self, job_id: str) -> None:
        super().assert_at_rest(job_id)
        assert self.system.messages("results") == 0
        assert not {"pending", "waits_for"} & set(self.item(job_id))
