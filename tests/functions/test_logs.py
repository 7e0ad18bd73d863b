"""Everything that the functions write, of good days and bad ones: JSON lines that name request and job, and no more.

The functions run in a process of their own, so that nothing they write is missed: not what goes to standard error, nor
what a library prints.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
import pytest
from PIL import Image

from local.http_server import Handler, LoopbackServer
from tests.system import ROOT, SEGMIND_KEY, System, queue_url, rest_event, running_system

PROMPT = "a quagga below a vermilion moon"
NEGATIVE = "wobbegong, xylophone"
METADATA = {"order": "thylacine-4711"}
# A file of a customer's, in a folder of its own.
NAME = "vermilion/quagga of thylacine.png"
WORDS = ("quagga", "vermilion", "wobbegong", "xylophone", "thylacine")
ROTATED_KEY = "SG_the_rotated_one"
API_KEY = "the-api-key"
UPLOAD_SIGNATURE = "5up3r5ecret5ignature"
KEYS = (SEGMIND_KEY, ROTATED_KEY, API_KEY, UPLOAD_SIGNATURE, "X-Amz-Signature", "X-Amz-Credential")
SHOWS_A_JOB = re.compile(r"/jobs/[0-9A-Z]{26}")


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.effect_mandelbrot((80, 80), (-3, -2.5, 2, 2.5), 40).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class Scenario:
    """Does to a deployment what callers, Segmind, AWS and time may do to it."""

    system: System

    def __post_init__(self) -> None:
        self.answers: list[Any] = []
        self.system.services.sleep = self.system.clock.advance

    def api(self, *request: Any, **others: Any) -> Any:
        answer = self.system.api(*request, **others)
        self.answers.append(answer.headers.get("location"))
        with contextlib.suppress(ValueError):
            self.answers.append(answer.json)
        return answer

    def create(self, wait: int = 0, headers: dict[str, str] | None = None, **fields: Any) -> Any:
        body = {
            "image": base64.b64encode(picture()).decode(),
            "prompt": PROMPT,
            "negative_prompt": NEGATIVE,
            "metadata": METADATA,
            **fields,
        }
        sent = {"Prefer": f"wait={wait}", "x-api-key": API_KEY, **(headers or {})}
        return self.api("POST", "/sd1.5-img2img", body, sent)

    def run(self, behaviour: str | None = None, **fields: Any) -> str:
        """Create a job, hand its message to the worker as often as it comes, and return its id."""
        if behaviour:
            self.system.segmind.behave(behaviour)
        created = self.create(**fields)
        for record in self.system.receive():
            while not self.system.work(record):
                pass
        return str(created.json["id"])

    def good_days(self) -> None:
        self.api("GET", "/health")
        uploaded = self.api("POST", "/uploads", picture(), {"Content-Type": "image/png"}).json["id"]
        self.api("POST", "/uploads", {"content_type": "image/png"})
        key = {"Idempotency-Key": "k"}
        job_id = self.run(headers=key, samples=2)
        self.create(wait=20, headers=key, samples=2)
        self.create(wait=20, headers={**key, "Accept": "image/*"}, samples=2)
        self.create(wait=20, headers=key, samples=2, base64=True)
        self.create(headers=key, prompt=f"{PROMPT}, once more")
        self.run(image=uploaded, output_format="webp")
        self.api("GET", f"/jobs/{job_id}")
        self.api("GET", f"/jobs/{job_id}/outputs/1")
        self.api("GET", "/jobs", query={"status": "succeeded"})
        self.create(wait=2)
        self.api("POST", f"/jobs/{self.create().json['id']}/cancel")
        self.api("DELETE", f"/jobs/{job_id}")
        self.api("GET", f"/jobs/{job_id}")
        self.system.deliver()
        self.api("POST", "/cost", {"prompt": PROMPT, "metadata": METADATA, "samples": 2})
        self.api("GET", "/balance")
        self.api("GET", "/usage")
        self.api("GET", "/usage", headers={"Accept": "text/csv"})

    def bad_requests(self) -> None:
        self.create(samples=9)
        self.create(prompt=[PROMPT])
        self.create(**{PROMPT: NEGATIVE})
        self.create(image=base64.b64encode(PROMPT.encode()).decode())
        self.create(image=PROMPT)
        self.create(image=f"https://127.0.0.1/quagga.png?X-Amz-Signature={UPLOAD_SIGNATURE}")
        self.create(image=base64.b64encode(picture()[:900]).decode())
        self.create(headers={"Idempotency-Key": f"{PROMPT}\t"})
        self.api("POST", "/sd1.5-img2img", f'{{"prompt": "{PROMPT}"', {"Content-Type": "application/json"})
        self.api("POST", "/sd1.5-img2img", f"prompt={PROMPT}", {"Content-Type": "text/plain"})
        self.api("POST", "/uploads", b"\x89PNG\r\n\x1a\nbroken", {"Content-Type": "image/png"})
        self.api("GET", "/jobs/no-id")
        self.api("GET", "/jobs", query={"vermilion": "1"})
        self.api("GET", "/no/such/route")
        self.api("POST", "/cost", {"prompt": [PROMPT]})
        self.api("GET", "/usage", query={"vermilion": "1"})

    def refused_callers(self) -> None:
        teams = self.system.services.teams
        teams.create("poor")
        for key_id in ("key-of-the-poor", "disabled-key"):
            teams.add_key(key_id, "poor", label=key_id)
        teams.enable_key("disabled-key", enabled=False)
        body = {"image": base64.b64encode(picture()).decode(), "prompt": PROMPT, "metadata": METADATA}
        for key_id in ("key-of-the-poor", "disabled-key", "unknown-key"):
            self.api("POST", "/sd1.5-img2img", body, {"x-api-key": API_KEY, "Prefer": "wait=0"}, key_id=key_id)

    def bad_days_of_segmind(self) -> None:
        for behaviour in ("400", "401", "403", "405", "406-credits", "429", "500", "cut", "html", "garbage", "black"):
            self.run(behaviour)
        for seed in ("1", "2"):
            self.system.segmind.behave("400")
            self.run("503", seed=seed, samples=3)
        self.system.secrets.put_secret_value(SecretId="segmind", SecretString=ROTATED_KEY)
        self.system.segmind.rotate(ROTATED_KEY)
        self.run()

    def an_echo_in_segminds_place(self) -> None:
        """Segmind repeats what it was sent, key included, in errors of every form."""

        class Echo(Handler):
            def do_POST(self) -> None:
                sent = json.loads(self.read_body(50_000_000) or b"{}")
                text = f"{self.headers['x-api-key']} may not see {sent['prompt']} or {sent['negative_prompt']}"
                status = int(sent["seed"])
                if status == 200:
                    self.reply(200, [("Content-Type", "text/html")], f"<p>{text}</p>".encode())
                else:
                    body = {"error": text, "message": sent["image"], "sent": sent}
                    self.reply(status, [("Content-Type", "application/json")], json.dumps(body).encode())

        server = LoopbackServer(Echo)
        server.start()
        use = self.system.services
        was, backend = use.settings, use.__dict__.pop("backend")
        use.settings = replace(was, segmind_base_url=f"http://{server.address}/v1")
        for status in (200, 400, 406, 422, 500):
            self.run(seed=status)
        server.stop()
        use.settings, use.__dict__["backend"] = was, backend

    def presets(self) -> None:
        fields = {"prompt": PROMPT, "negative_prompt": NEGATIVE}
        for _ in range(2):
            self.api("PUT", "/presets/art", fields)
        self.api("PUT", "/presets/art", {"prompt": [PROMPT], PROMPT: 1})
        self.api("GET", "/presets/art")
        self.api("GET", "/presets")
        self.api("GET", "/presets/oil")
        self.api("DELETE", "/presets/oil")
        self.run(preset="art", prompt=None)
        self.create(preset="quagga")
        self.api("POST", "/cost", {"preset": "quagga"})

    def drop(self, key: str, data: bytes | None = None, **metadata: str) -> None:
        """Put a file into the uploads bucket, and hand every notice to the functions twice."""
        body = picture() if data is None else data
        self.system.s3.put_object(Bucket="uploads", Key=key, Body=body, Metadata=metadata)
        for record in self.system.receive("uploads") * 2:
            self.system.ingest(record)
        self.system.deliver()

    def inbox(self) -> None:
        """Files of every kind: the good, the bad, and those of nobody."""
        self.drop(f"inbox/default/art/{NAME}")
        self.drop(f"inbox/default/art/{NAME}", strength="0.4", **{"negative-prompt": NEGATIVE, "order": PROMPT})
        self.drop(f"inbox/default/art/{NAME}", PROMPT.encode())
        self.drop(f"inbox/default/art/{NAME}", strength=PROMPT)
        self.drop(f"inbox/default/{PROMPT}/{NAME}")
        self.system.services.presets.save("poor", "art", {"prompt": PROMPT})
        self.drop(f"inbox/poor/art/{NAME}")
        self.drop(f"inbox/nobody/art/{NAME}")
        self.drop(f"inbox/{NAME.replace('/', '-')}")
        self.drop(f"awaited/default/{NAME}")
        self.system.segmind.behave("400")
        self.drop(f"inbox/default/art/{NAME}")
        for body in (PROMPT, "{}", "null", json.dumps({"Records": [{"s3": {"object": {"key": NAME}}}]})):
            self.system.sqs.send_message(QueueUrl=queue_url("uploads"), MessageBody=body)
        self.system.take_in()

    def upload_and_forget(self) -> None:
        job = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "metadata": METADATA}
        key = {"Idempotency-Key": "upload"}
        for data in (picture(), PROMPT.encode()):
            form = self.api("POST", "/uploads", {"job": job}, key if data == picture() else None).json
            self.drop(form["fields"]["key"], data)
        self.api("POST", "/uploads", {"job": job}, key)
        self.api("POST", "/uploads", {"job": {**job, "seed": [PROMPT], PROMPT: 1}})
        self.api("POST", "/uploads", {"job": {**job, "image": PROMPT}})
        self.api("POST", "/uploads", {"job": PROMPT})
        self.api("POST", "/uploads", {"job": job})
        self.system.clock.advance(1600)
        self.system.sweep()

    def sweeps(self) -> None:
        self.create()
        for record in self.system.receive():
            self.system.sqs.delete_message(QueueUrl=self.system.queue_url, ReceiptHandle=record["receiptHandle"])
        for seconds in (61, 130, 1800):
            self.system.clock.advance(seconds)
            self.system.sweep()
        self.system.deliver()
        self.system.sweep()

    def odd_messages(self) -> None:
        named = {"team": "default", "job_id": "01ARZ3NDEKTSV4RRFFQ69G5FAV", "correlation_id": "c"}
        for body in (PROMPT, "{}", json.dumps({**named, "prompt": PROMPT}), json.dumps(named)):
            self.system.sqs.send_message(QueueUrl=self.system.queue_url, MessageBody=body)
        for record in self.system.receive():
            self.system.work(record)

    def bad_days_of_aws(self, broken: Callable[[str], contextlib.AbstractContextManager[None]]) -> None:
        """Calls fail with errors that say far too much."""
        for operation in ("PutObject", "TransactWriteItems", "SendMessage", "PutItem", "UpdateItem"):
            with broken(operation):
                self.create(headers={"Idempotency-Key": f"of {operation}"})
        self.system.deliver()
        for operation in ("GetItem", "Query"):
            with broken(operation):
                self.api("GET", "/jobs" if operation == "Query" else "/jobs/01ARZ3NDEKTSV4RRFFQ69G5FAV")
        for operation in ("UpdateItem", "GetObject", "PutObject", "TransactWriteItems", "GetSecretValue"):
            self.create()
            self.system.services.__dict__.pop("backend", None)
            with broken(operation):
                self.system.deliver()
        for operation in ("GetItem", "PutItem", "GetObject", "PutObject", "TransactWriteItems", "SendMessage"):
            with broken(operation):
                self.drop(f"inbox/default/art/{operation} {NAME}")
        for operation in ("CopyObject", "DeleteObject"):
            self.system.s3.put_object(Bucket="uploads", Key=f"inbox/default/art/{operation} {NAME}", Body=picture())
            self.system.take_in()
            with broken(operation):
                self.system.deliver()
        with broken("Query"), contextlib.suppress(Exception):
            self.system.sweep()

    def no_table(self) -> None:
        self.create()
        self.system.dynamodb.delete_table(TableName="jobs")
        self.create()
        self.create(headers={"Idempotency-Key": "another"})
        self.api("GET", "/jobs")
        self.api("GET", "/jobs/01ARZ3NDEKTSV4RRFFQ69G5FAV")
        self.api("DELETE", "/jobs/01ARZ3NDEKTSV4RRFFQ69G5FAV")
        self.system.deliver()
        with contextlib.suppress(Exception):
            self.system.sweep()


def main() -> None:
    """Run it all; what it answered goes to the file that is named, what it wrote to where a function writes."""
    failing: set[str] = set()

    def fail(model: Any, params: Any, **_: Any) -> None:
        if model.name in failing:
            raise RuntimeError(f"{PROMPT} {NEGATIVE} {SEGMIND_KEY} {ROTATED_KEY} {API_KEY} {params}")

    @contextlib.contextmanager
    def broken(operation: str) -> Iterator[None]:
        failing.add(operation)
        yield
        failing.clear()

    with running_system() as system:
        boto3.DEFAULT_SESSION.events.register("provide-client-params", fail)
        scenario = Scenario(system)
        scenario.good_days()
        scenario.bad_requests()
        scenario.refused_callers()
        scenario.bad_days_of_segmind()
        scenario.an_echo_in_segminds_place()
        scenario.sweeps()
        scenario.presets()
        scenario.inbox()
        scenario.upload_and_forget()
        scenario.odd_messages()
        scenario.bad_days_of_aws(broken)
        scenario.no_table()
    pathlib.Path(sys.argv[1]).write_text(json.dumps(scenario.answers))


@dataclass(frozen=True)
class Written:
    """What a run wrote, and what it answered."""

    stdout: str
    stderr: str
    answers: list[Any]

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def logs(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "_aws" not in line]

    def of(self, message: str) -> list[dict[str, Any]]:
        return [line for line in self.logs if line["message"] == message]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Written:
    answers = tmp_path_factory.mktemp("logs") / "answers.json"
    done = subprocess.run(
        [sys.executable, "-c", "from tests.functions.test_logs import main; main()", str(answers)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "layers/core/python"), str(ROOT)))},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return Written(done.stdout, done.stderr, json.loads(answers.read_text()))


def test_nothing_is_written_outside_the_log(written):
    assert written.stderr == ""


def test_every_line_is_one_json_object(written):
    assert len(written.lines) > 100
    for line in written.lines:
        assert isinstance(line, dict)


def test_every_log_line_has_what_searches_need(written):
    for line in written.logs:
        assert {"level", "message", "timestamp", "service", "function_request_id"} <= line.keys(), line


def test_every_line_names_its_request(written):
    assert [line for line in written.lines if not line.get("correlation_id")] == []


def test_every_line_about_a_job_names_it(written):
    about_a_job = [
        line for line in written.logs if line["message"].startswith("job ") or SHOWS_A_JOB.match(line.get("route", ""))
    ]
    assert len(about_a_job) > 50
    assert [line for line in about_a_job if not line.get("job_id")] == []
    created = {line["job_id"] for line in written.of("job created")}
    assert len(created) > 20


def test_metrics_of_a_job_name_it(written):
    metrics = [line for line in written.lines if "_aws" in line]
    named = ("JobsCreated", "BackendTime", "BackendRetries", "FailuresByCode")
    about_a_job = [line for line in metrics if any(name in line for name in named)]
    assert len(about_a_job) > 20
    assert [line for line in about_a_job if not line.get("job_id") or not line.get("correlation_id")] == []


def test_a_job_carries_the_id_of_its_request_through_the_queue(written):
    asked = {line["job_id"]: line["correlation_id"] for line in written.of("job created")}
    # A request that failed once its job was written has not said so.
    ended = [line for line in written.of("job ended") if line["job_id"] in asked]
    assert len(ended) > 15
    for line in ended:
        assert line["correlation_id"] == asked[line["job_id"]]


def test_a_job_that_the_sweep_ended_can_be_found_by_its_request(written):
    shown = [answer for answer in written.answers if isinstance(answer, dict) and "created_at" in answer]
    assert shown
    asked = {line["job_id"]: line["correlation_id"] for line in written.of("job created")}
    late = [line for line in written.logs if line.get("code") == "deadline_exceeded"]
    assert late
    for line in late:
        assert line["correlation_id"] == asked[line["job_id"]]


def test_every_request_of_a_known_key_names_its_team(written):
    answered = [line for line in written.of("answered") if line.get("team")]
    assert len(answered) > 60
    assert {(line["team"], line["key_id"]) for line in answered} == {
        ("default", "key-of-the-test"),
        ("poor", "key-of-the-poor"),
    }


def test_callers_that_are_refused_are_logged_with_the_reason(written):
    codes = {line["code"] for line in written.of("refused")}
    assert codes >= {"insufficient_credits", "key_disabled", "key_unknown"}


def test_files_that_come_in_are_logged_with_their_job_and_team(written):
    taken = written.of("taken in")
    assert len(taken) > 10
    assert {line["team"] for line in taken} == {"default", "poor"}
    assert [line for line in taken if not line.get("job_id")] == []
    assert {line["status"] for line in taken} >= {"queued", "failed"}
    assert written.of("nothing to do")


def test_files_of_nobody_are_errors(written):
    nobodys = written.of("belongs to no team")
    assert len(nobodys) >= 3
    assert {line["level"] for line in nobodys} == {"ERROR"}


def test_files_that_cannot_be_run_are_counted_by_their_code(written):
    codes = {line["code"] for line in written.lines if "FailuresByCode" in line}
    assert codes >= {"unsupported_image", "invalid_request", "preset_unknown", "insufficient_credits", "upload_missing"}


def test_what_nothing_foresaw_is_logged_with_its_place_alone(written):
    unexpected = written.of("unexpected")
    assert {line["error"] for line in unexpected} >= {"RuntimeError", "ResourceNotFoundException"}
    for line in unexpected:
        assert line["level"] == "ERROR"
        assert line["stack"]
        assert "exception" not in line


def test_keys_are_never_written(written):
    for key in KEYS:
        assert key not in written.stdout + written.stderr, key


def test_prompts_metadata_and_the_names_of_files_are_never_written(written):
    for word in WORDS:
        assert word not in written.stdout + written.stderr, word


def test_pictures_are_never_written(written):
    text = written.stdout + written.stderr
    assert not re.search(r"[A-Za-z0-9+/]{80,}", text)
    encoded = base64.b64encode(picture()).decode()
    for start in range(0, len(encoded) - 24, 12):
        assert encoded[start : start + 24] not in text


def test_the_signatures_of_urls_are_never_written(written):
    def urls(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            for inner in value:
                yield from urls(inner)
        elif isinstance(value, str) and "X-Amz-Signature" in value:
            yield value

    forms = [
        answer["fields"]
        for answer in written.answers
        if isinstance(answer, dict) and "policy" in answer.get("fields", {})
    ]
    assert len(forms) >= 4
    for form in forms:
        for secret in ("policy", "x-amz-signature"):
            assert form[secret] not in written.stdout + written.stderr
    signatures = {parse_qs(urlsplit(url).query)["X-Amz-Signature"][0] for url in urls(written.answers)}
    assert len(signatures) >= 2
    for signature in signatures:
        assert signature not in written.stdout + written.stderr


def test_no_answer_shows_what_a_bug_said(written):
    problems = [answer for answer in written.answers if isinstance(answer, dict) and answer.get("status") == 500]
    assert len(problems) > 8
    for problem in problems:
        text = json.dumps(problem)
        assert problem["code"] == "internal_error"
        assert not any(secret in text for secret in (*KEYS, *WORDS, "Traceback", "RuntimeError"))


def test_the_sample_event_is_what_the_gateway_sends():
    """The words above only mean something while requests carry them."""
    event = rest_event("POST", "/sd1.5-img2img", {"prompt": PROMPT})
    assert API_KEY in json.dumps(event["requestContext"])
    assert "quagga" in event["body"]
