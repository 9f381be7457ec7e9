"""What clients send. Whatever would change the answer and is not supported is refused by name, never ignored."""

import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from meswitch.engine import SamplingParams
from meswitch.engine.grammar import ANY_JSON, Grammar
from meswitch.engine.sampling import MAX_BIASED, MAX_LOGPROBS, MAX_STOP, MAX_STOP_TOKENS

MAX_CHOICES = 16
MAX_PAIRS = 16  # of metadata, as OpenAI has it; so are the lengths
MAX_STOPS = 4
MAX_TOOLS = 128
_SEED = 2**63 - 1
_UNLIMITED = 1 << 31  # the engine cuts it to what the context leaves
_COMPLETION_TOKENS = 16  # of /v1/completions without max_tokens, as OpenAI has it

# Nothing in the answer depends on these.
_IGNORED = {
    "keep_alive",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Not supported; a client may send the value that asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "documents": ([],),
    "early_stopping": (False,),
    "extra_body": ({},),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "modalities": (["text"],),
    "prediction": (),
    "priority": (0,),
    "reasoning_effort": ("none",),
    "repeat_penalty": (1, 1.0),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "suffix": ("",),
    "typical_p": (1, 1.0),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# The same of fields that the other endpoint has.
_NEUTRAL_IN_CHAT: dict[str, tuple[Any, ...]] = {"best_of": (1,), "echo": (False,)}
_NEUTRAL_IN_COMPLETION: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
# The same of a message: what servers write into their answers, which clients send back as they got them.
_NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "images": ([],),
    "reasoning_details": ([],),
    "refusal": ("",),
    "thinking_blocks": ([],),
}
_IGNORED_IN_PART = {"cache_control"}  # hints for caches


def refuse(kind: Literal["unsupported", "bad_value"], field: str | tuple[str | int, ...], reason: str) -> Any:
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
            raise refuse("unsupported", key, "not supported by this server; leave it out")
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


def content_text(value: Any, kinds: Collection[str] = ("text",)) -> Any:
    """A text, or a list of text parts joined by line breaks.

    Args:
        value: of the field.
        kinds: what text parts are called.
    """
    if not isinstance(value, list):
        return value
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind is None:
            raise refuse("bad_value", (index,), 'a part is an object with a `type`: {"type": "text", "text": ...}')
        if kind not in kinds:
            raise refuse("unsupported", (index,), f"{kind!r} is not supported: the experts read text only")
        if not isinstance(part.get("text"), str):
            raise refuse("bad_value", (index, "text"), "a text part needs a text")
        extra = next((key for key in part.keys() - {"type", "text"} - _IGNORED_IN_PART), None)
        if extra is not None and part[extra] not in (None, []):
            raise refuse("unsupported", (index, extra), "not supported by this server; leave it out")
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


def neutral_only(data: Any, ignored: Collection[str], neutral: Mapping[str, tuple[Any, ...]]) -> Any:
    """A body without what changes nothing. Raises: PydanticCustomError: a field of `neutral` asks for something."""
    if not isinstance(data, dict):
        return data
    return _supported({key: value for key, value in data.items() if key not in ignored}, neutral)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        # clients send null for what they do not set
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class CalledFunction(Strict):
    name: Text
    arguments: Text = "{}"

    def for_template(self) -> dict[str, Any]:
        """Templates want the arguments as an object."""
        return {"name": self.name, "arguments": json.loads(self.arguments or "{}")}

    @model_validator(mode="after")
    def _readable(self) -> "CalledFunction":
        try:
            is_object = isinstance(json.loads(self.arguments or "{}"), dict)
        except (json.JSONDecodeError, RecursionError):
            is_object = False
        if not is_object:
            raise refuse("bad_value", "arguments", "a JSON object, as text")
        return self


class Called(Strict):
    """A call that the assistant made."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # of a stream, which some clients leave there


class Message(Strict):
    """One turn of a conversation. null for what the assistant said is an empty turn, as OpenAI writes it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text, BeforeValidator(lambda value: content_text(value))]
    name: Text | None = None
    tool_calls: list[Called] = Field(default_factory=list)
    tool_call_id: Text | None = None
    reasoning_content: Text = ""
    prefix: bool = False

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if "reasoning" in data:  # vLLM's name for it
            data.setdefault("reasoning_content", data.pop("reasoning"))
        if data.get("role") == "assistant" and (data.get("tool_calls") or data.get("content", "") is None):
            data["content"] = data.get("content") or ""
        return _supported(data, _NEUTRAL_IN_MESSAGE)

    @model_validator(mode="after")
    def _of_its_role(self) -> "Message":
        for field, role in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, field) and self.role != role:
                raise refuse("bad_value", field, f"only in a message of the role {role!r}")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: OpenAI renamed the system role, templates have not."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content,
        }
        for field in ("name", "tool_call_id", "reasoning_content"):
            if getattr(self, field):
                message[field] = getattr(self, field)
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": call.function.for_template()}
                for call in self.tool_calls
            ]
        return message


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: Text = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def for_template(self, *, any_arguments: bool = False) -> dict[str, Any]:
        """any_arguments: without the schema of its arguments."""
        function: dict[str, Any] = {"name": self.function.name, "description": self.function.description}
        parameters = self.function.parameters or {"type": "object", "properties": {}}
        parameters = {"type": "object"} if any_arguments else parameters
        return {"type": "function", "function": function | {"parameters": parameters}}


class NamedFunction(Strict):
    name: Text


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    name: Text = "answer"
    description: Text = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool = False  # it is always kept


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _with_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise refuse("bad_value", "json_schema", "together with the type json_schema, and only with it")
        return self

    def grammar(self) -> Grammar | None:
        if self.type == "text":
            return None
        if self.json_schema is None:
            return ANY_JSON
        return Grammar("json_schema", json.dumps(self.json_schema.schema_))


class StructuredOutputs(Strict):
    """vLLM's extension; one of its fields."""

    json_: dict[str, Any] | Text | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Annotated[list[SomeText], Field(min_length=1, max_length=1024)] | None = None
    grammar: Text | None = None

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        if len(self.model_fields_set) != 1:
            raise refuse("bad_value", (), "give one of json, json_object, regex, choice and grammar")
        return self

    def constraint(self) -> Grammar | None:
        if self.json_ is not None:
            return Grammar("json_schema", self.json_ if isinstance(self.json_, str) else json.dumps(self.json_))
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar("choice", json.dumps(self.choice))
        if self.grammar is not None:
            return Grammar("lark", self.grammar)
        return ANY_JSON if self.json_object else None


Metadata = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], Field(max_length=MAX_PAIRS)
]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis: there is none to switch on


def _biases(value: Any) -> Any:
    """Token ids are texts in JSON; keys that are none stay, and are refused."""
    if not isinstance(value, dict):
        return value
    if not all(isinstance(key, int) or (key.isascii() and key.isdigit() and len(key) < 10) for key in value):
        raise ValueError("its keys are token ids")
    return {int(key): bias for key, bias in value.items()}


class GenerationRequest(Strict):
    """What all endpoints that answer have in common."""

    model: str = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1)  # vLLM writes -1 for all
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_biases), Field(max_length=MAX_BIASED)
    ] = Field(default_factory=dict)
    min_tokens: int = Field(default=0, ge=0)
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKENS)] = Field(
        default_factory=list
    )
    seed: int | None = Field(default=None, ge=-_SEED, le=_SEED)
    stop: Annotated[tuple[SomeText, ...], BeforeValidator(_texts), Field(max_length=MAX_STOPS)] = ()
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    metadata: Metadata = Field(default_factory=dict)  # read by routing rules alone

    own_neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        return neutral_only(data, _IGNORED, _NEUTRAL | cls.own_neutral)

    @model_validator(mode="after")
    def _streaming(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise refuse("bad_value", "stream_options", "only together with stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def token_limit(self) -> int:
        return self.max_tokens or _UNLIMITED

    @property
    def answers(self) -> int:
        """How many are made for each prompt; not all may be given."""
        return self.n

    @property
    def alternatives(self) -> int | None:
        """How many of the likeliest tokens are named beside each of the answer's; None for no log probabilities."""
        return None

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's tokens have log probabilities, too."""
        return False

    @property
    def grammar_field(self) -> str:
        """The field that says so."""
        return "structured_outputs"

    @property
    def grammar(self) -> Grammar | None:
        """What the answer must be."""
        return None if self.structured_outputs is None else self.structured_outputs.constraint()

    def params(self, choice: int, grammar: Grammar | None = None, shown: tuple[str, ...] = ()) -> SamplingParams:
        """Of the request's choice-th answer: each has its own seed, so that answers differ and can be repeated.

        Args:
            choice: from 0.
            grammar: what the answer must be.
            shown: special tokens that are part of its text.
        """
        return SamplingParams(
            max_new_tokens=self.token_limit,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            seed=None if self.seed is None else self.seed + choice,
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_new_tokens=self.min_tokens,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            logprobs=self.alternatives,
            prompt_logprobs=self.alternatives if self.scores_prompt else None,
            grammar=grammar,
            shown=shown,
        )


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    own_neutral = _NEUTRAL_IN_CHAT

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise refuse("bad_value", "max_tokens", "differs from max_completion_tokens, its new name; give one")
        return self

    @model_validator(mode="after")
    def _fitting(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise refuse("bad_value", "top_logprobs", "only together with logprobs: true")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise refuse("bad_value", "tools", "two of them have the same name")
        chosen = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        if chosen is not None and chosen not in names:
            raise refuse("bad_value", "tool_choice", f"there is no tool {chosen!r}")
        if self.tool_choice == "required" and not names:
            raise refuse("bad_value", "tool_choice", "needs tools")
        if self.structured_outputs is not None and self.response_format is not None:
            raise refuse("bad_value", "structured_outputs", "not together with response_format")
        if self.offered and self.response_format is not None and self.response_format.type != "text":
            raise refuse("unsupported", "response_format", "not together with tools that may be called")
        if self.demanded and self.structured_outputs is not None:
            raise refuse("unsupported", "structured_outputs", "not together with a call that is demanded")
        if self.strict and self.structured_outputs is not None:
            raise refuse("unsupported", "structured_outputs", "not together with strict tools")
        if any(message.prefix for message in self.messages[:-1]):
            raise refuse("bad_value", "messages", "prefix: only in the last message")
        if self.continues and self.messages[-1].role != "assistant":
            raise refuse("bad_value", "continue_final_message", "the last message is not the assistant's")
        if not (self.add_generation_prompt or self.continues):
            raise refuse("unsupported", "add_generation_prompt", "false only together with continue_final_message")
        return self

    @property
    def token_limit(self) -> int:
        return self.max_completion_tokens or self.max_tokens or _UNLIMITED

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def continues(self) -> bool:
        """Whether the answer goes on with the last message."""
        return self.continue_final_message or self.messages[-1].prefix

    @property
    def offered(self) -> list[Tool]:
        """Tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def demanded(self) -> list[Tool]:
        """Tools one of which the model must call; none if it may as well answer."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools if self.tool_choice == "required" else []

    @property
    def strict(self) -> bool:
        """Whether arguments of some tool's calls must fit its schema."""
        return any(tool.function.strict for tool in self.offered)

    @property
    def grammar_field(self) -> str:
        return (
            "tools"
            if self.demanded or self.strict
            else "response_format"
            if self.response_format
            else "structured_outputs"
        )

    @property
    def grammar(self) -> Grammar | None:
        return super().grammar if self.response_format is None else self.response_format.grammar()

    def conversation(self) -> list[dict[str, Any]]:
        return [message.for_template() for message in self.messages]


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts)]
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: Annotated[int | None, BeforeValidator(lambda value: None if value is False else value)] = Field(
        default=None, ge=0, le=MAX_LOGPROBS
    )
    echo: bool = False
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    own_neutral = _NEUTRAL_IN_COMPLETION

    @model_validator(mode="after")
    def _best(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < self.n:
            raise refuse("bad_value", "best_of", "not less than n")
        if self.stream and self.answers > self.n:
            raise refuse("bad_value", "best_of", "more than n cannot be streamed: which are best shows at the end")
        return self

    @property
    def token_limit(self) -> int:
        return _COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def answers(self) -> int:
        return self.best_of or self.n

    @property
    def alternatives(self) -> int | None:
        if self.logprobs is None and self.answers > self.n:
            return 0  # to know which are best
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        return self.echo and self.logprobs is not None
