"""What clients get: OpenAI's response objects."""

from typing import Any, Literal

from pydantic import BaseModel, RootModel, SerializerFunctionWrapHandler, model_serializer


class _Lean(BaseModel):
    """Leaves out fields that are None; the other objects write them as null, which clients rely on."""

    @model_serializer(mode="wrap")
    def _without_nulls(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if value is not None}


class Event(RootModel[dict[str, Any]]):
    """An object whose fields the protocols of `responses` and `messages` fix."""


class Usage(BaseModel):
    """Tokens: the prompt's (once, however many answers), and all answers', end tokens included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token that could have come. bytes: a part of a character has no text of its own."""

    token: str
    logprob: float
    bytes: list[int]


class LogprobToken(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[LogprobToken]
    refusal: None = None


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class FunctionCall(BaseModel):
    name: str
    arguments: str


class Call(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class CallDelta(Call):
    """A whole call: its arguments are not streamed in pieces."""

    index: int


class ChatMessage(BaseModel):
    """content: null where there are calls only."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None

    @model_serializer(mode="wrap")
    def _only_what_is_there(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        optional = ("reasoning_content", "tool_calls")
        return {key: value for key, value in write(self).items() if value is not None or key not in optional}


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: str | int | None = None  # vLLM's: the stop text or token of the request that ended the answer


class ChatCompletion(BaseModel):
    """model: the expert that answered."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(_Lean):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(_Lean):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class TextCompletion(_Lean):
    """A whole answer, or a piece of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelCard(_Lean):
    """One row of `/v1/models`.

    kind: `base`, `expert` or `router`. parent: the base of an expert. max_model_len: tokens of a prompt and its answer.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "meswitch"
    kind: Literal["base", "expert", "router"]
    description: str
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(_Lean):
    """waiting, running: requests. auto: whether the router is there."""

    status: Literal["ok", "failed"]
    reason: str | None = None
    waiting: int
    running: int
    auto: bool
