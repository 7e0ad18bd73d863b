"""One sample of a job: asked for, or taken from where its backend left it, and stored."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from aws_lambda_powertools import Logger
from botocore.exceptions import BotoCoreError, ClientError

from img2img import images
from img2img.aws import AwsError
from img2img.backends import Backend, GeneratedImage, Notice, Pending
from img2img.errors import BackendBroken, InternalError, JobError, OutputBlocked, UnsupportedImage
from img2img.jobs.job import Job, Output, OutputStatus, missing

if TYPE_CHECKING:
    from img2img.bootstrap import Services
    from img2img.jobs.objects import Storage

logger = Logger(child=True)


class StorageTrouble(InternalError):
    """S3 took no picture for now: another attempt pays for it once more."""

    retryable = True


def _not_stored(error: BotoCoreError | ClientError) -> JobError:
    """Return what became of a picture that S3 did not take. A refusal would come again, and cost the picture again."""
    status = error.response["ResponseMetadata"]["HTTPStatusCode"] if isinstance(error, ClientError) else 503
    kind = StorageTrouble if status == 429 or status >= 500 else InternalError
    return kind("The output could not be stored")


@dataclass(kw_only=True)
class Sample:
    """What became of one sample in this run: an output, an error, or a place where it will be."""

    index: int
    answer: GeneratedImage | Pending | None = None
    output: Output | None = None
    error: JobError | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it in this run or by itself."""
        return self.output is not None or self.error is not None


class UnderWay:
    """What a claimed job has under way, as far as it is known by now: also what no write has kept yet."""

    def __init__(self, services: Services, job: Job) -> None:
        self.pending = dict(job.pending)
        self._services = services
        self._job = job
        self._lock = threading.Lock()

    def add(self, index: int, call: Pending, *, at_once: bool) -> None:
        """Remember a call; `at_once` writes it down, in the next breath after it was made."""
        with self._lock:
            self.pending[index] = call
            if at_once:
                try:
                    self._services.jobs.note(replace(self._job, pending=self.pending))
                except AwsError as error:
                    # What is written when the job is let go of holds it as well.
                    logger.warning("call not written down", error=type(error).__name__, index=index)


def _keep(storage: Storage, job: Job, index: int, generated: GeneratedImage) -> Output:
    """Store a picture, unless there is none to see. Raises `UnsupportedImage` and botocore's errors."""
    data = generated.data
    picture = None if generated.flagged else images.examine(data)
    if picture is None or picture.black:
        return Output(
            index=index,
            status=OutputStatus.BLOCKED,
            seed=job.params.seed_of(index),
            seconds=generated.seconds,
            error_code=OutputBlocked.code,
        )
    if wanted := job.params.output_format:
        data = images.convert(data, wanted)
        picture = replace(picture, content_type=f"image/{wanted}")
    return storage.put_output(job, index, data, picture, generated.seconds)


def _take(storage: Storage, job: Job, sample: Sample, get: Callable[[int], GeneratedImage | Pending | None]) -> None:
    try:
        sample.answer = get(sample.index)
    except JobError as error:
        sample.error = error
        return
    if not isinstance(sample.answer, GeneratedImage):
        return
    try:
        sample.output = _keep(storage, job, sample.index, sample.answer)
    except UnsupportedImage:
        sample.error = BackendBroken("The backend's answer was no image")
    except JobError as error:
        sample.error = error
    except AwsError as error:
        logger.warning("output not stored", error=type(error).__name__, index=sample.index)
        sample.error = _not_stored(error)


def _take_all(
    services: Services, job: Job, samples: list[Sample], get: Callable[[int], GeneratedImage | Pending | None]
) -> list[Sample]:
    if samples:
        # Made before there are threads: neither boto3's session nor `cached_property` makes one thing once for all.
        storage = services.storage
        with ThreadPoolExecutor(len(samples)) as pool:
            list(pool.map(lambda sample: _take(storage, job, sample, get), samples))
    return samples


def take_answers(services: Services, job: Job, notice: Notice | None) -> list[Sample]:
    """Take what backends have done by themselves, of which a notice tells of one sample.

    The others are looked for as well: the samples of a job run together, and so end together.
    """
    told = {}
    if notice and notice.index in missing(job) and (notice.output or notice.index in job.pending):
        told = {notice.index: notice}
    calls: list[Notice | Pending] = [*told.values(), *job.pending.values()]
    # Made before there are threads, as below.
    backends = {call.backend: services.async_backend(call.backend) for call in calls}

    def answer(index: int) -> GeneratedImage | None:
        pending, said = job.pending.get(index), told.get(index)
        found = None
        if said and (pending is None or pending.backend != said.backend):
            # Of an earlier call, of which the pending one's backend knows nothing.
            found, said = backends[said.backend].answer(None, said), None
        if found is None and pending:
            found = backends[pending.backend].answer(pending, said)
        return replace(found, reason=pending.reason) if found and pending else found

    return _take_all(services, job, [Sample(index=index) for index in sorted({*told, *job.pending})], answer)


def is_awaited(services: Services, job: Job) -> bool:
    """Whether the job's caller still waits for it."""
    return services.clock() < (job.waited_until or 0)


def ask_for(
    services: Services, job: Job, indexes: list[int], instead: Mapping[int, Backend], under_way: UnderWay
) -> list[Sample]:
    """Ask for samples, all at the same time: the backend or, of those that it failed, what stands in for it.

    Raises botocore's errors for the picture they start from.
    """
    if not indexes:
        return []
    image = services.storage.get_input(job)
    backend = services.backend
    # Of one sample that nobody waits for, the job's release is the next write.
    is_last_write = len(indexes) == 1 and not is_awaited(services, job)

    def generate(index: int) -> GeneratedImage | Pending:
        # The claim's own id keeps the notices of earlier calls apart.
        name, seed = f"{job.team}/{job.id}/{job.lease}/{index}", job.params.seed_of(index)
        made = instead.get(index, backend).generate(image, job.params, seed, name=name, until=job.deadline_at)
        if isinstance(made, Pending):
            under_way.add(index, made, at_once=services.pays_by_call(made.backend) and not is_last_write)
        return made

    return _take_all(services, job, [Sample(index=index) for index in indexes], generate)
