"""The API Gateway side of the template: keys, stages, preflights and the gateway's own answers.

What only the API for Segmind's own clients has stands in `test_compatible_api`.
"""

from __future__ import annotations

import json
import re

import pytest

OPEN_ROUTES = {("GET", "/health")}
STATUS = {
    "ACCESS_DENIED": 403,
    "API_CONFIGURATION_ERROR": 500,
    "BAD_REQUEST_BODY": 400,
    "BAD_REQUEST_PARAMETERS": 400,
    "INTEGRATION_FAILURE": 502,
    "INTEGRATION_TIMEOUT": 504,
    "INVALID_API_KEY": 403,
    "MISSING_AUTHENTICATION_TOKEN": 404,
    "QUOTA_EXCEEDED": 429,
    "REQUEST_TOO_LARGE": 413,
    "RESOURCE_NOT_FOUND": 404,
    "THROTTLED": 429,
    "UNSUPPORTED_MEDIA_TYPE": 415,
}


def responses(template):
    return template.api["x-amazon-apigateway-gateway-responses"]


def bodies(response):
    return {kind: json.loads(text) for kind, text in response["responseTemplates"].items()}


def test_regional_and_named(template):
    api = template.properties("Api")
    assert api["EndpointConfiguration"] == {"Types": ["REGIONAL"]}
    assert api["Name"] == {"Fn::Sub": "${AWS::StackName}-api"}
    assert api["ApiKeySourceType"] == "HEADER"


def test_a_new_parameter_reaches_the_stage(source):
    # SAM names a deployment by the template's text, in which a parameter's value does not show.
    assert source["Resources"]["Api"]["Properties"]["AlwaysDeploy"] is True


@pytest.mark.parametrize(("api", "name"), [("Api", "v1"), ("CompatibleApi", "segmind")])
def test_one_stage(template, api, name):
    stages = template.of_type("AWS::ApiGateway::Stage").values()
    (stage,) = (stage for stage in stages if stage["RestApiId"] == {"Ref": api})
    assert stage["StageName"] == name
    assert stage["TracingEnabled"] is True
    (settings,) = stage["MethodSettings"]
    assert settings["ThrottlingRateLimit"] == {"Ref": "ThrottleRate"}
    assert settings["ThrottlingBurstLimit"] == {"Ref": "ThrottleBurst"}
    # SAM's extra stage `Stage` comes in through the deployment.
    assert all("StageName" not in d for d in template.of_type("AWS::ApiGateway::Deployment").values())


def test_every_route_but_the_open_ones_needs_a_key(template):
    for method, path, definition in template.operations():
        if method == "OPTIONS":
            continue
        needed = [{"api_key": []}] if (method, path) not in OPEN_ROUTES else []
        assert definition["security"] == needed, (method, path)


def test_preflights_need_no_key(template):
    preflights = [(p, d) for m, p, d in template.operations() if m == "OPTIONS"]
    assert {path for path, _ in preflights} == set(template.api["paths"])
    for path, definition in preflights:
        assert not definition.get("security"), path
        headers = definition["x-amazon-apigateway-integration"]["responses"]["default"]["responseParameters"]
        assert headers["method.response.header.Access-Control-Allow-Origin"] == {"Fn::Sub": "'${CorsOrigin}'"}
        allowed = headers["method.response.header.Access-Control-Allow-Headers"].strip("'").lower().split(",")
        assert {"content-type", "x-api-key", "prefer", "idempotency-key"} <= set(allowed)


def test_preflights_allow_every_method_in_use(template):
    used = {method for method, _, _ in template.operations()}
    for method, path, definition in template.operations():
        if method == "OPTIONS":
            headers = definition["x-amazon-apigateway-integration"]["responses"]["default"]["responseParameters"]
            allowed = headers["method.response.header.Access-Control-Allow-Methods"].strip("'").split(",")
            assert used <= set(allowed), path


def test_no_catch_all_route(template):
    assert not [path for path in template.api["paths"] if "+" in path]
    assert "x-amazon-apigateway-any-method" not in {method.lower() for method, _, _ in template.operations()}


def test_requests_go_to_the_alias(template):
    for method, path, definition in template.operations():
        integration = definition["x-amazon-apigateway-integration"]
        if method != "OPTIONS":
            assert integration["type"] == "aws_proxy"
            assert "${ApiFunctionAliaslive}" in integration["uri"]["Fn::Sub"], path


def test_one_usage_plan_limits_the_keys_over_both_apis(template):
    plans = template.of_type("AWS::ApiGateway::UsagePlan")
    assert set(plans) == {"UsagePlan"}
    plan = plans["UsagePlan"]
    assert plan["Quota"] == {"Limit": {"Ref": "QuotaPerDay"}, "Period": "DAY"}
    assert plan["Throttle"] == {"RateLimit": {"Ref": "ThrottleRate"}, "BurstLimit": {"Ref": "ThrottleBurst"}}
    # The stage by reference, too: a plan that is made before its stage fails.
    assert plan["ApiStages"] == [
        {"ApiId": {"Ref": "Api"}, "Stage": {"Ref": "Apiv1Stage"}},
        {"ApiId": {"Ref": "CompatibleApi"}, "Stage": {"Ref": "CompatibleApisegmindStage"}},
    ]


def test_no_key_is_made_that_belongs_to_no_team(template):
    kinds = {resource["Type"] for resource in template.resources.values()}
    assert not kinds & {"AWS::ApiGateway::ApiKey", "AWS::ApiGateway::UsagePlanKey"}


def test_a_refused_key_is_told_from_the_functions_own_refusals(template):
    from img2img.errors import InsufficientCredits, KeyDisabled, KeyUnknown, TeamDisabled

    own = {error.code for error in (InsufficientCredits, KeyDisabled, KeyUnknown, TeamDisabled)}
    for kind in ("INVALID_API_KEY", "ACCESS_DENIED"):
        codes = {problem["code"] for problem in bodies(responses(template)[kind]).values()}
        assert codes == {"forbidden"}
        assert not codes & own


def test_binary_types_cover_images_but_not_everything(template):
    types = template.properties("Api")["BinaryMediaTypes"]
    assert template.api["x-amazon-apigateway-binary-media-types"] == [kind.replace("~1", "/") for kind in types]
    listed = {kind.replace("~1", "/") for kind in types}
    # With */* JSON bodies would arrive as base64, and the preflight mock would answer 500.
    assert "*/*" not in listed
    # Each by name, too: what a pattern matches is not documented.
    assert {"image/*", "image/jpeg", "image/png", "image/webp", "application/octet-stream"} <= listed
    assert not any(kind.startswith(("application/json", "application/problem", "text/")) for kind in listed)


@pytest.mark.parametrize(("kind", "status"), STATUS.items())
def test_gateway_answers_are_problems(template, kind, status):
    response = responses(template)[kind]
    assert response["statusCode"] == str(status)
    problems = bodies(response)
    assert set(problems) == {"application/json", "application/problem+json"}
    problem = problems["application/problem+json"]
    assert problems["application/json"] == problem
    assert problem["status"] == status
    assert {"type", "title", "status", "detail", "error", "code", "errors"} == set(problem)
    assert all(re.fullmatch("[a-z_]+", problem["code"]) for problem in problems.values())


def test_every_gateway_answer_has_its_text_where_segminds_clients_look(template):
    for kind, response in responses(template).items():
        for problem in bodies(response).values():
            assert problem["error"] == problem["detail"], kind


def test_every_gateway_answer_has_cors_and_its_type(template):
    for kind, response in responses(template).items():
        headers = response["responseParameters"]
        assert headers["gatewayresponse.header.Content-Type"] == "'application/problem+json'", kind
        assert headers["gatewayresponse.header.Access-Control-Allow-Origin"] == {"Fn::Sub": "'${CorsOrigin}'"}, kind
        # What stands there in text has to be a quoted literal.
        assert all(re.fullmatch("'.*'", value) for value in headers.values() if isinstance(value, str)), kind


def test_defaults_keep_their_status(template):
    assert set(responses(template)) == {*STATUS, "DEFAULT_4XX", "DEFAULT_5XX"}
    for kind in ("DEFAULT_4XX", "DEFAULT_5XX"):
        response = responses(template)[kind]
        assert "statusCode" not in response
        for problem in bodies(response).values():
            assert "status" not in problem
            assert {"type", "title", "detail", "error", "code", "errors"} == set(problem)


def test_refusals_for_now_say_when_to_come_back(template):
    for kind in ("THROTTLED", "QUOTA_EXCEEDED"):
        headers = responses(template)[kind]["responseParameters"]
        assert headers["gatewayresponse.header.Retry-After"].strip("'").isdigit()
        assert "Retry-After" in headers["gatewayresponse.header.Access-Control-Expose-Headers"]


@pytest.mark.parametrize(("kind", "field"), [("REQUEST_TOO_LARGE", "body"), ("INVALID_API_KEY", "x-api-key")])
def test_answers_name_what_is_wrong(template, kind, field):
    problem = bodies(responses(template)[kind])["application/problem+json"]
    assert [error["field"] for error in problem["errors"]] == [field]
    assert all(set(error) == {"field", "detail"} for error in problem["errors"])
