"""What the tests of this folder do to a deployment that calls Segmind's v2, and ask of it."""

from __future__ import annotations

from img2img.jobs.items import to_job
from tests.faults.deployment import Deployment

# The ways the submits of two samples can fall, and the fetches.
SUBMITTED = ("POST 0", "UpdateItem 0", "POST 1", "UpdateItem 1")
SUBMITTED_SIDE_BY_SIDE = ("POST 0", "POST 1", "UpdateItem 0", "UpdateItem 1")
FETCH = ("GetStatus 0", "GetResponse 0", "GetOutput 0", "PutObject 0")
FETCHED = (*FETCH, *(call.replace("0", "1") for call in FETCH))


class QueueDeployment(Deployment):
    """A deployment whose worker sends messages to itself, and does not sleep."""

    def restart(self) -> None:
        super().restart()
        self.system.services.sleep = lambda _: None

    def submit(self, *, samples: int = 1, latency: float = 60) -> str:
        """Create a job, have the worker submit its samples, and hold the message of the first look."""
        self.warm()
        self.system.segmind.latency = latency
        job_id = self.new_job(samples=samples)
        self.work()
        self.receive()
        self.system.clock.advance(1)
        return job_id

    def have_a_caller_wait(self, job_id: str) -> None:
        """Have the job's caller wait for it, for longer than a test takes."""
        self.system.dynamodb.update_item(
            TableName="jobs",
            Key={"pk": {"S": "TEAM#default"}, "sk": {"S": f"JOB#{job_id}"}},
            UpdateExpression="SET waited_until = :until",
            ExpressionAttributeValues={":until": {"N": str(int(self.system.clock()) + 60)}},
        )

    def kept(self, job_id: str) -> set[int]:
        """Return the samples of which the job says which request they are, or whose pictures are stored."""
        job = to_job(self.item(job_id))
        stored = (int(key[-5]) for key in self.results(job_id))
        return {*job.pending, *(output.index for output in job.outputs), *stored}

    def settle(self) -> None:
        """Let the queue and the schedule work on, as they would, until nothing is left to do."""
        self.system.segmind.release()
        self.system.segmind.latency = 0
        for _ in range(40):
            self.receive()
            if self.held:
                self.work()
                self.system.clock.advance(5)
            elif any("due_at" in item for item in self.job_items()):
                self.system.clock.advance(60)
                self.system.sweep()
            else:
                return
        raise AssertionError(f"left: {len(self.held)} messages, {self.job_items()}")
