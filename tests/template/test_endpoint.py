"""What each choice of backend and invocation deploys, and the SageMaker endpoint."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.template.conftest import ENDPOINT, TOPIC, Template, as_list, deployment

INVOCATIONS = ("async", "realtime")
CHOICES = [(backend, invocation) for backend in ("segmind", "sagemaker", "auto") for invocation in INVOCATIONS]
WITH_ENDPOINT = [choice for choice in CHOICES if choice[0] != "segmind"]
SERVICES = ("AWS::SageMaker::", "AWS::ApplicationAutoScaling::", "AWS::SNS::")
OF_THE_ENDPOINT = {
    "EndpointRole",
    "EndpointLogGroup",
    "Model",
    "EndpointConfig",
    "Endpoint",
    "EndpointScaling",
    "EndpointErrorsAlarm",
    "EndpointRefusalsAlarm",
}
OF_REALTIME = {"RealtimePolicy"}
KEPT = ("Type", "Default")
OF_ASYNC = {
    "BacklogPolicy",
    "FirstInstancePolicy",
    "FirstInstanceAlarm",
    "SuccessTopic",
    "SuccessTopicPolicy",
    "SuccessSubscription",
    "ErrorTopic",
    "ErrorTopicPolicy",
    "ErrorSubscription",
    "ResultsQueue",
    "ResultsQueuePolicy",
    "ResultsDeadLetterQueue",
    "ResultsDeadLetterQueuePolicy",
    "CollectFunction",
    "CollectFunctionRole",
    "CollectFunctionResults",
    "CollectLogGroup",
    "CollectErrorsAlarm",
    "UncollectedResultsAlarm",
    "OldestResultAlarm",
    "OldestRequestAlarm",
}


def deployed(backend, invocation, **parameters):
    least = {"MinInstances": "1"} if invocation == "realtime" else {}
    given = {} if backend == "segmind" else ENDPOINT
    return deployment(Backend=backend, SageMakerInvocation=invocation, **least, **given, **parameters)


@pytest.fixture(params=CHOICES, ids="-".join)
def choice(request):
    return request.param


@pytest.fixture(params=WITH_ENDPOINT, ids="-".join)
def endpoint_choice(request):
    return request.param


@pytest.fixture
def realtime():
    return Template(deployed("sagemaker", "realtime"))


def names_in(value):
    """Yield every resource, parameter or pseudo parameter that a value refers to."""
    match value:
        case {"Ref": str(name)} | {"Fn::GetAtt": [str(name), *_]}:
            yield name
        case {"Fn::Sub": [str(text), dict(parts)]}:
            yield from (name for name in re.findall(r"\$\{([\w:]+)", text) if name not in parts)
            yield from names_in(parts)
        case {"Fn::Sub": str(text)}:
            yield from re.findall(r"\$\{([\w:]+)", text)
        case dict():
            for item in value.values():
                yield from names_in(item)
        case list():
            for item in value:
                yield from names_in(item)


# ---------------------------------------------------------------- what there is


def test_only_what_the_choice_needs_is_deployed(choice, segmind):
    backend, invocation = choice
    expected = set(segmind.resources)
    if backend != "segmind":
        expected |= OF_THE_ENDPOINT | (OF_ASYNC if invocation == "async" else OF_REALTIME)
    if backend == "auto":
        expected.add("FallbacksAlarm")
    assert set(Template(deployed(*choice)).resources) == expected


def test_segmind_deploys_nothing_of_the_endpoint(segmind):
    assert not [kind for kind in segmind.kinds() if kind.startswith(SERVICES)]
    assert not {"EndpointName", "ResultsQueueUrl", "ResultsDeadLetterQueueUrl"} & set(segmind.outputs)
    assert not [action for _, action, _, _ in segmind.grants() if action.startswith(("sagemaker:", "sns:", "ecr:"))]


def test_the_same_is_deployed_for_segmind_whatever_the_invocation():
    assert deployed("segmind", "realtime")["Resources"] == deployed("segmind", "async")["Resources"]


def test_nothing_refers_to_what_is_not_deployed(choice):
    found = deployed(*choice)
    known = set(found["Resources"]) | set(found["Parameters"])
    for section in ("Resources", "Outputs"):
        for name, entry in found[section].items():
            missing = {n for n in names_in(entry) if n not in known and not n.startswith("AWS::")}
            assert not missing, name
            assert set(as_list(entry.get("DependsOn", []))) <= set(found["Resources"]), name


# Between them each value of each parameter.
@pytest.mark.parametrize("choice", [("segmind", "async"), ("sagemaker", "async"), ("auto", "realtime")], ids="-".join)
def test_cfn_lint_of_what_is_deployed(choice, tmp_path):
    # By itself cfn-lint looks at parameters one at a time: here each has its value, and conditions are decided.
    found = deployed(*choice, AlarmTopicArn=TOPIC)
    found["Parameters"] = {name: {key: p[key] for key in KEPT} for name, p in found["Parameters"].items()}
    path = tmp_path / "template.json"
    path.write_text(json.dumps(found))
    command = [str(Path(sys.executable).with_name("cfn-lint")), "--regions", "eu-west-1"]
    # Parameters of the other choices are not used.
    done = subprocess.run(
        [*command, "--ignore-checks", "W2001", "--", str(path)],
        env={"PATH": "", "AWS_DEFAULT_REGION": "eu-west-1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def holds(rule, parameters):
    match rule:
        case {"Fn::Not": [part]}:
            return not holds(part, parameters)
        case {"Fn::And": parts}:
            return all(holds(part, parameters) for part in parts)
        case {"Fn::Equals": [{"Ref": name}, value]}:
            return parameters[name] == value
    raise AssertionError(rule)


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({}, set()),
        ({"Backend": "sagemaker"}, {"EndpointHasImageAndModel"}),
        ({"Backend": "auto", "ModelDataUri": ENDPOINT["ModelDataUri"]}, {"EndpointHasImageAndModel"}),
        ({"Backend": "auto", "EndpointImageUri": ENDPOINT["EndpointImageUri"]}, {"EndpointHasImageAndModel"}),
        ({"Backend": "auto", **ENDPOINT}, set()),
        ({"SageMakerInvocation": "realtime"}, set()),
        ({"Backend": "sagemaker", "SageMakerInvocation": "realtime", **ENDPOINT}, {"RealtimeHasAnInstance"}),
        ({"Backend": "sagemaker", "SageMakerInvocation": "realtime", "MinInstances": "1", **ENDPOINT}, set()),
    ],
)
def test_cloudformation_refuses_what_could_not_work(given, refused):
    template = deployment()
    parameters = {name: str(p["Default"]) for name, p in template["Parameters"].items()} | given
    broken = {
        name
        for name, rule in template["Rules"].items()
        if holds(rule["RuleCondition"], parameters)
        and not all(holds(assertion["Assert"], parameters) for assertion in rule["Assertions"])
    }
    assert broken == refused
    assert all(a["AssertDescription"] for rule in template["Rules"].values() for a in rule["Assertions"])


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        (
            "EndpointImageUri",
            [
                "123456789012.dkr.ecr.eu-west-1.amazonaws.com/img2img-endpoint:20260101-abc",
                "123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn/img2img@sha256:" + "0" * 64,
            ],
            ["img2img-endpoint", "public.ecr.aws/a/b:1", "123456789012.dkr.ecr.eu-west-1.amazonaws.com/a/b:1"],
        ),
        ("ModelDataUri", ["s3://bucket/a/", "s3://my.bucket/a/b/"], ["s3://bucket/", "s3://bucket/a", "/opt/model/"]),
        ("InstanceType", ["ml.g6.xlarge", "ml.p5.4xlarge", "ml.g6e.48xlarge"], ["g6.xlarge", "ml.g6", ""]),
    ],
)
def test_parameters_of_the_endpoint(source, name, good, bad):
    pattern = source["Parameters"][name]["AllowedPattern"]
    assert all(re.fullmatch(pattern, value) for value in good)
    assert not [value for value in bad if re.fullmatch(pattern, value)]


# ---------------------------------------------------------------- the functions


def test_environment_tells_what_to_call(choice):
    backend, invocation = choice
    template = Template(deployed(*choice))
    worker = template.properties("WorkerFunction")["Environment"]["Variables"]
    assert worker["BACKEND"] == template.properties("ApiFunction")["Environment"]["Variables"]["BACKEND"]
    uses = backend != "segmind"
    assert worker["SAGEMAKER_ENDPOINT"] == ({"Fn::GetAtt": ["Endpoint", "EndpointName"]} if uses else "")
    is_async = uses and invocation == "async"
    assert worker["RESULTS_QUEUE_URL"] == ({"Ref": "ResultsQueue"} if is_async else "")
    if is_async:
        assert template.properties("CollectFunction")["Environment"]["Variables"] == worker


@pytest.mark.parametrize("function", ["Worker", "Collect"])
def test_who_calls_may_call_what_there_is(choice, function):
    backend, invocation = choice
    template = Template(deployed(*choice))
    if f"{function}Function" not in template.resources:
        assert (function, backend == "segmind" or invocation == "realtime") == ("Collect", True)
        return
    granted = {(action, place) for role, action, place, _ in template.grants() if role == f"{function}FunctionRole"}
    of_endpoint = {action for action, place in granted if place == "Endpoint"}
    of_bucket = {(action, place) for action, place in granted if place.startswith("UploadsBucket")}
    of_bucket -= {("s3:GetObject", "UploadsBucket/inputs/*")}
    call = "sagemaker:InvokeEndpointAsync" if invocation == "async" else "sagemaker:InvokeEndpoint"
    # Only the worker says why a job waits.
    look = {"sagemaker:DescribeEndpoint"} if function == "Worker" else set()
    assert of_endpoint == (set() if backend == "segmind" else {call} | look)
    requests = {("s3:PutObject", "UploadsBucket/requests/*")} if invocation == "async" else set()
    # Also in real time: what an asynchronous endpoint did before is still taken.
    answers = {
        ("s3:GetObject", "UploadsBucket/answers/*"),
        ("s3:GetObject", "UploadsBucket/failures/*"),
        ("s3:ListBucket", "UploadsBucket"),
    }
    assert of_bucket == (set() if backend == "segmind" else requests | answers)
    # Also with the endpoint alone: what Segmind was asked for before is paid for.
    assert ("secretsmanager:GetSecretValue", "SegmindSecret") in granted


def test_the_endpoints_arn_is_not_put_together_by_hand(template):
    # In it the name is in lower case, and IAM tells the cases apart.
    named = [
        statement["Resource"]
        for _, statement in template.statements()
        if [action for action in as_list(statement["Action"]) if action.startswith("sagemaker:")]
    ]
    assert named == [{"Ref": "Endpoint"}] * 2


# ---------------------------------------------------------------- the endpoint


def test_role_of_the_endpoint(endpoint_choice):
    template = Template(deployed(*endpoint_choice))
    granted = {(action, place) for role, action, place, _ in template.grants() if role == "EndpointRole"}
    queued = {
        ("s3:GetObject", "UploadsBucket/requests/*"),
        ("s3:ListBucket", "UploadsBucket"),
        *((action, f"UploadsBucket/{prefix}/*") for prefix in ("answers", "failures") for action in WRITE),
        ("sns:Publish", "SuccessTopic"),
        ("sns:Publish", "ErrorTopic"),
    }
    assert granted == {
        *((f"logs:{action}", "EndpointLogGroup") for action in LOG),
        ("cloudwatch:PutMetricData", "*"),
        ("ecr:GetAuthorizationToken", "*"),
        *(
            (f"ecr:{action}", "arn:${AWS::Partition}:ecr:${Region}:${Account}:repository/${Repository}")
            for action in PULL
        ),
        ("s3:GetObject", "arn:${AWS::Partition}:s3:::${Prefix}*"),
        ("s3:ListBucket", "arn:${AWS::Partition}:s3:::${Bucket}"),
        *(queued if endpoint_choice[1] == "async" else ()),
    }


WRITE = ("s3:PutObject", "s3:AbortMultipartUpload")
LOG = ("CreateLogGroup", "CreateLogStream", "DescribeLogStreams", "PutLogEvents")
PULL = ("BatchCheckLayerAvailability", "BatchGetImage", "GetDownloadUrlForLayer")


def resolve(value, parameters):
    """Return what CloudFormation makes of a text of parameters."""
    match value:
        case {"Ref": name}:
            return parameters[name]
        case {"Fn::Select": [index, parts]}:
            return resolve(parts, parameters)[int(index)]
        case {"Fn::Split": [separator, text]}:
            return resolve(text, parameters).split(separator)
        case {"Fn::Sub": [text, parts]}:
            known = parameters | {name: resolve(part, parameters) for name, part in parts.items()}
            return re.sub(r"\$\{([\w:]+)\}", lambda found: known[found[1]], text)
    return value


@pytest.mark.parametrize("tag", [":20260101-abc", "@sha256:" + "0" * 64])
def test_role_is_bound_to_the_image_and_the_model(template, tag):
    parameters = {
        "EndpointImageUri": f"123456789012.dkr.ecr.eu-west-1.amazonaws.com/img2img-endpoint{tag}",
        "ModelDataUri": "s3://my.models/sd15/one/",
        "AWS::Partition": "aws",
    }
    (policy,) = template.properties("EndpointRole")["Policies"]
    statements = {s["Sid"]: resolve(s["Resource"], parameters) for s in policy["PolicyDocument"]["Statement"]}
    assert statements["Image"] == "arn:aws:ecr:eu-west-1:123456789012:repository/img2img-endpoint"
    assert statements["Model"] == "arn:aws:s3:::my.models/sd15/one/*"
    assert statements["ListModel"] == "arn:aws:s3:::my.models"


def test_the_container_reaches_no_network(template):
    assert template.properties("Model")["EnableNetworkIsolation"] is True


def test_settings_of_the_container_are_ones_that_it_reads(template, source):
    settings = (Path(__file__).parents[2] / "endpoint/settings.py").read_text()
    given = template.properties("Model")["PrimaryContainer"]["Environment"]
    for name, value in given.items():
        assert f'"{name}"' in settings, name
        for choice in source["Parameters"][value["Ref"]].get("AllowedValues", []):
            assert f'"{choice}"' in settings, (name, choice)
    # What SageMaker sends at a time finds room.
    config = template.properties("EndpointConfig")["AsyncInferenceConfig"]["ClientConfig"]
    assert given["MAX_QUEUE"] == config["MaxConcurrentInvocationsPerInstance"]


def test_names_do_not_stand_in_the_way_of_a_replacement(template):
    assert "ModelName" not in template.properties("Model")
    assert "EndpointConfigName" not in template.properties("EndpointConfig")


def test_another_kind_of_instance_or_invocation_is_another_endpoint(template):
    # Application Auto Scaling refuses to change the instance type of what it scales.
    def name(stack="img2img", invocation="async", instance="ml.g6.xlarge"):
        parameters = {"AWS::StackName": stack, "SageMakerInvocation": invocation, "InstanceType": instance}
        return resolve(template.properties("Endpoint")["EndpointName"], parameters)

    assert name() == "img2img-async-g6-xlarge"
    assert (
        len({name(), name(invocation="realtime"), name(instance="ml.g6.2xlarge"), name(instance="ml.g5.xlarge")}) == 4
    )
    longest = name("s" * 38, "realtime", "ml.p6-b200.48xlarge")
    assert re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}", longest)


def test_log_of_the_endpoint_is_there_first_and_kept_for_a_while(template):
    group = template.properties("EndpointLogGroup")
    parameters = {"AWS::StackName": "a", "SageMakerInvocation": "async", "InstanceType": "ml.g6.xlarge"}
    name = resolve(template.properties("Endpoint")["EndpointName"], parameters)
    assert resolve(group["LogGroupName"], parameters) == f"/aws/sagemaker/Endpoints/{name}"
    assert group["RetentionInDays"] == {"Ref": "LogRetentionDays"}
    assert template.resources["Endpoint"]["DependsOn"] == "EndpointLogGroup"


@pytest.mark.parametrize(("least", "first"), [("0", 1), ("3", {"Ref": "MinInstances"})])
def test_instances_at_the_start(least, first):
    template = Template(deployed("sagemaker", "async", MinInstances=least))
    (variant,) = template.properties("EndpointConfig")["ProductionVariants"]
    assert variant["InitialInstanceCount"] == first


def test_instances_without_a_gpu_have_no_gpu_drivers():
    template = Template(deployed("sagemaker", "async", InferenceAmiVersion=""))
    (variant,) = template.properties("EndpointConfig")["ProductionVariants"]
    assert "InferenceAmiVersion" not in variant


def test_realtime_endpoint_has_no_queue(realtime):
    assert "AsyncInferenceConfig" not in realtime.properties("EndpointConfig")


# ---------------------------------------------------------------- scaling


def test_scaling_is_of_the_endpoints_one_variant(endpoint_choice):
    template = Template(deployed(*endpoint_choice))
    (variant,) = template.properties("EndpointConfig")["ProductionVariants"]
    target = template.properties("EndpointScaling")
    assert target["ResourceId"] == {"Fn::Sub": f"endpoint/${{Endpoint.EndpointName}}/variant/{variant['VariantName']}"}
    assert target["MinCapacity"] == {"Ref": "MinInstances"}
    assert target["MaxCapacity"] == {"Ref": "MaxInstances"}
    for policy in template.of_type("AWS::ApplicationAutoScaling::ScalingPolicy").values():
        assert policy["ScalingTargetId"] == {"Ref": "EndpointScaling"}


def test_a_first_instance_is_started_by_the_alarm(template):
    alarm = template.properties("FirstInstanceAlarm")
    assert (alarm["Namespace"], alarm["MetricName"]) == ("AWS/SageMaker", "HasBacklogWithoutCapacity")
    assert alarm["Dimensions"] == [{"Name": "EndpointName", "Value": {"Fn::GetAtt": ["Endpoint", "EndpointName"]}}]
    assert (alarm["Threshold"], alarm["ComparisonOperator"]) == (1, "GreaterThanOrEqualToThreshold")
    assert alarm["AlarmActions"] == [{"Ref": "FirstInstancePolicy"}]
    steps = template.properties("FirstInstancePolicy")["StepScalingPolicyConfiguration"]
    # One, however long the alarm lasts while it starts.
    assert steps["AdjustmentType"] == "ExactCapacity"
    assert steps["StepAdjustments"] == [{"MetricIntervalLowerBound": 0, "ScalingAdjustment": 1}]


def test_more_instances_follow_the_backlog(template):
    tracking = template.properties("BacklogPolicy")["TargetTrackingScalingPolicyConfiguration"]
    metric = tracking["CustomizedMetricSpecification"]
    assert (metric["Namespace"], metric["MetricName"]) == ("AWS/SageMaker", "ApproximateBacklogSizePerInstance")
    assert metric["Statistic"] == "Average"
    assert metric["Dimensions"] == [{"Name": "EndpointName", "Value": {"Fn::GetAtt": ["Endpoint", "EndpointName"]}}]


def test_realtime_scales_on_invocations(realtime):
    (policy,) = realtime.of_type("AWS::ApplicationAutoScaling::ScalingPolicy").values()
    tracking = policy["TargetTrackingScalingPolicyConfiguration"]
    assert tracking["PredefinedMetricSpecification"] == {
        "PredefinedMetricType": "SageMakerVariantInvocationsPerInstance"
    }
    assert tracking["TargetValue"] == {"Ref": "TargetInvocationsPerMinute"}


# ---------------------------------------------------------------- notices


@pytest.mark.parametrize("name", ["Success", "Error"])
def test_a_topic_feeds_the_results_queue(template, name):
    notified = template.properties("EndpointConfig")["AsyncInferenceConfig"]["OutputConfig"]["NotificationConfig"]
    assert notified[f"{name}Topic"] == {"Ref": f"{name}Topic"}
    assert template.properties(f"{name}Topic")["KmsMasterKeyId"] == "alias/aws/sns"
    assert template.properties(f"{name}Subscription") == {
        "TopicArn": {"Ref": f"{name}Topic"},
        "Protocol": "sqs",
        "Endpoint": {"Fn::GetAtt": ["ResultsQueue", "Arn"]},
        # What the collect function reads is SNS's envelope.
        "RawMessageDelivery": False,
    }


def test_nobody_but_the_endpoint_gives_notice(template):
    senders = {name: s for name, s in template.statements() if s["Effect"] == "Allow" and "Principal" in s}
    assert set(senders) == {"UploadsQueuePolicy", "ResultsQueuePolicy", "SuccessTopicPolicy", "ErrorTopicPolicy"}
    queue = senders["ResultsQueuePolicy"]
    assert queue["Principal"] == {"Service": "sns.amazonaws.com"}
    assert queue["Action"] == "sqs:SendMessage"
    assert queue["Condition"] == {"ArnEquals": {"aws:SourceArn": [{"Ref": "SuccessTopic"}, {"Ref": "ErrorTopic"}]}}
    for name in ("SuccessTopic", "ErrorTopic"):
        topic = senders[f"{name}Policy"]
        assert topic["Principal"] == {"AWS": {"Fn::GetAtt": ["EndpointRole", "Arn"]}}
        assert (topic["Action"], topic["Resource"]) == ("sns:Publish", {"Ref": name})
        assert template.properties(f"{name}Policy")["Topics"] == [{"Ref": name}]


@pytest.mark.parametrize("name", ["SuccessTopicPolicy", "ErrorTopicPolicy"])
def test_topics_take_tls_only(template, name):
    (statement,) = [s for owner, s in template.statements() if owner == name and s["Effect"] == "Deny"]
    assert (statement["Principal"], statement["Action"]) == ("*", "sns:Publish")
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_answers_lie_where_the_functions_look(template):
    output = template.properties("EndpointConfig")["AsyncInferenceConfig"]["OutputConfig"]
    assert output["S3OutputPath"] == {"Fn::Sub": "s3://${UploadsBucket}/answers/"}
    assert output["S3FailurePath"] == {"Fn::Sub": "s3://${UploadsBucket}/failures/"}


# ---------------------------------------------------------------- operation


def test_alarms_watch_the_endpoint(endpoint_choice):
    template = Template(deployed(*endpoint_choice))
    watched = {
        alarm["MetricName"]: {d["Name"] for d in alarm["Dimensions"]}
        for alarm in template.of_type("AWS::CloudWatch::Alarm").values()
        if alarm["Namespace"] == "AWS/SageMaker"
    }
    expected = {f"Invocation{kind}Errors": {"EndpointName", "VariantName"} for kind in ("4XX", "5XX")}
    if endpoint_choice[1] == "async":
        expected |= {name: {"EndpointName"} for name in ("HasBacklogWithoutCapacity", "ApproximateAgeOfOldestRequest")}
    assert watched == expected


def test_dashboard_shows_what_is_deployed(choice, segmind):
    backend, invocation = choice
    template = Template(deployed(*choice))
    more = {w["properties"]["title"] for w in template.widgets()} - {
        w["properties"]["title"] for w in segmind.widgets()
    }
    of_endpoint = {"Endpoint", "Latest errors of the endpoint"}
    of_queue = {"Queue of the endpoint", "Results of the endpoint", "Latest errors of collect"}
    uses = backend != "segmind"
    assert more == (of_endpoint if uses else set()) | (of_queue if uses and invocation == "async" else set())


def test_outputs(choice):
    backend, invocation = choice
    uses = backend != "segmind"
    expected = {"EndpointName"} if uses else set()
    if uses and invocation == "async":
        expected |= {"ResultsQueueUrl", "ResultsDeadLetterQueueUrl"}
    outputs = set(Template(deployed(*choice)).outputs)
    assert outputs & {"EndpointName", "ResultsQueueUrl", "ResultsDeadLetterQueueUrl"} == expected
