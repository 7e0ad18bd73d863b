"""Puts the parts together: settings -> clients -> services. Only this and admin/stack.py make boto3 clients."""

from __future__ import annotations

import math
import os
import time
from functools import cache, cached_property
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config

from img2img.errors import BackendUnreachable
from img2img.jobs.objects import Storage
from img2img.jobs.outbox_index import OutboxIndex
from img2img.jobs.queues import JobQueue, Queue
from img2img.jobs.repeats import RepeatStore
from img2img.jobs.store import JobStore
from img2img.money.credits import Credits
from img2img.money.prices import PriceTable
from img2img.money.usage import UsageStore
from img2img.params import UNIT_OF_WORK
from img2img.requests import are_known
from img2img.settings import BACKENDS, Settings
from img2img.teams.presets import PresetStore
from img2img.teams.store import TeamStore

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aws_lambda_powertools.utilities.idempotency import DynamoDBPersistenceLayer
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_sqs import SQSClient

    from img2img.backends import AsyncBackend, Backend, Notice, Pending
    from img2img.backends.auto import AutoBackend
    from img2img.backends.sagemaker import SageMakerBackend
    from img2img.backends.segmind_http import KeySource
    from img2img.backends.segmind_v2 import SegmindQueue
    from img2img.errors import JobError
    from img2img.fetch import Fetcher
    from img2img.jobs.job import Job
    from img2img.params import Img2ImgParams

# A hung AWS call must leave time to answer: API Gateway waits 29 s in all.
_CONFIG = Config(connect_timeout=2, read_timeout=4, retries={"mode": "standard", "total_max_attempts": 3})
# By default boto3 presigns with SigV2 for the global host in older regions, which new buckets refuse.
_S3_CONFIG = _CONFIG.merge(Config(signature_version="s3v4", s3={"addressing_style": "virtual"}))
# SageMaker ends a call in real time after 60 s.
_REALTIME_SECONDS = 65
# What an endpoint that was scaled to zero needs for its first picture, at most as a rule.
_COLD_START_SECONDS = 600


class Services:
    """What the use cases work with. Each part is made when it is first asked for.

    Imports stand inside where only one function needs them: an import is most of a cold start.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.sleep = sleep
        self.prices = PriceTable.parse(settings.price_base)

    @cached_property
    def _dynamodb(self) -> DynamoDBClient:
        return boto3.client("dynamodb", config=_CONFIG)

    @cached_property
    def jobs(self) -> JobStore:
        """The table of jobs."""
        return JobStore(
            self._dynamodb,
            self.settings.jobs_table,
            retention_days=self.settings.retention_days,
            clock=self.clock,
        )

    @cached_property
    def repeats(self) -> RepeatStore:
        """What ties requests that are sent again to their jobs."""
        return RepeatStore(self._dynamodb, self.settings.jobs_table, clock=self.clock)

    @cached_property
    def teams(self) -> TeamStore:
        """The teams and their API keys."""
        return TeamStore(self._dynamodb, self.settings.jobs_table, clock=self.clock)

    @cached_property
    def presets(self) -> PresetStore:
        """The teams' presets."""
        return PresetStore(self._dynamodb, self.settings.jobs_table, clock=self.clock)

    @cached_property
    def outbox_index(self) -> OutboxIndex:
        """What the outbox shows."""
        return OutboxIndex(
            self._dynamodb,
            self.settings.jobs_table,
            retention_days=self.settings.retention_days,
            clock=self.clock,
        )

    @cached_property
    def credits(self) -> Credits:
        """The teams' accounts."""
        return Credits(self._dynamodb, self.settings.jobs_table, clock=self.clock)

    @cached_property
    def usage(self) -> UsageStore:
        """The counters of what was used."""
        return UsageStore(self._dynamodb, self.settings.jobs_table)

    @cached_property
    def _s3(self) -> S3Client:
        return boto3.client("s3", config=_S3_CONFIG)

    @cached_property
    def storage(self) -> Storage:
        """The buckets."""
        return Storage(
            self._s3,
            uploads_bucket=self.settings.uploads_bucket,
            results_bucket=self.settings.results_bucket,
            max_image_bytes=self.settings.max_image_bytes,
            result_url_ttl=self.settings.result_url_ttl,
            upload_url_ttl=self.settings.upload_url_ttl,
        )

    @cached_property
    def _sqs(self) -> SQSClient:
        return boto3.client("sqs", config=_CONFIG)

    @cached_property
    def queue(self) -> JobQueue:
        """The queue of jobs."""
        return JobQueue(self._sqs, self.settings.jobs_queue_url)

    @cached_property
    def uploads_queue(self) -> Queue:
        """The queue of S3's notices."""
        return Queue(self._sqs, self.settings.uploads_queue_url)

    @cached_property
    def idempotency(self) -> DynamoDBPersistenceLayer:
        """Powertools' table of idempotency keys."""
        from aws_lambda_powertools.utilities.idempotency import DynamoDBPersistenceLayer

        return DynamoDBPersistenceLayer(self.settings.idempotency_table, boto3_client=self._dynamodb)

    @cached_property
    def fetcher(self) -> Fetcher:
        """Downloads the images that callers name by URL."""
        from img2img.fetch import Fetcher

        return Fetcher(max_bytes=self.settings.max_image_bytes)

    @cached_property
    def answers_queue(self) -> Queue:
        """The queue of SageMaker's notices."""
        return Queue(self._sqs, self.settings.results_queue_url)

    @cached_property
    def backend(self) -> Backend:
        """What generates the pictures."""
        match self.settings.backend:
            case "segmind":
                return self._segmind_asked()
            case "sagemaker":
                return self.sagemaker
            case "auto":
                return self._auto
        raise AssertionError("settings admit no other backend")

    @cached_property
    def _auto(self) -> AutoBackend:
        from img2img.backends.auto import AutoBackend

        asynchronous = self.settings.sagemaker_invocation == "async"
        # In real time both calls have to fit into the worker's 120 s.
        longest = math.inf if asynchronous else 110 - _REALTIME_SECONDS
        # Large pictures take long without anything being wrong, and what is given up may be billed.
        patient = self._segmind_asked(
            lambda params: min(self.settings.fallback_after * max(params.work / UNIT_OF_WORK, 1), longest)
        )
        reserve = _COLD_START_SECONDS if asynchronous else _REALTIME_SECONDS
        return AutoBackend(patient, self.sagemaker, reserve=reserve, clock=self.clock)

    def instead(self, call: Pending, error: JobError) -> Backend | None:
        """Return what serves a sample whose pending call came to this error; None where nothing stands in for it."""
        stands_in = self.settings.backend == "auto" and call.backend == self.settings.first_backend
        return self._auto.instead(error) if stands_in else None

    @cached_property
    def sagemaker(self) -> SageMakerBackend:
        """The SageMaker endpoint."""
        from img2img.backends.sagemaker import SageMakerBackend

        # A call is repeated by the job's own rules only.
        patient = Config(
            connect_timeout=2, read_timeout=_REALTIME_SECONDS, retries={"mode": "standard", "total_max_attempts": 1}
        )
        return SageMakerBackend(
            runtime=boto3.client("sagemaker-runtime", config=patient),
            control=boto3.client("sagemaker", config=_CONFIG),
            s3=self._s3,
            endpoint=self.settings.sagemaker_endpoint,
            bucket=self.settings.uploads_bucket,
            asynchronous=self.settings.sagemaker_invocation == "async",
            timeout=self.settings.sagemaker_timeout,
            clock=self.clock,
        )

    def async_backend(self, name: str) -> AsyncBackend:
        """Return a backend that answers later, whether or not it is still asked."""
        return _ASYNC_BACKENDS[name](self)

    def read_notice(self, body: str) -> Notice:
        """Read what a backend says, unasked, of a call that is over. Raises `ValueError`, `KeyError`, `TypeError` or
        `AttributeError` for anything else.
        """
        from img2img.backends.sagemaker import read_notice

        return read_notice(body)

    def pays_by_call(self, backend: str) -> bool:
        """Whether asking a backend again costs again, so that no call of it may be forgotten."""
        return backend in _PAID_BY_CALL

    def follows(self, backend: str) -> bool:
        """Whether answers of a backend are waited for: one that was taken out of service may have taken its answers
        with it, but for what was paid for.
        """
        return self.pays_by_call(backend) or backend in self.settings.asked_backends

    def understands(self, job: Job) -> bool:
        """Whether this version knows what decides what becomes of a job; see `stored`."""
        return (
            job.is_understood
            and job.backend in BACKENDS
            and all(call.backend in _ASYNC_BACKENDS for call in job.pending.values())
            and are_known(job.params)
        )

    @cached_property
    def _segmind_key(self) -> KeySource:
        from aws_lambda_powertools.utilities.parameters import GetParameterError, SecretsProvider

        secrets = SecretsProvider(boto3_client=boto3.client("secretsmanager", config=_CONFIG))

        def key(refresh: bool) -> str:
            # Read at each call, not at import: a snapshot would keep a rotated key.
            try:
                return str(secrets.get(self.settings.segmind_secret_id, max_age=300, force_fetch=refresh))
            except GetParameterError:
                raise BackendUnreachable("The backend's key could not be read") from None

        return key

    def _segmind_asked(self, patience: Callable[[Img2ImgParams], float] = lambda _: math.inf) -> Backend:
        if self.settings.segmind_api == "v2":
            return self._segmind_queue(patience)
        from img2img.backends.segmind import SegmindBackend

        return SegmindBackend(
            base_url=self.settings.segmind_base_url,
            key=self._segmind_key,
            timeout=self.settings.segmind_timeout,
            patience=patience,
        )

    def _segmind_queue(self, patience: Callable[[Img2ImgParams], float] = lambda _: math.inf) -> SegmindQueue:
        from img2img.backends.segmind_v2 import SegmindQueue

        return SegmindQueue(
            base_url=self.settings.segmind_base_url,
            origins=self.settings.segmind_output_origins.split(","),
            key=self._segmind_key,
            timeout=self.settings.segmind_timeout,
            patience=patience,
            clock=self.clock,
        )

    @cached_property
    def segmind_queue(self) -> SegmindQueue:
        """Segmind's queue, for what lies in it whatever is asked by now."""
        return self._segmind_queue()


_ASYNC_BACKENDS: Mapping[str, Callable[[Services], AsyncBackend]] = {
    "segmind": lambda use: use.segmind_queue,
    "sagemaker": lambda use: use.sagemaker,
}
# An endpoint costs by the hour, whatever it is asked.
_PAID_BY_CALL = frozenset({"segmind"})


@cache
def services() -> Services:
    """Return the services of this process, made from its environment once."""
    return Services(Settings.from_env(os.environ))
