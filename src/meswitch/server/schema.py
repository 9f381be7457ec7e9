"""What clients send. Whatever would change the answer and is not supported is refused by name, never ignored."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from meswitch.engine import SamplingParams
from meswitch.engine.sampling import MAX_STOP

MAX_CHOICES = 16
MAX_PAIRS = 16  # of metadata, as OpenAI has it; so are the lengths
MAX_STOPS = 4
_SEED = 2**63 - 1
_UNLIMITED = 1 << 31  # the engine cuts it to what the context leaves
_COMPLETION_TOKENS = 16  # of /v1/completions without max_tokens, as OpenAI has it

# Nothing in the answer depends on these.
_IGNORED = {
    "keep_alive",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Not supported; a client may send the value that asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "extra_body": ({},),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "priority": (0,),
    "reasoning_effort": ("none",),
    "repeat_penalty": (1, 1.0),
    "repetition_penalty": (1, 1.0),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),  # tools themselves are refused
    "tools": ([],),
    "top_logprobs": (0,),
    "typical_p": (1, 1.0),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# The same of a message: what servers write into their answers, which clients send back as they got them.
_NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "images": ([],),
    "prefix": (False,),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "reasoning_details": ([],),
    "refusal": ("",),
    "thinking_blocks": ([],),
    "tool_call_id": (),
    "tool_calls": ([],),
}
_IGNORED_IN_PART = {"cache_control"}  # hints for caches


def _refuse(kind: Literal["unsupported", "bad_value"], field: str | tuple[str | int, ...], reason: str) -> Any:
    """An error that says which field of the object it is about, or the way to it."""
    return PydanticCustomError(kind, "{reason}", {"field": field, "reason": reason})


def _supported(data: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Without the fields that ask for nothing.

    Raises:
        PydanticCustomError: one asks for something.
    """
    kept = {}
    for key, value in data.items():
        if key not in neutral:
            kept[key] = value
        elif value is not None and not any(type(value) is type(no) and value == no for no in neutral[key]):
            raise _refuse("unsupported", key, "not supported by this server; leave it out")
    return kept


def _encodable(value: str) -> str:
    """JSON may hold half a surrogate pair, which no tokenizer reads."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode text (half of a surrogate pair)") from None
    return value


Text = Annotated[str, AfterValidator(_encodable)]
SomeText = Annotated[str, Field(min_length=1, max_length=MAX_STOP), AfterValidator(_encodable)]


def _texts(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _content(value: Any) -> Any:
    """A text, or a list of text parts joined by line breaks."""
    if not isinstance(value, list):
        return value
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind is None:
            raise _refuse("bad_value", (index,), 'a part is an object with a `type`: {"type": "text", "text": ...}')
        if kind != "text":
            raise _refuse("unsupported", (index,), f"{kind!r} is not supported: the experts read text only")
        if not isinstance(part.get("text"), str):
            raise _refuse("bad_value", (index, "text"), "a text part needs a text")
        extra = next((key for key in part.keys() - {"type", "text"} - _IGNORED_IN_PART), None)
        if extra is not None and part[extra] is not None:
            raise _refuse("unsupported", (index, extra), "not supported by this server; leave it out")
        texts.append(part["text"])
    return "\n".join(texts)


def _prompts(value: Any) -> Any:
    """One prompt or several -> a list of prompts."""
    if isinstance(value, str):
        return [_encodable(value)]
    if _is_tokens(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return [_encodable(item) for item in value]
    if isinstance(value, list) and value and all(_is_tokens(item) for item in value):
        return value
    raise ValueError("give a text, a list of texts, a list of token ids or a list of such lists; none of them empty")


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        # clients send null for what they do not set
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class Message(_Strict):
    """One turn of a conversation. null for what the assistant said is an empty turn, as OpenAI writes it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_content)]
    name: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        silent = data.get("role") == "assistant" and data.get("content", "") is None
        return _supported(data, _NEUTRAL_IN_MESSAGE) | ({"content": ""} if silent else {})

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: OpenAI renamed the system role, templates have not."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content}
        return message if self.name is None else message | {"name": self.name}


Metadata = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], Field(max_length=MAX_PAIRS)
]


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis: there is none to switch on


class GenerationRequest(_Strict):
    """What both endpoints have in common."""

    model: str = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    seed: int | None = Field(default=None, ge=-_SEED, le=_SEED)
    stop: Annotated[tuple[SomeText, ...], BeforeValidator(_texts), Field(max_length=MAX_STOPS)] = ()
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    metadata: Metadata = Field(default_factory=dict)  # read by routing rules alone

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return _supported({key: value for key, value in data.items() if key not in _IGNORED}, _NEUTRAL)

    @model_validator(mode="after")
    def _streaming(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise _refuse("bad_value", "stream_options", "only together with stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def token_limit(self) -> int:
        return self.max_tokens or _UNLIMITED

    def params(self, choice: int) -> SamplingParams:
        """Of the request's choice-th answer: each has its own seed, so that answers differ and can be repeated."""
        return SamplingParams(
            max_new_tokens=self.token_limit,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=None if self.seed is None else self.seed + choice,
            stop=self.stop,
        )


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _refuse("bad_value", "max_tokens", "differs from max_completion_tokens, its new name; give one")
        return self

    @property
    def token_limit(self) -> int:
        return self.max_completion_tokens or self.max_tokens or _UNLIMITED

    def conversation(self) -> list[dict[str, Any]]:
        return [message.for_template() for message in self.messages]


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts)]

    @property
    def token_limit(self) -> int:
        return self.max_tokens or _COMPLETION_TOKENS
