"""Everything that can go wrong, as one tree.

ServiceError                        code                    HTTP  retryable
├── InvalidRequest                  invalid_request          400
│   └── ImageUnreachable            image_unreachable        400
├── InsufficientCredits             insufficient_credits     402
├── Forbidden                       forbidden                403
│   ├── KeyUnknown                  key_unknown              403
│   ├── KeyDisabled                 key_disabled             403
│   └── TeamDisabled                team_disabled            403
├── NotFound                        not_found                404
│   └── PresetUnknown               preset_unknown           404
├── AlreadyExists                   already_exists           409
├── NotUnderstood                   not_understood           409
├── IdempotencyInFlight             idempotency_in_flight    409
├── Gone                            gone                     410
│   └── UploadMissing               upload_missing           410
├── TooLarge                        too_large                413
│   └── AnswerTooLarge              answer_too_large         413
├── UnsupportedMediaType            unsupported_media_type   415
│   └── UnsupportedImage            unsupported_image        415
├── IdempotencyKeyReused            idempotency_key_reused   422
└── JobError: what ends a job as `failed`
    ├── InternalError               internal_error           500
    ├── BackendRefused              backend_refused          502
    ├── BackendBroken               backend_broken           502
    ├── BackendFailed               backend_failed           502  yes
    ├── BackendUnreachable          backend_unreachable      502  yes
    ├── OutputBlocked               output_blocked           502
    ├── BackendUnauthorized         backend_unauthorized     503
    ├── BackendOutOfCredits         backend_out_of_credits   503
    ├── BackendGone                 backend_gone             503
    ├── BackendRateLimited          backend_rate_limited     503  yes
    ├── BackendTimeout              backend_timeout          504
    ├── BackendGatewayTimeout       backend_gateway_timeout  504  yes
    └── DeadlineExceeded            deadline_exceeded        504

`retryable` says that another attempt may be made; a backend's error only when that cannot be paid twice. A `detail` is
shown to the caller, so it never holds a secret, a traceback or another team's data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class FieldError:
    """One wrong field of a request: its name and what would have been accepted."""

    field: str
    detail: str


class ServiceError(Exception):
    """Base of every error that a caller may see."""

    code: ClassVar[str]
    status: ClassVar[int]
    title: ClassVar[str]
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str, *, errors: Sequence[FieldError] = (), retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = tuple(errors)
        self.retry_after = retry_after

    @property
    def members(self) -> Mapping[str, int]:
        """What a program can read of it, beside the code."""
        return {}

    @classmethod
    def of_field(cls, field: str, detail: str) -> ServiceError:
        """Return the error that blames one field."""
        return cls(f"{field}: {detail}", errors=[FieldError(field, detail)])


class InvalidRequest(ServiceError):
    code, status, title = "invalid_request", 400, "The request is not valid"

    @classmethod
    def of_fields(cls, errors: Sequence[FieldError]) -> InvalidRequest:
        """Return the error that blames several fields; of very many, the first twenty."""
        return cls("; ".join(f"{e.field}: {e.detail}" for e in errors[:20]), errors=errors[:20])


class ImageUnreachable(InvalidRequest):
    code, title = "image_unreachable", "The image could not be fetched from its URL"


class InsufficientCredits(ServiceError):
    """The team's balance is short; amounts in thousandths of a credit."""

    code, status, title = "insufficient_credits", 402, "Not enough credits"

    def __init__(self, detail: str, *, price: int = 0, balance: int = 0) -> None:
        super().__init__(detail)
        self.price = price
        self.balance = balance

    @property
    def members(self) -> Mapping[str, int]:
        return {"price": self.price, "balance": self.balance}


class Forbidden(ServiceError):
    code, status, title = "forbidden", 403, "API key refused"


class KeyUnknown(Forbidden):
    code = "key_unknown"


class KeyDisabled(Forbidden):
    code = "key_disabled"


class TeamDisabled(Forbidden):
    code = "team_disabled"


class NotFound(ServiceError):
    code, status, title = "not_found", 404, "Not found"


class PresetUnknown(NotFound):
    code = "preset_unknown"


class AlreadyExists(ServiceError):
    code, status, title = "already_exists", 409, "Already exists"


class NotUnderstood(ServiceError):
    code, status, title = "not_understood", 409, "Stored by a newer version of the service"


class IdempotencyInFlight(ServiceError):
    code, status, title = "idempotency_in_flight", 409, "A request with this Idempotency-Key is in flight"


class Gone(ServiceError):
    code, status, title = "gone", 410, "Gone"


class UploadMissing(Gone):
    code, title = "upload_missing", "The upload did not come in time"


class TooLarge(ServiceError):
    code, status, title = "too_large", 413, "Too large"


class AnswerTooLarge(TooLarge):
    code, title = "answer_too_large", "The answer does not fit; use the URLs"


class UnsupportedMediaType(ServiceError):
    code, status, title = "unsupported_media_type", 415, "Unsupported content type"


class UnsupportedImage(UnsupportedMediaType):
    code, title = "unsupported_image", "Not an image that can be read"


class IdempotencyKeyReused(ServiceError):
    code, status, title = "idempotency_key_reused", 422, "This Idempotency-Key was used with another payload"


class JobError(ServiceError):
    """What ends a job as `failed`; the status is for a caller who waits."""


class InternalError(JobError):
    code, status, title = "internal_error", 500, "Internal error"


class BackendRefused(JobError):
    code, status, title = "backend_refused", 502, "The backend refused the request"


class BackendBroken(JobError):
    code, status, title = "backend_broken", 502, "The backend's answer broke off or was no image"


class BackendFailed(JobError):
    code, status, title = "backend_failed", 502, "The backend failed"
    retryable = True


class BackendUnreachable(JobError):
    code, status, title = "backend_unreachable", 502, "The backend could not be reached"
    retryable = True


class OutputBlocked(JobError):
    code, status, title = "output_blocked", 502, "The backend's safety checker blocked every output"


class BackendUnauthorized(JobError):
    code, status, title = "backend_unauthorized", 503, "The backend does not accept the service's key"


class BackendOutOfCredits(JobError):
    code, status, title = "backend_out_of_credits", 503, "The backend is out of credits"


class BackendGone(JobError):
    code, status, title = "backend_gone", 503, "The backend has the model no more"


class BackendRateLimited(JobError):
    code, status, title = "backend_rate_limited", 503, "The backend's rate limit is reached"
    retryable = True


class BackendTimeout(JobError):
    code, status, title = "backend_timeout", 504, "The backend did not answer in time"


class BackendGatewayTimeout(JobError):
    code, status, title = "backend_gateway_timeout", 504, "The backend reported a timeout"
    retryable = True


class DeadlineExceeded(JobError):
    code, status, title = "deadline_exceeded", 504, "The job's deadline passed"


def _tree(root: type[ServiceError]) -> Iterator[type[ServiceError]]:
    for child in root.__subclasses__():
        yield child
        yield from _tree(child)


def recorded_error(code: str, detail: str) -> ServiceError:
    """Return the error that a failed job recorded as `code`; an unknown one is an `InternalError` of that code."""
    for error in _tree(ServiceError):
        if error.__dict__.get("code") == code:
            return error(detail)
    unknown = InternalError(detail)
    # This one's own: a newer version recorded it.
    unknown.code = code  # type: ignore[misc]
    return unknown
