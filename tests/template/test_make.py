"""`make secret`, `make model` and `make endpoint-image`: what they leave in AWS is what the template takes.

The commands that they run are tested in tests/unit/test_admin.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

ROOT = Path(__file__).parents[2]
# In place of Docker: writes down what it is told.
DOCKER = """#!/bin/sh
echo "docker $*" >> "$DOCKER_LOG"
test "$1" != "$DOCKER_FAILS"
"""
# In place of the endpoint's Python, which has torch: "converts" by copying.
CONVERTER = """#!/bin/sh
test "$*" != "" || exit 1
for folder; do from=$last last=$folder; done
echo "$*" > "$CONVERTED"
cp -r "$from/." "$last"
"""


@pytest.fixture(scope="module")
def aws():
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    server.stop()


@pytest.fixture
def client(aws):
    return lambda service: boto3.client(service, endpoint_url=aws["AWS_ENDPOINT_URL"])


@pytest.fixture
def tools(tmp_path):
    """A folder with a docker and a converter that only tell what they were asked for."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, text in (("docker", DOCKER), ("converter", CONVERTER)):
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    return folder


@pytest.fixture
def make(aws, tools, tmp_path):
    def run(*arguments, given="", **environment):
        # What these targets install first is here already.
        here = ["RUN=", "ENDPOINT_RUN=", f"PY={sys.executable}", f"ENDPOINT_PY={tools / 'converter'}"]
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        credentials = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        logs = {"DOCKER_LOG": str(tmp_path / "docker.log"), "CONVERTED": str(tmp_path / "converted")}
        return subprocess.run(
            [shutil.which("make") or "make", "-s", *here, *arguments],
            cwd=ROOT,
            env={**kept, **credentials, **aws, **logs, "PATH": f"{tools}:{os.environ['PATH']}", **environment},
            input=given,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.fixture
def weights(tmp_path):
    folder = tmp_path / "weights"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet/model.safetensors").write_bytes(b"weights")
    return folder


def fits(source, parameter, value):
    return re.fullmatch(source["Parameters"][parameter]["AllowedPattern"], value)


def told(done, parameter):
    assert done.returncode == 0, done.stderr
    (value,) = re.findall(f"^{parameter}: (.*)$", done.stdout, re.MULTILINE)
    return value


def keys(client, bucket):
    return [item["Key"] for item in client("s3").list_objects_v2(Bucket=bucket).get("Contents", [])]


def test_model_lies_below_a_prefix_that_the_template_takes(make, client, weights, source, tmp_path):
    client("s3").create_bucket(Bucket="models-a", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    uri = told(make("model", f"MODEL={weights}", "BUCKET=models-a"), "ModelDataUri")
    assert fits(source, "ModelDataUri", uri)
    assert uri.startswith("s3://models-a/models/")
    prefix = uri.removeprefix("s3://models-a/")
    assert keys(client, "models-a") == [f"{prefix}model_index.json", f"{prefix}unet/model.safetensors"]
    assert "--safety-checker" not in (tmp_path / "converted").read_text()
    # Nothing is left of it here.
    assert not Path((tmp_path / "converted").read_text().split()[-1]).exists()
    # The same weights have the same address, others another.
    assert told(make("model", f"MODEL={weights}", "BUCKET=models-a"), "ModelDataUri") == uri
    (weights / "unet/model.safetensors").write_bytes(b"others")
    assert told(make("model", f"MODEL={weights}", "BUCKET=models-a"), "ModelDataUri") != uri


def test_model_below_a_prefix_of_ones_own_with_its_safety_checker(make, client, weights, tmp_path):
    client("s3").create_bucket(Bucket="models-b", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    done = make("model", f"MODEL={weights}", "URI=s3://models-b/sd15/fp16/", "SAFETY_CHECKER=on")
    assert told(done, "ModelDataUri").startswith("s3://models-b/sd15/fp16/")
    assert "--safety-checker" in (tmp_path / "converted").read_text()


@pytest.mark.parametrize(
    "arguments",
    [("BUCKET=models",), ("MODEL=somewhere",), ("MODEL=WEIGHTS", "URI=models/"), ("MODEL=WEIGHTS", "URI=s3://a/b")],
)
def test_model_says_what_it_needs(make, weights, arguments):
    done = make("model", *(argument.replace("WEIGHTS", str(weights)) for argument in arguments))
    assert done.returncode != 0
    assert "MODEL=FOLDER_OR_HUB_NAME" in done.stderr or "s3://bucket/prefix/" in done.stderr
    assert "Traceback" not in done.stderr


def test_image_is_one_that_the_template_takes(make, client, source, tmp_path):
    image = told(make("endpoint-image", "REPOSITORY=an-endpoint", "TAG=one"), "EndpointImageUri")
    assert fits(source, "EndpointImageUri", image)
    assert image.endswith("/an-endpoint:one")
    assert (tmp_path / "docker.log").read_text().splitlines()[-1] == f"docker push {image}"
    client("ecr").describe_repositories(repositoryNames=["an-endpoint"])
    # Each time under another tag.
    again = told(make("endpoint-image", "REPOSITORY=an-endpoint"), "EndpointImageUri")
    assert fits(source, "EndpointImageUri", again)
    assert again != image


def test_image_that_is_not_pushed_is_not_named(make):
    done = make("endpoint-image", DOCKER_FAILS="push")
    assert done.returncode != 0
    assert "docker push failed" in done.stderr
    assert "EndpointImageUri" not in done.stdout


def test_secret_is_the_stacks_own(make, client):
    # moto's CloudFormation makes no secrets: a bucket of the same name stands in the stack.
    template = {"Resources": {"SegmindSecret": {"Type": "AWS::S3::Bucket", "Properties": {"BucketName": "of-mine"}}}}
    client("cloudformation").create_stack(StackName="mine", TemplateBody=json.dumps(template))
    secrets = client("secretsmanager")
    secrets.create_secret(Name="of-mine", SecretString="unset")
    done = make("secret", "STACK=mine", "REGION=eu-west-1", given="SG_key\n")
    assert done.returncode == 0, done.stderr
    assert "SG_key" not in done.stdout + done.stderr
    assert secrets.get_secret_value(SecretId="of-mine")["SecretString"] == "SG_key"
    for arguments in (["STACK=mine"], ["STACK=others"], ["STACK=mine", "REGION=us-east-1"]):
        done = make("secret", *arguments)
        assert done.returncode != 0
        assert done.stderr.startswith("error: ")
    assert secrets.get_secret_value(SecretId="of-mine")["SecretString"] == "SG_key"
