"""template.yaml as the local machine needs it: translated by SAM, and read back as functions, routes and triggers.

Reading goes in two steps. `Blueprint` holds what the translated template says under the given parameters, intrinsics
and all but for conditions; CloudFormation (moto's, see `aws.py`) resolves them, and `Application.read` turns the
resolved values into typed ones.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
from samtranslator.parser.parser import Parser
from samtranslator.translator.translator import Translator
from samtranslator.yaml_helper import yaml_parse

from local.conditions import ConditionError, as_text, under_conditions

REGION = "us-east-1"
ACCOUNT = "123456789012"
Json = dict[str, Any]
_PSEUDO_PARAMETERS = {"AWS::Region": REGION, "AWS::AccountId": ACCOUNT, "AWS::Partition": "aws"}

# What CloudFormation makes in moto. Everything else of the template is played by this package, or plays no role here.
_DATA_TYPES = {
    "AWS::DynamoDB::Table",
    "AWS::S3::Bucket",
    "AWS::SQS::Queue",
    "AWS::SNS::Topic",
}
_SUBSCRIPTION = "AWS::SNS::Subscription"
_ENDPOINT = "AWS::SageMaker::Endpoint"
_ENDPOINT_CONFIG = "AWS::SageMaker::EndpointConfig"
_SECRET = "AWS::SecretsManager::Secret"  # noqa: S105 (a resource type)
_USAGE_PLAN = "AWS::ApiGateway::UsagePlan"


class TemplateError(Exception):
    """The template holds something the local machine cannot stand in for."""


@dataclass(frozen=True)
class FunctionSpec:
    name: str
    directory: Path
    layers: tuple[Path, ...]
    handler: str
    timeout: int
    memory: int
    environment: Mapping[str, str]


@dataclass(frozen=True)
class QueueMapping:
    function: str
    queue: str
    batch_size: int
    max_concurrency: int
    reports_failures: bool


@dataclass(frozen=True)
class Schedule:
    name: str
    function: str
    every_seconds: float
    input: str | None


@dataclass(frozen=True)
class ApiSpec:
    """A REST API: its OpenAPI body, with the integrations' functions by name under `x-local-function`."""

    name: str
    stage: str
    body: Json


@dataclass(frozen=True)
class AsyncSpec:
    """How an endpoint takes asynchronous invocations; without a topic nobody is told."""

    concurrency: int
    outputs: str
    failures: str
    success_topic: str = ""
    error_topic: str = ""


@dataclass(frozen=True)
class EndpointSpec:
    """A SageMaker endpoint: a real-time one where `asynchronous` is None."""

    name: str
    variant: str
    asynchronous: AsyncSpec | None = None


@dataclass(frozen=True)
class Application:
    functions: tuple[FunctionSpec, ...]
    apis: tuple[ApiSpec, ...]
    mappings: tuple[QueueMapping, ...]
    schedules: tuple[Schedule, ...]
    endpoint: EndpointSpec | None = None

    @classmethod
    def read(cls, resolved: Json, blueprint: Blueprint) -> Application:
        """Build the typed form of a blueprint's parts once they are resolved."""
        functions = tuple(
            FunctionSpec(
                name=name,
                directory=blueprint.directories[name],
                layers=blueprint.layers[name],
                handler=properties["Handler"],
                timeout=int(properties.get("Timeout", 3)),
                memory=int(properties.get("MemorySize", 128)),
                environment={key: as_text(value) for key, value in _variables(properties).items()},
            )
            for name, properties in resolved["functions"].items()
        )
        mappings = tuple(
            QueueMapping(
                function=properties["function"],
                queue=properties["queue"],
                batch_size=int(properties.get("BatchSize", 10)),
                max_concurrency=int(properties.get("ScalingConfig", {}).get("MaximumConcurrency", 5)),
                reports_failures="ReportBatchItemFailures" in properties.get("FunctionResponseTypes", []),
            )
            for properties in resolved["mappings"].values()
        )
        schedules = tuple(
            Schedule(name, properties["function"], _rate(properties["ScheduleExpression"]), properties["input"])
            for name, properties in resolved["schedules"].items()
        )
        apis = tuple(ApiSpec(name, api["stage"], api["body"]) for name, api in resolved["apis"].items())
        return cls(functions, apis, mappings, schedules, _endpoint_spec(resolved["endpoints"]))


@dataclass(frozen=True)
class Blueprint:
    """What to create, and what to read once it is: `parts` still hold intrinsics."""

    stack: Json
    secrets: dict[str, Json]
    usage_plans: tuple[str, ...]
    parts: Json
    directories: Mapping[str, Path]
    layers: Mapping[str, tuple[Path, ...]]

    @classmethod
    def load(cls, path: Path, parameters: Mapping[str, str]) -> Blueprint:
        """Translate the template and take it apart."""
        source = yaml_parse(path.read_text())
        directories = _localise(source, path.parent, "AWS::Serverless::Function", "CodeUri")
        content = _localise(source, path.parent, "AWS::Serverless::LayerVersion", "ContentUri")
        layers = {
            name: tuple(
                # A layer that a Makefile builds has no `python` folder in the source: its packages are installed here.
                content[layer["Ref"]] / "python"
                for layer in _function_property(source, name, "Layers", [])
                if layer.get("Ref") in content and (content[layer["Ref"]] / "python").is_dir()
            )
            for name in directories
        }
        template = _translate(source, parameters)
        for name, value in parameters.items():
            if name not in template.get("Parameters", {}):
                raise TemplateError(f"the template has no parameter {name}")
            template["Parameters"][name]["Default"] = value
        try:
            template = _with_endpoint_names(under_conditions(template, _PSEUDO_PARAMETERS))
        except ConditionError as error:
            raise TemplateError(str(error)) from None
        resources: Json = template["Resources"]
        data = _data_resources(resources)
        secrets = _of_type(resources, _SECRET)
        usage_plans = tuple(_of_type(resources, _USAGE_PLAN))
        return cls(
            stack={
                **_only(template, "Parameters", "Mappings"),
                "Resources": data,
                "Outputs": _outputs(template, {*data, *secrets, *usage_plans}),
            },
            secrets=secrets,
            usage_plans=usage_plans,
            parts={
                "functions": {
                    name: _only(p, "Handler", "Timeout", "MemorySize", "Environment")
                    for name, p in _of_type(resources, "AWS::Lambda::Function").items()
                },
                "apis": dict(_apis(resources)),
                "mappings": dict(_mappings(resources)),
                "schedules": dict(_schedules(resources)),
                "buckets": {
                    name: _only(p, "CorsConfiguration", "NotificationConfiguration")
                    for name, p in _of_type(resources, "AWS::S3::Bucket").items()
                },
                "ttl": {
                    name: p["TimeToLiveSpecification"]
                    for name, p in _of_type(resources, "AWS::DynamoDB::Table").items()
                    if "TimeToLiveSpecification" in p
                },
                "subscriptions": _of_type(resources, _SUBSCRIPTION),
                "endpoints": _endpoints(resources),
            },
            directories=directories,
            layers=layers,
        )


def _localise(source: Json, root: Path, kind: str, key: str) -> dict[str, Path]:
    """Return the local folders of a kind of resource; the translator itself accepts only addresses in S3."""
    folders: dict[str, Path] = {}
    for name, resource in source["Resources"].items():
        if resource["Type"] == kind:
            properties = resource.setdefault("Properties", {})
            folders[name] = (root / _function_property(source, name, key, ".")).resolve()
            properties[key] = f"s3://local/{name}"
    return folders


def _function_property(source: Json, name: str, key: str, default: Any) -> Any:
    properties = source["Resources"][name].get("Properties", {})
    shared = source.get("Globals", {}).get("Function", {}).get(key, default)
    own = properties.get(key)
    # SAM joins lists of Globals with the function's own.
    return [*shared, *own] if isinstance(shared, list) and own else own or shared


def _translate(source: Json, parameters: Mapping[str, str]) -> Json:
    # Feature toggles that only AWS's own deployment has are reported as warnings.
    logging.getLogger("samtranslator").setLevel(logging.ERROR)
    session = boto3.Session(region_name=REGION)
    translated: Json = Translator(None, Parser(), None, session).translate(
        copy.deepcopy(source), dict(parameters), get_managed_policy_map=dict
    )
    return translated


def _with_endpoint_names(template: Json) -> Json:
    """Return the template with the endpoint's name wherever it is asked for: CloudFormation makes no endpoint here."""
    names = {
        name: properties.get("EndpointName", "local-endpoint")
        for name, properties in _of_type(template["Resources"], _ENDPOINT).items()
    }

    def named(value: Any) -> Any:
        match value:
            case {"Fn::GetAtt": [str(name), "EndpointName"]} if name in names:
                return names[name]
            case dict():
                return {key: named(item) for key, item in value.items()}
            case list():
                return [named(item) for item in value]
            case _:
                return value

    result: Json = named(template)
    for name, endpoint_name in names.items():
        result["Resources"][name].setdefault("Properties", {})["EndpointName"] = endpoint_name
    return result


def _of_type(resources: Json, kind: str) -> dict[str, Json]:
    return {name: r.get("Properties", {}) for name, r in resources.items() if r["Type"] == kind}


def _data_resources(resources: Json) -> Json:
    kept: Json = {}
    for name, resource in resources.items():
        if resource["Type"] in _DATA_TYPES:
            kept[name] = _only(resource, "Type", "Properties")
    return kept


def _outputs(template: Json, made: set[str]) -> Json:
    """Return the outputs that refer to nothing but what is made here."""
    known = made | set(template["Parameters"])
    return {
        name: output
        for name, output in template.get("Outputs", {}).items()
        if all(found in known or found.startswith("AWS::") for found in _references(output["Value"]))
    }


def _references(value: Any) -> Iterator[str]:
    """Yield what a value refers to: parameters, pseudo parameters and resources."""
    match value:
        case {"Ref": str(name)} | {"Fn::GetAtt": [str(name), *_]}:
            yield name
        case {"Fn::Sub": [str(text), dict(given)]}:
            yield from (name for name in _references({"Fn::Sub": text}) if name not in given)
            yield from _references(given)
        case {"Fn::Sub": str(text)}:
            yield from re.findall(r"\$\{([\w:]+)", text)
        case dict():
            for item in value.values():
                yield from _references(item)
        case list():
            for item in value:
                yield from _references(item)


def _only(properties: Json, *keys: str) -> Json:
    return {key: properties[key] for key in keys if key in properties}


def _variables(properties: Json) -> Json:
    variables: Json = properties.get("Environment", {}).get("Variables", {})
    return variables


def _target(resources: Json, reference: Any) -> str:
    """Return the function that a `Ref`, `GetAtt` or integration address means, through an alias or not."""
    match reference:
        case {"Ref": str(name)} | {"Fn::GetAtt": [str(name), *_]}:
            pass
        case {"Fn::Sub": str(text)} if found := re.search(r"\$\{(\w+)(?:\.Arn)?\}(?:/invocations)?$", text):
            name = found[1]
        case _:
            raise TemplateError(f"cannot tell which function {reference} is")
    if resources[name]["Type"] == "AWS::Lambda::Alias":
        return _target(resources, resources[name]["Properties"]["FunctionName"])
    return str(name)


def _apis(resources: Json) -> Iterator[tuple[str, Json]]:
    stages = [(s["RestApiId"]["Ref"], s["StageName"]) for s in _of_type(resources, "AWS::ApiGateway::Stage").values()]
    apis = _of_type(resources, "AWS::ApiGateway::RestApi")
    if sorted(api for api, _ in stages) != sorted(apis) or len({stage for _, stage in stages}) != len(stages):
        raise TemplateError("the local machine serves REST APIs with one stage each, of different names")
    for name, stage in stages:
        body = copy.deepcopy(apis[name]["Body"])
        for methods in body["paths"].values():
            for operation in methods.values():
                integration = operation.get("x-amazon-apigateway-integration", {})
                if integration.get("type") == "aws_proxy":
                    operation["x-local-function"] = _target(resources, integration.pop("uri"))
        yield name, {"stage": stage, "body": body}


def _endpoints(resources: Json) -> Json:
    configs = list(_of_type(resources, _ENDPOINT_CONFIG).values())
    endpoints = _of_type(resources, _ENDPOINT)
    if len(endpoints) > 1 or len(configs) != len(endpoints):
        raise TemplateError("the local machine runs one SageMaker endpoint with one configuration")
    return {
        name: {
            "EndpointName": properties["EndpointName"],
            "VariantName": config["ProductionVariants"][0]["VariantName"],
            **_only(config, "AsyncInferenceConfig"),
        }
        for (name, properties), config in zip(endpoints.items(), configs, strict=True)
    }


def _endpoint_spec(resolved: Json) -> EndpointSpec | None:
    for properties in resolved.values():
        spec = EndpointSpec(properties["EndpointName"], properties["VariantName"])
        if "AsyncInferenceConfig" not in properties:
            return spec
        output = properties["AsyncInferenceConfig"]["OutputConfig"]
        topics = output.get("NotificationConfig", {})
        asynchronous = AsyncSpec(
            concurrency=int(properties["AsyncInferenceConfig"]["ClientConfig"]["MaxConcurrentInvocationsPerInstance"]),
            outputs=output["S3OutputPath"],
            failures=output["S3FailurePath"],
            success_topic=topics.get("SuccessTopic", ""),
            error_topic=topics.get("ErrorTopic", ""),
        )
        return replace(spec, asynchronous=asynchronous)
    return None


def _mappings(resources: Json) -> Iterator[tuple[str, Json]]:
    for name, properties in _of_type(resources, "AWS::Lambda::EventSourceMapping").items():
        if properties.get("Enabled", True):
            source = properties["EventSourceArn"]
            queue = source.get("Fn::GetAtt", [""])[0] if isinstance(source, dict) else ""
            if resources.get(queue, {}).get("Type") != "AWS::SQS::Queue":
                raise TemplateError(f"{name}: only queues of the template can feed a function here")
            kept = _only(properties, "BatchSize", "ScalingConfig", "FunctionResponseTypes")
            yield name, {**kept, "queue": queue, "function": _target(resources, properties["FunctionName"])}


def _schedules(resources: Json) -> Iterator[tuple[str, Json]]:
    found = [
        *((n, p, p.get("Targets", [])) for n, p in _of_type(resources, "AWS::Events::Rule").items()),
        *((n, p, [p["Target"]]) for n, p in _of_type(resources, "AWS::Scheduler::Schedule").items()),
    ]
    for name, properties, targets in found:
        if "ScheduleExpression" in properties and properties.get("State", "ENABLED") == "ENABLED":
            for target in targets:
                yield (
                    name,
                    {
                        "ScheduleExpression": properties["ScheduleExpression"],
                        "function": _target(resources, target["Arn"]),
                        "input": target.get("Input"),
                    },
                )


def _rate(expression: str) -> float:
    found = re.fullmatch(r"rate\((\d+) (minute|hour|day)s?\)", expression)
    if not found:
        raise TemplateError(f"the local clock knows rate(...) only, not {expression}")
    return int(found[1]) * {"minute": 60.0, "hour": 3600.0, "day": 86400.0}[found[2]]
