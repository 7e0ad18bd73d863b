"""How one machine plays the endpoint: what the template's conditions leave, and the process of the container."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from local import container as container_module
from local.commands import main
from local.conditions import ConditionError, under_conditions
from local.container import Container, EndpointError, tiny_model
from local.template import Blueprint, TemplateError
from tests.stack.client import wait_until

ROOT = Path(__file__).resolve().parents[2]
# Stands in for the interpreter of `python -m endpoint`: no model runs.
_INTERPRETER = f"""#!{sys.executable}
import pathlib, sys, threading
assert sys.argv[1:3] == ["-m", "endpoint"], sys.argv
command, *rest = sys.argv[3:]
if command == "tiny":
    pathlib.Path(rest[0]).mkdir()
    sys.exit()
options = dict(zip(rest[::2], rest[1::2]))
if options["--model"].endswith("broken"):
    sys.exit("error: no model there")
sys.path.insert(0, {str(ROOT)!r})
from tests.container import FakeContainer
assert options["--host"] == "127.0.0.1"
with FakeContainer(int(options["--port"])):
    threading.Event().wait()
"""


@pytest.fixture
def python(tmp_path) -> Path:
    path = tmp_path / "python"
    path.write_text(_INTERPRETER)
    path.chmod(0o755)
    return path


# -------------------------------------------------------------------------------------------------- conditions


@pytest.mark.parametrize(
    ("parameters", "functions", "topics"),
    [
        ({}, 5, 0),
        ({"Backend": "sagemaker"}, 6, 2),
        ({"Backend": "auto"}, 6, 2),
        ({"Backend": "sagemaker", "SageMakerInvocation": "realtime"}, 5, 0),
    ],
)
def test_each_backend_deploys_its_own_resources(parameters, functions, topics):
    blueprint = Blueprint.load(ROOT / "template.yaml", parameters)
    kinds = [resource["Type"] for resource in blueprint.stack["Resources"].values()]
    assert len(blueprint.parts["functions"]) == functions
    assert kinds.count("AWS::SNS::Topic") == len(blueprint.parts["subscriptions"]) == topics
    assert len(blueprint.parts["endpoints"]) == (1 if parameters else 0)
    assert ("EndpointName" in blueprint.stack["Outputs"]) == bool(parameters)


def test_conditions_choose_resources_values_and_outputs():
    template = {
        "Parameters": {"Size": {"Type": "Number", "Default": 2}, "Name": {"Type": "String", "Default": "x"}},
        "Conditions": {
            "Big": {"Fn::Not": [{"Fn::Equals": [{"Ref": "Size"}, "1"]}]},
            "Here": {"Fn::Equals": [{"Ref": "AWS::Region"}, "us-east-1"]},
            "Both": {"Fn::And": [{"Condition": "Big"}, {"Condition": "Here"}]},
            "Neither": {"Fn::Not": [{"Fn::Or": [{"Condition": "Big"}, {"Condition": "Here"}]}]},
        },
        "Resources": {
            "Kept": {
                "Type": "A",
                "Condition": "Both",
                "Properties": {
                    "One": {"Fn::If": ["Big", {"Fn::If": ["Neither", 1, {"Ref": "Name"}]}, 3]},
                    "None": {"Fn::If": ["Neither", 1, {"Ref": "AWS::NoValue"}]},
                    "Some": [1, {"Fn::If": ["Neither", 2, {"Ref": "AWS::NoValue"}]}, 3],
                },
            },
            "Gone": {"Type": "B", "Condition": "Neither"},
        },
        "Outputs": {"Gone": {"Condition": "Neither", "Value": 1}, "Kept": {"Condition": "Big", "Value": 2}},
    }
    left = under_conditions(template, {"AWS::Region": "us-east-1"})
    assert left["Resources"] == {"Kept": {"Type": "A", "Properties": {"One": {"Ref": "Name"}, "Some": [1, 3]}}}
    assert left["Outputs"] == {"Kept": {"Value": 2}}
    assert "Conditions" not in left


@pytest.mark.parametrize(
    "condition",
    [
        {"Fn::Equals": [{"Fn::GetAtt": ["Queue", "Arn"]}, "x"]},
        {"Fn::Equals": [{"Ref": "Queue"}, "x"]},
        {"Condition": "Unknown"},
        {"Fn::Contains": [["a"], "a"]},
    ],
)
def test_a_condition_that_only_aws_can_judge_is_refused(condition):
    template = {"Conditions": {"Odd": condition}, "Resources": {"A": {"Type": "A", "Condition": "Odd"}}}
    with pytest.raises(ConditionError):
        under_conditions(template, {})


def test_a_template_with_such_a_condition_is_refused(tmp_path):
    text = (ROOT / "template.yaml").read_text()
    path = tmp_path / "template.yaml"
    path.write_text(text.replace("\nConditions:\n", "\nConditions:\n  Odd: !Equals [!Ref JobsQueue, x]\n", 1))
    path.write_text(path.read_text().replace("Condition: UsesAsync", "Condition: Odd"))
    with pytest.raises(TemplateError, match="JobsQueue"):
        Blueprint.load(path, {})


# -------------------------------------------------------------------------------------------------- the container


def test_a_container_is_waited_for_and_ended(python, tmp_path, monkeypatch):
    monkeypatch.setattr(container_module, "_PROGRESS_SECONDS", 0.0)
    said: list[str] = []
    container = Container("a/model", tmp_path / "log", python)
    try:
        container.wait_until_ready(said.append)
        assert requests.get(f"{container.url}/ping", timeout=5).status_code == 200
        assert container.alive
    finally:
        container.close()
    assert any("warms up" in line for line in said)
    assert not container.alive
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{container.url}/ping", timeout=5)
    container.close()


def test_a_container_that_ends_says_why(python, tmp_path):
    container = Container("broken", tmp_path / "log", python)
    with pytest.raises(EndpointError, match=r"(?s)status 1.*no model there"):
        container.wait_until_ready()
    container.close()


def test_the_tiny_model_is_made_once_and_again_when_its_maker_has_changed(python, tmp_path, monkeypatch):
    monkeypatch.setattr(container_module, "TINY_MODEL", tmp_path / "tiny")
    maker = tmp_path / "maker"
    maker.touch()
    os.utime(maker, (1, 1))
    monkeypatch.setattr(container_module, "_TINY_MAKER", maker)
    (tmp_path / "tiny.unfinished").mkdir()  # of somebody who lost patience
    said: list[str] = []
    for _ in range(2):
        assert tiny_model(tmp_path / "log", python, said.append) == tmp_path / "tiny"
    assert (tmp_path / "tiny").is_dir()
    assert len(said) == 1
    os.utime(maker, (2**32, 2**32))
    tiny_model(tmp_path / "log", python, said.append)
    assert len(said) == 2


@pytest.mark.parametrize(
    ("environ", "arguments", "told"),
    [
        ({"BACKEND": "gpu"}, [], "BACKEND must be one of segmind, sagemaker, auto"),
        (
            {"BACKEND": "auto", "SAGEMAKER_INVOCATION": "soon"},
            [],
            "SAGEMAKER_INVOCATION must be one of async, realtime",
        ),
        ({"BACKEND": "sagemaker"}, ["--endpoint-python", "/nowhere/python"], "make run BACKEND=sagemaker"),
    ],
)
def test_what_cannot_be_run_is_said_plainly(environ, arguments, told, monkeypatch, capsys, tmp_path):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    files = ["--logs", str(tmp_path), "--env", str(tmp_path / "aws.env")]
    assert main(["run", "--port", "0", *files, *arguments]) == 1
    assert told in capsys.readouterr().err


class Run:
    """`python -m local run` as somebody starts it in a terminal."""

    def __init__(self, folder: Path, python: Path, **environ: str) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "local", "run", "--port", "0", "--latency", "0"),
                *("--logs", str(folder), "--env", str(folder / "aws.env"), "--endpoint-python", str(python)),
            ],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "SEGMIND_API_KEY"} | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.said = ""
        while "-d @-" not in self.said:
            line = self.process.stdout.readline()
            assert line, self.process.communicate()[1]
            self.said += line

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def children(self) -> set[int]:
        """Return all processes below it."""
        found: set[int] = set()
        while more := {pid for pid, parent in processes().items() if parent in found | {self.process.pid}} - found:
            found |= more
        return found


def processes() -> dict[int, int]:
    """Return the parents of all processes that are not just waiting to be buried."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines()]
    return {int(pid): int(parent) for pid, parent, state in rows if not state.startswith("Z")}


@pytest.mark.parametrize("backend", ["sagemaker", "auto"])
def test_run_starts_the_endpoint_and_ends_it_again(python, tmp_path, backend):
    with Run(tmp_path, python, BACKEND=backend, MODEL="some/model", SAGEMAKER_INVOCATION="realtime") as running:
        assert "real-time" in running.said
        assert "Model    some/model\n" in running.said
        assert "noise" not in running.said
        assert ("Segmind  simulated" in running.said) == (backend == "auto")
        children = running.children()
        assert len(children) >= 7  # moto, four functions, the endpoint and what ends it
        # In whichever way it ends.
        running.process.send_signal(signal.SIGKILL if backend == "auto" else signal.SIGINT)
        running.process.wait(timeout=20)
        wait_until(lambda: not children & processes().keys())


def test_run_says_when_the_endpoint_has_ended(python, tmp_path):
    with Run(tmp_path, python, BACKEND="sagemaker", MODEL="some/model") as running:
        listing = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pid=,args="], capture_output=True, text=True, check=True
        ).stdout
        [pid] = [
            int(line.split()[0])
            for line in listing.splitlines()
            if f"{python} -m endpoint serve" in line and "local.leash" not in line
        ]
        os.kill(pid, signal.SIGKILL)
        assert running.process.wait(timeout=20) == 1
        assert "ended by itself" in running.process.communicate()[1]
