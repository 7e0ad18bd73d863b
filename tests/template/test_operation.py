"""Alarms, dashboard, parameters and outputs."""

from __future__ import annotations

import io
import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from img2img.money.prices import PriceTable
from tests.system import function

ROOT = Path(__file__).parents[2]
CODE = [*ROOT.glob("functions/*/app.py"), *ROOT.glob("layers/core/python/img2img/**/*.py")]
EMITTED = {name for path in CODE for name in re.findall(r'(?:add|single)_metric\(\s*"(\w+)"', path.read_text())}

SIDES = (("x", "width"), ("y", "height"))


def dimensions(alarm):
    return {d["Name"]: d["Value"] for d in alarm["Dimensions"]}


def test_alarms_notify_the_topic_if_there_is_one(template, segmind):
    alarms = template.of_type("AWS::CloudWatch::Alarm")
    for name, alarm in alarms.items():
        assert alarm["TreatMissingData"] == "notBreaching", name
        assert alarm["AlarmDescription"], name
        if name != "FirstInstanceAlarm":  # that one starts an instance
            assert alarm["AlarmActions"] == alarm["OKActions"] == [{"Ref": "AlarmTopicArn"}], name
    for name, alarm in segmind.of_type("AWS::CloudWatch::Alarm").items():
        assert not {"AlarmActions", "OKActions"} & set(alarm), name


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
        ("Img2Img", "TeamsLowOnCredits"),
        ("Img2Img", "InsufficientCredits"),
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
    from img2img.errors import InternalError, recorded_error

    codes = {dimensions(alarm).get("code") for alarm in template.of_type("AWS::CloudWatch::Alarm").values()} - {None}
    assert codes
    for code in codes:
        assert not isinstance(recorded_error(code, ""), InternalError), code


def test_one_team_low_on_credits_raises_the_alarm(template):
    alarm = template.properties("LowBalanceAlarm")
    assert (alarm["MetricName"], alarm["ComparisonOperator"]) == ("TeamsLowOnCredits", "GreaterThanThreshold")
    # Each minute has the number anew: a sum would count a team five times.
    assert (alarm["Statistic"], alarm["Threshold"], alarm["EvaluationPeriods"]) == ("Maximum", 0, 1)
    # Longer than from one run to the next: else a late run would be no data, and end the alarm.
    assert alarm["Period"] > 60


def test_one_request_refused_for_want_of_credits_raises_the_alarm(template):
    alarm = template.properties("SpentBudgetAlarm")
    assert (alarm["MetricName"], alarm["ComparisonOperator"]) == ("InsufficientCredits", "GreaterThanThreshold")
    assert (alarm["Statistic"], alarm["Threshold"], alarm["Period"]) == ("Sum", 0, 300)


def test_alarms_tell_the_teams_credits_from_those_at_segmind(template):
    descriptions = {
        alarm["MetricName"]: alarm["AlarmDescription"]
        for alarm in template.of_type("AWS::CloudWatch::Alarm").values()
        if "credits" in alarm["AlarmDescription"].lower() or "402" in alarm["AlarmDescription"]
    }
    about_segmind = {metric for metric, text in descriptions.items() if "Segmind" in text}
    assert about_segmind == {"SegmindRemainingCredits", "FailuresByCode"}
    assert set(descriptions) - about_segmind == {"TeamsLowOnCredits", "InsufficientCredits"}


@pytest.mark.parametrize(
    ("metric", "queues"),
    [
        (
            "ApproximateNumberOfMessagesVisible",
            {"JobsDeadLetterQueue", "UploadsDeadLetterQueue", "ResultsDeadLetterQueue"},
        ),
        ("ApproximateAgeOfOldestMessage", {"JobsQueue", "UploadsQueue", "ResultsQueue"}),
    ],
)
def test_alarms_watch_every_queue(template, metric, queues):
    alarms = [a for a in template.of_type("AWS::CloudWatch::Alarm").values() if a["MetricName"] == metric]
    assert sorted(alarm["Dimensions"][0]["Value"]["Fn::GetAtt"][0] for alarm in alarms) == sorted(queues)
    assert all(set(dimensions(alarm)) == {"QueueName"} for alarm in alarms)


def test_one_object_of_no_team_raises_the_alarm(template):
    alarm = template.properties("UnattributedObjectsAlarm")
    assert (alarm["Statistic"], alarm["Threshold"], alarm["EvaluationPeriods"]) == ("Maximum", 0, 1)
    assert alarm["ComparisonOperator"] == "GreaterThanThreshold"


def test_alarms_watch_every_function_behind_the_api(template):
    alarms = template.of_type("AWS::CloudWatch::Alarm").values()
    watched = {dimensions(a)["FunctionName"]["Ref"] for a in alarms if a["MetricName"] == "Errors"}
    # Those of an API show as 5xx.
    assert watched == set(template.of_type("AWS::Lambda::Function")) - {"ApiFunction", "CompatibleFunction"}
    stages = [dimensions(a) for a in alarms if a["MetricName"] == "5XXError"]
    assert stages == [
        {"ApiName": template.properties(api)["Name"], "Stage": {"Ref": stage}}
        for api, stage in (("Api", "Apiv1Stage"), ("CompatibleApi", "CompatibleApisegmindStage"))
    ]


def test_dashboard_is_json_and_shows_every_metric(template):
    text, widgets = template.dashboard(), template.widgets()
    assert not {name for name in EMITTED if f'"{name}' not in text and f'\\"{name}' not in text}
    shown = set(re.findall(r"\$\{(\w+)(?:\.QueueName)?\}", text))
    kinds = ("AWS::Lambda::Function", "AWS::SQS::Queue", "AWS::Logs::LogGroup")
    assert not {name for kind in kinds for name in template.of_type(kind)} - shown
    assert all(widget["x"] + widget["width"] <= 24 for widget in widgets)
    assert not [(a, b) for a, b in combinations(widgets, 2) if overlap(a, b)]


def overlap(a, b):
    """Whether two widgets share a place."""
    return all(a[start] < b[start] + b[size] and b[start] < a[start] + a[size] for start, size in SIDES)


def test_dashboard_names_the_teams_that_the_sweep_found_low(template, system, monkeypatch):
    text = re.sub(r"\$\{\w+Threshold\}", "0", template.dashboard())
    queries = [w["properties"].get("query", "") for w in json.loads(text)["widgets"]]
    (query,) = [query for query in queries if query.startswith("SOURCE '${SweepLogGroup}'")]
    (message,) = re.findall("message = '([^']+)'", query)
    (pattern,) = re.findall("parse @message '([^']+)' as low", query)
    for team in ("rich", "poor", "poorer"):
        system.services.teams.create(team)
        system.services.credits.add(team, 1_000_000 if team == "rich" else 1)
    logged = io.StringIO()
    monkeypatch.setattr(function("sweep").logger.registered_handler, "stream", logged)
    system.sweep()
    (line,) = [line for line in logged.getvalue().splitlines() if json.loads(line)["message"] == message]
    # In a pattern of Logs Insights, * stands for anything, as little of it as possible.
    before, after = map(re.escape, pattern.split("*"))
    (shown,) = re.findall(f"{before}(.*?){after}", line)
    assert shown == '"poor","poorer"'


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
        "SegmindCompatibleUrl",
        "UsagePlanId",
        "UploadsBucketName",
        "ResultsBucketName",
        "JobsTableName",
        "JobsQueueUrl",
        "JobsDeadLetterQueueUrl",
        "InboxUri",
        "OutboxUri",
        "UploadsQueueUrl",
        "UploadsDeadLetterQueueUrl",
        "SegmindSecretArn",
        "DashboardUrl",
    } <= set(source["Outputs"])
    assert all(output["Description"] for output in source["Outputs"].values())


def test_a_pipeline_finds_the_inbox_and_the_outbox(source):
    assert source["Outputs"]["InboxUri"]["Value"] == {"Fn::Sub": "s3://${UploadsBucket}/inbox/"}
    assert source["Outputs"]["OutboxUri"]["Value"] == {"Fn::Sub": "s3://${ResultsBucket}/outbox/"}


def test_a_segmind_client_finds_its_address(template):
    address = template.outputs["SegmindCompatibleUrl"]["Value"]["Fn::Sub"]
    assert address.startswith("https://${CompatibleApi}.execute-api.")
    assert address.endswith("/${CompatibleApisegmindStage}/v1")


def test_an_operator_finds_the_table_and_the_usage_plan(source):
    assert source["Outputs"]["JobsTableName"]["Value"] == {"Ref": "JobsTable"}
    assert source["Outputs"]["UsagePlanId"]["Value"] == {"Ref": "UsagePlan"}


@pytest.mark.parametrize("price", ["1", "1000", "1000,sagemaker=600", "999999999,segmind=2,sagemaker=3"])
def test_prices_that_a_deployment_takes_can_be_read(source, price):
    parameter = source["Parameters"]["PriceBase"]
    assert re.fullmatch(parameter["AllowedPattern"], price)
    assert len(price) <= parameter["MaxLength"]
    assert PriceTable.parse(price).version.startswith(f"1:{price.partition(',')[0]}")


@pytest.mark.parametrize(
    "price", ["", "0", "-1", "1.5", "01", "1e3", "1000,", "1000,sagemaker", "sagemaker=600", "9999999999"]
)
def test_prices_that_a_deployment_refuses_are_those_that_cannot_be_read(source, price):
    assert not re.fullmatch(source["Parameters"]["PriceBase"]["AllowedPattern"], price)
    with pytest.raises(ValueError, match="price table"):
        PriceTable.parse(price)
