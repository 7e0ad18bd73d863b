"""Reading what a newer version stored before it was rolled back.

Attributes that are not known here are ignored. Values that are not known, such as a status, are kept and shown as they
are stored, and never acted on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import StrEnum
from typing import Any, Self, TypeVar

T = TypeVar("T")


class StoredEnum(StrEnum):
    """An enumeration that also takes values that it does not list."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        unknown: Self = cls._new_member_(cls, value)  # type: ignore[attr-defined]
        unknown._name_ = unknown._value_ = value
        return unknown

    @property
    def is_known(self) -> bool:
        """Whether this version lists the value."""
        return any(self is member for member in type(self))


def known_fields(kind: type[T], stored: Mapping[str, Any]) -> T:
    """Return a dataclass of what is stored, without what it has no field for."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in stored.items() if name in names})
