"""Spans of requests: what OpenTelemetry's own exporter gets, and when nothing is sent."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from structlog.testing import capture_logs

from latentrt.errors import MissingDependencyError
from latentrt.serve.core.service import Service
from latentrt.serve.http.app import create_app
from latentrt.serve.process import traces
from latentrt.serve.process.config import Settings
from tests.serve.conftest import eventually
from tests.support.serve.fake_engine import Fakes, fake_engine
from tests.support.serve.fakes import catalog_of, get, live, post

DRAW = "/v1/images/generations"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SDK = find_spec("opentelemetry") is not None and find_spec("opentelemetry.sdk") is not None


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*traces.ENDPOINTS, *traces.PROTOCOLS, "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def spans() -> Any:
    """What the exporter in memory has."""
    pytest.importorskip("opentelemetry.sdk", reason="pip install 'latentrt[otel]'")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


@pytest.fixture
def url(spans: Any) -> Iterator[str]:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with fake_engine(Fakes(), seconds=0.01) as engine, Service(engine) as service:
        eventually(lambda: service.scheduler.ready)
        catalog = catalog_of(engine.model, keys=("one",))
        with live(create_app(service.scheduler, catalog, traces=traces.Traces(provider))) as url:
            yield url


@pytest.mark.parametrize("background", [False, True])
def test_each_part_of_a_request_is_a_span_below_its_callers(url: str, spans: Any, background: bool) -> None:
    headers = {"authorization": "Bearer one", "traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
    body = {"prompt": "a secret", "n": 2, "num_inference_steps": 3, "size": "64x64", "background": background}
    status = 202 if background else 200
    assert post(f"{url}{DRAW}", json=body, headers=headers).status_code == status
    eventually(lambda: len(spans.get_finished_spans()) == 7)  # of a job: once it is over
    get(f"{url}/latentrt/queue", headers=headers)  # polled: no span
    assert post(f"{url}{DRAW}", json=body).status_code == 401
    eventually(lambda: len(spans.get_finished_spans()) == 8)
    *parts, whole, refused = spans.get_finished_spans()
    assert (whole.name, f"{whole.context.trace_id:032x}") == (f"POST {DRAW}", TRACE)
    assert f"{whole.parent.span_id:016x}" == PARENT
    told = whole.attributes
    assert (told["http.route"], told["http.response.status_code"]) == (DRAW, status)
    assert [told[f"latentrt.{name}"] for name in ("id", "n", "steps", "size")] == ["mine", 2, 3, "64x64"]
    assert "secret" not in str(told)
    assert sorted(part.name for part in parts) == ["decode", "decode", "prepare", "queue", "steps", "steps"]
    assert {part.parent.span_id for part in parts} == {whole.context.span_id}
    assert all(whole.start_time <= part.start_time < part.end_time <= whole.end_time for part in parts)
    by = {(part.name, part.attributes.get("latentrt.picture")): part for part in parts}
    for index in (0, 1):
        steps = by["steps", index]
        assert by["queue", None].end_time <= steps.start_time
        assert steps.end_time - steps.start_time >= 3 * 0.01e9
        assert steps.end_time <= by["decode", index].start_time
    assert (refused.attributes["latentrt.outcome"], refused.parent) == ("invalid_api_key", None)


@pytest.mark.skipif(not SDK, reason="pip install 'latentrt[otel]'")
@pytest.mark.parametrize("by_variable", [False, True])
def test_spans_go_where_the_setting_or_the_variable_says(by_variable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []

    class Exporter:
        def __init__(self, endpoint: str | None = None) -> None:
            sent.append(endpoint or "by OpenTelemetry's own variables")

        def shutdown(self) -> None:
            sent.append("closed")

    monkeypatch.setattr("opentelemetry.exporter.otlp.proto.http.trace_exporter.OTLPSpanExporter", Exporter)
    settings = Settings(otlp_endpoint=None if by_variable else "http://a:4318/")
    if by_variable:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://b:4318")
    with traces.tracing(settings) as made:
        assert made is not None
    assert sent == ["by OpenTelemetry's own variables" if by_variable else "http://a:4318/v1/traces", "closed"]


@pytest.mark.parametrize(
    ("variables", "warns"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, True),
    ],
)
def test_otherwise_nothing_is_sent(variables: dict[str, str], warns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with capture_logs() as log, traces.tracing(Settings()) as made:
        assert made is None
    assert bool(log) is warns


def test_without_the_extra_a_setting_is_refused_and_a_variable_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    with pytest.raises(MissingDependencyError, match="otel"), traces.tracing(Settings(otlp_endpoint="http://a")):
        pass
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://a")
    with capture_logs() as log, traces.tracing(Settings()) as made:
        assert made is None
    assert "latentrt[otel]" in str(log)
