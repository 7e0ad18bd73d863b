"""Answers that backends give later: of which call, and from whom."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from img2img.backends import GeneratedImage, Notice, Pending
from img2img.errors import BackendFailed
from img2img.flows.generate import take_answers
from img2img.jobs.job import Job, Output, OutputStatus, Status
from img2img.money.prices import Receipt
from img2img.params import Img2ImgParams


class FakeBackend:
    """Has the answers of `done`, by what it is asked with, and remembers what it was asked with."""

    def __init__(self, name: str, **done: GeneratedImage | Exception) -> None:
        self.name = name
        self.done = done
        self.asked: list[tuple[str | None, str | None]] = []

    def answer(self, pending: Pending | None, notice: Notice | None) -> GeneratedImage | None:
        asked = (pending.notes["call"] if pending else None, notice.call if notice else None)
        self.asked.append(asked)
        found = self.done.get(asked[1] or asked[0] or "")
        if isinstance(found, Exception):
            raise found
        return found


def flagged(backend: str) -> GeneratedImage:
    return GeneratedImage(b"", 1.0, backend, flagged=True)


def job(**pending: str) -> Job:
    """Return a job of two samples, whose calls are pending at the backends named: `s0="vertex"`."""
    calls = {
        int(name[1:]): Pending(backend=backend, notes={"call": f"{backend}-{name[1:]}"})
        for name, backend in pending.items()
    }
    return Job(
        id="JOB",
        team="default",
        key_id="key",
        correlation_id="request",
        status=Status.PROCESSING,
        params=Img2ImgParams(prompt="p", samples=2, seed=1),
        backend="segmind",
        credits=Receipt(reserved=2000, price_version="1:1000"),
        created_ms=0,
        deadline_at=1800,
        pending=calls,
    )


def notice(backend: str, call: str, *, index: int = 0, output: str | None = "s3://there") -> Notice:
    return Notice(backend=backend, name=f"default/JOB/1/{index}", call=call, output=output)


def services(*backends: FakeBackend) -> Any:
    of = {backend.name: backend for backend in backends}
    return SimpleNamespace(async_backend=of.__getitem__, storage=None)


def test_each_call_is_looked_for_at_its_own_backend():
    first, second = FakeBackend("vertex"), FakeBackend("sagemaker", **{"sagemaker-1": flagged("sagemaker")})
    samples = take_answers(services(first, second), job(s0="vertex", s1="sagemaker"), None)
    assert [(sample.index, sample.output is not None) for sample in samples] == [(0, False), (1, True)]
    assert (first.asked, second.asked) == ([("vertex-0", None)], [("sagemaker-1", None)])


def test_a_notice_goes_to_the_backend_that_gave_it():
    first, second = FakeBackend("vertex"), FakeBackend("sagemaker", early=flagged("sagemaker"))
    [sample] = take_answers(services(first, second), job(s0="vertex"), notice("sagemaker", "early"))
    assert sample.output
    assert sample.output.status is OutputStatus.BLOCKED
    assert (first.asked, second.asked) == ([], [(None, "early")])


def test_what_another_backends_notice_does_not_bring_is_still_looked_for():
    first, second = FakeBackend("vertex", **{"vertex-0": flagged("vertex")}), FakeBackend("sagemaker")
    [sample] = take_answers(services(first, second), job(s0="vertex"), notice("sagemaker", "early"))
    assert sample.output
    assert (first.asked, second.asked) == ([("vertex-0", None)], [(None, "early")])


def test_a_notice_of_the_pending_call_goes_with_it():
    only = FakeBackend("vertex", **{"vertex-0": BackendFailed("no")})
    [sample] = take_answers(services(only), job(s0="vertex"), notice("vertex", "vertex-0", output=None))
    assert isinstance(sample.error, BackendFailed)
    assert only.asked == [("vertex-0", "vertex-0")]


@pytest.mark.parametrize("pending", [{}, {"s1": "vertex"}])
def test_a_failure_that_nobody_waits_for_asks_nobody(pending):
    only = FakeBackend("vertex")
    assert [
        sample.index for sample in take_answers(services(only), job(**pending), notice("vertex", "x", output=None))
    ] == [int(name[1:]) for name in pending]
    assert [asked for asked in only.asked if asked[1]] == []


def test_a_notice_of_a_sample_that_has_ended_asks_nobody():
    ended = replace(job(), outputs=(Output(index=0, status=OutputStatus.BLOCKED, seed=1),))
    assert take_answers(services(FakeBackend("vertex")), ended, notice("vertex", "late")) == []
