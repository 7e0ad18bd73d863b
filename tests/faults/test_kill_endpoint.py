"""Worker and collect killed at each of their calls on the way of a job through an asynchronous endpoint.

What a crash may repeat is an invocation, which costs nothing by itself; never a charge. As in `test_kill.py`, the first
test of a walk fails when its calls are no longer those that it names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.faults.calls import AFTER, BEFORE, MOMENTS, InOrder, Killed, Meanwhile, Place, apart, places
from tests.faults.deployment import LEASE, PRICE
from tests.faults.endpoint import ASKED, ONE_TAKEN, TAKEN, TAKEN_SIDE_BY_SIDE, EndpointDeployment

BACKEND = "sagemaker"

Prepare = Callable[[EndpointDeployment], str]


@dataclass(frozen=True)
class Walk:
    """One delivery of a message or a notice: how to come to it, and which calls it takes."""

    prepare: Prepare
    calls: tuple[str, ...]
    order: tuple[str, ...] = ()
    samples: int = 1
    asked: int = 1

    @property
    def gaps(self) -> list[Place]:
        """The places that leave different things behind."""
        return self.gaps_from(0)

    def gaps_from(self, number: int) -> list[Place]:
        """Return those that come after so many calls."""
        return apart(places(self.calls[number:]))

    def since(self, call: str, moment: str) -> list[Place]:
        """Return the places from one on."""
        every = places(self.calls)
        return every[every.index((call, moment)) :]


def _ids(name: str, place: tuple[str, str], *then: Callable[..., Any]) -> str:
    return "-".join([name, f"{place[1]} {place[0]}", *(what.__name__.strip("_") for what in then)])


def _assert_ended(deployment: EndpointDeployment, how: str, job_id: str) -> None:
    """Check a job that its owner ended: nothing is left of its pictures, and nothing was paid."""
    assert deployment.results(job_id) == []
    assert deployment.spent() == 0
    deployment.assert_at_rest(job_id)
    if how == "delete":
        assert deployment.job_ids() == set()
    else:
        assert deployment.system.job(job_id)["status"] == "canceled"


# The worker


def _queued(deployment: EndpointDeployment) -> str:
    return deployment.new_job()


def _two_queued(deployment: EndpointDeployment) -> str:
    return deployment.new_job(samples=2)


def _unheard(deployment: EndpointDeployment) -> str:
    """A job whose answer is there, but its notice is lost: the sweep has sent it again."""
    job_id = deployment.ask()
    deployment.lose_notices()
    deployment.system.clock.advance(61)
    deployment.system.sweep()
    deployment.receive()
    return job_id


WALKS = {
    "one sample": Walk(
        _queued,
        ("UpdateItem", "GetObject", "PutObject 0", "InvokeEndpointAsync 0", "DescribeEndpoint", "UpdateItem #2"),
    ),
    "one by one": Walk(
        _two_queued,
        ("UpdateItem", "GetObject", *ASKED, "DescribeEndpoint", "UpdateItem #2"),
        order=ASKED,
        samples=2,
    ),
    "unheard": Walk(_unheard, ("UpdateItem", "GetObject 0", "PutObject 0", "TransactWriteItems")),
}


def _message_returns(deployment: EndpointDeployment) -> None:
    """The worker asks again, and only then come the notices of the calls of both."""
    deployment.return_messages()
    deployment.listen()
    deployment.hear()


def _sweep_comes_first(deployment: EndpointDeployment) -> None:
    deployment.outlive_lease()
    deployment.system.sweep()
    deployment.work(deployment.receive())
    deployment.return_messages()


def _notice_comes(deployment: EndpointDeployment) -> None:
    deployment.outlive_lease()
    deployment.listen()
    deployment.hear()
    deployment.return_messages()


def _notice_comes_too_early(deployment: EndpointDeployment) -> None:
    """Notice and message both find the dead worker's lease: the notice stays, the message is gone."""
    deployment.listen()
    deployment.hear()
    deployment.work()
    deployment.outlive_lease()
    deployment.hear()


def _notice_comes_twice(deployment: EndpointDeployment) -> None:
    deployment.listen()
    assert len(deployment.heard) == 2 * len(deployment.endpoint.invocations)
    _notice_comes(deployment)


def _notice_is_lost(deployment: EndpointDeployment) -> None:
    deployment.listen()
    assert not deployment.heard
    _sweep_comes_first(deployment)


# What happens to the notices that leave first.
TREATMENT = {_notice_comes_twice: "twice", _notice_is_lost: "drop"}
INVOKED = WALKS["one sample"].since("InvokeEndpointAsync 0", AFTER)


def _returns() -> list[Any]:
    one, two = WALKS["one sample"], WALKS["one by one"]
    then: dict[str, list[tuple[list[tuple[str, str]], tuple[Callable[..., Any], ...]]]] = {
        "one sample": [
            (one.gaps, (_message_returns,)),
            (one.gaps_from(3), (_sweep_comes_first,)),
            (apart(INVOKED), (_notice_comes, _notice_comes_too_early, _notice_comes_twice, _notice_is_lost)),
        ],
        "one by one": [
            (two.gaps_from(2), (_message_returns,)),
            (two.gaps_from(two.calls.index("PutObject 1")), (_notice_comes,)),
        ],
        "unheard": [(WALKS["unheard"].gaps, (_message_returns,))],
    }
    return [
        pytest.param(name, *place, back, id=_ids(name, place, back))
        for name, parts in then.items()
        for places, backs in parts
        for place, back in itertools.product(places, backs)
    ]


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_takes_every_call_of_the_worker(deployment, name):
    WALKS[name].prepare(deployment)
    deployment.run(InOrder(WALKS[name].order))
    assert deployment.calls.made == list(WALKS[name].calls)


@pytest.mark.parametrize(("name", "call", "moment", "back"), _returns())
def test_a_worker_killed_at_any_call_is_followed_by_one_end(deployment, name, call, moment, back):
    walk = WALKS[name]
    job_id = walk.prepare(deployment)
    if back in TREATMENT:
        deployment.endpoint.treat_notices(TREATMENT[back])
    deployment.kill_worker(call, moment, walk.order)
    before, known = deployment.asked(), deployment.pending(job_id)

    back(deployment)
    deployment.settle()

    deployment.assert_succeeded(job_id, walk.samples)
    assert deployment.job_ids() == {job_id}
    assert deployment.spent() == PRICE * walk.samples
    asked = deployment.asked()
    assert set(asked) == set(range(walk.samples))
    # Only what was asked for by a worker that could not write it down may be asked for again, and only once.
    assert all(count == 1 or (count == 2 and before[index] and index not in known) for index, count in asked.items())
    if walk.samples == 1 and back in (_notice_comes, _notice_comes_too_early, _notice_comes_twice):
        # The notice alone says where the picture lies.
        assert asked == {0: 1}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("call", ["InvokeEndpointAsync 0", "UpdateItem #2"])
def test_a_job_whose_worker_always_dies_ends_though_its_notices_come_late(deployment, call, moment):
    job_id = _queued(deployment)
    released = (call, moment) == ("UpdateItem #2", AFTER)
    invoked = (call, moment) in INVOKED
    for _ in range(1 if released else 3):
        deployment.kill_worker(call, moment)
        deployment.outlive_lease()
    deployment.listen()
    assert len(deployment.heard) == deployment.asked()[0] == (1 if released else 3 * invoked)

    deployment.work()

    if not released:
        assert deployment.system.job(job_id)["error"]["code"] == "internal_error"
    deployment.settle()
    if released:
        deployment.assert_succeeded(job_id)
    else:
        assert deployment.system.job(job_id)["error"]["code"] == "internal_error"
        assert deployment.results(job_id) == []
        assert deployment.spent() == 0
        deployment.assert_at_rest(job_id)


@pytest.mark.parametrize(("call", "moment"), apart(INVOKED))
def test_a_notice_that_comes_while_the_worker_is_at_its_calls_is_heard_afterwards(deployment, call, moment):
    job_id = _queued(deployment)

    def notice_comes() -> None:
        deployment.listen()
        assert len(deployment.heard) == 1
        deployment.hear()

    meanwhile = Meanwhile(deployment.calls, notice_comes, (call, moment))
    deployment.run(meanwhile)
    assert meanwhile.happened
    # Before the worker has written down what it asked for, the notice has to come again.
    assert bool(deployment.heard) == ((call, moment) != ("UpdateItem #2", AFTER))
    deployment.settle()
    deployment.assert_succeeded(job_id)
    assert deployment.asked() == {0: 1}
    assert deployment.spent() == PRICE


def _end(how: str) -> Callable[[EndpointDeployment, str], None]:
    return lambda deployment, job_id: deployment.end(how, job_id)


def _sweep_gives_up(deployment: EndpointDeployment, _job_id: str) -> None:
    deployment.system.clock.advance(deployment.system.services.settings.job_deadline + LEASE)
    deployment.system.sweep()


ENDS = {"cancel": _end("cancel"), "delete": _end("delete"), "deadline": _sweep_gives_up}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize(("call", "moment"), WALKS["one sample"].gaps_from(3))
def test_a_job_ended_between_two_calls_of_its_worker_stays_ended(deployment, call, moment, how):
    job_id = _queued(deployment)
    meanwhile = Meanwhile(deployment.calls, lambda: ENDS[how](deployment, job_id), (call, moment))
    deployment.run(meanwhile)
    assert meanwhile.happened
    deployment.settle()
    if how == "deadline":
        _assert_late(deployment, job_id)
    else:
        _assert_ended(deployment, how, job_id)
    assert deployment.asked()[0] <= 1


def _assert_late(deployment: EndpointDeployment, job_id: str) -> None:
    assert deployment.system.job(job_id)["error"]["code"] == "deadline_exceeded"
    assert deployment.spent() == 0
    deployment.assert_at_rest(job_id)


@pytest.mark.parametrize("how", ["cancel", "delete"])
@pytest.mark.parametrize(("call", "moment"), apart(INVOKED))
def test_a_job_whose_worker_died_and_that_is_ended_before_its_notice_comes_leaves_no_picture(
    deployment, call, moment, how
):
    job_id = _queued(deployment)
    deployment.kill_worker(call, moment)
    deployment.end(how, job_id)
    deployment.listen()
    assert len(deployment.heard) == 1
    deployment.settle()
    _assert_ended(deployment, how, job_id)
    assert deployment.asked() == {0: 1}


@pytest.mark.parametrize("died", [False, True])
def test_a_call_that_is_never_heard_of_again_fails_its_job_at_the_deadline(deployment, died):
    deployment.endpoint.behave("lost", times=3)
    job_id = _queued(deployment)
    if died:
        deployment.kill_worker("UpdateItem #2", BEFORE)
        deployment.outlive_lease()
    deployment.work()
    deployment.settle()
    _assert_late(deployment, job_id)
    assert deployment.asked() == {0: 1 + died}


# Collect


def _one_answered(deployment: EndpointDeployment) -> str:
    return deployment.ask()


def _two_answered(deployment: EndpointDeployment) -> str:
    return deployment.ask(samples=2)


def _one_of_two_answered(deployment: EndpointDeployment) -> str:
    return deployment.ask_for_two()


def _flagged(deployment: EndpointDeployment) -> str:
    deployment.container.next.append("flagged")
    return deployment.ask()


def _failed(deployment: EndpointDeployment) -> str:
    deployment.container.next.append(500)
    return deployment.ask()


def _expired(deployment: EndpointDeployment) -> str:
    """A job whose call was too old when the endpoint got to it."""
    deployment.endpoint.behave("expired")
    return deployment.ask()


def _failed_before(deployment: EndpointDeployment) -> str:
    """A job whose notice of a failure comes again, for it to be asked for again."""
    job_id = _failed(deployment)
    deployment.hear()
    assert deployment.heard
    return job_id


ASK_AGAIN = ("UpdateItem", "UpdateItem #2", "ChangeMessageVisibility")
COLLECTS = {
    "one sample": Walk(_one_answered, ("UpdateItem", "GetObject 0", "PutObject 0", "TransactWriteItems")),
    "one by one": Walk(_two_answered, ("UpdateItem", *TAKEN, "TransactWriteItems"), order=TAKEN, samples=2),
    "side by side": Walk(
        _two_answered,
        ("UpdateItem", *TAKEN_SIDE_BY_SIDE, "TransactWriteItems"),
        order=TAKEN_SIDE_BY_SIDE,
        samples=2,
    ),
    "one of two": Walk(_one_of_two_answered, ("UpdateItem", *ONE_TAKEN, "UpdateItem #2"), order=ONE_TAKEN, samples=2),
    "failed": Walk(_failed, ASK_AGAIN, asked=2),
    "expired": Walk(_expired, ASK_AGAIN, asked=2),
    "asked for again": Walk(
        _failed_before,
        ("UpdateItem", "GetObject", "PutObject 0", "InvokeEndpointAsync 0", "UpdateItem #2"),
        asked=2,
    ),
}


def _notice_returns(deployment: EndpointDeployment) -> None:
    deployment.outlive_lease()
    deployment.hear()


def _notice_returns_too_early(deployment: EndpointDeployment) -> None:
    deployment.hear()
    deployment.outlive_lease()


def _notice_is_lost_too(deployment: EndpointDeployment) -> None:
    deployment.lose_notices()
    deployment.outlive_lease()
    deployment.system.sweep()
    deployment.receive()


def _worker_comes_first(deployment: EndpointDeployment) -> None:
    deployment.outlive_lease()
    deployment.system.sweep()
    deployment.receive()
    deployment.work()
    deployment.listen()
    deployment.hear()


def _collect_returns() -> list[Any]:
    then: dict[str, tuple[Callable[..., Any], ...]] = dict.fromkeys(COLLECTS, (_notice_returns,))
    then["one sample"] = (_notice_returns, _notice_returns_too_early, _notice_is_lost_too)
    then["one of two"] = (_worker_comes_first,)
    del then["side by side"]
    return [
        pytest.param(name, *place, back, id=_ids(name, place, back))
        for name, backs in then.items()
        for place in COLLECTS[name].gaps
        for back in backs
    ]


@pytest.mark.parametrize("name", COLLECTS)
def test_a_walk_takes_every_call_of_collect(deployment, name):
    COLLECTS[name].prepare(deployment)
    deployment.collect(InOrder(COLLECTS[name].order))
    assert deployment.calls.made == list(COLLECTS[name].calls)


@pytest.mark.parametrize(("name", "call", "moment", "back"), _collect_returns())
def test_a_collect_killed_at_any_call_is_followed_by_one_end(deployment, name, call, moment, back):
    walk = COLLECTS[name]
    job_id = walk.prepare(deployment)
    deployment.kill_collect(call, moment, walk.order)
    before, known = deployment.asked(), deployment.pending(job_id)

    deployment.container.release()
    back(deployment)
    deployment.settle()

    deployment.assert_succeeded(job_id, walk.samples)
    assert deployment.spent() == PRICE * walk.samples
    asked = deployment.asked()
    # An answer that lies there is taken, never asked for again.
    repeated = walk.asked == before[0] == 2 and 0 not in known
    assert set(asked) == set(range(walk.samples))
    assert all(walk.asked <= count <= walk.asked + repeated for count in asked.values())


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("call", ["GetObject 0", "TransactWriteItems"])
def test_a_flagged_picture_is_never_paid_for_however_collect_dies(deployment, call, moment):
    job_id = _flagged(deployment)
    deployment.kill_collect(call, moment)
    assert deployment.calls.made == ["UpdateItem", "GetObject 0", "TransactWriteItems"][: len(deployment.calls.made)]
    deployment.outlive_lease()
    deployment.settle()
    job = deployment.system.job(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "output_blocked")
    assert deployment.results(job_id) == []
    assert deployment.spent() == 0
    assert deployment.asked() == {0: 1}
    deployment.assert_at_rest(job_id)


def test_an_answer_that_is_there_makes_the_job_succeed_however_often_collect_died(deployment):
    job_id = _one_answered(deployment)
    for call, moment in (("GetObject 0", BEFORE), *itertools.product(["PutObject 0"], MOMENTS)) * 2:
        deployment.kill_collect(call, moment)
        deployment.outlive_lease()
    deployment.settle()
    deployment.assert_succeeded(job_id)
    assert deployment.asked() == {0: 1}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("call", ["UpdateItem #2", "ChangeMessageVisibility"])
def test_a_sample_that_fails_at_each_call_is_given_up_though_collect_dies_in_between(deployment, call, moment):
    deployment.container.next.extend([500] * 9)
    job_id = deployment.ask()
    deployment.kill_collect(call, moment)
    deployment.outlive_lease()
    deployment.settle()
    job = deployment.system.job(job_id)
    assert (job["status"], job["outputs"][0]["error"]["code"]) == ("failed", job["error"]["code"])
    assert 1 <= deployment.asked()[0] <= 3
    assert deployment.spent() == 0
    assert deployment.results(job_id) == []
    deployment.assert_at_rest(job_id)


def test_a_failure_that_is_told_late_counts_only_for_its_own_call(deployment):
    deployment.container.next.append(500)
    job_id = _queued(deployment)
    deployment.kill_worker("UpdateItem #2", BEFORE)
    deployment.listen()
    (late,) = deployment.heard
    deployment.return_messages()
    deployment.system.collect(deployment.heard[late])
    deployment.settle()
    deployment.assert_succeeded(job_id)
    assert deployment.asked() == {0: 2}


# Others at the same time


def _worker_comes(deployment: EndpointDeployment, _job_id: str) -> None:
    deployment.work()


def _other_notice_comes(deployment: EndpointDeployment, _job_id: str) -> None:
    (_, other) = deployment.heard
    deployment.system.collect(deployment.heard[other])


def _sent_again(deployment: EndpointDeployment) -> str:
    """A job of two answered samples, which a message and two notices are about."""
    job_id = _two_answered(deployment)
    deployment.system.clock.advance(61)
    deployment.system.sweep()
    deployment.receive()
    return job_id


@pytest.mark.parametrize("happens", [_worker_comes, _other_notice_comes])
@pytest.mark.parametrize(("call", "moment"), COLLECTS["one by one"].gaps_from(1))
def test_a_message_that_comes_between_two_calls_of_collect_changes_nothing(deployment, call, moment, happens):
    job_id = _sent_again(deployment)
    meanwhile = Meanwhile(deployment.calls, lambda: happens(deployment, job_id), (call, moment), TAKEN)
    deployment.collect(meanwhile)
    assert meanwhile.happened
    deployment.settle()
    deployment.assert_succeeded(job_id, samples=2)
    assert deployment.asked() == {0: 1, 1: 1}
    assert deployment.spent() == 2 * PRICE


def test_a_collect_that_outlives_its_lease_changes_nothing_of_what_the_next_one_holds(deployment):
    job_id = _one_answered(deployment)
    taken_over = []

    def take_over() -> None:
        deployment.outlive_lease()
        taken_over.append(deployment.system.services.jobs.claim("default", job_id, lease_seconds=LEASE)[1])

    deployment.collect(Meanwhile(deployment.calls, take_over, ("PutObject 0", BEFORE)))
    item = deployment.item(job_id)
    assert (item["status"]["S"], item["lease"]["S"]) == ("processing", taken_over[0].lease)
    deployment.outlive_lease()
    deployment.settle()
    deployment.assert_succeeded(job_id)
    assert deployment.asked() == {0: 1}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize(("call", "moment"), COLLECTS["one sample"].gaps)
def test_a_job_ended_between_two_calls_of_collect_stays_ended(deployment, call, moment, how):
    job_id = _one_answered(deployment)
    meanwhile = Meanwhile(deployment.calls, lambda: ENDS[how](deployment, job_id), (call, moment))
    deployment.collect(meanwhile)
    assert meanwhile.happened
    deployment.settle()
    if (call, moment, how) == ("TransactWriteItems", AFTER, "delete"):
        assert deployment.results(job_id) == []
        assert deployment.spent() == PRICE
        assert deployment.job_ids() == set()
    elif (call, moment) == ("TransactWriteItems", AFTER):
        # It had succeeded before.
        deployment.assert_succeeded(job_id)
        assert deployment.spent() == PRICE
    elif how == "deadline":
        _assert_late(deployment, job_id)
    else:
        _assert_ended(deployment, how, job_id)
    assert deployment.asked() == {0: 1}


@pytest.mark.parametrize("how", ["cancel", "delete"])
@pytest.mark.parametrize(("call", "moment"), COLLECTS["failed"].gaps)
def test_a_job_ended_between_two_calls_that_hear_of_a_failure_is_not_asked_for_again(deployment, call, moment, how):
    job_id = _failed(deployment)
    meanwhile = Meanwhile(deployment.calls, lambda: ENDS[how](deployment, job_id), (call, moment))
    if call == "ChangeMessageVisibility":
        # The job is released, and its end needs no more of this run.
        deployment.collect(meanwhile)
        assert meanwhile.happened
    else:
        with deployment.calls.shown_to(meanwhile):
            deployment.hear()
        assert meanwhile.happened
    deployment.settle()
    _assert_ended(deployment, how, job_id)
    assert deployment.asked() == {0: 1}


ENDED_MEANWHILE = Walk(
    _one_answered,
    (
        *("UpdateItem", "GetObject 0", "PutObject 0", "TransactWriteItems"),
        *("GetItem", "ListObjectsV2", "DeleteObject 0"),
    ),
)


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_the_walk_of_a_job_that_ends_while_it_is_collected_takes_every_call(deployment, how):
    job_id = _one_answered(deployment)
    deployment.collect(Meanwhile(deployment.calls, lambda: deployment.end(how, job_id), ("GetObject 0", AFTER)))
    assert deployment.calls.made == list(ENDED_MEANWHILE.calls)


@pytest.mark.parametrize(("call", "moment"), ENDED_MEANWHILE.gaps_from(2))
@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_a_collect_killed_after_its_job_was_ended_leaves_no_picture(deployment, how, call, moment):
    job_id = _one_answered(deployment)
    kill = Meanwhile(deployment.calls, lambda: deployment.end(how, job_id), ("GetObject 0", AFTER), kill=(call, moment))
    with pytest.raises(Killed):
        deployment.collect(kill)
    deployment.restart()
    deployment.outlive_lease()
    deployment.settle()
    _assert_ended(deployment, how, job_id)
    assert deployment.asked() == {0: 1}


# The inbox


def _file_answered(deployment: EndpointDeployment) -> str:
    """A file's job whose answer is there; an earlier version of the file was no picture."""
    deployment.put_file(b"no image")
    assert deployment.ingest()
    earlier = deployment.job_ids()
    deployment.put_file()
    assert deployment.ingest()
    (job_id,) = deployment.job_ids() - earlier
    deployment.receive()
    deployment.work()
    deployment.listen()
    return job_id


PUBLISHING = Walk(
    _file_answered,
    (
        *("UpdateItem", "GetObject 0", "PutObject 0", "TransactWriteItems"),
        *("UpdateItem #2", "CopyObject", "PutObject", "DeleteObject", "UpdateItem #3", "GetItem"),
    ),
)


def _assert_published(deployment: EndpointDeployment, job_id: str) -> None:
    deployment.assert_published(job_id, 0)
    assert deployment.asked() == {0: 1}
    assert deployment.account().charged == PRICE
    deployment.assert_at_rest(job_id)


def test_a_walk_takes_every_call_of_collect_and_of_publishing(deployment):
    job_id = PUBLISHING.prepare(deployment)
    deployment.collect(InOrder())
    assert deployment.calls.made == list(PUBLISHING.calls)
    deployment.settle()
    _assert_published(deployment, job_id)


@pytest.mark.parametrize(("call", "moment"), apart(PUBLISHING.since("TransactWriteItems", BEFORE)))
def test_a_collect_killed_while_it_publishes_is_followed_by_one_that_completes_the_outbox(deployment, call, moment):
    job_id = PUBLISHING.prepare(deployment)
    deployment.kill_collect(call, moment)
    deployment.outlive_lease()
    deployment.settle()
    _assert_published(deployment, job_id)
