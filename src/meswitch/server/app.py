"""The routes."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from urllib.parse import quote, unquote

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from meswitch.engine import Engine
from meswitch.errors import MeswitchError
from meswitch.router import Router
from meswitch.server.answers import ChatCompletion, Health, ModelCard, ModelList, TextCompletion
from meswitch.server.auth import ApiKeyMiddleware
from meswitch.server.errors import ApiError, install_error_handlers, without_paths
from meswitch.server.formats import ChatFormat, Format, TextFormat
from meswitch.server.generation import Generation
from meswitch.server.logs import REQUEST_ID, RequestLog
from meswitch.server.middleware import NormalisingMiddleware
from meswitch.server.routing import ERROR, Desk, Messages, with_circumstances
from meswitch.server.schema import ChatRequest, CompletionRequest, GenerationRequest
from meswitch.server.stream import EventStream, answer
from meswitch.tokenizer import Prompt
from meswitch.version import __version__

AUTO = "auto"
EXPERT, ROUTE_REASON, ROUTE_SCORE = "x-meswitch-expert", "x-meswitch-route-reason", "x-meswitch-route-score"
WANTED = EXPERT  # of a request to `auto`: who is to answer this one, whatever the router would say
API_KEY_VARIABLE = "MESWITCH_API_KEY"


def create_app(
    engine: Engine,
    *,
    router: Router | None = None,
    fallback: str | None = None,
    descriptions: Mapping[str, str] | None = None,
    no_router: str = "there is no router; make one with `meswitch router train` and start the server again",
    api_key: str | None = None,
    allow_origins: Sequence[str] = (),
    root_path: str = "",
    close_engine: bool = True,
) -> FastAPI:
    """The application: serve it with uvicorn or any ASGI server, in one process.

    Args:
        router: answers `model: "auto"`. no_router: why there is none, for who asks for `auto` all the same.
        fallback: who answers when the router fails; None for the base, and so does `error`, which only means that an
            abstaining router is an error.
        descriptions: what the experts are good at, by name, for the models page.
        api_key: what clients must send; None takes it from MESWITCH_API_KEY, empty asks for none.
        allow_origins: sites whose pages may ask from a browser, such as `https://chat.example`; `*` for all.
        root_path: under which a proxy serves it, such as `/llm`.
        close_engine: whether the engine ends with the server.
    """
    service = _Service(engine, router, fallback or engine.base_name, descriptions or {}, without_paths(no_router))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if close_engine:
            await asyncio.to_thread(engine.close)

    app = FastAPI(title="meswitch", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.servers = [{"url": root_path}] if root_path else []
    install_error_handlers(app)
    key = os.environ.get(API_KEY_VARIABLE, "") if api_key is None else api_key
    if key:
        app.add_middleware(ApiKeyMiddleware, key=key)
    app.add_middleware(NormalisingMiddleware, root_path=root_path)
    app.add_middleware(RequestLog, engine=engine)
    if allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[EXPERT, ROUTE_REASON, ROUTE_SCORE, REQUEST_ID, "retry-after"],
        )

    @app.get("/health", response_model=Health)
    async def health() -> Response:
        """200 while the engine can answer, 503 when it cannot."""
        report = service.health()
        return JSONResponse(report.model_dump(), 200 if report.status == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Counters of the router, for Prometheus."""
        return service.metrics()

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
        raise service.unknown(name)

    @app.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        messages = body.conversation()
        asked = with_circumstances(messages, request.headers.items(), body.metadata)
        expert, headers = await service.choose(body.model, asked, request.headers.get(WANTED))
        generation = await Generation.start(engine, expert, [messages], body, "messages")
        return await _respond(generation, ChatFormat(expert), body, request, headers)

    @app.post("/v1/completions", response_model=TextCompletion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts or token ids."""
        prompts: Sequence[Prompt] = body.prompt
        wanted = request.headers.get(WANTED)
        routable = _routable(body) if body.model == AUTO and wanted is None else []
        asked = with_circumstances(routable, request.headers.items(), body.metadata)
        expert, headers = await service.choose(body.model, asked, wanted)
        generation = await Generation.start(engine, expert, prompts, body, "prompt")
        return await _respond(generation, TextFormat(expert), body, request, headers)

    return app


async def _respond(
    generation: Generation, shape: Format, body: GenerationRequest, request: Request, headers: Mapping[str, str]
) -> Response:
    if body.stream:
        return EventStream(generation, shape, body.include_usage, headers)
    return await answer(generation, shape, request, headers)


def _routable(body: CompletionRequest) -> Messages:
    """The one text that the router can read."""
    if len(body.prompt) != 1 or not isinstance(body.prompt[0], str):
        message = f"prompt: model {AUTO!r} takes one text a request; name an expert for several prompts or token ids"
        raise ApiError(400, message, param="prompt", code="invalid_value")
    return [{"role": "user", "content": body.prompt[0]}]


class _Service:
    """What the routes share."""

    def __init__(
        self, engine: Engine, router: Router | None, fallback: str, descriptions: Mapping[str, str], no_router: str
    ) -> None:
        self._engine = engine
        if fallback == ERROR:
            fallback = engine.base_name
        self._desk = None if router is None else Desk(router, engine.names, fallback, prefetch=self._prefetch)
        self._descriptions = descriptions
        self._no_router = no_router
        self._created = int(time.time())

    async def choose(self, model: str, messages: Messages, wanted: str | None) -> tuple[str, dict[str, str]]:
        """A request's `model` -> (who answers, headers that say so); wanted: instead of the router's choice."""
        if model == AUTO and wanted is not None:
            model = unquote(wanted)
        if model != AUTO:
            if model not in self._engine.names:
                raise self.unknown(model)
            return model, _served_by(model)
        if self._desk is None:
            raise self.unknown(model)
        decision = await self._desk.decide(messages)
        if decision.expert == ERROR:
            message = f"no expert is for this (probability {decision.score or 0:.4f} at best); name one instead of auto"
            raise ApiError(422, message, param="model", code="no_expert")
        headers = {**_served_by(decision.expert), ROUTE_REASON: decision.reason}
        if decision.score is not None:
            headers[ROUTE_SCORE] = f"{decision.score:.4f}"
        return decision.expert, headers

    def metrics(self) -> str:
        lines = [] if self._desk is None else self._desk.metrics()
        return "\n".join([*lines, ""])

    def _prefetch(self, name: str) -> None:
        """Begin to bring an expert's weights to its slot, or at least into host memory; its request is on its way."""
        if name in self._engine.store.artifacts:
            with contextlib.suppress(MeswitchError):  # the request itself will say what is wrong
                self._engine.store.prefetch(name)

    def unknown(self, model: str) -> ApiError:
        if model == AUTO:
            message = f"model {AUTO!r} needs a router: {self._no_router}"
        else:
            message = f"model {model!r} does not exist; there are {', '.join(card.id for card in self.cards())}"
        return ApiError(404, message, param="model", code="model_not_found")

    def cards(self) -> list[ModelCard]:
        base = self._engine.base_name
        cards = []
        for name in self._engine.names:
            description = self._descriptions.get(name, "")
            if name == base:
                cards.append(ModelCard(id=name, created=self._created, kind="base", description=description))
            else:
                card = ModelCard(id=name, created=self._created, kind="expert", description=description, parent=base)
                cards.append(card)
        if self._desk is not None:
            description = "The router chooses the expert for each request."
            cards.append(ModelCard(id=AUTO, created=self._created, kind="router", description=description))
        return cards

    def health(self) -> Health:
        failure = self._engine.failure
        load = self._engine.load()
        return Health(
            status="ok" if failure is None else "failed",
            reason=None if failure is None else without_paths(failure),
            waiting=load["waiting"],
            running=load["running"],
            auto=self._desk is not None,
        )


def _served_by(expert: str) -> dict[str, str]:
    return {EXPERT: quote(expert, safe=" /:@+,")}  # the base's name may be any text, a header may not
