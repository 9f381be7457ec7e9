"""`POST /v1/route`: what the router says to a query, without an answer."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, BeforeValidator, Field

from meswitch.server.auto import AutoPolicy, with_circumstances
from meswitch.server.schema import Message, Metadata, Strict


def _messages(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class RouteRequest(Strict):
    """input: a text, or the messages of a conversation."""

    input: Annotated[list[Message], BeforeValidator(_messages)] = Field(min_length=1)
    metadata: Metadata = Field(default_factory=dict)


class RouteAnswer(BaseModel):
    """model: who would answer, `error` for nobody. scores: label -> probability."""

    model: str
    reason: str
    score: float | None
    scores: dict[str, float]


def routes(auto: AutoPolicy) -> APIRouter:
    """`/v1/route`."""
    router = APIRouter()

    @router.post("/v1/route")
    async def route(body: RouteRequest, request: Request) -> RouteAnswer:
        """Who would answer, and how sure the router is."""
        messages = [message.for_template() for message in body.input]
        decision = await auto.decide(with_circumstances(messages, request.headers.items(), body.metadata))
        scores = {} if decision.scores is None else dict(decision.scores)
        return RouteAnswer(model=decision.expert, reason=decision.reason, score=decision.score, scores=scores)

    return router
