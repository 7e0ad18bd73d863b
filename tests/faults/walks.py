"""One delivery, walked through call by call."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.faults.calls import Place, apart, places


@dataclass(frozen=True)
class Walk:
    """One delivery of a message or a notice: how to come to it, and which calls it takes.

    `order` is that of the calls of several samples, whose threads could make them in any other.
    """

    prepare: Callable[[Any], str]
    calls: tuple[str, ...]
    order: tuple[str, ...] = ()
    samples: int = 1

    @property
    def is_side_by_side(self) -> bool:
        """Whether one sample's calls come between another's."""
        turns = itertools.groupby(call.split()[1] for call in self.order)
        return len(list(turns)) > len({call.split()[1] for call in self.order})

    @property
    def gaps(self) -> list[Place]:
        """The places that leave different things behind; side by side, a call's end is not the other's beginning."""
        every = places(self.calls)
        return every if self.is_side_by_side else apart(every)
