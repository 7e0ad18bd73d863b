"""Functions, their environment, their triggers and what they may do."""

from __future__ import annotations

import dataclasses
import re

import pytest

from img2img.jobs.guards import OBJECT_GUARD_TTL
from img2img.settings import Settings

FUNCTIONS = (
    "ApiFunction",
    "WorkerFunction",
    "CollectFunction",
    "IngestFunction",
    "SweepFunction",
    "CompatibleFunction",
)
# Those that somebody waits for.
SNAPSHOTS = ("ApiFunction", "CompatibleFunction")
FED = {
    "WorkerFunction": ("JobsQueue", {"Ref": "WorkerConcurrency"}),
    "CollectFunction": ("ResultsQueue", 20),
    "IngestFunction": ("UploadsQueue", {"Ref": "IngestConcurrency"}),
}
PREFIXES = (
    r"\$\{UploadsBucket\.Arn\}/(uploads|inputs|inbox|awaited|requests|answers|failures)/\*"
    r"|\$\{ResultsBucket\.Arn\}/(results|outbox)/\*"
    # The model's, see `test_endpoint`.
    r"|arn:\$\{AWS::Partition\}:s3:::\$\{Prefix\}\*"
)
SETTINGS = {field.metadata["name"]: field for field in dataclasses.fields(Settings)}
# Only who calls a backend has them.
OF_BACKENDS = {
    "SEGMIND_SECRET_ID",
    "SEGMIND_API",
    "SEGMIND_BASE_URL",
    "SEGMIND_OUTPUT_ORIGINS",
    "SEGMIND_TIMEOUT_SECONDS",
    "FALLBACK_AFTER_SECONDS",
    "SAGEMAKER_ENDPOINT",
    "SAGEMAKER_INVOCATION",
    "SAGEMAKER_TIMEOUT_SECONDS",
    "RESULTS_QUEUE_URL",
}
CALL_BACKENDS = ("WorkerFunction", "CollectFunction")
# What has no resource to name.
UNBOUND = {
    "xray:PutTraceSegments",
    "xray:PutTelemetryRecords",
    "cloudwatch:PutMetricData",
    "ecr:GetAuthorizationToken",
}


@pytest.fixture(params=FUNCTIONS)
def function(request, template):
    return template.properties(request.param)


def as_list(value):
    return value if isinstance(value, list) else [value]


def test_runtime(function):
    assert function["Runtime"] == "python3.13"
    assert function["Architectures"] == ["arm64"]
    assert function["Handler"] == "app.handler"
    assert function["TracingConfig"] == {"Mode": "Active"}
    assert len(function["Layers"]) == 2


def test_no_other_functions(template):
    assert set(template.of_type("AWS::Lambda::Function")) == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_setting_is_set_and_nothing_else(template, name):
    variables = template.properties(name)["Environment"]["Variables"]
    expected = set(SETTINGS) - (set() if name in CALL_BACKENDS else OF_BACKENDS)
    assert {variable for variable in variables if not variable.startswith("POWERTOOLS_")} == expected


def test_powertools_settings(function):
    variables = function["Environment"]["Variables"]
    assert variables["POWERTOOLS_SERVICE_NAME"] == "img2img"
    assert variables["POWERTOOLS_METRICS_NAMESPACE"] == "Img2Img"
    # Whole events hold API keys and prompts.
    assert "POWERTOOLS_LOGGER_LOG_EVENT" not in variables
    assert "POWERTOOLS_DEV" not in variables


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_default_of_a_setting_is_that_of_its_parameter(segmind, source, name):
    field = SETTINGS[name]
    value = segmind.properties("WorkerFunction")["Environment"]["Variables"][name]
    if isinstance(value, dict):
        referenced = value["Ref"]
        if referenced not in source["Parameters"]:
            return  # the name of a resource
        value = source["Parameters"][referenced]["Default"]
    assert field.default is not dataclasses.MISSING
    assert str(value) == str(field.default)


def test_retry_times_fit_together(template):
    for function, (queue, _) in FED.items():
        timeout = template.properties(function)["Timeout"]
        assert template.properties(queue)["VisibilityTimeout"] >= 6 * timeout, function
    # Both claim jobs.
    for function in CALL_BACKENDS:
        properties = template.properties(function)
        assert int(properties["Environment"]["Variables"]["LEASE_SECONDS"]) > properties["Timeout"], function
    # The gateway hangs up at 29 s, and a sweep ends before the next one starts.
    for function in SNAPSHOTS:
        assert template.properties(function)["Timeout"] < 29, function
    assert template.properties("SweepFunction")["Timeout"] < 60


def test_longest_segmind_call_fits_into_the_worker(template, source):
    longest = source["Parameters"]["SegmindTimeoutSeconds"]["MaxValue"]
    assert longest < template.properties("WorkerFunction")["Timeout"]


def test_deadline_ends_a_job_before_its_message_is_lost(template, source):
    assert (
        source["Parameters"]["JobDeadlineSeconds"]["MaxValue"]
        < template.properties("JobsQueue")["MessageRetentionPeriod"]
    )


def test_an_object_is_known_for_as_long_as_a_notice_of_it_may_come(template):
    queues = ("UploadsQueue", "UploadsDeadLetterQueue")
    assert sum(template.properties(name)["MessageRetentionPeriod"] for name in queues) < OBJECT_GUARD_TTL


def test_queues_feed_their_functions(template):
    mappings = {
        mapping["FunctionName"]["Ref"]: mapping
        for mapping in template.of_type("AWS::Lambda::EventSourceMapping").values()
    }
    assert set(mappings) == set(FED)
    for function, (queue, concurrency) in FED.items():
        assert mappings[function]["BatchSize"] == 1
        assert mappings[function]["FunctionResponseTypes"] == ["ReportBatchItemFailures"]
        assert mappings[function]["ScalingConfig"] == {"MaximumConcurrency": concurrency}
        assert mappings[function]["EventSourceArn"] == {"Fn::GetAtt": [queue, "Arn"]}


@pytest.mark.parametrize("concurrency", ["WorkerConcurrency", "IngestConcurrency"])
def test_concurrency_is_what_a_queue_can_have(source, concurrency):
    parameter = source["Parameters"][concurrency]
    assert (parameter["MinValue"], parameter["MaxValue"]) == (2, 1000)


def test_sweep_runs_every_minute(template):
    (rule,) = template.of_type("AWS::Events::Rule").values()
    assert rule["ScheduleExpression"] == "rate(1 minute)"


def test_functions_behind_an_api_are_snapshots_behind_aliases(template):
    for name in SNAPSHOTS:
        assert template.properties(name)["SnapStart"] == {"ApplyOn": "PublishedVersions"}
    aliases = {alias["FunctionName"]["Ref"]: alias for alias in template.of_type("AWS::Lambda::Alias").values()}
    assert set(aliases) == set(SNAPSHOTS)
    assert {alias["Name"] for alias in aliases.values()} == {"live"}
    versions = [r for r in template.resources.values() if r["Type"] == "AWS::Lambda::Version"]
    # Kept versions are snapshots that are paid for.
    assert [version["DeletionPolicy"] for version in versions] == ["Delete"] * len(SNAPSHOTS)


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_alias_follows_code_and_layers(version_of, name):
    before = version_of(name)
    assert version_of(name) == before
    assert version_of(name, artefacts="two") != before
    for layer in ("CoreLayer", "DependenciesLayer"):

        def change(template, layer=layer):
            template["Resources"][layer]["Properties"].update(Description="changed")

        assert version_of(name, change) != before, layer


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_alias_follows_the_functions_own_properties(version_of, name):
    before = version_of(name)
    assert version_of(name, lambda t: t["Resources"][name]["Properties"].update(Timeout=20)) != before
    changed = version_of(name, lambda t: t["Globals"]["Function"]["Environment"]["Variables"].update(NEW_NAME="value"))
    assert changed != before


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_alias_follows_parameters(template, source, name):
    versions = template.of_type("AWS::Lambda::Version").values()
    (version,) = (version for version in versions if version["FunctionName"] == {"Ref": name})
    mentioned = set(re.findall(r"\$\{(\w+)\}", version["Description"]["Fn::Sub"]))
    variables = template.properties(name)["Environment"]["Variables"].values()
    used = {v["Ref"] for v in variables if isinstance(v, dict)} & set(source["Parameters"])
    assert mentioned == used

    def longest(name):
        parameter = source["Parameters"][name]
        if "AllowedValues" in parameter:
            return max(len(str(value)) for value in parameter["AllowedValues"])
        return parameter.get("MaxLength") or len(str(parameter["MaxValue"]))

    text = version["Description"]["Fn::Sub"]
    assert len(re.sub(r"\$\{\w+\}", "", text)) + sum(map(longest, mentioned)) <= 256


def test_logs_are_json_kept_for_a_while_in_a_group_of_the_stack(function, template):
    group = function["LoggingConfig"]["LogGroup"]["Ref"]
    assert function["LoggingConfig"]["LogFormat"] == "JSON"
    assert template.properties(group)["RetentionInDays"] == {"Ref": "LogRetentionDays"}


def test_no_log_level_at_which_libraries_log_bodies(source, template):
    assert "DEBUG" not in source["Parameters"]["LogLevel"]["AllowedValues"]
    # It would be the level of the root logger, whatever Powertools' own is.
    assert all("ApplicationLogLevel" not in template.properties(name)["LoggingConfig"] for name in FUNCTIONS)


def test_own_roles_without_managed_policies(template):
    roles = template.of_type("AWS::IAM::Role")
    assert set(roles) == {f"{name}Role" for name in FUNCTIONS} | {"EndpointRole"}
    for name, role in roles.items():
        assert "ManagedPolicyArns" not in role, name
    for name in FUNCTIONS:
        assert template.properties(name)["Role"] == {"Fn::GetAtt": [f"{name}Role", "Arn"]}


def test_no_statement_allows_any_action(template):
    for name, statement in template.statements():
        assert {"Sid", "Effect", "Action", "Resource"} <= set(statement), name
        if statement["Effect"] == "Allow":
            assert not [action for action in as_list(statement["Action"]) if "*" in action], (name, statement["Sid"])


def test_no_statement_allows_any_resource_where_one_can_be_named(template):
    for name, statement in template.statements():
        if "*" in as_list(statement["Resource"]):
            assert set(as_list(statement["Action"])) <= UNBOUND, name
        for resource in as_list(statement["Resource"]):
            text = as_list(resource.get("Fn::Sub", ""))[0] if isinstance(resource, dict) else resource
            if statement["Effect"] == "Allow" and text.endswith("*") and text != "*":
                assert re.fullmatch(PREFIXES, text), name


def allowed(template, role):
    return {(action, resource) for name, action, resource, _ in template.grants() if name == role}


@pytest.mark.parametrize(("name", "queue"), [(name, queue) for name, (queue, _) in FED.items()])
def test_a_fed_function_may_back_off(template, name, queue):
    granted = {action for action, resource in allowed(template, f"{name}Role") if resource == queue}
    # The worker sends to itself: each look at a picture on its way is a message, without Lambda's limit to such chains.
    sends = {"sqs:SendMessage"} if queue == "JobsQueue" else set()
    assert (template.properties(name).get("RecursiveLoop") == "Allow") == bool(sends)
    assert granted - sends == {
        f"sqs:{action}"
        for action in ("ReceiveMessage", "DeleteMessage", "GetQueueAttributes", "ChangeMessageVisibility")
    }


def test_only_who_calls_a_backend_reads_the_segmind_key(template):
    grants = [grant[:3] for grant in template.grants() if grant[1].startswith("secretsmanager:")]
    assert grants == [(f"{name}Role", "secretsmanager:GetSecretValue", "SegmindSecret") for name in CALL_BACKENDS]


def test_listing_is_bound_to_prefixes(template):
    listings = [s for _, s in template.statements() if "s3:ListBucket" in as_list(s["Action"])]
    bound = [s for s in listings if "Condition" in s]
    # Those without tell a missing object from a forbidden one; a read names no prefix.
    assert [s["Sid"] for s in listings if s not in bound] == [
        "MissingUploads",
        "MissingAnswers",
        "MissingAnswers",
        "MissingObjects",
        "MissingUploads",
        "ListModel",
        "MissingRequests",
    ]
    assert bound
    for statement in bound:
        prefixes = as_list(statement["Condition"]["StringLike"]["s3:prefix"])
        assert prefixes == ["results/*"]


def test_no_function_may_touch_the_others_data(template):
    for role in ("WorkerFunctionRole", "CollectFunctionRole", "SweepFunctionRole"):
        assert not [r for a, r in allowed(template, role) if "IdempotencyTable" in r]
    for name in set(FUNCTIONS) - {"ApiFunction"}:
        assert ("dynamodb:DeleteItem", "JobsTable") not in allowed(template, f"{name}Role")
    # The sweep sees no picture that a client sent, the API nothing that was put out for a pipeline.
    assert not [r for _, r in allowed(template, "SweepFunctionRole") if r.startswith("UploadsBucket")]
    for name in SNAPSHOTS:
        assert not [r for _, r in allowed(template, f"{name}Role") if r.startswith("ResultsBucket/outbox")]
    # Segmind's clients may name an upload, and delete nothing.
    uploads = {r for _, r in allowed(template, "CompatibleFunctionRole") if r.startswith("UploadsBucket")}
    assert uploads == {"UploadsBucket", "UploadsBucket/inputs/*", "UploadsBucket/uploads/*"}
    assert ("s3:PutObject", "UploadsBucket/uploads/*") not in allowed(template, "CompatibleFunctionRole")
    assert ("s3:DeleteObject", "ResultsBucket/results/*") not in allowed(template, "CompatibleFunctionRole")


def test_a_failed_sweep_is_not_repeated_before_the_next(template):
    (invoked,) = template.of_type("AWS::Lambda::EventInvokeConfig").values()
    assert invoked["FunctionName"] == {"Ref": "SweepFunction"}
    assert invoked["MaximumRetryAttempts"] == 0


def test_binary_answers_are_of_types_that_the_gateway_decodes(template):
    from img2img.negotiation import BINARY_TYPES

    assert set(BINARY_TYPES) <= {
        name.replace("~1", "/") for name in template.api["x-amazon-apigateway-binary-media-types"]
    }
