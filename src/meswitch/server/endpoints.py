"""The smaller endpoints: `/v1/embeddings`, `/v1/route`, `/tokenize`, `/detokenize`, `/version` and `/metrics`.

Embeddings are the base's own hidden states: those of a language model, no trained embeddings. `/v1/route` is what a
router says to a query, without an answer: the family's, or one over given routes. The next three are as vLLM has them.
`/metrics` is what Prometheus reads: requests, tokens, times, memory, experts and the router.
"""

import asyncio
import base64
import threading
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from starlette.responses import Response
from torch import Tensor

from meswitch import __version__
from meswitch.engine import Engine
from meswitch.engine import Request as EngineRequest
from meswitch.errors import MeswitchError
from meswitch.router import Decider, Selection, parse_options
from meswitch.router.encoder import TextEncoder
from meswitch.server.auto import ERROR, AutoPolicy, routing_request
from meswitch.server.errors import ApiError
from meswitch.server.generation import encoded
from meswitch.server.logs import Record
from meswitch.server.protocol.chat import Chat
from meswitch.server.protocol.schema import ChatRequest, Message, Metadata, Strict, Text, Tool, neutral_only, refuse
from meswitch.tokenizer import ChatTokenizer

MAX_INPUTS = 256
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_BY_EXPERT = ("expert",)
OpenEncoder = Callable[[], TextEncoder]
OpenDecider = Callable[[], Decider]


class TokenizeRequest(Strict):
    """A text, or a conversation."""

    model: str = Field(min_length=1)
    prompt: Text | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    tools: list[Tool] = Field(default_factory=list)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise refuse("bad_value", "prompt", "give a prompt or messages")
        return self


class DetokenizeRequest(Strict):
    model: str = Field(min_length=1)
    tokens: list[int]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    prompt: str


class VersionAnswer(BaseModel):
    version: str


def token_routes(engine: Engine, check: Callable[[str], None]) -> APIRouter:
    """The three.

    Args:
        engine: whose tokenizers they are.
        check: raises an ApiError for a model that may not be asked.
    """
    router = APIRouter()

    def tokenizer_of(model: str) -> ChatTokenizer:
        check(model)
        return engine.tokenizers[model]

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Tokens:
        """Token ids of a text or of a conversation, as the expert gets them."""
        tokenizer = tokenizer_of(body.model)
        if body.messages is None:
            assert body.prompt is not None
            ids = (
                await encoded(tokenizer, body.prompt, "prompt", special=body.add_special_tokens) if body.prompt else []
            )
        else:
            chat = ChatRequest(
                model=body.model,
                messages=body.messages,
                tools=body.tools,
                chat_template_kwargs=body.chat_template_kwargs,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
            )
            ids = await encoded(tokenizer, Chat(chat, tokenizer).prompt, "messages")
        names = None
        if body.return_token_strs:
            names = [str(name) for name in tokenizer.tokenizer.convert_ids_to_tokens(ids)]
        return Tokens(count=len(ids), max_model_len=engine.max_length(body.model), tokens=ids, token_strs=names)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Detokenized:
        """The text of token ids, special tokens too."""
        tokenizer = tokenizer_of(body.model)
        if any(not 0 <= token < tokenizer.vocab_size for token in body.tokens):
            message = f"tokens: ids of {body.model!r} lie between 0 and {tokenizer.vocab_size - 1}"
            raise ApiError(400, message, param="tokens", code="invalid_value")
        return Detokenized(prompt=tokenizer.tokenizer.decode(body.tokens, skip_special_tokens=False))

    @router.get("/version")
    async def version() -> VersionAnswer:
        """Of meswitch."""
        return VersionAnswer(version=__version__)

    return router


def _inputs(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and any(not isinstance(one, str) for one in value):
        raise ValueError("give a text or a list of texts; token ids of another tokenizer would mean something else")
    return value


class EmbeddingRequest(Strict):
    model: str = Field(min_length=1)
    input: Annotated[
        list[Annotated[Text, Field(min_length=1)]], BeforeValidator(_inputs), Field(min_length=1, max_length=MAX_INPUTS)
    ]
    encoding_format: Literal["float", "base64"] = "float"

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        return neutral_only(data, {"user"}, {"dimensions": ()})


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Embedder:
    """Means of the base's last hidden states, each of length 1.

    Args:
        engine: whose base it is.
        open_encoder: gives a base on the engine's weights; called for the first request.
    """

    def __init__(self, engine: Engine, open_encoder: OpenEncoder) -> None:
        self._engine, self._open = engine, open_encoder
        self._encoder: TextEncoder | None = None
        self._lock = threading.Lock()  # one request at a time: a step of the batch is not to wait for many

    def embed(self, texts: list[str]) -> tuple[Tensor, int]:
        """[texts, hidden_size] float32, and the number of tokens.

        Raises:
            ConfigError: a text is too long or no text.
        """
        name = self._engine.base_name
        tokenizer, limit = self._engine.tokenizers[name], self._engine.max_length(name)
        counts = []
        for index, text in enumerate(texts):
            counts.append(len(tokenizer.text_ids(text, special=False)))
            if counts[-1] >= limit:
                message = f"input[{index}]: {counts[-1]} tokens; {name!r} takes {limit - 1}"
                raise ApiError(400, message, param=f"input[{index}]", code="context_length_exceeded")
        with self._lock:
            if self._encoder is None:
                self._encoder = self._open()
            states = self._encoder.encode(texts, [self._encoder.depth], limit)
        return states / states.norm(dim=1, keepdim=True).clamp(min=1e-12), sum(counts)


def embedding_routes(engine: Engine, open_encoder: OpenEncoder | None, check: Callable[[str], None]) -> APIRouter:
    """`/v1/embeddings`.

    Args:
        engine: whose base it is.
        open_encoder: gives a base on the engine's weights; None where there is no such thing.
        check: raises an ApiError for a model that may not be asked.
    """
    router = APIRouter()
    embedder = None if open_encoder is None else Embedder(engine, open_encoder)

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest) -> Embeddings:
        """Means of the base's last hidden states, each of length 1."""
        check(body.model)
        if body.model != engine.base_name:
            message = f"model: embeddings are the base's: ask for {engine.base_name!r}"
            raise ApiError(400, message, param="model", code="invalid_value")
        if embedder is None:
            message = "model: this base gives no embeddings here (it takes turns with its experts, or reads images too)"
            raise ApiError(400, message, param="model", code="unsupported_parameter")
        try:
            found, tokens = await asyncio.to_thread(embedder.embed, body.input)
        except MeswitchError as error:
            raise ApiError.refused(error, "input") from error
        rows = [row.numpy().tobytes() for row in found]
        data = [
            Embedding(
                index=index,
                embedding=base64.b64encode(rows[index]).decode() if body.encoding_format == "base64" else row.tolist(),
            )
            for index, row in enumerate(found)
        ]
        usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
        return Embeddings(data=data, model=body.model, usage=usage)

    return router


def _messages(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class RouteRequest(Strict):
    """input: a text, or the messages of a conversation.

    Args:
        routes: `{name, description, examples}` each, in place of the family's experts; a description or an example at
            least.
        threshold: with them, the probability that the best must reach; by default what their own lines give.
    """

    input: Annotated[list[Message], BeforeValidator(_messages)] = Field(min_length=1)
    metadata: Metadata = Field(default_factory=dict)
    routes: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    threshold: float | None = Field(default=None, ge=0.0, le=1.0)


class RouteAnswer(BaseModel):
    """Who would answer.

    Args:
        model: a name, `error` for nobody.
        scores: label -> probability.
    """

    model: str
    reason: str
    score: float | None
    scores: dict[str, float]


class _Deciders:
    """Opens the encoder for the first request that brings routes of its own."""

    def __init__(self, open_decider: OpenDecider | None) -> None:
        self._open = open_decider
        self._decider: Decider | None = None
        self._lock = threading.Lock()

    def decide(self, messages: list[dict[str, Any]], routes: list[dict[str, Any]], least: float | None) -> Selection:
        """From a thread.

        Raises:
            ApiError: routes that cannot be told apart, a query without text, or no encoder.
        """
        if self._open is None:
            message = "routes: this server has no encoder for them; name one as `encoder` of [router] in family.toml"
            raise ApiError(400, message, param="routes", code="unsupported_parameter")
        try:
            options = parse_options(routes)
            with self._lock:
                if self._decider is None:
                    self._decider = self._open()
            return self._decider.decide(messages, options, threshold=least)
        except MeswitchError as error:
            raise ApiError(400, str(error), param="routes", code="invalid_value") from error


def routing_routes(auto: AutoPolicy, open_decider: OpenDecider | None) -> APIRouter:
    """`/v1/route`.

    Args:
        open_decider: for routes that a request brings; None where there is no encoder for them.
    """
    router, deciders = APIRouter(), _Deciders(open_decider)

    @router.post("/v1/route")
    async def route(body: RouteRequest, request: Request) -> RouteAnswer:
        """Who would answer, and how sure the router is."""
        messages = [message.for_template() for message in body.input]
        if body.routes is not None:
            found = await asyncio.to_thread(deciders.decide, messages, body.routes, body.threshold)
            reason = "abstained" if found.choice is None else "scored"
            return RouteAnswer(model=found.choice or ERROR, reason=reason, score=found.confidence, scores=found.scores)
        if body.threshold is not None:
            message = "threshold: only with `routes`; the family's router has one of its own"
            raise ApiError(400, message, param="threshold", code="invalid_value")
        decision = await auto.decide(routing_request(messages, request.headers.items(), body.metadata))
        scores = {} if decision.scores is None else dict(decision.scores)
        return RouteAnswer(model=decision.expert, reason=decision.reason, score=decision.score, scores=scores)

    return router


class Metrics:
    """The counters of one server, for `/metrics`.

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

    def _ended(self, request: EngineRequest) -> None:
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
