"""Alarms, dashboard, parameters and outputs."""

from __future__ import annotations

import json
import re

EMITTED = {
    "JobsCreated",
    "JobsSucceeded",
    "JobsFailed",
    "FailuresByCode",
    "QueueTime",
    "BackendTime",
    "SegmindRemainingCredits",
    "BackendRetries",
}


def dimensions(alarm):
    return {d["Name"]: d["Value"] for d in alarm["Dimensions"]}


def test_alarms_notify_the_topic_if_there_is_one(template):
    alarms = template.of_type("AWS::CloudWatch::Alarm")
    action = {"Fn::If": ["HasAlarmTopic", [{"Ref": "AlarmTopicArn"}], {"Ref": "AWS::NoValue"}]}
    for name, alarm in alarms.items():
        assert alarm["AlarmActions"] == action, name
        assert alarm["OKActions"] == action, name
        assert alarm["TreatMissingData"] == "notBreaching", name
        assert alarm["AlarmDescription"], name


def test_alarms_watch_what_can_go_wrong(template):
    watched = {(a["Namespace"], a["MetricName"]) for a in template.of_type("AWS::CloudWatch::Alarm").values()}
    assert watched >= {
        ("AWS/SQS", "ApproximateNumberOfMessagesVisible"),
        ("AWS/SQS", "ApproximateAgeOfOldestMessage"),
        ("AWS/Lambda", "Errors"),
        ("AWS/Lambda", "Throttles"),
        ("AWS/ApiGateway", "5XXError"),
        ("Img2Img", "JobsFailed"),
        ("Img2Img", "FailuresByCode"),
        ("Img2Img", "SegmindRemainingCredits"),
    }


def test_alarms_name_the_dimensions_that_are_emitted(template):
    alarms = template.of_type("AWS::CloudWatch::Alarm")
    own = {name: alarm for name, alarm in alarms.items() if alarm["Namespace"] == "Img2Img"}
    assert own
    for name, alarm in own.items():
        assert alarm["MetricName"] in EMITTED, name
        expected = {"service", "code"} if alarm["MetricName"] == "FailuresByCode" else {"service"}
        assert set(dimensions(alarm)) == expected, name
        assert dimensions(alarm)["service"] == "img2img"


def test_alarms_on_codes_name_codes_that_exist(template):
    from img2img.errors import InternalError, job_error

    codes = {dimensions(alarm).get("code") for alarm in template.of_type("AWS::CloudWatch::Alarm").values()} - {None}
    assert codes
    for code in codes:
        assert not isinstance(job_error(code, ""), InternalError), code


def test_dead_letter_alarm_watches_the_dead_letter_queue(template):
    assert dimensions(template.properties("DeadLettersAlarm")) == {
        "QueueName": {"Fn::GetAtt": ["JobsDeadLetterQueue", "QueueName"]}
    }


def test_dashboard_is_json_and_shows_every_metric(template):
    text = template.properties("Dashboard")["DashboardBody"]["Fn::Sub"]
    widgets = json.loads(re.sub(r"\$\{[^}]+\}", "0", text))["widgets"]
    assert all(name in text for name in EMITTED)
    places = [(w["x"], w["y"], w["width"], w["height"]) for w in widgets]
    assert len({(x, y) for x, y, _, _ in places}) == len(places)
    assert all(x + width <= 24 for x, _, width, _ in places)


def test_parameters_are_documented_grouped_and_have_defaults(source):
    parameters = source["Parameters"]
    groups = source["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"]
    grouped = [name for group in groups for name in group["Parameters"]]
    assert sorted(grouped) == sorted(parameters)
    for name, parameter in parameters.items():
        assert parameter["Description"].endswith("."), name
        assert "Default" in parameter, name


def test_outputs(source):
    assert {
        "ApiUrl",
        "ApiKeyId",
        "UploadsBucketName",
        "ResultsBucketName",
        "JobsTableName",
        "JobsQueueUrl",
        "JobsDeadLetterQueueUrl",
        "SegmindSecretArn",
        "DashboardUrl",
    } <= set(source["Outputs"])
    assert all(output["Description"] for output in source["Outputs"].values())
