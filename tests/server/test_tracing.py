"""Spans, with OpenTelemetry's own memory as the collector."""

import httpx
import pytest

from meswitch.errors import ConfigError
from meswitch.server import create_app
from meswitch.server.logs import spans, traced
from tests.server.test_auto import Counting
from tests.support.http_server import QUESTIONS, ask_with, policy, serving, user, wait_until


def test_a_request_is_a_span_below_the_clients(engine):
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs the extra otel")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    app = create_app(engine, auto=policy(engine, Counting()), trace=spans(provider), close_engine=False)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serving(app) as url:
        ask_with(url).chat.completions.create(
            model="auto", messages=user(QUESTIONS["math"]), max_tokens=3, extra_headers={"traceparent": parent}
        )
        httpx.get(f"{url}/v1/models/nobody")
        assert wait_until(lambda: len(memory.get_finished_spans()) == 2)
    asked, missed = memory.get_finished_spans()
    assert f"{asked.parent.span_id:x}" == "b7ad6b7169203331"
    assert asked.attributes["gen_ai.request.model"] == "auto"
    assert asked.attributes["gen_ai.response.model"] == "math"
    assert asked.attributes["gen_ai.usage.output_tokens"] == 3
    assert asked.end_time - asked.start_time > asked.attributes["gen_ai.server.time_to_first_token"] * 1e9 > 0
    assert (missed.parent, missed.attributes["http.response.status_code"]) == (None, 404)


def test_a_collector_without_the_package_names_the_extra(monkeypatch):
    assert traced() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT: .*install meswitch\[otel\]"):
        traced()
