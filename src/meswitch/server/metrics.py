"""What Prometheus reads at `/metrics`: requests, tokens, times, memory, experts and the router."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from starlette.responses import Response

from meswitch.engine import Engine, Request
from meswitch.server.auto import AutoPolicy
from meswitch.server.logs import Record

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_BY_EXPERT = ("expert",)


class Metrics:
    """The counters of one server.

    Args:
        engine: is watched.
        auto: the router's numbers.
    """

    def __init__(self, engine: Engine, auto: AutoPolicy) -> None:
        self._engine = engine
        self._registry = registry = CollectorRegistry(auto_describe=False)

        def counter(name: str, text: str, labels: tuple[str, ...]) -> Counter:
            return Counter(f"meswitch_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"meswitch_{name}", text, _BY_EXPERT, buckets=buckets, registry=registry)

        self._requests = counter("requests", "Answers that ended.", ("expert", "finish_reason"))
        self._prompt = counter("prompt_tokens", "Tokens of prompts.", _BY_EXPERT)
        self._generated = counter("generation_tokens", "Tokens of answers.", _BY_EXPERT)
        self._ttft = histogram("time_to_first_token_seconds", "From request to first token.", _SECONDS)
        self._tpot = histogram("time_per_output_token_seconds", "Between tokens after the first.", _TOKEN_SECONDS)
        self._queued = histogram("queue_seconds", "From request to its expert's slot.", _SECONDS)
        self._duration = histogram("request_seconds", "From request to last token.", _SECONDS)
        self._responses = counter("http_responses", "HTTP responses.", ("status",))
        registry.register(_Now(engine, auto))
        engine.observers.append(self._ended)

    def response(self) -> Response:
        """All metrics in Prometheus' text format."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    def count(self, record: Record) -> None:
        """One more HTTP response."""
        self._responses.labels(str(record.status)).inc()

    def _ended(self, request: Request) -> None:
        """From the engine's threads."""
        expert = request.model
        self._requests.labels(expert, request.finish_reason or "error").inc()
        self._prompt.labels(expert).inc(len(request.prompt))
        self._generated.labels(expert).inc(len(request.tokens))
        if request.started is not None:
            self._queued.labels(expert).observe(request.started - request.created)
        if request.first is not None:
            self._ttft.labels(expert).observe(request.first - request.created)
        if request.ended is not None and request.error is None:
            self._duration.labels(expert).observe(request.ended - request.created)
            if request.first is not None and len(request.tokens) > 1:
                self._tpot.labels(expert).observe((request.ended - request.first) / (len(request.tokens) - 1))


class _Now(Collector):
    """What is read when Prometheus asks."""

    def __init__(self, engine: Engine, auto: AutoPolicy) -> None:
        self._engine, self._auto = engine, auto

    def collect(self) -> Iterator[Metric]:
        load = self._engine.load()
        yield _gauge("requests_running", "Requests that are being answered.", load["running"])
        yield _gauge("requests_waiting", "Requests that wait for their expert.", load["waiting"])
        yield _gauge("engine_up", "1 while the engine can answer.", int(self._engine.failure is None))
        yield _gauge("kv_cache_tokens", "Tokens that the KV cache holds.", self._engine.kv_tokens)
        yield _gauge("kv_cache_used_tokens", "Tokens of it that running requests use.", self._engine.kv_used_tokens)
        yield _counter("steps", "Steps of the batch.", self._engine.steps)
        yield self._sizes()
        memory = GaugeMetricFamily("meswitch_memory_bytes", "Memory by purpose.", labels=["purpose"])
        for purpose, size in self._engine.memory().items():
            memory.add_metric([purpose], size)
        yield memory
        yield from self._experts()
        yield from self._router()

    def _sizes(self) -> Metric:
        found = self._engine.step_sizes()
        buckets = [(f"{most}.0", sum(count for size, count in found.items() if size <= most)) for most in _SIZES]
        buckets.append(("+Inf", sum(found.values())))
        total = sum(size * count for size, count in found.items())
        return HistogramMetricFamily("meswitch_batch_size", "Requests of a step.", buckets=buckets, sum_value=total)

    def _experts(self) -> Iterator[Metric]:
        resident = GaugeMetricFamily("meswitch_expert_resident", "1 where an expert is.", labels=["expert", "place"])
        size = GaugeMetricFamily("meswitch_expert_bytes", "Bytes of an expert in a slot.", labels=["expert"])
        pins = GaugeMetricFamily("meswitch_expert_pins", "Requests that use an expert now.", labels=["expert"])
        for row in self._engine.store.residency():
            for place in ("device", "host", "disk"):
                resident.add_metric([row.expert, place], int(row.place == place))
            size.add_metric([row.expert], row.bytes)
            pins.add_metric([row.expert], row.pins)
        yield from (resident, size, pins)
        counts = self._engine.store.counts()
        for name, text in (
            ("requests", "Requests for an expert's slot."),
            ("hits", "Requests whose expert was in a slot."),
            ("loads", "Copies of an expert into a slot."),
            ("evictions", "Times that an expert had to leave its slot."),
            ("failures", "Loads that failed."),
        ):
            family = CounterMetricFamily(f"meswitch_expert_{name}", text, labels=["expert"])
            for expert, one in counts.items():
                family.add_metric([expert], getattr(one, name))
            yield family

    def _router(self) -> Iterator[Metric]:
        stats = self._auto.stats()
        if stats is None:
            return
        decisions = CounterMetricFamily(
            "meswitch_route_decisions", "Decisions of the router.", labels=["expert", "reason"]
        )
        for (expert, reason), count in sorted(stats.decided.items()):
            decisions.add_metric([expert, reason], count)
        yield decisions
        yield _counter("route_cache_hits", "Decisions that were remembered.", stats.hits)
        yield _counter("route_batches", "Batches that the router scored.", stats.batches)
        yield _counter("route_scored", "Queries in them.", stats.scored)
        yield _counter("route_seconds", "Seconds that this took.", stats.seconds)
        yield _gauge("route_cache_bytes", "Of remembered decisions.", stats.cache_bytes)
        yield _gauge("route_waiting", "Queries that wait for the router.", stats.waiting)


def _gauge(name: str, text: str, value: Any) -> Metric:
    return GaugeMetricFamily(f"meswitch_{name}", text, value=value)


def _counter(name: str, text: str, value: Any) -> Metric:
    return CounterMetricFamily(f"meswitch_{name}", text, value=value)
