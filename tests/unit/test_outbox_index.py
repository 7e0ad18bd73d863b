"""Which version of a file the outbox shows: the latest that has ended, however late the others end."""

from __future__ import annotations

from typing import Any

import boto3
import pytest

from img2img.jobs.job import Source
from img2img.jobs.outbox_index import OutboxIndex
from tests.books import START, Clock
from tests.system import fresh_aws


@pytest.fixture(scope="module")
def client() -> Any:
    fresh_aws()
    return boto3.client("dynamodb")


@pytest.fixture
def published(client) -> OutboxIndex:
    for item in client.scan(TableName="jobs")["Items"]:
        client.delete_item(TableName="jobs", Key={"pk": item["pk"], "sk": item["sk"]})
    return OutboxIndex(client, "jobs", retention_days=30, clock=Clock())


def version(sequencer: str, key: str = "inbox/default/p/a.png", etag: str = "e") -> Source:
    return Source(bucket="uploads", key=key, version=f"{etag}:{sequencer}", preset="p")


def test_a_later_version_takes_the_place_of_the_earlier_ones(published):
    assert published.replace(version("01"), "job", ["a-0", "a-1", "a.json"]) == set()
    assert published.replace(version("02"), "job", ["a-0", "a.json"]) == {"a-1"}
    published.forget(version("02"), {"a-1"})
    assert published.replace(version("03"), "job", ["a.error.json"]) == {"a-0", "a.json"}


def test_an_earlier_version_is_shown_no_more(published):
    published.replace(version("02"), "job", ["a.json"])
    assert published.replace(version("01"), "job", ["a.error.json"]) is None
    assert published.replace(version("03"), "job", ["a-0"]) == {"a.json"}


def test_what_was_not_deleted_is_named_again(published):
    published.replace(version("01"), "job", ["a-0"])
    for _ in range(2):
        assert published.replace(version("02"), "job", ["a-1"]) == {"a-0"}
    assert published.replace(version("03"), "job", ["a-2"]) == {"a-0", "a-1"}


def test_the_same_version_may_be_shown_again(published):
    for _ in range(2):
        assert published.replace(version("01"), "job", ["a-0", "a.json"]) == set()


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("0055AED6DCD90281E5", "0055AED6DCD90281E6"),
        # S3 pads the shorter one with zeros on its right before it compares.
        ("0055AED6DCD9", "0055AED6DCD90281E5"),
        ("0055AED6DCD90281E5", "0056"),
        ("9", "A"),
    ],
)
def test_versions_are_told_apart_as_s3_orders_them(published, earlier, later):
    published.replace(version(later, etag="0"), "job", ["a.json"])
    assert published.replace(version(earlier, etag="f"), "job", ["a.json"]) is None
    other = "inbox/default/p/b.png"
    published.replace(version(earlier, other, etag="f"), "job", ["b.json"])
    assert published.replace(version(later, other, etag="0"), "job", ["b.json"]) == set()


@pytest.mark.parametrize("key", ["inbox/default/p/b.png", "inbox/default/q/a.png", "inbox/other/p/a.png"])
def test_every_file_has_versions_of_its_own(published, key):
    published.replace(version("02"), "job", ["a.json"])
    assert published.replace(version("01", key), "job", ["b.json"]) == set()


def test_a_key_may_be_as_long_as_s3_takes_it(published):
    key = "inbox/default/p/".ljust(1024, "x")
    assert published.replace(version("01", key), "job", ["a.json"]) == set()


def test_it_is_kept_as_long_as_what_it_names(published, client):
    published.replace(version("01"), "job", ["a.json"])
    [item] = client.scan(TableName="jobs")["Items"]
    assert int(item["expires_at"]["N"]) == START + 30 * 86_400
