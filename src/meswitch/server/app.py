"""The routes."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from urllib.parse import quote, unquote

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from meswitch.engine import Engine
from meswitch.errors import MeswitchError
from meswitch.router import Router
from meswitch.server import embeddings, messages, reference, responses, tokens
from meswitch.server.answers import ChatCompletion, Health, ModelCard, ModelList, TextCompletion
from meswitch.server.auth import ApiKeyMiddleware
from meswitch.server.chat import Chat
from meswitch.server.errors import ApiError, install_error_handlers
from meswitch.server.formats import ChatFormat, Format, TextFormat
from meswitch.server.generation import Generation, encoded
from meswitch.server.middleware import NormalisingMiddleware
from meswitch.server.routing import ERROR, Desk, Messages, with_circumstances
from meswitch.server.schema import ChatRequest, CompletionRequest, GenerationRequest
from meswitch.server.stream import EventStream, answer
from meswitch.tokenizer import Prompt
from meswitch.version import __version__

AUTO = "auto"
EXPERT, ROUTE_REASON, ROUTE_SCORE = "x-meswitch-expert", "x-meswitch-route-reason", "x-meswitch-route-score"
NOTE = "x-meswitch-note"  # what the expert cannot do of the request, and does without
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
    close_engine: bool = True,
    open_encoder: embeddings.OpenEncoder | None = None,
) -> FastAPI:
    """The application: serve it with uvicorn or any ASGI server, in one process.

    Args:
        router: answers `model: "auto"`. no_router: why there is none, for who asks for `auto` all the same.
        fallback: who answers when the router fails; None for the base, and so does `error`, which only means that an
            abstaining router is an error.
        descriptions: what the experts are good at, by name, for the models page.
        api_key: what clients must send; None takes it from MESWITCH_API_KEY, empty asks for none.
        allow_origins: sites whose pages may ask from a browser, such as `https://chat.example`; `*` for all.
        close_engine: whether the engine ends with the server.
        open_encoder: gives a base on the engine's weights, for embeddings; None for none.
    """
    service = _Service(engine, router, fallback or engine.base_name, descriptions or {}, no_router)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if close_engine:
            await asyncio.to_thread(engine.close)

    app = FastAPI(title="meswitch", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    install_error_handlers(app)
    key = os.environ.get(API_KEY_VARIABLE, "") if api_key is None else api_key
    if key:
        app.add_middleware(ApiKeyMiddleware, key=key)
    app.add_middleware(NormalisingMiddleware)
    if allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[EXPERT, ROUTE_REASON, ROUTE_SCORE, "retry-after"],
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

    async def answer_chat(
        body: ChatRequest, request: Request, shape: Callable[[str, Chat], Format], prompt_field: str
    ) -> Response:
        expert, headers, chat = await service.begin_chat(body, request)
        generation = await Generation.start(engine, expert, [chat.prompt], body, prompt_field, chat)
        return await _respond(generation, shape(expert, chat), body, request, headers)

    async def count_tokens(body: ChatRequest, request: Request) -> int:
        expert, _, chat = await service.begin_chat(body, request)
        return len(await encoded(engine.tokenizers[expert], chat.prompt, "messages"))

    app.include_router(responses.routes(answer_chat))
    app.include_router(messages.routes(answer_chat, count_tokens))
    app.include_router(tokens.routes(engine, service.unknown))
    app.include_router(reference.routes(app))
    app.include_router(embeddings.routes(engine, open_encoder, service.unknown))

    @app.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await answer_chat(body, request, lambda expert, chat: ChatFormat(expert, body, chat), "messages")

    @app.post("/v1/completions", response_model=TextCompletion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts or token ids."""
        prompts: Sequence[Prompt] = body.prompt
        wanted = request.headers.get(WANTED)
        routable = _routable(body) if body.model == AUTO and wanted is None else []
        asked = with_circumstances(routable, request.headers.items(), body.metadata)
        expert, headers = await service.choose(body.model, asked, wanted)
        generation = await Generation.start(engine, expert, prompts, body, "prompt")
        return await _respond(generation, TextFormat(expert, body), body, request, headers)

    return app


async def _respond(
    generation: Generation, shape: Format, body: GenerationRequest, request: Request, headers: Mapping[str, str]
) -> Response:
    if body.stream:
        return EventStream(generation, shape, headers)
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

    async def begin_chat(self, body: ChatRequest, request: Request) -> tuple[str, dict[str, str], Chat]:
        """Who answers a chat request, headers that say so, and what the request is for this expert."""
        asked = with_circumstances(body.conversation(), request.headers.items(), body.metadata)
        expert, headers = await self.choose(body.model, asked, request.headers.get(WANTED))
        tokenizer = self._engine.tokenizers[expert]
        if any(m.role in ("system", "developer") for m in body.messages) and not tokenizer.shows_system:
            headers[NOTE] = "the expert's chat template leaves system messages out"
        try:
            return expert, headers, Chat(body, tokenizer)
        except MeswitchError as error:
            raise ApiError.refused(error, "messages") from error

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
                card = ModelCard(id=name, created=self._created, kind="base", description=description)
            else:
                card = ModelCard(id=name, created=self._created, kind="expert", description=description, parent=base)
            cards.append(card.model_copy(update={"max_model_len": self._engine.max_length(name)}))
        if self._desk is not None:
            description = "The router chooses the expert for each request."
            cards.append(ModelCard(id=AUTO, created=self._created, kind="router", description=description))
        return cards

    def health(self) -> Health:
        failure = self._engine.failure
        load = self._engine.load()
        return Health(
            status="ok" if failure is None else "failed",
            reason=failure,
            waiting=load["waiting"],
            running=load["running"],
            auto=self._desk is not None,
        )


def _served_by(expert: str) -> dict[str, str]:
    return {EXPERT: quote(expert, safe=" /:@+,")}  # the base's name may be any text, a header may not
