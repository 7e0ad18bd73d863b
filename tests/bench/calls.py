"""The AWS and backend calls of each flow, counted below boto3 over moto. Child of `__main__`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import botocore

from tests.bench.setting import ROOT, Context, report, silence

# What section 6 of the design allows each flow, on a function that has run before. A caller's first request reads key
# and team. An upload costs a read, and its prepared picture is stored as one from the body is. A replay is one refused
# write and two reads: of the job and, once it has ended, of the balance. A sweep asks each of four shards, and for the
# list of teams.
#
# A file in the inbox is a create with a key, which reads the team, the object and the preset. What a file comes to is
# noted as what the outbox shows; then each picture is copied there, the document put beside it, and one read tells
# whether a later version has overtaken it. The job that an upload starts was paid for when it was announced: it is
# read, and one update queues it.
#
# One of Segmind's clients knows no key: a read tells whether the same request waits for its picture, here with one look
# at the job. Who gets it then has it read, the balance as well, and the request forgotten.
CREATE = {"dynamodb.TransactWriteItems": 1, "sqs.SendMessage": 1, "s3.PutObject": 1}
KEY = {"dynamodb.PutItem": 1, "dynamodb.UpdateItem": 1}
ALLOWED: dict[str, dict[str, int]] = {
    "create, a caller's first": CREATE | {"dynamodb.GetItem": 2},
    "create, image in the body": CREATE,
    "create, with a key": CREATE | KEY,
    "create, of an upload": CREATE | {"s3.GetObject": 1},
    "replay of a key": {"dynamodb.PutItem": 1, "dynamodb.GetItem": 2},
    "poll": {"dynamodb.GetItem": 1},
    "announce an upload with its job": {"dynamodb.TransactWriteItems": 1},
    "ingest of an awaited upload": {
        "dynamodb.GetItem": 1,
        "s3.GetObject": 1,
        "s3.PutObject": 1,
        "dynamodb.UpdateItem": 1,
        "sqs.SendMessage": 1,
    },
    "ingest of a file in the inbox": CREATE | KEY | {"dynamodb.GetItem": 2, "s3.GetObject": 1},
    "ingest of a repeated notice": {"dynamodb.GetItem": 2, "dynamodb.PutItem": 1},
    "ingest of an unreadable file": KEY
    | {
        "dynamodb.GetItem": 3,
        "s3.GetObject": 1,
        "dynamodb.TransactWriteItems": 1,
        "dynamodb.UpdateItem": 2,
        "s3.PutObject": 1,
    },
    **{
        f"run, {samples} sample{'s' if samples > 1 else ''}": {
            "dynamodb.UpdateItem": 1,
            "s3.GetObject": 1,
            "segmind": samples,
            "s3.PutObject": samples,
            "dynamodb.TransactWriteItems": 1,
        }
        for samples in (1, 4)
    },
    "run of a file's job, 1 sample": {
        "dynamodb.UpdateItem": 2,
        "dynamodb.GetItem": 1,
        "s3.GetObject": 1,
        "segmind": 1,
        "s3.PutObject": 2,
        "dynamodb.TransactWriteItems": 1,
        "s3.CopyObject": 1,
    },
    "submit of 1 sample to Segmind's v2": {
        "dynamodb.UpdateItem": 2,
        "s3.GetObject": 1,
        "segmind": 1,
        "sqs.SendMessage": 1,
    },
    "look at Segmind's v2, not done": {"dynamodb.UpdateItem": 2, "segmind": 1, "sqs.SendMessage": 1},
    "look at Segmind's v2, done": {
        "dynamodb.UpdateItem": 1,
        "segmind": 3,
        "s3.PutObject": 1,
        "dynamodb.TransactWriteItems": 1,
    },
    "cancel": {"dynamodb.GetItem": 1, "dynamodb.TransactWriteItems": 1},
    "balance": {"dynamodb.GetItem": 1},
    "Segmind's v1, not done in time": CREATE | {"dynamodb.GetItem": 2},
    "Segmind's v1, sent again": {"dynamodb.GetItem": 3, "s3.GetObject": 1, "dynamodb.UpdateItem": 1},
    "Segmind's v2, submit": CREATE,
    "Segmind's v2, status": {"dynamodb.GetItem": 1},
    "Segmind's v2, result": {"dynamodb.GetItem": 2},
    "sweep, nothing due": {"dynamodb.Query": 5, "dynamodb.BatchGetItem": 1},
}

_calls: Counter[str] = Counter()


def _count(model: Any, **_: Any) -> None:
    _calls[f"{model.service_model.service_name}.{model.name}"] += 1


# Every session made from here on, whoever makes it. `before-call` comes once for a call, however often it is sent.
botocore.register_initializer(lambda session: session.register("before-call", _count))


def main() -> None:
    silence()
    # moto only mocks the clients that are made after it was imported.
    from tests.system import function, queue_url, running_system, sample_base64

    made: dict[str, dict[str, int]] = {}
    with running_system() as system:

        @contextmanager
        def counted(name: str) -> Iterator[None]:
            _calls.clear()
            system.segmind.calls.clear()
            yield
            made[name] = dict(_calls) | ({"segmind": len(system.segmind.calls)} if system.segmind.calls else {})

        def handle(name: str, worker: str, record: Any) -> None:
            with counted(name):
                answer = function(worker).handler({"Records": [record]}, Context())
            if answer["batchItemFailures"]:
                raise SystemExit(f"{name}: not done")

        def run(name: str) -> None:
            (record,) = system.receive()
            handle(name, "worker", record)
            system.sqs.delete_message(QueueUrl=queue_url("jobs"), ReceiptHandle=record["receiptHandle"])

        def put(key: str, data: bytes) -> Any:
            """Put an object into the uploads bucket and return S3's notice of it."""
            system.s3.put_object(Bucket="uploads", Key=key, Body=data)
            # The first time, after those of S3's test events.
            *_, notice = records = system.receive("uploads")
            for record in records:
                system.sqs.delete_message(QueueUrl=queue_url("uploads"), ReceiptHandle=record["receiptHandle"])
            return notice

        with counted("create, a caller's first"):
            system.create()
        run("warm-up: the worker reads the Segmind key with its first job")
        with counted("create, image in the body"):
            job = system.create().json
        with counted("poll"):
            system.api("GET", f"/jobs/{job['id']}")
        run("run, 1 sample")
        with counted("create, with a key"):
            system.create(headers={"Idempotency-Key": "a"}, samples=4)
        run("run, 4 samples")
        with counted("replay of a key"):
            replay = system.create(headers={"Idempotency-Key": "a"}, samples=4)
        if replay.headers.get("idempotent-replayed") != "true":
            raise SystemExit(f"no replay: {replay.status}")
        photo = (ROOT / "events" / "sample.jpg").read_bytes()
        upload = system.api("POST", "/uploads", photo, {"Content-Type": "image/jpeg"}).json
        with counted("create, of an upload"):
            unfinished = system.create(image=upload["id"]).json
        with counted("cancel"):
            canceled = system.api("POST", f"/jobs/{unfinished['id']}/cancel").json
        if canceled["status"] != "canceled":
            raise SystemExit(f"not canceled: {canceled}")
        with counted("balance"):
            system.api("GET", "/balance")
        # The message of the job that was canceled: the worker finds nothing to do.
        run("run of a canceled job")
        with counted("announce an upload with its job"):
            awaiting = system.api("POST", "/uploads", {"job": {"prompt": "a castle on a hill"}}).json["job"]
        handle("ingest of an awaited upload", "ingest", put(f"awaited/default/{awaiting['id']}", photo))
        run("run of an awaited job")
        system.services.presets.save("default", "castle", {"prompt": "a castle on a hill"})
        notice = put("inbox/default/castle/photo.jpg", photo)
        handle("ingest of a file in the inbox", "ingest", notice)
        run("run of a file's job, 1 sample")
        handle("ingest of a repeated notice", "ingest", notice)
        handle("ingest of an unreadable file", "ingest", put("inbox/default/castle/text.jpg", b"no image"))
        body = {"image": sample_base64(), "prompt": "a castle on a hill", "seed": 7}
        with counted("Segmind's v2, submit"):
            request_id = system.compatible("POST", "/v2/sd1.5-img2img", body).json["request_id"]
        run("run of a job of v2")
        with counted("Segmind's v2, status"):
            system.compatible("GET", f"/v2/requests/{request_id}/status")
        with counted("Segmind's v2, result"):
            system.compatible("GET", f"/v2/requests/{request_id}")
        system.services.sleep = lambda _: system.clock.advance(30)
        with counted("Segmind's v1, not done in time"):
            system.compatible("POST", "/v1/sd1.5-img2img", body)
        run("run of a job of v1")
        with counted("Segmind's v1, sent again"):
            again = system.compatible("POST", "/v1/sd1.5-img2img", body)
        if again.status != 200:
            raise SystemExit(f"no picture: {again.status}")
        with counted("sweep, nothing due"):
            system.sweep()
    made |= _through_the_queue()
    report({name: (made[name], allowed) for name, allowed in ALLOWED.items()})


def _through_the_queue() -> dict[str, dict[str, int]]:
    """Return the calls of a job's ways through Segmind's v2."""
    from tests.system import running_system

    made: dict[str, dict[str, int]] = {}
    with running_system(segmind_api="v2") as system:

        def run(name: str) -> None:
            system.clock.advance(5)
            (record,) = system.receive()
            _calls.clear()
            asked = len(system.segmind.calls) + len(system.segmind.looks)
            if not system.work(record):
                raise SystemExit(f"{name}: not done")
            # The message is deleted by Lambda.
            own = {call: count for call, count in _calls.items() if call != "sqs.DeleteMessage"}
            made[name] = own | {"segmind": len(system.segmind.calls) + len(system.segmind.looks) - asked}

        system.create()
        run("warm-up: the worker reads the Segmind key with its first job")
        run("warm-up: its picture")
        system.segmind.latency = 60
        system.create()
        run("submit of 1 sample to Segmind's v2")
        run("look at Segmind's v2, not done")
        system.segmind.release()
        run("look at Segmind's v2, done")
    return made


if __name__ == "__main__":
    main()
