"""template.yaml is ordered by function: all of the worker's parts stand together, and so on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def headings():
    """The heading that each resource stands under."""
    found, heading = {}, ""
    lines = (ROOT / "template.yaml").read_text().splitlines()
    for line in lines[lines.index("Resources:") + 1 : lines.index("Outputs:")]:
        if match := re.fullmatch(r"  # -{20,} (.+)", line):
            heading = match[1]
        elif match := re.fullmatch(r"  (\w+):", line):
            found[match[1]] = heading
    return found


def references(resource):
    """Yield the references to what a resource has for itself, or is made for."""
    properties = resource.get("Properties", {})
    match resource["Type"]:
        case "AWS::Serverless::Function":
            yield properties["Role"]
            yield properties["LoggingConfig"]["LogGroup"]
            yield from (e["Properties"]["Queue"] for e in properties["Events"].values() if e["Type"] == "SQS")
        case "AWS::SQS::Queue" if "RedrivePolicy" in properties:
            yield properties["RedrivePolicy"]["deadLetterTargetArn"]
        case "AWS::SQS::QueuePolicy":
            yield from properties["Queues"]
        case "AWS::SNS::TopicPolicy":
            yield from properties["Topics"]
        case "AWS::S3::BucketPolicy":
            yield properties["Bucket"]
        case "AWS::CloudWatch::Alarm":
            yield from (dimension["Value"] for dimension in properties["Dimensions"])


def name_of(reference):
    match reference:
        case {"Ref": str(name)}:
            return name.partition(".")[0]
        case {"Fn::GetAtt": [str(name), _]}:
            return name
    return None


def test_every_resource_stands_under_a_heading(headings, source):
    assert list(headings) == list(source["Resources"])
    assert all(headings.values())


def test_what_belongs_together_stands_together(headings, source):
    pairs = {
        (name, name_of(reference))
        for name, resource in source["Resources"].items()
        for reference in references(resource)
        if name_of(reference) in source["Resources"]
    }
    assert {
        ("WorkerFunction", "WorkerFunctionRole"),
        ("WorkerFunction", "WorkerLogGroup"),
        ("WorkerFunction", "JobsQueue"),
        ("JobsQueue", "JobsDeadLetterQueue"),
        ("JobsQueuePolicy", "JobsQueue"),
        ("WorkerErrorsAlarm", "WorkerFunction"),
        ("DeadLettersAlarm", "JobsDeadLetterQueue"),
        ("ApiErrorsAlarm", "Api"),
    } <= pairs
    assert {(one, other) for one, other in pairs if headings[one] != headings[other]} == set()
