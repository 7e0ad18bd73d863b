"""What a caller is told instead of a picture, as one tree.

Refused                         code                    HTTP
├── InvalidRequest              invalid_request          400
├── TooLarge                    too_large                413
├── UnsupportedMediaType        unsupported_media_type   415
├── InternalError               internal_error           500
└── Unavailable                 busy                     503  with Retry-After
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class FieldError:
    """One wrong field of a request: its name and what would have been accepted."""

    field: str
    detail: str


class Refused(Exception):
    """Base of every error that a caller may see. Its text never holds a prompt or anything of ours."""

    code: ClassVar[str]
    status: ClassVar[int]

    def __init__(self, detail: str, errors: Sequence[FieldError] = (), *, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = tuple(errors)
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        return {"code": self.code, "detail": self.detail, "errors": [asdict(error) for error in self.errors]}

    @property
    def headers(self) -> dict[str, str]:
        """The answer's headers."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


class InvalidRequest(Refused):
    """A field, or the body as a whole, is not accepted."""

    code = "invalid_request"
    status = 400

    @classmethod
    def of_fields(cls, errors: Sequence[FieldError]) -> InvalidRequest:
        """Return the error that names these fields."""
        return cls("; ".join(f"{error.field}: {error.detail}" for error in errors), errors)


class TooLarge(Refused):
    """The body is larger than SageMaker would let through."""

    code = "too_large"
    status = 413


class UnsupportedMediaType(Refused):
    """The body is no JSON by its content type."""

    code = "unsupported_media_type"
    status = 415


class InternalError(Refused):
    """The picture could not be made."""

    code = "internal_error"
    status = 500


class Unavailable(Refused):
    """Another time, or another instance, will do: the queue is full, or the process starts or stops."""

    code = "busy"
    status = 503
