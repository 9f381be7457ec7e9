"""What is known of a request and told of it: a line in the log, and a span.

The line is text or JSON, with an id that the answer carries too. The span goes to the collector that OpenTelemetry's
own variables name; it needs the extra `otel`.
"""

import json
import logging
import os
import re
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meswitch.engine import Engine, Request
from meswitch.engine.request import TRACE
from meswitch.errors import ConfigError
from meswitch.server.errors import ApiError

logger = logging.getLogger("meswitch.requests")

LogFormat = Literal["text", "json"]
REQUEST_ID = "x-request-id"
GONE = 499  # nobody reads it; the number is for logs (nginx's)
_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_QUIET = {"/health", "/metrics"}  # asked every few seconds
_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def is_request_id(text: str) -> bool:
    """Whether a client's `x-request-id` is taken: others could forge lines of a log."""
    return _ID.fullmatch(text) is not None


@dataclass(slots=True)
class Record:
    """What is known of one HTTP request.

    Args:
        id: what the client sent as `x-request-id`, or one of ours.
        model: that was asked for.
        expert: who answered.
        key: name of the API key.
        reason: of the router.
        prompt_tokens: of all its answers.
        completion_tokens: of all its answers.
        parent: `traceparent` of the client's trace, if it sent one.
        ttft: seconds to the first token of the first answer that had one.
    """

    id: str
    method: str
    path: str
    client: str = ""
    status: int = 0
    model: str | None = None
    expert: str | None = None
    reason: str | None = None
    key: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft: float | None = None
    error: str | None = None
    parent: str = ""
    began: float = field(default_factory=time.perf_counter)

    def fields(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in self.__slots__ if name not in ("began", "id", "parent")}
        named = {"request_id": self.id} | named | {"seconds": round(time.perf_counter() - self.began, 4)}
        if self.ttft is not None:
            named["ttft"] = round(self.ttft, 4)
        return {name: value for name, value in named.items() if value not in (None, "")}


RECORD: ContextVar[Record | None] = ContextVar("meswitch_record", default=None)


class RequestLog:
    """ASGI middleware, the outermost of ours: names requests, counts and logs them, and has the last word on errors.

    Args:
        engine: is watched for what its requests' answers took.
        told: are told of every record at its end.
    """

    def __init__(self, app: ASGIApp, engine: Engine, told: Sequence[Callable[[Record], None]] = ()) -> None:
        self._app, self._told = app, told
        self._open: dict[str, Record] = {}
        engine.observers.append(self._ended)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        name = given if is_request_id(given) else f"req-{uuid.uuid4().hex[:16]}"
        client = scope.get("client")
        record = Record(
            name, scope["method"], scope["path"], client[0] if client else "", parent=headers.get("traceparent", "")
        )
        trace = name if name not in self._open else f"{name}:{uuid.uuid4().hex[:8]}"  # clients may repeat theirs
        self._open[trace] = record
        tokens = TRACE.set(trace), RECORD.set(record)
        header = (REQUEST_ID.encode(), name.encode())

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        try:
            await self._app(scope, receive, named)
        except ClientDisconnect:  # while it sent its request
            record.status = GONE
        except Exception as error:
            record.error = f"{type(error).__name__}: {error}"
            logger.exception("request %s failed", name)
            if record.status == 0:
                text = f"the server failed on this request; its log says why, under {name}"
                await ApiError(500, text, code="internal_error").response()(scope, receive, named)
        finally:
            TRACE.reset(tokens[0])
            RECORD.reset(tokens[1])
            del self._open[trace]
            self._log(record)

    def _log(self, record: Record) -> None:
        for tell in self._told:
            tell(record)
        level = logging.ERROR if record.status >= 500 else logging.DEBUG if record.path in _QUIET else logging.INFO
        if logger.isEnabledFor(level):
            fields = record.fields()
            text = " ".join(f"{name}={value}" for name, value in fields.items())
            logger.log(level, "%s", text, extra={"fields": fields})

    def _ended(self, request: Request) -> None:
        """From the engine's threads."""
        record = self._open.get(request.trace)
        if record is None:
            return
        record.expert = request.model
        record.prompt_tokens += len(request.prompt)
        record.completion_tokens += len(request.tokens)
        if record.ttft is None and request.first is not None:
            record.ttft = request.first - request.created
        record.error = record.error or request.error


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        made = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": made, "level": record.levelname.lower(), "logger": record.name}
        line |= fields or {"message": record.getMessage()}
        if record.exc_info:
            line["trace"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=False)


def set_up_logging(level: str, kind: LogFormat) -> None:
    """Send the logs of meswitch and uvicorn to stderr. level: `debug`, `info`, `warning` or `error`."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter() if kind == "json" else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    for name in ("meswitch", "uvicorn"):
        chosen = logging.getLogger(name)
        chosen.handlers, chosen.propagate = [handler], False
        chosen.setLevel(level.upper())


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
