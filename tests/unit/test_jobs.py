"""What a job may become, and what its samples make of it."""

from __future__ import annotations

import pytest

from img2img.backends import GeneratedImage, Pending
from img2img.errors import (
    BackendFailed,
    BackendOutOfCredits,
    BackendTimeout,
    DeadlineExceeded,
    InternalError,
    JobError,
    OutputBlocked,
    ServiceError,
    UnsupportedImage,
    recorded_error,
)
from img2img.jobs.job import (
    NEXT,
    Job,
    Output,
    OutputStatus,
    Status,
    Wait,
    concluded,
    ended,
    given_up,
    missing,
    served,
    verdict,
    with_outputs,
)
from img2img.money.prices import Receipt
from img2img.params import Img2ImgParams


def output(index: int, status: OutputStatus, **others: object) -> Output:
    return Output(index=index, status=status, seed=7 + index, **others)


def refused(index: int, error: type[JobError], detail: str = "why") -> Output:
    return output(index, OutputStatus.FAILED, error_code=error.code, error_detail=detail)


def job(**others: object) -> Job:
    fields = {
        "id": "01ARZ3NDEKTSV4RRFFQ69G5FAV",
        "team": "default",
        "key_id": "key",
        "correlation_id": "request",
        "status": Status.QUEUED,
        "params": Img2ImgParams(prompt="a castle", seed=7),
        "backend": "segmind",
        "credits": Receipt(reserved=1000, price_version="1:1000"),
        "created_ms": 1_700_000_000_000,
        "deadline_at": 1_700_001_800,
    }
    return Job(**{**fields, **others})


OK, BLOCKED = OutputStatus.SUCCEEDED, OutputStatus.BLOCKED


def test_the_statuses_that_a_job_may_take():
    assert {
        Status.AWAITING_UPLOAD: {Status.QUEUED, Status.FAILED, Status.CANCELED},
        # Succeeded: the deadline passed while some samples waited, and others had been delivered.
        Status.QUEUED: {Status.PROCESSING, Status.SUCCEEDED, Status.FAILED, Status.CANCELED},
        Status.PROCESSING: {Status.QUEUED, Status.SUCCEEDED, Status.FAILED, Status.CANCELED},
        Status.SUCCEEDED: set(),
        Status.FAILED: set(),
        Status.CANCELED: set(),
    } == NEXT


@pytest.mark.parametrize("status", Status)
def test_a_status_is_terminal_when_nothing_follows_it(status):
    assert status.is_terminal == (status in (Status.SUCCEEDED, Status.FAILED, Status.CANCELED))
    assert status not in NEXT[status]


@pytest.mark.parametrize("end", [Status.FAILED, Status.CANCELED])
def test_every_unfinished_job_can_fail_and_be_canceled(end):
    assert {old for old in Status if end in NEXT[old]} == {status for status in Status if not status.is_terminal}


@pytest.mark.parametrize(
    "outputs",
    [
        (output(0, OK),),
        (output(0, BLOCKED), output(1, OK)),
        (refused(0, BackendFailed), output(1, BLOCKED), output(2, OK)),
    ],
)
def test_one_picture_makes_a_job_succeed(outputs):
    assert verdict(job(outputs=outputs)) is None


def test_a_job_fails_of_its_first_failed_sample():
    outputs = (output(0, BLOCKED), refused(1, BackendOutOfCredits, "no credits"), refused(2, BackendFailed))
    found = verdict(job(outputs=outputs))
    assert type(found) is BackendOutOfCredits
    assert found.detail == "no credits"


def test_a_job_whose_samples_are_all_black_is_blocked():
    assert type(verdict(job(outputs=(output(0, BLOCKED), output(1, BLOCKED))))) is OutputBlocked


def test_outputs_that_come_later_are_put_in_order_and_replace_earlier_ones():
    known = job(outputs=(output(1, BLOCKED), output(3, OK)))
    found = with_outputs(known, [output(2, OK), output(0, OK), output(1, OK)]).outputs
    assert [(item.index, item.status) for item in found] == [(index, OK) for index in range(4)]


def test_what_is_missing_is_what_has_not_ended():
    samples = Img2ImgParams(prompt="a castle", seed=7, samples=4)
    assert missing(job(params=samples)) == [0, 1, 2, 3]
    assert missing(job(params=samples, outputs=(refused(0, BackendFailed), output(2, BLOCKED)))) == [1, 3]


def test_a_job_given_up_keeps_what_was_delivered():
    samples = Img2ImgParams(prompt="a castle", seed=7, samples=3)
    given = given_up(job(params=samples, outputs=(output(1, OK),)), DeadlineExceeded("too late"))
    assert missing(given) == []
    assert [(item.status, item.seed, item.error_code) for item in given.outputs] == [
        (OutputStatus.FAILED, 7, "deadline_exceeded"),
        (OK, 8, ""),
        (OutputStatus.FAILED, 9, "deadline_exceeded"),
    ]
    assert verdict(given) is None


def test_a_job_given_up_with_nothing_delivered_fails_of_why():
    found = verdict(given_up(job(), DeadlineExceeded("too late")))
    assert type(found) is DeadlineExceeded
    assert found.detail == "too late"


FOUR = {
    "params": Img2ImgParams(prompt="a castle", seed=7, samples=4),
    "credits": Receipt(reserved=4812, price_version="1:1203"),
}


@pytest.mark.parametrize("delivered", range(1, 5))
def test_a_job_that_succeeded_is_charged_for_what_it_delivered(delivered):
    samples = [output(index, OK if index < delivered else BLOCKED) for index in range(4)]
    found = ended(job(**FOUR, outputs=tuple(samples)), Status.SUCCEEDED, at_ms=1).credits
    assert (found.reserved, found.price_version) == (4812, "1:1203")
    assert (found.charged, found.released) == (1203 * delivered, 1203 * (4 - delivered))


@pytest.mark.parametrize(
    ("status", "outputs"),
    [
        (Status.FAILED, (refused(0, BackendFailed), output(1, BLOCKED))),
        (Status.FAILED, ()),
        (Status.CANCELED, ()),
        (Status.CANCELED, (output(0, OK),)),
    ],
)
def test_a_job_that_failed_or_was_canceled_costs_nothing(status, outputs):
    found = ended(job(**FOUR, outputs=outputs), status, at_ms=1).credits
    assert (found.charged, found.released) == (0, 4812)


def test_an_ended_job_waits_for_nothing_and_keeps_its_error_and_outputs():
    was = job(status=Status.PROCESSING, lease="lease", due_at=5, outputs=(refused(0, BackendFailed, "broke"),))
    found = ended(was, Status.FAILED, at_ms=1_700_000_001_500, error=BackendFailed("broke"))
    assert (found.status, found.completed_ms) == (Status.FAILED, 1_700_000_001_500)
    assert (found.lease, found.due_at) == (None, None)
    assert (found.error_code, found.error_detail) == ("backend_failed", "broke")
    assert found.outputs == was.outputs


def test_an_ended_job_is_at_no_backend_any_more():
    call = Pending(backend="sagemaker", notes={"inference_id": "a-1-0"})
    was = job(status=Status.PROCESSING, pending={0: call}, waits_for=Wait.ENDPOINT_STARTING, backend="sagemaker")
    for end in (Status.CANCELED, Status.FAILED):
        found = ended(was, end, at_ms=1)
        assert (found.pending, found.waits_for, found.backend) == ({}, None, "sagemaker")


@pytest.mark.parametrize(
    "answer",
    [
        GeneratedImage(b"a", 1.0, backend="sagemaker", reason="backend_failed"),
        Pending(backend="sagemaker", reason="backend_failed", notes={"inference_id": "a-1-0"}),
    ],
)
def test_a_job_knows_which_backend_serves_it_and_why(answer):
    found = served(job(), answer)
    assert (found.backend, found.backend_reason) == ("sagemaker", "backend_failed")
    again = served(found, GeneratedImage(b"a", 1.0, "segmind"))
    assert (again.backend, again.backend_reason) == ("segmind", "")


def test_a_sample_that_is_on_its_way_is_missing():
    call = Pending(backend="sagemaker", notes={"inference_id": "a-1-0"})
    assert missing(job(pending={0: call})) == [0]


def test_samples_generated_together_take_as_long_as_the_longest():
    assert job().generation_seconds == 0
    assert job(outputs=(output(0, OK, seconds=1.5), output(1, OK, seconds=2.5))).generation_seconds == 2.5


def test_an_output_is_found_by_its_index():
    second = output(1, OK)
    assert job(outputs=(second,)).output(1) is second
    assert job(outputs=(second,)).output(0) is None


def test_a_failed_job_knows_its_error():
    assert job().error is None
    found = job(status=Status.FAILED, error_code="deadline_exceeded", error_detail="too late").error
    assert type(found) is DeadlineExceeded
    assert (found.detail, found.status) == ("too late", 504)


def below(root: type[ServiceError]) -> list[type[ServiceError]]:
    return [child for direct in root.__subclasses__() for child in (direct, *below(direct))]


@pytest.mark.parametrize("error", [e for e in below(ServiceError) if "code" in e.__dict__], ids=lambda e: e.__name__)
def test_every_error_is_found_again_by_its_code(error):
    found = recorded_error(error.code, "detail")
    assert (type(found), found.detail) == (error, "detail")


@pytest.mark.parametrize("error", [e for e in below(JobError) if "code" in e.__dict__], ids=lambda e: e.__name__)
def test_an_error_of_running_is_the_servers(error):
    assert error.status in (500, 502, 503, 504)


def test_an_error_that_no_version_knows_is_internal():
    assert type(recorded_error("of_a_later_version", "detail")) is InternalError
    assert type(recorded_error("", "detail")) is InternalError


def test_a_job_of_no_use_fails_of_what_its_file_was():
    found = verdict(given_up(job(status=Status.AWAITING_UPLOAD), UnsupportedImage("no image")))
    assert (type(found), found.detail) == (UnsupportedImage, "no image")


@pytest.mark.parametrize(
    ("outputs", "status", "charged"),
    [
        ((output(0, OK), refused(1, BackendFailed)), Status.SUCCEEDED, 1000),
        ((output(0, BLOCKED), refused(1, BackendFailed)), Status.FAILED, 0),
    ],
)
def test_a_job_whose_samples_have_all_ended_is_over(outputs, status, charged):
    params = Img2ImgParams(prompt="a castle", seed=7, samples=2)
    running = job(params=params, outputs=outputs, credits=Receipt(reserved=2000, price_version="1:1000"), lease="x")
    over = concluded(running, at_ms=1_700_000_005_000)
    assert (over.status, over.completed_ms, over.lease, over.due_at) == (status, 1_700_000_005_000, None, None)
    assert (over.credits.charged, over.credits.released) == (charged, 2000 - charged)
    assert over.error_code == ("" if status is Status.SUCCEEDED else "backend_failed")


@pytest.mark.parametrize(
    ("error", "again"),
    [
        ("backend_failed", True),
        ("backend_gateway_timeout", True),
        ("backend_rate_limited", True),
        ("backend_unreachable", True),
        ("backend_broken", False),
        ("backend_out_of_credits", False),
        ("backend_refused", False),
        (BackendTimeout.code, False),
        ("backend_unauthorized", False),
        ("deadline_exceeded", False),
        ("internal_error", False),
        ("output_blocked", False),
    ],
)
def test_only_what_cannot_have_been_billed_is_retryable(error, again):
    assert recorded_error(error, "").retryable is again
