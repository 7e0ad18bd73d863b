"""What S3 says of new objects, where their keys belong, and what their metadata asks for."""

from __future__ import annotations

import base64
import copy
import encodings.aliases
import itertools
import json
from email.header import Header
from typing import Any
from urllib.parse import quote, quote_plus

import boto3
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from img2img.jobs.inbox import (
    AwaitedUpload,
    InboxFile,
    NewObject,
    NotAttributable,
    parameters_in,
    place_of,
    read_notices,
)
from img2img.params import PARAMETERS
from tests.long import examples
from tests.system import fresh_aws, queue_url

JOB = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


def record(key: str = "inbox/default/p/a.png", name: str = "ObjectCreated:Put", **others: Any) -> dict[str, Any]:
    """Return one record, its key encoded as S3 does."""
    item = {"key": quote_plus(key, safe="/"), "size": 9, "eTag": "d41d8", "sequencer": "0055AED6DCD90281E5", **others}
    return {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "eventName": name,
        "s3": {"s3SchemaVersion": "1.0", "configurationId": "x", "bucket": {"name": "uploads"}, "object": item},
    }


def notice(*records: dict[str, Any]) -> str:
    return json.dumps({"Records": records})


# Notices


def test_a_notice_names_a_version_of_an_object():
    [found] = read_notices(notice(record(versionId="096fKKXTRTtl3on89fVO.nfljtsv6qko")))
    assert found == NewObject(
        bucket="uploads",
        key="inbox/default/p/a.png",
        etag="d41d8",
        version_id="096fKKXTRTtl3on89fVO.nfljtsv6qko",
        sequencer="0055AED6DCD90281E5",
    )


@pytest.mark.parametrize("name", ["Put", "Post", "Copy", "CompleteMultipartUpload"])
def test_an_object_may_come_in_every_way(name):
    assert len(read_notices(notice(record(name=f"ObjectCreated:{name}")))) == 1


@pytest.mark.parametrize("name", ["ObjectRemoved:Delete", "ObjectRestore:Completed", "ReducedRedundancyLostObject"])
def test_what_is_no_new_object_is_left_out(name):
    assert [new.key for new in read_notices(notice(record(name=name), record("inbox/a/b/c")))] == ["inbox/a/b/c"]


def test_a_notice_may_name_several_objects_or_none():
    found = read_notices(notice(record("inbox/a/b/1"), record("inbox/a/b/2"), record("awaited/a/3")))
    assert [new.key for new in found] == ["inbox/a/b/1", "inbox/a/b/2", "awaited/a/3"]
    assert read_notices(notice()) == []


def test_a_folder_that_a_console_makes_is_none_of_them():
    assert read_notices(notice(record("inbox/"), record("inbox/default/"), record("inbox/default/p/"))) == []


def test_the_test_event_names_nothing():
    event = {"Service": "Amazon S3", "Event": "s3:TestEvent", "Time": "2026-11-22T12:00:00.000Z", "Bucket": "uploads"}
    assert read_notices(json.dumps(event)) == []


@pytest.mark.parametrize(
    ("sent", "key"),
    [
        ("inbox/a/b/red+shoe.png", "inbox/a/b/red shoe.png"),
        ("inbox/a/b/1%2B1.png", "inbox/a/b/1+1.png"),
        ("inbox/a/b/caf%C3%A9.png", "inbox/a/b/caf\u00e9.png"),
        ("inbox/a/b/100%25.png", "inbox/a/b/100%.png"),
        ("inbox/a/b/%252F.png", "inbox/a/b/%2F.png"),
        ("inbox%2Fa%2Fb%2Fc", "inbox/a/b/c"),
    ],
)
def test_keys_come_url_encoded(sent, key):
    encoded = record()
    encoded["s3"]["object"]["key"] = sent
    assert [new.key for new in read_notices(notice(encoded))] == [key]


def without(*path: str) -> str:
    found = copy.deepcopy(record())
    inner: Any = found
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return notice(found)


@pytest.mark.parametrize(
    "body",
    [
        *("", "{", "x", "{}", "5", "null", "\ud800", '{"Records": null}', '{"Records": 5}', '{"Records": [5]}'),
        '{"Records": [{}]}',
        '{"Records": [null]}',
        without("eventName"),
        without("s3", "bucket"),
        without("s3", "object"),
        without("s3", "object", "key"),
        without("s3", "object", "eTag"),
    ],
)
def test_what_is_no_notice_raises(body):
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        read_notices(body)


def test_a_version_is_told_by_its_bytes_or_id_and_its_order():
    first = NewObject(bucket="uploads", key="k", etag="e", sequencer="1")
    again = NewObject(bucket="uploads", key="k", etag="e", sequencer="2")
    other = NewObject(bucket="uploads", key="k", etag="f", sequencer="1")
    kept = NewObject(bucket="uploads", key="k", etag="e", version_id="v", sequencer="1")
    assert len({new.version for new in (first, again, other, kept)}) == 4
    assert first.version == NewObject(bucket="uploads", key="k", etag="e", sequencer="1").version


# Places


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("inbox/default/p/a.png", InboxFile("default", "p", "a.png")),
        ("inbox/default/p/2026/11/a.png", InboxFile("default", "p", "2026/11/a.png")),
        ("inbox/default/p//a.png", InboxFile("default", "p", "/a.png")),
        ("inbox/default/p/../../other/p/a.png", InboxFile("default", "p", "../../other/p/a.png")),
        ("inbox/default/no such preset/a", InboxFile("default", "no such preset", "a")),
        ("inbox/TEAM#x/p/a#b", InboxFile("TEAM#x", "p", "a#b")),
        ("inbox/inbox/inbox/inbox", InboxFile("inbox", "inbox", "inbox")),
        ("inbox/default/p/ ", InboxFile("default", "p", " ")),
        (f"awaited/default/{JOB}", AwaitedUpload("default", JOB)),
    ],
)
def test_where_a_key_belongs(key, place):
    assert place_of(key) == place


@pytest.mark.parametrize(
    "key",
    [
        *("", "a.png", "inbox", "inbox/a.png", "inbox/default/a.png", "inbox//p/a.png", "inbox/default//a.png"),
        *("inbox/default/p/", "/inbox/default/p/a.png", "Inbox/default/p/a.png", "inboxes/default/p/a.png"),
        *("awaited/default", "awaited/default/", "awaited/default/x", f"awaited//{JOB}", f"awaited/{JOB}"),
        *(f"awaited/default/{JOB}/x", f"awaited/default/{JOB}.png", f"awaited/default/{JOB.lower()}"),
        *(f"awaited/default/{JOB}\n", f"uploads/default/upl_{JOB}", f"inputs/default/{JOB}.png"),
    ],
)
def test_a_key_that_belongs_nowhere(key):
    with pytest.raises(NotAttributable) as caught:
        place_of(key)
    # It is logged: a key may be as private as a prompt.
    assert str(caught.value) == "the key is not of the form inbox/<team>/<preset>/<name>"


# S3 keys are Unicode of at most 1,024 bytes; what XML cannot hold, boto3 cannot send.
names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def bucket() -> Any:
    fresh_aws()
    assert list(itertools.chain(*map(read_notices, received()))) == []
    return boto3.client("s3")


def received() -> list[str]:
    """Take what S3 has sent from the queue."""
    sqs = boto3.client("sqs")
    messages = sqs.receive_message(QueueUrl=queue_url("uploads"), MaxNumberOfMessages=10).get("Messages", [])
    for message in messages:
        sqs.delete_message(QueueUrl=queue_url("uploads"), ReceiptHandle=message["ReceiptHandle"])
    return [message["Body"] for message in messages]


@settings(
    max_examples=examples(80), deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(names)
@example("a b+c%20d%2B&e=f?g#h;i:j@k!l$m'n(o)p*q,r")
@example("100%")
@example("%")
@example("\u00e9\u0301\u65e5\u672c\U0001f30a")
@example("a/b//c/../d")
@example("..")
@example("=?utf-8?q?x?=")
@example("\\")
def test_any_key_that_can_be_put_is_read_as_it_was_put(bucket, name):
    key = f"inbox/default/p/{name}"
    bucket.put_object(Bucket="uploads", Key=key, Body=b"x")
    [body] = received()
    [new] = read_notices(body) or [None]
    if key.endswith("/"):
        assert new is None
        return
    assert new.key == key
    assert bucket.get_object(Bucket=new.bucket, Key=new.key, IfMatch=new.etag)["Body"].read() == b"x"
    assert place_of(new.key) == InboxFile("default", "p", name)


# Metadata


def latin(text: str) -> str:
    """Return raw UTF-8 as HTTP libraries read it."""
    return text.encode().decode("latin-1")


def in_base64(text: str) -> str:
    return f"=?UTF-8?B?{base64.b64encode(text.encode()).decode()}?="


def quoted(text: str) -> str:
    return "=?UTF-8?Q?" + "".join("_" if c == " " else "".join(f"={b:02X}" for b in c.encode()) for c in text) + "?="


PROMPTS = [
    "a castle",
    "une ch\u00e2teau d'\u00e9t\u00e9",
    "\u6d6e\u4e16\u7d75",
    "a \U0001f3f0 on a hill",
    "x=y?z",
    "==",
]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("encode", [str, latin, in_base64, quoted, quote], ids=lambda encode: encode.__name__)
def test_a_prompt_is_understood_however_it_was_sent(encode, prompt):
    assert parameters_in({"prompt": encode(prompt)}) == {"prompt": prompt}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_long_prompt_that_s3_gives_back_in_several_words_is_put_together(prompt):
    long = " ".join([prompt] * 20)
    folded = Header(long, "utf-8", maxlinelen=75).encode(linesep="").replace("\r", "").replace("\n", "")
    assert parameters_in({"prompt": folded}) == {"prompt": long}


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        ("100% wool", "100% wool"),
        ("%", "%"),
        ("50%, 50%", "50%, 50%"),
        ("%zz", "%zz"),
        ("a+b = c + d", "a+b = c + d"),
        ("a%2Bb%20c", "a+b c"),
        ("100%25", "100%"),
        ("caf\u00e9", "caf\u00e9"),
        ("caf%C3%A9", "caf\u00e9"),
        ("=?", "=?"),
        ("=?utf-8?q?broken", "=?utf-8?q?broken"),
        ("=?no-such-charset?q?x?=", "=?no-such-charset?q?x?="),
        ("=?rot13?q?x?=", "=?rot13?q?x?="),
        ("=?undefined?q?x?=", "=?undefined?q?x?="),
        ("=?utf-8?b?!!?=", None),
        ("=?utf-8?q?=FF?=", None),
        ("\u65e5", "\u65e5"),
        ("", ""),
    ],
)
def test_what_only_looks_encoded_stays_as_it_is(sent, read):
    found = parameters_in({"prompt": sent})["prompt"]
    assert isinstance(found, str)
    found.encode()
    if read is not None:
        assert found == read


def test_every_parameter_can_be_asked_for():
    assert parameters_in(dict.fromkeys(PARAMETERS, "1")) == dict.fromkeys(PARAMETERS, "1")


@pytest.mark.parametrize("name", ["negative-prompt", "Negative-Prompt", "NEGATIVE_PROMPT", "negative_prompt"])
def test_names_may_have_dashes_and_capitals(name):
    assert parameters_in({name: "x"}) == {"negative_prompt": "x"}


def test_what_is_no_parameter_is_left_out():
    sent = {"s3cmd-attrs": "uid:0", "preset": "oil", "image": "x", "metadata": "{}", "base64": "true", "seed": "7"}
    assert parameters_in(sent) == {"seed": "7"}
    assert parameters_in({}) == {}


@settings(max_examples=examples(300), deadline=None, database=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
    | st.from_regex(r"(=\?[a-z0-9-]{0,9}\?[bqBQx]\?[ -~]{0,9}\?= ?){1,3}", fullmatch=True)
    | st.builds("=?{}?q?=FF=00=41?=".format, st.sampled_from(sorted(set(encodings.aliases.aliases.values()))))
)
@example("=?utf-8?q?=?=")
@example("=?utf-8?b?=?=")
@example("=?=?=")
def test_any_metadata_is_read_as_text(value):
    found = parameters_in({"prompt": value})["prompt"]
    found.encode()
    # As any tool can send every text.
    assert parameters_in({"prompt": quote(value, safe="")}) == {"prompt": value}
