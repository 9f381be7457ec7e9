"""`POST /v1/route`: what a router says to a query, without an answer: the family's, or one over given routes."""

import asyncio
import threading
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field

from meswitch.errors import MeswitchError
from meswitch.router import Decider, Selection, parse_options
from meswitch.server.auto import ERROR, AutoPolicy, with_circumstances
from meswitch.server.errors import ApiError
from meswitch.server.schema import Message, Metadata, Strict

OpenDecider = Callable[[], Decider]


def _messages(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class RouteRequest(Strict):
    """input: a text, or the messages of a conversation.

    routes: `{name, description, examples}` each, in place of the family's experts; a description or an example at
    least. threshold: with them, the probability that the best must reach; by default what their own lines give.
    """

    input: Annotated[list[Message], BeforeValidator(_messages)] = Field(min_length=1)
    metadata: Metadata = Field(default_factory=dict)
    routes: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    threshold: float | None = Field(default=None, ge=0.0, le=1.0)


class RouteAnswer(BaseModel):
    """model: who would answer, `error` for nobody. scores: label -> probability."""

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


def routes(auto: AutoPolicy, open_decider: OpenDecider | None) -> APIRouter:
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
        decision = await auto.decide(with_circumstances(messages, request.headers.items(), body.metadata))
        scores = {} if decision.scores is None else dict(decision.scores)
        return RouteAnswer(model=decision.expert, reason=decision.reason, score=decision.score, scores=scores)

    return router
