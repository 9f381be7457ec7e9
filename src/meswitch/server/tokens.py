"""`/tokenize`, `/detokenize` and `/version`, as vLLM has them."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field, model_validator

from meswitch.engine import Engine
from meswitch.server.chat import Chat
from meswitch.server.errors import ApiError
from meswitch.server.generation import encoded
from meswitch.server.schema import ChatRequest, Message, Strict, Text, Tool, refuse
from meswitch.tokenizer import ChatTokenizer
from meswitch.version import __version__


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


class Version(BaseModel):
    version: str


def routes(engine: Engine, check: Callable[[str], None]) -> APIRouter:
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
    async def version() -> Version:
        """Of meswitch."""
        return Version(version=__version__)

    return router
