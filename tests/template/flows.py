"""Everything that ever happens to the functions, and what each of them asks of AWS meanwhile."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
import pytest

from local.sagemaker import SageMaker
from tests.system import ROOT, System, fresh_aws, function, running_system, sample_base64

FUNCTIONS = ("api", "worker", "collect", "ingest", "sweep", "segmind")
PRESET = {"prompt": "a poster", "samples": 2}


@dataclass(frozen=True)
class Call:
    """One call of AWS that a function made, of a deployment with this backend."""

    backend: str
    function: str
    service: str
    operation: str
    parameters: dict[str, Any]


def use_every_route(system: System) -> None:
    photo = base64.b64decode(sample_base64())
    upload = system.api("POST", "/uploads", photo, {"Content-Type": "image/jpeg"}).json["id"]
    key = {"Idempotency-Key": "once"}
    job_id = system.create(image=upload, headers=key).json["id"]
    assert system.create(image=upload, headers=key).json["id"] == job_id
    assert system.create(image="upl_01ARZ3NDEKTSV4RRFFQ69G5FAV", headers={"Idempotency-Key": "other"}).status == 404
    assert system.deliver() == 1
    reads = ("/jobs", f"/jobs/{job_id}", "/balance", "/usage")
    assert {system.api("GET", path).status for path in reads} == {200}
    assert system.api("POST", "/cost", {}).status == 200
    assert system.api("GET", f"/jobs/{job_id}/outputs/0").status == 302
    assert system.api("DELETE", f"/jobs/{job_id}").status == 204
    assert system.api("POST", f"/jobs/{system.create().json['id']}/cancel").json["status"] == "canceled"
    system.deliver()


def come_as_segminds_clients(system: System) -> None:
    photo = base64.b64decode(sample_base64())
    upload = system.api("POST", "/uploads", photo, {"Content-Type": "image/jpeg"}).json["id"]
    body = {"image": upload, "prompt": "a castle", "seed": 7}
    run, submit = "/v1/sd1.5-img2img", "/v2/sd1.5-img2img"
    job_id = system.compatible("POST", submit, body).json["request_id"]
    system.services.sleep = system.clock.advance
    for seed in (7, -1):
        assert system.compatible("POST", run, {**body, "seed": seed}).status == 504
        assert system.deliver()
        assert system.compatible("POST", run, {**body, "seed": seed}).status == 200
    assert system.compatible("POST", run, {**body, "image": "upl_01ARZ3NDEKTSV4RRFFQ69G5FAV"}).status == 404
    poor = system.services.credits.account("default").balance
    system.services.credits.add("default", -poor)
    assert system.compatible("POST", run, {**body, "seed": 8}).status == 406
    system.services.credits.add("default", poor)
    for path in (f"/v2/requests/{job_id}", f"/v2/requests/{job_id}/status", f"/v1/requests/{job_id}"):
        assert system.compatible("GET", path).json["status"] == "COMPLETED"
    assert system.compatible("GET", "/v1/get-user-credits").status == 200


def need_a_second_attempt(system: System) -> None:
    system.segmind.behave("500")
    job_id = system.create(samples=2).json["id"]
    [record] = system.receive()
    assert not system.work(record)
    assert system.work(record)
    assert system.job(job_id)["status"] == "succeeded"


def cancel_between_two_attempts(system: System) -> None:
    system.segmind.behave("500")
    job_id = system.create(samples=2).json["id"]
    [record] = system.receive()
    assert not system.work(record)
    system.api("POST", f"/jobs/{job_id}/cancel")
    assert system.work(record)


def cancel_while_it_runs(system: System) -> None:
    asked_before = len(system.segmind.calls)
    system.segmind.behave("hang")
    job_id = system.create().json["id"]
    worker = threading.Thread(target=system.work, args=system.receive())
    worker.start()
    assert system.segmind.wait_for_calls(asked_before + 1)
    system.api("POST", f"/jobs/{job_id}/cancel")
    system.segmind.release()
    worker.join()


def forget_a_job(system: System) -> None:
    system.create()
    lose_messages(system)
    system.clock.advance(60)
    assert system.sweep() == {"resent": 1}
    system.clock.advance(1800)
    assert system.sweep() == {"failed": 1}
    lose_messages(system)


def use_presets(system: System) -> None:
    assert system.api("PUT", "/presets/poster", PRESET).status == 201
    assert system.api("GET", "/presets/poster").json["fields"] == PRESET
    assert [preset["name"] for preset in system.api("GET", "/presets").json["presets"]] == ["poster"]
    assert system.api("DELETE", "/presets/poster").status == 204
    system.api("PUT", "/presets/poster", PRESET)
    assert system.create(preset="poster", samples=1).status == 202
    assert system.deliver() == 1


def upload_and_forget(system: System) -> None:
    body, key = {"job": {"preset": "poster"}}, {"Idempotency-Key": "announced"}
    job = system.api("POST", "/uploads", body, key).json["job"]
    assert system.api("POST", "/uploads", body, key).json["job"]["id"] == job["id"]
    put(system, job["source"]["key"])
    assert take_in(system) == [True]
    assert system.deliver() == 1
    assert system.job(job["id"])["status"] == "succeeded"
    # Once more, when the job has ended.
    put(system, job["source"]["key"])
    assert take_in(system) == [True]
    assert system.api("DELETE", f"/jobs/{job['id']}").status == 204


def upload_what_is_no_image(system: System) -> None:
    job = system.api("POST", "/uploads", {"job": {"preset": "poster"}}).json["job"]
    put(system, job["source"]["key"], b"no image")
    assert take_in(system) == [True]
    assert system.job(job["id"])["error"]["code"] == "unsupported_image"


def upload_nothing(system: System) -> None:
    system.api("POST", "/uploads", {"job": {"preset": "poster"}})
    system.clock.advance(3600)
    assert system.sweep() == {"canceled": 1}


def fill_the_inbox(system: System) -> None:
    put(system, "inbox/default/poster/cup.jpg")
    [record] = system.receive("uploads")
    assert system.ingest(record)
    [message] = system.receive()
    assert system.work(message)
    # A worker that crashed before it published is followed by one that does.
    assert system.work(message)
    assert "outbox/default/poster/cup.jpg.json" in system.objects("results")
    # A notice that comes again after Powertools' record of it is gone.
    for item in system.dynamodb.scan(TableName="idempotency")["Items"]:
        system.dynamodb.delete_item(TableName="idempotency", Key={"id": item["id"]})
    assert system.ingest(record)
    assert not system.messages()


def fill_the_inbox_with_what_fails(system: System) -> None:
    put(system, "inbox/default/unknown/cup.jpg")
    put(system, "inbox/default/poster/no-image.jpg", b"no image")
    system.services.teams.create("poor")
    system.services.presets.save("poor", "poster", PRESET)
    put(system, "inbox/poor/poster/cup.jpg")
    put(system, "inbox/nobody/poster/cup.jpg")
    assert sorted(take_in(system)) == [False, True, True, True]
    errors = [key for key in system.objects("results") if key.endswith(".error.json")]
    assert errors == [
        "outbox/default/poster/no-image.jpg.error.json",
        "outbox/default/unknown/cup.jpg.error.json",
        "outbox/poor/poster/cup.jpg.error.json",
    ]


def replace_a_file_before_it_is_taken_in(system: System) -> None:
    put(system, "inbox/default/poster/replaced.jpg", b"first")
    [record] = system.receive("uploads")
    system.s3.delete_object(Bucket="uploads", Key="inbox/default/poster/replaced.jpg")
    assert system.ingest(record)
    assert not system.messages()


def name_versions(system: System) -> None:
    """Take in objects of a bucket whose versions somebody has turned on: notices then name them."""
    system.s3.put_bucket_versioning(Bucket="uploads", VersioningConfiguration={"Status": "Enabled"})
    job = system.api("POST", "/uploads", {"job": {"preset": "poster"}}).json["job"]
    for key in ("inbox/default/poster/version.jpg", job["source"]["key"]):
        version = put(system, key)["VersionId"]
        [record] = system.receive("uploads")
        named = record["body"].replace('"eTag"', f'"versionId": "{version}", "eTag"')
        assert version in named
        assert system.ingest({**record, "body": named})
        assert system.deliver() == 1
    assert "outbox/default/poster/version.jpg.json" in system.objects("results")
    assert system.job(job["id"])["status"] == "succeeded"
    system.s3.put_bucket_versioning(Bucket="uploads", VersioningConfiguration={"Status": "Suspended"})


def give_up_a_file_of_which_half_is_done(system: System) -> None:
    put(system, "inbox/default/poster/half.jpg")
    assert take_in(system) == [True]
    system.segmind.behave("500")
    [record] = system.receive()
    assert not system.work(record)
    system.sqs.delete_message(QueueUrl=system.queue_url, ReceiptHandle=record["receiptHandle"])
    system.clock.advance(3600)
    assert system.sweep() == {"succeeded": 1}
    assert "outbox/default/poster/half.jpg.json" in system.objects("results")


def put(system: System, key: str, data: bytes | None = None) -> Any:
    """Put an object where clients put theirs."""
    body = (ROOT / "events/sample.jpg").read_bytes() if data is None else data
    return system.s3.put_object(Bucket="uploads", Key=key, Body=body)


def take_in(system: System) -> list[bool]:
    """Hand every visible notice to the ingest function; return of each whether it is done with."""
    return [system.ingest(record) for record in system.receive("uploads")]


def lose_messages(system: System) -> None:
    for record in system.receive():
        system.sqs.delete_message(QueueUrl=system.queue_url, ReceiptHandle=record["receiptHandle"])


def generate_on_the_endpoint(system: System) -> None:
    job_id = system.create(samples=2).json["id"]
    assert system.deliver() == 1
    assert system.job(job_id)["status"] == "processing"
    assert system.hear() == 2
    assert system.job(job_id)["status"] == "succeeded"


def end_in_the_outbox(system: System) -> None:
    system.api("PUT", "/presets/poster", PRESET)
    put(system, "inbox/default/poster/cup.jpg")
    assert take_in(system)[-1]
    assert system.deliver() == 1
    assert system.hear() == 2
    assert "outbox/default/poster/cup.jpg.json" in system.objects("results")


def miss_a_notice(system: System) -> None:
    job_id = system.create().json["id"]
    assert system.work(resent_after_a_lost_notice(system))
    assert system.job(job_id)["status"] == "succeeded"


def miss_the_notice_of_a_failure(system: System) -> None:
    front_of(system).behave("500")
    job_id = system.create().json["id"]
    message = resent_after_a_lost_notice(system)
    assert not system.work(message)
    assert system.work(message)
    assert system.hear() == 1
    assert system.job(job_id)["status"] == "succeeded"


def resent_after_a_lost_notice(system: System) -> dict[str, Any]:
    front_of(system).treat_notices("drop")
    assert system.deliver() == 1
    system.settle()
    system.clock.advance(120)
    assert system.sweep() == {"resent": 1}
    [message] = system.receive()
    return message


def need_a_second_inference(system: System) -> None:
    """The first one fails, and its notice comes back until there is a second, which takes its turn at Segmind first."""
    front_of(system).behave("500")
    job_id = system.create().json["id"]
    assert system.deliver() == 1
    system.settle()
    [notice] = system.receive("results")
    system.clock.advance(60)
    assert not system.collect(notice)
    assert system.collect(notice)
    assert system.hear() == 1
    assert system.job(job_id)["status"] == "succeeded"


def fail_twice_at_once(system: System) -> None:
    front_of(system).behave("500", times=2)
    job_id = system.create(samples=2).json["id"]
    assert system.deliver() == 1
    system.settle()
    [first, second] = system.receive("results")
    system.clock.advance(60)
    # The first notice finds the other sample's failure as well.
    assert not system.collect(first)
    assert system.collect(second)
    assert system.collect(first)
    assert system.hear() == 2
    assert system.job(job_id)["status"] == "succeeded"


def cancel_when_half_is_done(system: System) -> None:
    front, container = front_of(system), system.container
    assert container
    container.next.append("hang")
    told = front.notices
    job_id = system.create(samples=2).json["id"]
    assert system.deliver() == 1
    assert front.wait_for(lambda: front.notices > told)
    [notice] = system.receive("results")
    assert system.collect(notice)
    system.api("POST", f"/jobs/{job_id}/cancel")
    container.release()
    assert system.hear() == 1
    assert not [key for key in system.objects("results") if job_id in key]


def cancel_while_the_endpoint_works(system: System) -> None:
    job_id = system.create().json["id"]
    assert system.deliver() == 1
    system.api("POST", f"/jobs/{job_id}/cancel")
    assert system.hear() == 1
    assert system.job(job_id)["status"] == "canceled"


def look_for_a_picture_of_segmind(system: System) -> None:
    system.segmind.latency = 60
    job_id = system.create().json["id"]
    assert system.deliver() == 1
    system.segmind.release()
    assert system.deliver() == 1
    assert system.job(job_id)["status"] == "succeeded"


def front_of(system: System) -> SageMaker:
    assert system.sagemaker
    return system.sagemaker


FLOWS: tuple[Callable[[System], None], ...] = (
    use_every_route,
    come_as_segminds_clients,
    need_a_second_attempt,
    cancel_between_two_attempts,
    cancel_while_it_runs,
    forget_a_job,
    use_presets,
    upload_and_forget,
    upload_what_is_no_image,
    upload_nothing,
    fill_the_inbox,
    replace_a_file_before_it_is_taken_in,
    name_versions,
    give_up_a_file_of_which_half_is_done,
    fill_the_inbox_with_what_fails,
)

# With the backend `auto`, while Segmind takes none.
ENDPOINT_FLOWS: tuple[Callable[[System], None], ...] = (
    generate_on_the_endpoint,
    end_in_the_outbox,
    miss_a_notice,
    miss_the_notice_of_a_failure,
    need_a_second_inference,
    fail_twice_at_once,
    cancel_when_half_is_done,
    cancel_while_the_endpoint_works,
)


@contextmanager
def _recorded(patch: pytest.MonkeyPatch, backend: str) -> Iterator[list[Call]]:
    calls: list[Call] = []
    running: list[str] = []

    def note(params: dict[str, Any], model: Any, **_: Any) -> None:
        # What botocore calls a presigned form, to find the address of its bucket: nothing is sent.
        form = model.name == "CreateBucket"
        if running and not form:
            calls.append(Call(backend, running[-1], model.service_model.service_name, model.name, dict(params)))

    def watched(name: str, handler: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def handle(event: Any, context: Any) -> Any:
            running.append(name)
            try:
                return handler(event, context)
            finally:
                running.pop()

        return handle

    # Moto forgets the default session when it starts.
    fresh_aws()
    session = boto3.Session()
    session.events.register("provide-client-params", note)
    patch.setattr(boto3, "DEFAULT_SESSION", session)
    for name in FUNCTIONS:
        patch.setattr(function(name), "handler", watched(name, function(name).handler))
    yield calls


def record_calls() -> list[Call]:
    """Let everything happen, and return every call that a function made.

    A presigned URL counts as the read that it stands for. A presigned form is no call: its client is the one who puts.
    """
    return [
        *_calls_of("segmind", FLOWS),
        *_calls_of("segmind", (look_for_a_picture_of_segmind,), segmind_api="v2"),
        *_calls_of("auto", ENDPOINT_FLOWS),
    ]


def _calls_of(backend: str, flows: tuple[Callable[[System], None], ...], *, segmind_api: str = "v1") -> list[Call]:
    with (
        pytest.MonkeyPatch.context() as patch,
        _recorded(patch, backend) as calls,
        running_system(backend, segmind_api=segmind_api) as system,
    ):
        # S3's test event.
        assert take_in(system) == [True]
        if backend == "auto":
            system.segmind.behave("401", times=1000)
        for flow in flows:
            flow(system)
    return calls
