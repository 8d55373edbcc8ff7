"""The OpenAPI description: true, and held by fuzzing it."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.serve.fake_engine import PATIENCE
from tests.support.serve.fakes import FakeScheduler, app_of

APP = app_of(FakeScheduler(), max_pixels=128 * 128, max_side=128, allowed_host=("testserver",))
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
schema = schemathesis.openapi.from_asgi("/openapi.json", APP)


@schema.parametrize()
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_nothing_that_fits_the_description_is_a_fault(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=CHECKS, timeout=PATIENCE)  # ten seconds are not long on a machine that is busy


def test_every_request_may_be_refused() -> None:
    for path, operations in APP.openapi()["paths"].items():
        for operation in operations.values():
            if not path.startswith("/sdapi"):  # A1111's own answer to a body that does not fit
                assert "422" not in operation["responses"]
            if path.startswith(("/v1", "/sdapi")):
                assert {"401", "default"} <= set(operation["responses"])


@pytest.mark.parametrize("keys", [(), ("secret",)])
def test_keys_are_described_if_there_are_any(keys: tuple[str, ...]) -> None:
    description: dict[str, Any] = app_of(FakeScheduler(), keys=keys).openapi()
    secured = "security" in description["paths"]["/v1/images/generations"]["post"]
    assert secured == bool(keys)
