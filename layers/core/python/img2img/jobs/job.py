"""What a job is and which way it may go. Pure: `store.py` keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from img2img.backends import GeneratedImage, Pending, Wait
from img2img.errors import OutputBlocked, ServiceError, recorded_error
from img2img.money.prices import Receipt
from img2img.params import Img2ImgParams
from img2img.stored import StoredEnum

# A message is on its way within milliseconds; later than this, `sweep` sends another.
RESEND_AFTER = 60
DEADLINE_PASSED = "The job was not done before its deadline"


class Status(StoredEnum):
    """Where a job stands."""

    AWAITING_UPLOAD = "awaiting_upload"
    QUEUED = "queued"
    PROCESSING = "processing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def is_terminal(self) -> bool:
        """Whether the job never changes again."""
        return self in NEXT and not NEXT[self]

    @property
    def is_open(self) -> bool:
        """Whether the job goes on here: not what has ended, and not what only a newer version knows."""
        return bool(NEXT.get(self))

    def may_become(self, other: Status) -> bool:
        """Whether a job may go from here to there; from a status that is not known it goes nowhere."""
        return other in NEXT.get(self, ())


NEXT: Mapping[Status, frozenset[Status]] = {
    Status.AWAITING_UPLOAD: frozenset({Status.QUEUED, Status.FAILED, Status.CANCELED}),
    Status.QUEUED: frozenset({Status.PROCESSING, Status.SUCCEEDED, Status.FAILED, Status.CANCELED}),
    # Back to queued: the backend asked to wait, or may be asked again without paying twice.
    Status.PROCESSING: frozenset({Status.QUEUED, Status.SUCCEEDED, Status.FAILED, Status.CANCELED}),
    Status.SUCCEEDED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELED: frozenset(),
}


class OutputStatus(StoredEnum):
    """How one sample ended."""

    SUCCEEDED = "succeeded"
    BLOCKED = "blocked"
    FAILED = "failed"


class Via(StoredEnum):
    """Through which door a job came in."""

    API = "api"
    SEGMIND = "segmind"
    INBOX = "inbox"


@dataclass(frozen=True, kw_only=True)
class Output:
    """One sample that ended. Everything from `key` on is set only where a picture is stored.

    `seconds` is what the backend took for it.
    """

    index: int
    status: OutputStatus
    seed: int
    error_code: str = ""
    error_detail: str = ""
    key: str = ""
    content_type: str = ""
    width: int = 0
    height: int = 0
    bytes: int = 0
    sha256: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Source:
    """The object that a job was made of: one version of a file in the inbox, put there under a preset's name."""

    bucket: str
    key: str
    version: str
    preset: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request on its way. Times are epoch milliseconds, but `due_at` and `deadline_at` epoch seconds.

    `due_at` is when `sweep` looks at an unfinished job: for a claimed one that is the end of its lease. `pending` are
    the samples, by index, that a backend works on by itself; meanwhile the job belongs to no worker, and `look_ms` is
    when a message comes to look at them. `waited_until` is until when its caller waits, in seconds. `backend_reason`
    is the error for which `backend`, and not the one asked first, serves the job. `attempts` counts the claims that
    were not given back in order, this one included; `failures` the calls, by sample, that may be repeated.
    """

    id: str
    team: str
    key_id: str
    correlation_id: str
    status: Status
    params: Img2ImgParams
    metadata: Mapping[str, str] = field(default_factory=dict)
    backend: str
    backend_reason: str = ""
    via: Via = Via.API
    source: Source | None = None
    credits: Receipt
    created_ms: int
    started_ms: int | None = None
    completed_ms: int | None = None
    due_at: int | None = None
    deadline_at: int
    attempts: int = 0
    failures: Mapping[int, int] = field(default_factory=dict)
    lease: str | None = None
    outputs: tuple[Output, ...] = ()
    pending: Mapping[int, Pending] = field(default_factory=dict)
    look_ms: int | None = None
    waited_until: int | None = None
    waits_for: Wait | None = None
    error_code: str = ""
    error_detail: str = ""

    @property
    def generation_seconds(self) -> float:
        """How long the backend took: samples are generated at the same time, so the longest one."""
        return max((output.seconds for output in self.outputs), default=0.0)

    @property
    def unclaimed_status(self) -> Status:
        """Where the job stands when no worker has it: at its backends, or in the queue."""
        return Status.PROCESSING if self.pending else Status.QUEUED

    @property
    def is_understood(self) -> bool:
        """Whether this version knows the values that decide what becomes of the job. What a newer one stored before it
        was rolled back is shown and left alone.
        """
        return self.status.is_known and all(output.status.is_known for output in self.outputs)

    @property
    def error(self) -> ServiceError | None:
        """What a failed job failed of."""
        return recorded_error(self.error_code, self.error_detail) if self.error_code else None

    @property
    def delivered(self) -> list[Output]:
        """The outputs that have a picture."""
        return [output for output in self.outputs if output.status is OutputStatus.SUCCEEDED]

    def output(self, index: int) -> Output | None:
        """Return the output of sample `index` if that sample has ended."""
        return next((output for output in self.outputs if output.index == index), None)


def next_look(job: Job, now: int) -> int:
    """Return when to look at a waiting job again: ever later, so that a long queue is not filled with repeats."""
    age = now - job.created_ms // 1000
    return min(now + max(RESEND_AFTER, age), max(job.deadline_at, now + 1))


def failed_output(job: Job, index: int, error: ServiceError) -> Output:
    """Return the output of a sample that failed for good."""
    return Output(
        index=index,
        status=OutputStatus.FAILED,
        seed=job.params.seed_of(index),
        error_code=error.code,
        error_detail=error.detail,
    )


def with_outputs(job: Job, outputs: Iterable[Output]) -> Job:
    """Return the job with more samples ended."""
    merged = {output.index: output for output in (*job.outputs, *outputs)}
    return replace(job, outputs=tuple(merged[index] for index in sorted(merged)))


def served(job: Job, answer: GeneratedImage | Pending) -> Job:
    """Return the job with the backend that serves it."""
    return replace(job, backend=answer.backend, backend_reason=answer.reason)


def tries(job: Job, index: int) -> int:
    """Return how often a claimed job's sample was asked for in vain, as far as is known: a crash may have been one."""
    return job.attempts - 1 + job.failures.get(index, 0)


def missing(job: Job) -> list[int]:
    """Return the samples that have not ended."""
    return [index for index in range(job.params.samples) if job.output(index) is None]


def given_up(job: Job, error: ServiceError) -> Job:
    """Return the job with every sample that has not ended failed: what was delivered until then stays."""
    return with_outputs(job, [failed_output(job, index, error) for index in missing(job)])


def ended(job: Job, status: Status, *, at_ms: int, error: ServiceError | None = None) -> Job:
    """Return the job at its end, with what it costs: nothing unless it succeeded, else what was delivered."""
    return replace(
        job,
        status=status,
        completed_ms=at_ms,
        due_at=None,
        lease=None,
        pending={},
        waits_for=None,
        error_code=error.code if error else "",
        error_detail=error.detail if error else "",
        credits=job.credits.settled(
            samples=job.params.samples, delivered=len(job.delivered) if status is Status.SUCCEEDED else 0
        ),
    )


def verdict(job: Job) -> ServiceError | None:
    """Return why a job whose samples have all ended failed: None as soon as one picture was delivered."""
    statuses = {output.status for output in job.outputs}
    if OutputStatus.SUCCEEDED in statuses:
        return None
    failed = next((output for output in job.outputs if output.status is OutputStatus.FAILED), None)
    if failed:
        return recorded_error(failed.error_code, failed.error_detail)
    return OutputBlocked("The backend returned an all-black picture, as its safety checker does")


def concluded(job: Job, *, at_ms: int) -> Job:
    """Return a job whose samples have all ended at its end."""
    error = verdict(job)
    return ended(job, Status.FAILED if error else Status.SUCCEEDED, at_ms=at_ms, error=error)
