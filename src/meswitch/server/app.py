"""The routes."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response

from meswitch import __version__
from meswitch.engine import Engine
from meswitch.errors import MeswitchError
from meswitch.server.auto import (
    AUTO,
    EXPERT,
    ROUTE_REASON,
    ROUTE_SCORE,
    ROUTE_SCORES,
    WANTED,
    AutoPolicy,
    routable_messages,
    routing_request,
)
from meswitch.server.endpoints import Metrics, OpenDecider, OpenEncoder, embedding_routes, routing_routes, token_routes
from meswitch.server.errors import ApiError, install_error_handlers, without_paths
from meswitch.server.experts import WATCH_SECONDS, Experts, expert_routes
from meswitch.server.generation import ENCODERS, EventStream, Generation, encoded, whole_answer
from meswitch.server.keys import CALLER, ApiKeyMiddleware, Keys, read_keys
from meswitch.server.logs import REQUEST_ID, Record, RequestLog
from meswitch.server.middleware import NormalisingMiddleware, TurnMiddleware
from meswitch.server.page import docs_routes, page_routes
from meswitch.server.protocol.answers import (
    ChatCompletion,
    ChatFormat,
    Format,
    Health,
    ModelCard,
    ModelList,
    TextCompletion,
    TextFormat,
)
from meswitch.server.protocol.chat import Chat
from meswitch.server.protocol.messages import message_routes
from meswitch.server.protocol.responses import response_routes
from meswitch.server.protocol.schema import ChatRequest, CompletionRequest, GenerationRequest
from meswitch.threads import Workers
from meswitch.tokenizer import Prompt

logger = logging.getLogger("meswitch.server")

_HELPERS = 8  # threads for what must not hold the event loop up
NOTE = "x-meswitch-note"  # what the expert cannot do of the request, and does without


@dataclass(frozen=True, slots=True)
class Web:
    """How browsers and proxies reach the application.

    Args:
        allow_origins: sites whose pages may ask from a browser, such as `https://chat.example`; `*` for all.
        root_path: under which a proxy serves it, such as `/llm`.
    """

    allow_origins: Sequence[str] = ()
    root_path: str = ""


@dataclass(frozen=True, slots=True)
class OnDemandModels:
    """Models beside the engine, each opened for the first request that needs it.

    Args:
        open_encoder: gives a base on the engine's weights, for embeddings; None for none.
        open_decider: gives a router over routes that a request brings; None for none.
    """

    open_encoder: OpenEncoder | None = None
    open_decider: OpenDecider | None = None


def create_app(
    engine: Engine,
    *,
    auto: AutoPolicy | None = None,
    descriptions: Mapping[str, str] | None = None,
    keys: Keys | None = None,
    experts: Experts | None = None,
    on_demand: OnDemandModels | None = None,
    trace: Callable[[Record], None] | None = None,
    web: Web | None = None,
    close_engine: bool = True,
) -> FastAPI:
    """The application: serve it with uvicorn or any ASGI server, in one process.

    Args:
        engine: answers.
        auto: says who answers; None for one without a router.
        descriptions: what the experts are good at, by name, for the models page.
        keys: of which clients must send one; None for those of the environment.
        experts: lets administrators change what is served; its descriptions then stand for `descriptions`.
        on_demand: for embeddings, and for routes that a request brings; None for neither.
        trace: is told of every request at its end: see `logs.spans`.
        web: how browsers and proxies reach it; None for neither.
        close_engine: whether the engine ends with the server.
    """
    web, on_demand = web or Web(), on_demand or OnDemandModels()
    auto = auto or AutoPolicy(None, lambda: engine.names, base=engine.base_name)
    measured = Metrics(engine, auto)
    service = _Service(engine, auto, descriptions or {} if experts is None else experts.descriptions)
    keys = Keys(read_keys(None)) if keys is None else keys

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        helpers = Workers(_HELPERS, "meswitch-server")
        asyncio.get_running_loop().set_default_executor(helpers)
        engine.watch("encodes prompts", ENCODERS)
        engine.watch("routes and changes experts", helpers)
        watching = asyncio.create_task(_watch(experts)) if experts is not None and experts.is_watched else None
        yield
        if watching is not None:
            watching.cancel()
        engine.forget(ENCODERS)
        engine.forget(helpers)
        if close_engine:
            await asyncio.to_thread(engine.close)

    app = FastAPI(title="meswitch", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.servers = [{"url": web.root_path}] if web.root_path else []
    install_error_handlers(app)
    app.add_middleware(ApiKeyMiddleware, keys=keys)
    app.add_middleware(NormalisingMiddleware, root_path=web.root_path)
    app.add_middleware(RequestLog, engine=engine, told=[measured.count, *([] if trace is None else [trace])])
    app.add_middleware(TurnMiddleware)
    if web.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(web.allow_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[EXPERT, NOTE, ROUTE_REASON, ROUTE_SCORE, ROUTE_SCORES, REQUEST_ID, "retry-after"],
        )

    @app.get("/health", response_model=Health)
    async def health() -> Response:
        """200 while the engine can answer, 503 when it cannot."""
        report = service.health()
        return JSONResponse(report.model_dump(), 200 if report.status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters, for Prometheus."""
        return measured.response()

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The base, the experts, and `auto` if there is a router."""
        return ModelList(data=service.cards())

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        """One of them."""
        for card in service.cards():
            if card.id == name:
                return card
        raise auto.unknown(name)

    async def answer_chat(
        body: ChatRequest, request: Request, shape: Callable[[str, Chat], Format], prompt_field: str
    ) -> Response:
        expert, headers, chat = await service.begin_chat(body, request)
        generation = await Generation.start(engine, expert, [chat.prompt], body, prompt_field, chat)
        return await _respond(generation, shape(expert, chat), body, request, headers)

    async def count_tokens(body: ChatRequest, request: Request) -> int:
        expert, _, chat = await service.begin_chat(body, request)
        return len(await encoded(engine.tokenizers[expert], chat.prompt, "messages"))

    app.include_router(response_routes(answer_chat))
    app.include_router(message_routes(answer_chat, count_tokens))
    app.include_router(token_routes(engine, auto.check))
    app.include_router(docs_routes(app))
    app.include_router(embedding_routes(engine, on_demand.open_encoder, auto.check))
    app.include_router(routing_routes(auto, on_demand.open_decider))

    @app.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await answer_chat(body, request, lambda expert, chat: ChatFormat(expert, body, chat), "messages")

    @app.post("/v1/completions", response_model=TextCompletion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts or token ids."""
        prompts: Sequence[Prompt] = body.prompt
        wanted = request.headers.get(WANTED)
        routable = routable_messages({"prompt": body.prompt}) if body.model == AUTO and wanted is None else []
        asked = routing_request(routable, request.headers.items(), body.metadata)
        chosen = await auto.choose(body.model, asked, wanted)
        generation = await Generation.start(engine, chosen.expert, prompts, body, "prompt")
        return await _respond(generation, TextFormat(chosen.expert, body), body, request, chosen.headers)

    app.include_router(page_routes(web.root_path))
    if experts is not None:
        app.include_router(expert_routes(experts, engine, keys))
    return app


async def _watch(experts: Experts) -> None:
    """Look again and again which experts are there."""
    while True:
        try:
            await asyncio.to_thread(experts.scan)
        except Exception:  # of one look: the next one may find what this one did not
            logger.exception("the directory of experts")
        await asyncio.sleep(WATCH_SECONDS)


async def _respond(
    generation: Generation, shape: Format, body: GenerationRequest, request: Request, headers: Mapping[str, str]
) -> Response:
    if body.stream:
        return EventStream(generation, shape, headers)
    return await whole_answer(generation, shape, request, headers)


class _Service:
    """What the routes share."""

    def __init__(self, engine: Engine, auto: AutoPolicy, descriptions: Mapping[str, str]) -> None:
        self._engine, self._auto = engine, auto
        self._descriptions = descriptions
        self._created = int(time.time())

    async def begin_chat(self, body: ChatRequest, request: Request) -> tuple[str, dict[str, str], Chat]:
        """Who answers a chat request, headers that say so, and what the request is for this expert."""
        asked = routing_request(body.conversation(), request.headers.items(), body.metadata)
        chosen = await self._auto.choose(body.model, asked, request.headers.get(WANTED))
        tokenizer = self._engine.tokenizers[chosen.expert]
        if any(m.role in ("system", "developer") for m in body.messages) and not tokenizer.shows_system:
            chosen.headers[NOTE] = "the expert's chat template leaves system messages out"
        try:
            return chosen.expert, chosen.headers, Chat(body, tokenizer)
        except MeswitchError as error:
            raise ApiError.refused(error, "messages") from error

    def cards(self) -> list[ModelCard]:
        base = self._engine.base_name
        cards = []
        for name in self._engine.names:
            description = self._descriptions.get(name, "")
            if name == base:
                card = ModelCard(id=name, created=self._created, kind="base", description=description)
            else:
                card = ModelCard(id=name, created=self._created, kind="expert", description=description, parent=base)
            cards.append(card.model_copy(update={"max_model_len": self._engine.max_length(name)}))
        if self._auto.has_router:
            description = "The router chooses the expert for each request."
            cards.append(ModelCard(id=AUTO, created=self._created, kind="router", description=description))
        caller = CALLER.get()
        return [card for card in cards if caller is None or caller.allows(card.id)]

    def health(self) -> Health:
        failure = self._engine.failure
        load = self._engine.load()
        return Health(
            status="ok" if failure is None else "failed",
            reason=None if failure is None else without_paths(failure),
            waiting=load["waiting"],
            running=load["running"],
            auto=self._auto.has_router,
        )
