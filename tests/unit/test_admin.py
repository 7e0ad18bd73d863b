"""The operator's commands `secret`, `model` and `image`, over moto and a Docker that only notes what it is told."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys

import boto3
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from moto.server import ThreadedMotoServer

from img2img.__main__ import main
from tests.system import ROOT, fresh_aws

DOCKER = """#!/bin/sh
echo "$BUILDX_NO_DEFAULT_ATTESTATIONS docker $*" >> "$DOCKER_LOG"
if [ "$1" = login ]; then echo "password $(cat)" >> "$DOCKER_LOG"; fi
echo "docker's own words"
if [ "$1" = "$DOCKER_INTERRUPTED" ]; then sleep 1; kill -INT $PPID; exec sleep 10; fi
if [ "$1" = "$DOCKER_FAILS" ]; then exit 17; fi
"""
KEY = "SG_0123456789abcdef"


@pytest.fixture
def aws():
    fresh_aws()


@pytest.fixture
def run(aws, capfd):
    """Return a function that runs a command and returns its exit status, stdout and stderr."""

    def run(*arguments):
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return run


def assert_refused(ran, *parts):
    status, out, err = ran
    assert status == 1
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def program(*arguments):
    """Return the command line of a program of its own, which takes signals."""
    return [sys.executable, "-m", "img2img", "--region", "eu-west-1", *map(str, arguments)]


@pytest.fixture(scope="module")
def elsewhere():
    """The environment of a program of its own whose AWS is that of this process."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "PYTHONPATH": str(ROOT / "layers/core/python")}
    server.stop()


# ----------------------------------------------------------------------------------------------------- secret


def create_secret(stack="img2img", logical_id="SegmindSecret"):
    """Create a secret, and a stack with a resource of its name: moto's CloudFormation makes no secrets."""
    name = f"{stack}-segmind"
    boto3.client("secretsmanager").create_secret(Name=name, SecretString="unset")
    template = {"Resources": {logical_id: {"Type": "AWS::S3::Bucket", "Properties": {"BucketName": name}}}}
    boto3.client("cloudformation").create_stack(StackName=stack, TemplateBody=json.dumps(template))
    return lambda: boto3.client("secretsmanager").get_secret_value(SecretId=name)["SecretString"]


@pytest.fixture
def stored(aws):
    return create_secret()


@pytest.fixture
def pipe(monkeypatch):
    """Return a function that puts bytes into the pipe at stdin."""
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_a_key_from_a_pipe_is_stored(run, stored, pipe):
    pipe(f" {KEY} \r\nanother line\n".encode())
    status, out, err = run("secret")
    assert (status, err) == (0, "")
    assert out.startswith("Stored")
    assert KEY not in out
    assert stored() == KEY


@pytest.mark.parametrize("data", [b"", b"\n", b" \n" + KEY.encode()])
def test_without_a_key_nothing_is_stored(run, stored, pipe, data):
    pipe(data)
    assert_refused(run("secret"), "No key", "nothing stored")
    assert stored() == "unset"


@pytest.mark.parametrize("data", [KEY.encode("utf-16"), KEY.encode("utf-8-sig"), b"SG\0", "schlüssel".encode()])
def test_what_can_be_no_key_is_not_stored(run, stored, pipe, data):
    pipe(data)
    assert_refused(run("secret"), "ASCII" if data[:1] != b"\xff" else "text", "nothing stored")
    assert stored() == "unset"


def test_the_key_is_stored_in_the_stack_that_is_named(run, stored, pipe):
    other = create_secret("other")
    pipe(KEY.encode())
    assert run("--stack", "other", "secret")[0] == 0
    assert (stored(), other()) == ("unset", KEY)


def test_nobody_is_asked_for_a_key_that_has_no_place(run, pipe):
    create_secret("another-application", "Something")
    pipe(f"{KEY}\n".encode())
    assert_refused(run("secret"), "img2img")
    assert_refused(run("--stack", "another-application", "secret"), "SegmindSecret")
    assert sys.stdin.readline() == f"{KEY}\n"


def test_a_key_that_aws_does_not_take_is_an_error_without_the_key(run, stored, pipe, before_calls):
    pipe(KEY.encode())
    before_calls("PutSecretValue", denied("PutSecretValue"))
    ran = run("secret")
    assert_refused(ran, "AccessDenied")
    assert KEY not in ran[2]


def denied(operation):
    def act():
        raise ClientError({"Error": {"Code": "AccessDenied", "Message": "not yours"}}, operation)

    return act


@pytest.fixture
def asked(stored, elsewhere):
    """The command at a terminal, where it has asked for the key; with the terminal's other end."""
    other_end, terminal = os.openpty()
    process = subprocess.Popen(
        program("secret"),
        env={**os.environ, **elsewhere},
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Without a terminal of its own it asks at stdin.
        start_new_session=True,
    )
    os.close(terminal)
    with process, os.fdopen(other_end, "r+b", buffering=0) as keyboard:
        prompt = process.stderr.read(len("Segmind API key: "))
        assert prompt == b"Segmind API key: "
        yield process, keyboard
        process.kill()


def test_at_a_terminal_the_command_asks_and_shows_nothing(stored, asked):
    process, keyboard = asked
    keyboard.write(f"{KEY}\n".encode())
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.startswith(b"Stored")
    assert stored() == KEY
    try:
        echo = os.read(keyboard.fileno(), 1000)
    except OSError:
        # On Linux: nothing lies there, and nobody holds the other end any more.
        echo = b""
    assert echo == b""


@pytest.mark.parametrize(("end", "status"), [("ctrl-c", 130), ("ctrl-d", 1)])
def test_at_a_terminal_one_may_think_better_of_it(stored, asked, end, status):
    process, keyboard = asked
    before = stored()
    if end == "ctrl-c":
        process.send_signal(signal.SIGINT)
    else:
        keyboard.write(b"\x04")
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert out == b""
    assert b"Traceback" not in err
    assert stored() == before


# ------------------------------------------------------------------------------------------------------ model


@pytest.fixture
def weights(tmp_path):
    folder = tmp_path / "weights"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet/config.json").write_text("")
    (folder / "unet/model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def bucket(aws):
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="models", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})

    def objects():
        found = s3.list_objects_v2(Bucket="models").get("Contents", [])
        return {item["Key"]: s3.get_object(Bucket="models", Key=item["Key"])["Body"].read() for item in found}

    return objects


@pytest.fixture
def puts(before_calls):
    """The calls that put an object, as they come."""
    made = []
    before_calls("PutObject", lambda: made.append("put"))
    return made


def uri_of(ran):
    status, out, err = ran
    assert status == 0, err
    [line] = out.splitlines()
    return line.removeprefix("ModelDataUri: ")


def test_a_model_lies_below_a_prefix_named_after_its_content(run, weights, bucket):
    uri = uri_of(run("model", weights, "s3://models/sd15/"))
    prefix = uri.removeprefix("s3://models/")
    assert prefix.startswith("sd15/")
    assert prefix.endswith("/")
    assert bucket() == {
        f"{prefix}model_index.json": b"{}",
        f"{prefix}unet/config.json": b"",
        f"{prefix}unet/model.safetensors": b"weights",
    }
    (weights / "unet/model.safetensors").write_bytes(b"weighed")
    assert uri_of(run("model", weights, "s3://models/sd15/")) != uri
    (weights / "unet/model.safetensors").rename(weights / "unet/renamed.safetensors")
    (weights / "unet/renamed.safetensors").write_bytes(b"weights")
    assert uri_of(run("model", weights, "s3://models/sd15/")) != uri
    assert uri_of(run("model", weights, "s3://models/")).count("/") == 4


def test_a_model_that_is_there_is_not_uploaded_again(run, weights, bucket, puts):
    uri = uri_of(run("model", weights, "s3://models/"))
    assert len(puts) == 3
    ran = run("model", weights, "s3://models/")
    assert uri_of(ran) == uri
    assert ran[2] == "3 of 3 files are there already\n"
    assert len(puts) == 3


def test_an_upload_that_broke_off_goes_on(run, weights, bucket, before_calls, puts):
    def break_off():
        if len(puts) == 2:
            raise EndpointConnectionError(endpoint_url="https://aws.example")

    before_calls("PutObject", break_off)
    status, out, err = run("model", weights, "s3://models/")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert "aws.example" in err
    assert len(bucket()) == 1
    uri = uri_of(run("model", weights, "s3://models/"))
    assert len(puts) == 4
    assert sorted(bucket().values()) == [b"", b"weights", b"{}"]
    # A file of another size is no whole one.
    key = f"{uri.removeprefix('s3://models/')}unet/model.safetensors"
    boto3.client("s3").put_object(Bucket="models", Key=key, Body=b"half")
    assert uri_of(run("model", weights, "s3://models/")) == uri
    assert bucket()[key] == b"weights"


def test_who_may_not_list_uploads_everything(run, weights, bucket, before_calls, puts):
    before_calls("ListObjectsV2", denied("ListObjectsV2"))
    assert uri_of(run("model", weights, "s3://models/")) == uri_of(run("model", weights, "s3://models/"))
    assert len(puts) == 6


def test_it_is_told_in_a_log_how_far_an_upload_is(run, weights, bucket):
    (weights / "unet/model.safetensors").write_bytes(bytes(20_000_000))
    lines = run("model", weights, "s3://models/")[2].splitlines()
    assert lines[:3] == [
        "model_index.json: 0 % of 20.0 MB",
        "unet/config.json: 0 % of 20.0 MB",
        "unet/model.safetensors: 0 % of 20.0 MB",
    ]
    assert lines[-1] == "unet/model.safetensors: 100 % of 20.0 MB"
    assert 5 <= len(lines) <= 13  # one at each tenth, and one at each file's beginning


def test_at_a_terminal_one_line_for_each_file_tells_how_far_an_upload_is(run, weights, bucket, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    (weights / "unet/model.safetensors").write_bytes(bytes(20_000_000))
    assert run("model", weights, "s3://models/")[0] == 0
    lines = terminal.getvalue().split("\n")
    assert len(lines) == 4
    assert lines[0] == "\rmodel_index.json: 0 % of 20.0 MB"
    assert lines[2].startswith("\runet/model.safetensors: 0 % of 20.0 MB\runet/model.safetensors: ")
    assert lines[2].endswith("\runet/model.safetensors: 100 % of 20.0 MB")


@pytest.mark.parametrize(
    "uri", ["models/", "s3:/models/", "https://models/", "s3://models", "s3:///models/", "s3://a/b"]
)
def test_a_uri_is_a_prefix_in_s3(run, weights, uri):
    assert_refused(run("model", weights, uri), "s3://bucket/prefix/")


def test_a_model_has_files_and_a_bucket(run, weights, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        assert_refused(run("model", tmp_path / folder, "s3://models/"), folder)
    assert_refused(run("model", weights, "s3://no-such-bucket/"), "NoSuchBucket")
    assert_refused(run("model", weights, "s3://no such bucket/"), "no such bucket")


# ------------------------------------------------------------------------------------------------------ image


@pytest.fixture
def told(tmp_path, monkeypatch):
    """What Docker was told; in a repository with an endpoint."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "docker").write_text(DOCKER)
    (tools / "docker").chmod(stat.S_IRWXU)
    (tmp_path / "endpoint").mkdir()
    (tmp_path / "endpoint/Dockerfile").touch()
    log = tmp_path / "docker.log"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_LOG", str(log))
    return lambda: log.read_text().splitlines() if log.exists() else []


def test_an_image_is_built_for_sagemaker_and_pushed(run, told):
    status, out, err = run("image", "an-endpoint", "one")
    assert status == 0
    # Alone on stdout.
    [line] = out.splitlines()
    image = line.removeprefix("EndpointImageUri: ")
    assert image.endswith(".dkr.ecr.eu-west-1.amazonaws.com/an-endpoint:one")
    assert err == "docker's own words\n" * 3
    ecr = boto3.client("ecr")
    login = ecr.get_authorization_token()["authorizationData"][0]["authorizationToken"]
    user, password = base64.b64decode(login).decode().split(":")
    registry = image.partition("/")[0]
    assert told() == [
        # Without attestations: with them SageMaker refuses the image.
        f"1 docker build --platform linux/amd64 --tag {image} endpoint",
        f"1 docker login --username {user} --password-stdin {registry}",
        f"password {password}",
        f"1 docker push {image}",
    ]
    [repository] = ecr.describe_repositories(repositoryNames=["an-endpoint"])["repositories"]
    assert repository["imageTagMutability"] == "IMMUTABLE"
    assert repository["imageScanningConfiguration"] == {"scanOnPush": True}
    # The repository is there by now.
    assert run("image", "an-endpoint", "two")[:2] == (0, line.removesuffix("one") + "two\n")


def test_a_tag_is_not_pushed_twice(run, told):
    ecr = boto3.client("ecr")
    ecr.create_repository(repositoryName="an-endpoint")
    manifest = {"mediaType": "application/vnd.docker.distribution.manifest.v2+json", "layers": [], "config": {}}
    ecr.put_image(repositoryName="an-endpoint", imageManifest=json.dumps(manifest), imageTag="one")
    assert_refused(run("image", "an-endpoint", "one"), "an-endpoint:one was pushed already")
    assert told() == []
    assert run("image", "an-endpoint", "two")[0] == 0


def test_a_repository_without_a_slash(run, told):
    assert_refused(run("image", "team/endpoint", "one"), "team/endpoint has a slash")
    assert boto3.client("ecr").describe_repositories()["repositories"] == []
    assert told() == []


def test_a_name_that_ecr_does_not_take_is_an_error(run, told):
    assert_refused(run("image", "Endpoint", "one"), "InvalidParameterException")
    assert told() == []


def test_an_image_needs_docker(run, told, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_refused(run("image", "an-endpoint", "one"), "https://docs.docker.com/get-docker/")
    assert boto3.client("ecr").describe_repositories()["repositories"] == []


def test_an_image_needs_its_folder(run, told, tmp_path):
    shutil.rmtree(tmp_path / "endpoint")
    assert_refused(run("image", "an-endpoint", "one"), "endpoint/Dockerfile", "root of the repository")
    assert told() == []


@pytest.mark.parametrize("step", ["build", "login", "push"])
def test_an_image_that_is_not_pushed_is_not_named(run, told, monkeypatch, step):
    monkeypatch.setenv("DOCKER_FAILS", step)
    status, out, err = run("image", "an-endpoint", "one")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == f"error: docker {step} failed with exit status 17"
    assert f" docker {step} " in [line for line in told() if "docker" in line][-1]


def test_ctrl_c_ends_the_building(told, elsewhere):
    ended = subprocess.run(
        program("image", "an-endpoint", "one"),
        env={**os.environ, **elsewhere, "DOCKER_INTERRUPTED": "build"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (130, "")
    assert "Traceback" not in ended.stderr
    assert len(told()) == 1
