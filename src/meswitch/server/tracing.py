"""A span for each request, to the collector that OpenTelemetry's own variables name; needs the extra `otel`."""

import os
import time
from collections.abc import Callable
from typing import Any

from meswitch.errors import ConfigError
from meswitch.server.logs import Record

_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def traced() -> Callable[[Record], None] | None:
    """What makes a record a span; None where no collector is named.

    Raises:
        ConfigError: one is named, and OpenTelemetry is not installed.
    """
    named = next((name for name in _VARIABLES if os.environ.get(name)), None)
    if named is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError(f"{named}: OpenTelemetry is not installed; install meswitch[otel]") from None
    provider = TracerProvider(
        resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "meswitch")})
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return spans(provider)


def spans(provider: Any) -> Callable[[Record], None]:
    """What makes a record a span of a provider of OpenTelemetry, below the client's own if it sent `traceparent`."""
    from opentelemetry.trace import SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer, propagator = provider.get_tracer("meswitch"), TraceContextTextMapPropagator()

    def span(record: Record) -> None:
        end = time.time_ns()
        begin = end - int((time.perf_counter() - record.began) * 1e9)
        found = {  # names of OpenTelemetry's conventions where it has some
            "http.request.method": record.method,
            "url.path": record.path,
            "http.response.status_code": record.status,
            "gen_ai.request.model": record.model,
            "gen_ai.response.model": record.expert,
            "gen_ai.usage.input_tokens": record.prompt_tokens or None,
            "gen_ai.usage.output_tokens": record.completion_tokens or None,
            "gen_ai.server.time_to_first_token": record.ttft,
            "meswitch.request_id": record.id,
            "meswitch.route_reason": record.reason,
        }
        context = propagator.extract({"traceparent": record.parent}) if record.parent else None
        attributes = {name: value for name, value in found.items() if value is not None}
        one = tracer.start_span(
            f"{record.method} {record.path}", context, SpanKind.SERVER, attributes=attributes, start_time=begin
        )
        if record.status >= 500:
            one.set_status(Status(StatusCode.ERROR, record.error or ""))
        one.end(end)

    return span
