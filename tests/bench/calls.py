"""The AWS and backend calls of each flow, counted below boto3 over moto. Child of `__main__`."""

from __future__ import annotations

import os
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
CREATE = {"dynamodb.TransactWriteItems": 1, "sqs.SendMessage": 1, "s3.PutObject": 1}
KEY = {"dynamodb.PutItem": 1, "dynamodb.UpdateItem": 1}
ALLOWED: dict[str, dict[str, int]] = {
    "create, a caller's first": CREATE | {"dynamodb.GetItem": 2},
    "create, image in the body": CREATE,
    "create, with a key": CREATE | KEY,
    "create, of an upload": CREATE | {"s3.GetObject": 1},
    "replay of a key": {"dynamodb.PutItem": 1, "dynamodb.GetItem": 2},
    "poll": {"dynamodb.GetItem": 1},
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
    "cancel": {"dynamodb.GetItem": 1, "dynamodb.TransactWriteItems": 1},
    "balance": {"dynamodb.GetItem": 1},
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
    from tests.system import function, running_system

    made: dict[str, dict[str, int]] = {}
    with running_system() as system:

        @contextmanager
        def counted(name: str) -> Iterator[None]:
            _calls.clear()
            system.segmind.calls.clear()
            yield
            made[name] = dict(_calls) | ({"segmind": len(system.segmind.calls)} if system.segmind.calls else {})

        def run(name: str) -> None:
            (record,) = system.receive()
            with counted(name):
                answer = function("worker").handler({"Records": [record]}, Context())
            if answer["batchItemFailures"]:
                raise SystemExit(f"{name}: not done")
            system.sqs.delete_message(QueueUrl=os.environ["JOBS_QUEUE_URL"], ReceiptHandle=record["receiptHandle"])

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
        with counted("sweep, nothing due"):
            system.sweep()
    report({name: (made[name], allowed) for name, allowed in ALLOWED.items()})


if __name__ == "__main__":
    main()
