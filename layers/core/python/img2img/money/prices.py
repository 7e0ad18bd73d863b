"""What a job costs. All amounts are integer thousandths of a credit: no rounding ever loses or makes money."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from img2img.params import UNIT_OF_WORK, Img2ImgParams

# Part of every price's version: raise it with a change of `PriceTable.quote`.
_FORMULA = 1
_TABLE = re.compile(r"[1-9][0-9]{0,8}(,[a-z]+=[1-9][0-9]{0,8})*")


def in_credits(thousandths: int) -> str:
    """Return an amount as people read it: 1500 is "1.5"."""
    sign = "-" if thousandths < 0 else ""
    whole, rest = divmod(abs(thousandths), 1000)
    return f"{sign}{whole}.{rest:03}".rstrip("0").rstrip(".")


def from_credits(text: str) -> int:
    """Return the thousandths that a decimal number of credits is. Raises `ValueError`."""
    found = re.fullmatch(r"([+-]?)(\d{1,12})(?:\.(\d{1,3}))?", text, re.ASCII)
    if not found:
        raise ValueError("must be a number of credits with at most three decimals, for example 100 or 2.5")
    sign, whole, rest = found.groups()
    return (-1 if sign == "-" else 1) * (int(whole) * 1000 + int((rest or "").ljust(3, "0")))


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A job's side of the books: `reserved` when it was created; once it has ended, `charged + released == reserved`.

    Thousandths of a credit. `samples` share the reserved amount equally.
    """

    reserved: int
    charged: int = 0
    released: int = 0
    price_version: str

    def settled(self, *, samples: int, delivered: int) -> Receipt:
        """Return the receipt of a job that delivered so many of its samples."""
        charged = self.reserved // samples * delivered
        return Receipt(
            reserved=self.reserved,
            charged=charged,
            released=self.reserved - charged,
            price_version=self.price_version,
        )


@dataclass(frozen=True)
class PriceTable:
    """The base price: thousandths of a credit for one sample of 20 steps and 512 x 512 pixels."""

    base: int
    of_backend: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> PriceTable:
        """Read `1000`, or `1000,sagemaker=600` where a backend has a base of its own. Raises `ValueError`."""
        if not _TABLE.fullmatch(text):
            raise ValueError(f"a price table must read like 1000 or 1000,sagemaker=600, not {text!r}")
        base, *others = text.split(",")
        of_backend = {name: int(number) for name, _, number in (other.partition("=") for other in others)}
        if len(of_backend) < len(others):
            raise ValueError(f"a price table must name each backend once, not {text!r}")
        return cls(int(base), of_backend)

    @property
    def version(self) -> str:
        """What a price was made of: the formula's number and the table, so that any receipt can be recomputed."""
        pairs = [f"{name}={base}" for name, base in sorted(self.of_backend.items())]
        return f"{_FORMULA}:{','.join([str(self.base), *pairs])}"

    def quote(self, params: Img2ImgParams, backend: str) -> Receipt:
        """Return the receipt of a new job: samples x base x steps / 20 x pixels / (512 x 512).

        One sample's price is rounded up to a thousandth, so that each can be charged or released by itself.
        """
        base = self.of_backend.get(backend, self.base)
        one = -(-base * params.work // UNIT_OF_WORK)
        return Receipt(reserved=one * params.samples, price_version=self.version)
