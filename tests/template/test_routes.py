"""The routes of the code are those of the template."""

from __future__ import annotations

import re

import pytest

from tests.system import function


def _shape(path: str) -> str:
    """Return a path with its parameters' names left out."""
    return re.sub(r"<[^>]+>|\{[^}]+\}", "{}", path)


def _routes_of_the_code(name: str) -> set[tuple[str, str]]:
    app = function(name).app
    # Powertools has no public list of them but the OpenAPI schema, which leaves out undocumented ones.
    routes = [*app._static_routes, *app._dynamic_routes]
    return {(route.method.upper(), _shape(route.path)) for route in routes}


@pytest.mark.parametrize(("api", "name"), [("Api", "api"), ("CompatibleApi", "segmind")])
def test_routes_agree(template, api, name):
    routes = {(method, _shape(path)) for method, path, _ in template.operations(api) if method != "OPTIONS"}
    assert routes == _routes_of_the_code(name)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/sd1.5-img2img"),
        ("POST", "/uploads"),
        ("GET", "/jobs"),
        ("GET", "/jobs/{id}"),
        ("GET", "/jobs/{id}/outputs/{index}"),
        ("POST", "/jobs/{id}/cancel"),
        ("DELETE", "/jobs/{id}"),
        ("POST", "/cost"),
        ("GET", "/presets"),
        ("GET", "/presets/{name}"),
        ("PUT", "/presets/{name}"),
        ("DELETE", "/presets/{name}"),
        ("GET", "/balance"),
        ("GET", "/usage"),
        ("GET", "/health"),
    ],
)
def test_route_exists(template, method, path):
    assert method.lower() in template.api["paths"][path]


def test_routes_for_segminds_clients(template):
    assert {(method, path) for method, path, _ in template.operations("CompatibleApi")} == {
        ("POST", "/v1/{model}"),
        ("POST", "/v2/{model}"),
        ("GET", "/v1/requests/{id}"),
        ("GET", "/v2/requests/{id}"),
        ("GET", "/v2/requests/{id}/status"),
        ("GET", "/v1/get-user-credits"),
    }
