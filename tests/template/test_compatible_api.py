"""The API for Segmind's own clients: bytes whatever they accept, Segmind's envelope and statuses, no browsers."""

from __future__ import annotations

import json

import pytest

STATUS = {
    "ACCESS_DENIED": 401,
    "API_CONFIGURATION_ERROR": 500,
    "BAD_REQUEST_BODY": 400,
    "BAD_REQUEST_PARAMETERS": 400,
    "INTEGRATION_FAILURE": 502,
    "INTEGRATION_TIMEOUT": 504,
    "INVALID_API_KEY": 401,
    "MISSING_AUTHENTICATION_TOKEN": 404,
    "QUOTA_EXCEEDED": 429,
    "REQUEST_TOO_LARGE": 413,
    "RESOURCE_NOT_FOUND": 404,
    "THROTTLED": 429,
    "UNSUPPORTED_MEDIA_TYPE": 406,
}


def responses(template):
    return template.compatible["x-amazon-apigateway-gateway-responses"]


def text_of(response):
    ((kind, body),) = response["responseTemplates"].items()
    assert kind == "application/json"
    document = json.loads(body)
    assert set(document) == {"error"}
    return document["error"]


def test_differs_from_the_main_api_in_what_segminds_clients_need(source):
    main, compatible = (source["Resources"][name]["Properties"] for name in ("Api", "CompatibleApi"))
    assert {key for key in main.keys() | compatible.keys() if main.get(key) != compatible.get(key)} == {
        "Name",
        "Description",
        "StageName",
        "Auth",  # of preflights
        "Cors",
        "BinaryMediaTypes",
        "GatewayResponses",
    }


def test_every_answer_may_be_bytes(template):
    assert template.properties("CompatibleApi")["BinaryMediaTypes"] == ["*~1*"]
    assert template.compatible["x-amazon-apigateway-binary-media-types"] == ["*/*"]


def test_no_preflights(template):
    # Their mocks would answer 500 with */*.
    assert "OPTIONS" not in {method for method, _, _ in template.operations("CompatibleApi")}


def test_every_route_needs_a_key_and_goes_to_the_alias(template):
    assert template.properties("CompatibleApi")["ApiKeySourceType"] == "HEADER"
    for method, path, definition in template.operations("CompatibleApi"):
        assert definition["security"] == [{"api_key": []}], (method, path)
        integration = definition["x-amazon-apigateway-integration"]
        assert integration["type"] == "aws_proxy"
        assert "${CompatibleFunctionAliaslive}" in integration["uri"]["Fn::Sub"], path


def test_function_differs_from_the_main_apis_in_what_it_does(source):
    main, compatible = (source["Resources"][name]["Properties"] for name in ("ApiFunction", "CompatibleFunction"))
    assert {key for key in main.keys() | compatible.keys() if main.get(key) != compatible.get(key)} == {
        "Description",
        "CodeUri",
        "Role",
        "LoggingConfig",
        "Events",
    }


@pytest.mark.parametrize(("kind", "status"), STATUS.items())
def test_gateway_answers_have_segminds_form(template, kind, status):
    assert responses(template)[kind]["statusCode"] == str(status)
    assert text_of(responses(template)[kind])


def test_defaults_keep_their_status(template):
    assert set(responses(template)) == {*STATUS, "DEFAULT_4XX", "DEFAULT_5XX"}
    for kind in ("DEFAULT_4XX", "DEFAULT_5XX"):
        assert "statusCode" not in responses(template)[kind]
        assert text_of(responses(template)[kind])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("INVALID_API_KEY", "x-api-key"),
        ("MISSING_AUTHENTICATION_TOKEN", "/v1/sd1.5-img2img"),
        ("REQUEST_TOO_LARGE", "3.3 MB"),
        ("REQUEST_TOO_LARGE", "URL"),
        ("INTEGRATION_TIMEOUT", "runs on"),
    ],
)
def test_gateway_answers_say_what_to_do(template, kind, says):
    assert says in text_of(responses(template)[kind])


@pytest.mark.parametrize(("kind", "seconds"), [("THROTTLED", "1"), ("QUOTA_EXCEEDED", "3600")])
def test_refusals_for_now_say_when_to_come_back(template, kind, seconds):
    assert responses(template)[kind]["responseParameters"] == {"gatewayresponse.header.Retry-After": f"'{seconds}'"}
