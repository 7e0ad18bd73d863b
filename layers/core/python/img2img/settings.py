"""The only place that reads the environment. `template.yaml` sets every name below; docs/operate.md lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any


def _setting(name: str, help: str, default: Any = MISSING, choices: tuple[str, ...] = ()) -> Any:  # noqa: A002 (the usual name)
    metadata = {"name": name, "help": help, "choices": choices}
    return field(metadata=metadata, **({} if default is MISSING else {"default": default}))


BACKENDS = ("segmind", "sagemaker")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a deployment can choose. Sizes in bytes, times in seconds."""

    jobs_table: str = _setting("JOBS_TABLE", "DynamoDB table of jobs and guards")
    idempotency_table: str = _setting("IDEMPOTENCY_TABLE", "DynamoDB table of Powertools idempotency")
    uploads_bucket: str = _setting("UPLOADS_BUCKET", "bucket of uploads and prepared inputs")
    results_bucket: str = _setting("RESULTS_BUCKET", "bucket of results")
    jobs_queue_url: str = _setting("JOBS_QUEUE_URL", "SQS queue that feeds the worker")
    uploads_queue_url: str = _setting("UPLOADS_QUEUE_URL", "SQS queue of S3's notices of new objects")
    segmind_secret_id: str = _setting("SEGMIND_SECRET_ID", "Secrets Manager secret that holds the Segmind key", "")
    segmind_api: str = _setting("SEGMIND_API", "Segmind's API that is asked: v1 or v2", "v1", ("v1", "v2"))
    segmind_base_url: str = _setting(
        "SEGMIND_BASE_URL", "address of Segmind's v1 API, beside which v2 lies", "https://api.segmind.com/v1"
    )
    segmind_output_origins: str = _setting(
        "SEGMIND_OUTPUT_ORIGINS",
        "v2: origins that Segmind's pictures are fetched from, between commas",
        "https://images.segmind.com,https://segmind-inference-io.s3.amazonaws.com",
    )
    segmind_timeout: int = _setting("SEGMIND_TIMEOUT_SECONDS", "longest wait for one Segmind answer", 90)
    backend: str = _setting(
        "BACKEND",
        "what generates: segmind, sagemaker, or auto (Segmind first)",
        "segmind",
        (*BACKENDS, "auto"),
    )
    fallback_after: int = _setting(
        "FALLBACK_AFTER_SECONDS",
        "with `auto`, wait for Segmind's picture of 20 steps, 512 x 512, others in proportion",
        8,
    )
    sagemaker_endpoint: str = _setting("SAGEMAKER_ENDPOINT", "name of the SageMaker endpoint", "")
    sagemaker_invocation: str = _setting(
        "SAGEMAKER_INVOCATION", "how the endpoint is called: async or realtime", "async", ("async", "realtime")
    )
    sagemaker_timeout: int = _setting(
        "SAGEMAKER_TIMEOUT_SECONDS", "async: longest that the endpoint may work on one sample, once it has begun", 600
    )
    results_queue_url: str = _setting("RESULTS_QUEUE_URL", "SQS queue of SageMaker's notices of what it has done", "")
    price_base: str = _setting(
        "PRICE_BASE", "thousandths of a credit for a sample of 20 steps and 512 x 512, `backend=` others", "1000"
    )
    low_balance: int = _setting("LOW_BALANCE_CREDITS", "balance below which a team counts as low, in credits", 10)
    lease_seconds: int = _setting("LEASE_SECONDS", "how long a claimed job belongs to one worker", 130)
    job_deadline: int = _setting("JOB_DEADLINE_SECONDS", "age at which an unfinished job fails", 1800)
    retention_days: int = _setting("RETENTION_DAYS", "days until jobs and their objects expire", 30)
    result_url_ttl: int = _setting("RESULT_URL_TTL_SECONDS", "life of a presigned result URL", 3600)
    upload_url_ttl: int = _setting("UPLOAD_URL_TTL_SECONDS", "life of a presigned upload form", 900)
    max_image_bytes: int = _setting("MAX_IMAGE_BYTES", "largest image file accepted", 25_000_000)
    max_image_pixels: int = _setting("MAX_IMAGE_PIXELS", "most pixels an image may have", 64_000_000)
    cors_origin: str = _setting("CORS_ORIGIN", "origin that browsers may call from", "*")

    @property
    def asked_backends(self) -> tuple[str, ...]:
        """The backends that are asked, the first one first."""
        return ("segmind", "sagemaker") if self.backend == "auto" else (self.backend,)

    @property
    def first_backend(self) -> str:
        """The backend that a new job is meant for, and priced by."""
        return self.asked_backends[0]

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings.

        Raises `ValueError` naming every missing or malformed variable at once.
        """
        values: dict[str, Any] = {}
        problems: list[str] = []
        for item in fields(cls):
            name = item.metadata["name"]
            text = environ.get(name)
            if not text:
                if item.default is MISSING:
                    problems.append(f"{name} is not set ({item.metadata['help']})")
                continue
            if isinstance(item.default, int):
                if not text.isascii() or not text.isdigit():
                    problems.append(f"{name} must be a whole number, not {text!r}")
                    continue
                values[item.name] = int(text)
            elif (choices := item.metadata["choices"]) and text not in choices:
                problems.append(f"{name} must be one of {', '.join(choices)}, not {text!r}")
            else:
                values[item.name] = text
        if problems:
            raise ValueError("; ".join(problems))
        return cls(**values)
