"""`POST /v1/embeddings`: the base's own hidden states. They are those of a language model, no trained embeddings."""

import asyncio
import base64
import threading
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from torch import Tensor

from meswitch.engine import Engine
from meswitch.errors import MeswitchError
from meswitch.router.encoder import TextEncoder
from meswitch.server.errors import ApiError
from meswitch.server.schema import Strict, Text, neutral_only

MAX_INPUTS = 256
OpenEncoder = Callable[[], TextEncoder]


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


def routes(engine: Engine, open_encoder: OpenEncoder | None, check: Callable[[str], None]) -> APIRouter:
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
