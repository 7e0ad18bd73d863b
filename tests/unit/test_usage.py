"""Who used what: what is counted when a job ends, and what a report makes of it."""

from __future__ import annotations

import csv
import io
import random
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from datetime import UTC, date, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from img2img.errors import InvalidRequest
from img2img.jobs.bookings import closing
from img2img.jobs.job import Job, Status, ended
from img2img.money.prices import PriceTable
from img2img.money.usage import (
    COUNTED,
    GROUPS,
    OPERATOR_GROUPS,
    Counts,
    Row,
    UsageQuery,
    as_csv,
    as_records,
    grouped,
    parse_usage_query,
    total,
)
from tests.books import TABLE, Books, with_outcomes
from tests.system import fresh_aws

# 2026-11-22, the last second of the day in UTC.
NOW = int(datetime(2026, 11, 22, 23, 59, 59, tzinfo=UTC).timestamp())
DAY = date(2026, 11, 22)
FORMULA_STARTS = tuple("=+-@\t\r\n")


@pytest.fixture(scope="module", autouse=True)
def _aws() -> None:
    fresh_aws()


@pytest.fixture
def books() -> Books:
    made = Books(balance=1_000_000)
    made.clock.now = NOW
    return made


def rows(books: Books, since: date = DAY, until: date = DAY) -> list[Row]:
    return books.usage.rows("default", since, until)


# What is counted


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        (["succeeded"], Counts(jobs=1, succeeded=1, images=1, charged=1000)),
        (["succeeded"] * 4, Counts(jobs=1, succeeded=1, images=4, charged=4000)),
        (["succeeded", "blocked", "failed"], Counts(jobs=1, succeeded=1, images=1, charged=1000)),
        (["blocked", "failed"], Counts(jobs=1, failed=1)),
    ],
)
def test_an_ended_job_is_counted(books, outcomes, expected):
    samples = len(outcomes)
    books.finish(books.job(samples=samples, price=1000 * samples, key="k"), *outcomes)
    assert rows(books) == [Row("default", "2026-11-22", "k", "segmind", expected)]


def test_a_canceled_job_is_counted_without_images(books):
    job = books.job(samples=2)
    _, claimed = books.jobs.claim("default", job.id, lease_seconds=130)
    assert books.jobs.release(with_outcomes(claimed, "succeeded"), due_at=NOW + 60, counts=True)
    books.jobs.cancel("default", job.id)
    assert total(rows(books)) == Counts(jobs=1, canceled=1)


def test_a_job_is_counted_once_and_not_before_it_ends(books):
    job = books.job()
    assert rows(books) == []
    _, claimed = books.jobs.claim("default", job.id, lease_seconds=130)
    assert books.jobs.release(with_outcomes(claimed), due_at=NOW + 60, counts=True)
    assert rows(books) == []
    ended = books.finish(job)
    assert books.jobs.finish(replace(claimed, outputs=ended.outputs)) is None
    books.jobs.cancel("default", job.id)
    books.jobs.delete("default", job.id)
    assert total(rows(books)).jobs == 1


def test_a_job_counts_on_the_day_it_ended_in_utc(books):
    job = books.job()
    books.finish(books.job())
    books.clock.now = NOW + 1
    books.finish(job)
    assert {row.day: row.counts.jobs for row in rows(books, until=date(2026, 11, 23))} == {
        "2026-11-22": 1,
        "2026-11-23": 1,
    }


def test_both_days_of_a_report_are_included_and_no_others(books):
    for day in range(-3, 4):
        books.clock.now = NOW + 86_400 * day
        books.finish(books.job())
    found = rows(books, date(2026, 11, 20), date(2026, 11, 24))
    assert [row.day for row in found] == [f"2026-11-{day}" for day in range(20, 25)]


def test_teams_keys_and_backends_are_counted_apart(books):
    books.teams.create("default2")
    books.credits.add("default2", 1000)
    books.finish(books.job("default2"))
    for key, backend in (("a", "segmind"), ("a", "sagemaker"), ("b", "segmind"), ("a", "segmind")):
        books.finish(books.job(key=key, backend=backend))
    assert {(row.key, row.backend): row.counts.jobs for row in rows(books)} == {
        ("a", "sagemaker"): 1,
        ("a", "segmind"): 2,
        ("b", "segmind"): 1,
    }


# Ten thousand jobs

MONTH = [date(2026, 11, day) for day in range(1, 31)]
KEYS = ("key-a", "key-b", "key-c")
BACKENDS = ("segmind", "sagemaker")


def ended_jobs(books: Books, number: int) -> list[Job]:
    """Return jobs that ended on every day of a month, by every key on every backend, if there are enough of them."""
    chance = random.Random(7)
    places = [(day, key, backend) for day in MONTH for key in KEYS for backend in BACKENDS]
    jobs = []
    for index in range(number):
        day, key, backend = places[index] if index < len(places) else chance.choice(places)
        noon = datetime(day.year, day.month, day.day, 12, tzinfo=UTC)
        samples = chance.randint(1, 4)
        job = books.fresh(key=key, backend=backend, samples=samples)
        job = replace(job, credits=PriceTable(1000).quote(job.params, backend))
        status = chance.choice([Status.SUCCEEDED, Status.SUCCEEDED, Status.FAILED, Status.CANCELED])
        outcomes = ["succeeded" if status is Status.SUCCEEDED else "failed"] * samples
        jobs.append(ended(with_outcomes(job, *outcomes), status, at_ms=int(noon.timestamp() * 1000)))
    return jobs


def write_counts(books: Books, jobs: list[Job]) -> None:
    """Count jobs, all of one counter in a call: a counter only adds up, and moto takes milliseconds for each call."""
    writes = defaultdict(list)
    for job in jobs:
        update = closing(TABLE, job)[-1].request["Update"]
        writes[update["Key"]["sk"]["S"]].append(update)
    for updates in writes.values():
        values = {
            name: {"N": str(sum(int(update["ExpressionAttributeValues"][name]["N"]) for update in updates))}
            for name in updates[0]["ExpressionAttributeValues"]
        }
        books.client.update_item(**updates[0] | {"ExpressionAttributeValues": values})


def report(books: Books) -> tuple[list[Row], Counter[str]]:
    """Return a report, and how many queries it took and items they read."""
    read: Counter[str] = Counter()

    def measure(parsed: dict[str, Any], model: Any, **_: Any) -> None:
        read["calls"] += 1
        read[model.name] += 1
        read["items"] += parsed["ScannedCount"]

    with books.hooked("after-call.dynamodb", measure):
        found = rows(books, MONTH[0], MONTH[-1])
    return found, read


def test_a_report_of_ten_thousand_jobs_reads_no_more_than_one_of_few(books):
    counters = len(MONTH) * len(KEYS) * len(BACKENDS)
    few = ended_jobs(books, counters)
    write_counts(books, few)
    small, reads_of_few = report(books)
    assert total(small).jobs == len(small) == counters

    many = ended_jobs(books, 10_000)
    write_counts(books, many)
    large, reads_of_many = report(books)
    assert reads_of_many == reads_of_few == {"calls": 1, "Query": 1, "items": counters}

    both = few + many
    assert total(large) == Counts(
        jobs=len(both),
        succeeded=sum(job.status is Status.SUCCEEDED for job in both),
        failed=sum(job.status is Status.FAILED for job in both),
        canceled=sum(job.status is Status.CANCELED for job in both),
        images=sum(job.params.samples for job in both if job.status is Status.SUCCEEDED),
        charged=sum(job.credits.charged for job in both),
    )
    by_key = {row.key: row.counts.jobs for row in grouped(large, ["key"])}
    assert by_key == Counter(job.key_id for job in both)


def test_a_report_longer_than_a_page_is_whole(books):
    write_counts(books, ended_jobs(books, 60))
    whole = rows(books, MONTH[0], MONTH[-1])
    with books.small_pages(7):
        assert rows(books, MONTH[0], MONTH[-1]) == whole
    assert len(whole) == 60


# What may be asked for


def query(**given: str) -> UsageQuery:
    return parse_usage_query({name.removesuffix("_"): value for name, value in given.items()}, now=NOW)


def refused(**given: str) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        query(**given)
    return {error.field: error.detail for error in caught.value.errors}


def test_the_default_is_this_month_in_full_detail():
    assert query() == UsageQuery(date(2026, 11, 1), DAY, ("day", "key", "backend"))
    a_second_later = parse_usage_query({}, now=NOW + 1)
    assert a_second_later.until == date(2026, 11, 23)


@pytest.mark.parametrize(
    ("given", "since", "until"),
    [
        ({"from_": "2026-02-28"}, date(2026, 2, 28), DAY),
        ({"to": "2026-02-28"}, date(2026, 2, 1), date(2026, 2, 28)),
        ({"from_": "2026-11-22", "to": "2026-11-22"}, DAY, DAY),
        ({"from_": "2024-02-29", "to": "2025-02-28"}, date(2024, 2, 29), date(2025, 2, 28)),
        ({"from_": "2026-12-31", "to": "2027-01-01"}, date(2026, 12, 31), date(2027, 1, 1)),
    ],
)
def test_days(given, since, until):
    asked = query(**given)
    assert (asked.since, asked.until) == (since, until)


@pytest.mark.parametrize(
    ("text", "groups"),
    [("day", ("day",)), ("backend,day", ("day", "backend")), ("key", ("key",)), ("backend,key,day", GROUPS)],
)
def test_groups_come_in_one_order(text, groups):
    assert query(group_by=text).group_by == groups


@pytest.mark.parametrize(
    "day",
    [
        *("", "today", "2026-11-31", "2026-13-01", "26-11-22", "20261122", "2026-11-22T00:00:00Z"),
        *(" 2026-11-22", "2026-1-02", "2026/11/22", "22.11.2026", "٣٣٣٣-11-22", "2026-W47-7", "0000-01-01"),
    ],
)
@pytest.mark.parametrize("name", ["from", "to"])
def test_what_is_no_day_is_refused_by_name(name, day):
    assert refused(**{name: day}) == {name: "must be a day such as 2026-11-22"}


@pytest.mark.parametrize("text", ["", "month", "day,", ",day", "day,day", "day;key", "day key", "DAY", "team", "label"])
def test_what_is_no_group_is_refused_with_what_is(text):
    detail = refused(group_by=text)["group_by"]
    assert all(name in detail for name in GROUPS)


def test_everything_wrong_is_named_at_once():
    found = refused(from_="x", to="y", group_by="z", since="2026-11-22")
    assert set(found) == {"from", "to", "group_by", "since"}
    assert "from, to, group_by" in found["since"]


def test_a_report_does_not_end_before_it_begins():
    assert refused(from_="2026-11-22", to="2026-11-21") == {"from": "must not be after `to`"}
    assert refused(from_="2026-11-23") == {"from": "must not be after `to`"}


def test_a_report_is_of_a_leap_year_at_most():
    assert query(from_="2024-01-01", to="2024-12-31").since == date(2024, 1, 1)
    assert "366 days" in refused(from_="2024-01-01", to="2025-01-01")["from"]


@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=20))
@example("0001-01-01", "9999-12-31", "day")
@example("9999-12-31", "9999-12-31", "day")
def test_any_query_is_understood_as_written_or_refused(since, until, group_by):
    try:
        asked = query(from_=since, to=until, group_by=group_by)
    except InvalidRequest:
        return
    assert (since, until) == (str(asked.since), str(asked.until))
    assert 0 <= (asked.until - asked.since).days < 366


# What a report makes of it

COUNTERS = [
    Row("t", "2026-11-02", "b", "segmind", Counts(jobs=1, succeeded=1, images=1, charged=1000)),
    Row("t", "2026-11-01", "b", "segmind", Counts(jobs=2, failed=2)),
    Row("t", "2026-11-01", "a", "segmind", Counts(jobs=4, canceled=1, succeeded=3, images=9, charged=9001)),
    Row("t", "2026-11-01", "a", "sagemaker", Counts(jobs=8, succeeded=8, images=8, charged=4800)),
]


@pytest.mark.parametrize(
    ("group_by", "jobs"),
    [
        ((), {("", "", ""): 15}),
        (("day",), {("2026-11-01", "", ""): 14, ("2026-11-02", "", ""): 1}),
        (("key",), {("", "a", ""): 12, ("", "b", ""): 3}),
        (("backend",), {("", "", "sagemaker"): 8, ("", "", "segmind"): 7}),
        (("key", "backend"), {("", "a", "sagemaker"): 8, ("", "a", "segmind"): 4, ("", "b", "segmind"): 3}),
    ],
)
def test_rows_are_summed_and_sorted(group_by, jobs):
    found = grouped(COUNTERS, group_by)
    assert {(row.day, row.key, row.backend): row.counts.jobs for row in found} == jobs
    assert [(row.day, row.key, row.backend) for row in found] == sorted(jobs)
    assert total(found) == total(COUNTERS) == Counts(15, 12, 2, 1, 18, 14_801)


def test_full_detail_is_every_counter_in_order():
    of_two_teams = [*COUNTERS, Row("s", "2026-11-03", "c", "segmind", Counts(jobs=1))]
    in_order = sorted(of_two_teams, key=lambda row: (row.team, row.day, row.key, row.backend))
    assert grouped(of_two_teams, OPERATOR_GROUPS) == in_order
    assert [(row.team, row.counts.jobs) for row in grouped(of_two_teams, ["team"])] == [("s", 1), ("t", 15)]
    assert grouped(of_two_teams, GROUPS)[-1].day == "2026-11-03"


def test_nothing_adds_up_to_nothing():
    assert grouped([], GROUPS) == []
    assert total([]) == Counts()


def test_records_show_the_label_of_each_key():
    records = as_records(grouped(COUNTERS, ["key"]), ["key"], {"a": "web"})
    assert records == [
        {"key": "a", "label": "web", **asdict(Counts(12, 11, 0, 1, 17, 13_801))},
        {"key": "b", "label": "", **asdict(Counts(3, 1, 2, 0, 1, 1000))},
    ]


# CSV


def test_csv_is_the_same_report(books):
    records = as_records(grouped(COUNTERS, GROUPS), GROUPS, {"a": "batch, nightly", "b": "web"})
    text = as_csv(records, GROUPS)
    assert text.split("\r\n")[0] == "day,key,label,backend,jobs,succeeded,failed,canceled,images,charged"
    assert text.split("\r\n")[1] == '2026-11-01,a,"batch, nightly",sagemaker,8,8,0,0,8,4800'
    assert text.endswith("\r\n")
    shown = list(csv.DictReader(io.StringIO(text, newline="")))
    assert shown == [{name: str(value) for name, value in record.items()} for record in records]


@pytest.mark.parametrize("columns", [(), ("day",), ("key",), ("team", "day", "key", "backend")])
def test_csv_of_nothing_has_its_header(columns):
    shown = [name for column in columns for name in ([column, "label"] if column == "key" else [column])]
    assert as_csv([], columns) == ",".join([*shown, *COUNTED]) + "\r\n"


@pytest.mark.parametrize("key", ["=1+1", "@SUM(A1)", "+1", "-1", "\t=1", "\r=1", "a#b"])
def test_whatever_a_key_is_called_its_report_can_be_read(books, key):
    """And no cell of it starts a formula: every text was checked on its way in, the id of a key as well."""
    try:
        books.teams.add_key(key, "default", label="web")
    except InvalidRequest:
        return
    books.finish(books.job(key=key))
    labels = {known.id: known.label for known in books.teams.keys("default")}
    text = as_csv(as_records(rows(books), GROUPS, labels), GROUPS)
    cells = [cell for line in csv.reader(io.StringIO(text, newline="")) for cell in line]
    assert [cell for cell in cells if cell.startswith(FORMULA_STARTS)] == []
