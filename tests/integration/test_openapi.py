"""Requests made at random from the OpenAPI document: nothing that a client can send breaks the service."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.conftest import Service

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {service.api_key}"}
    response = httpx.get(f"{service.url}/openapi.json", headers=headers, timeout=60)
    assert response.status_code == 200
    return dict(response.json())


def operations(document: dict[str, Any]) -> Iterator[Any]:
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        yield found.ok()


def sent(service: Service, document: dict[str, Any], cases: int) -> dict[str, int]:
    """Send so many cases, spread over the operations, and check each answer; returns how many had which status."""
    statuses: dict[str, int] = {}
    found = list(operations(document))
    # Without a body there is nothing to get wrong, and with nothing to vary one case is all there is.
    ways = [(each, mode) for each in found for mode in GenerationMode if each.body or mode is GenerationMode.POSITIVE]
    varied = sum(1 for each, _ in ways if each.body or each.path_parameters)

    def send_some(operation: Any, mode: GenerationMode) -> None:
        @settings(
            max_examples=cases // varied + 1, derandomize=True, deadline=None, database=None,
            phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            headers = {"Authorization": f"Bearer {service.api_key}"}
            case.headers = {**(case.headers or {}), **headers}
            response = case.call(base_url=service.url, timeout=60)
            statuses[str(response.status_code)] = statuses.get(str(response.status_code), 0) + 1
            case.validate_response(response, checks=CHECKS)

        send()

    for operation, mode in ways:
        send_some(operation, mode)
    return statuses


def test_the_document_names_every_route(service: Service, document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    for path, methods in document["paths"].items():
        for method in methods:
            response = httpx.request(method, service.url + path.replace("{", "").replace("}", ""), timeout=60)
            assert response.status_code in (200, 401), (method, path)


def test_random_requests_are_answered_as_the_document_says(service: Service, document: dict[str, Any]) -> None:
    statuses = sent(service, document, 200)
    assert {"200", "400"} <= set(statuses)
    assert "401" not in statuses


@pytest.mark.slow
def test_two_thousand_random_requests_are_answered_as_the_document_says(
    service: Service, document: dict[str, Any], record_property: Any
) -> None:
    statuses = sent(service, document, 2_000)
    record_property("statuses", statuses)
    assert sum(statuses.values()) >= 2_000
    assert not [status for status in statuses if status >= "500"]
    assert statuses["200"] > 400, "so many are no random refusals"
