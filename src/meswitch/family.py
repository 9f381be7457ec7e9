"""`family.toml`: one base, its experts, the router and how to serve them.

This is an edge of the package (pydantic); codec, artifact, ops, experts and engine never import it.
"""

import dataclasses
import difflib
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    WrapValidator,
    create_model,
    model_validator,
)

from meswitch.compression.options import SETTINGS, Options, Setting, check_given
from meswitch.engine_options import DEVICE, LEAST, BackendName, DtypeName, EngineOptions, RunnerName
from meswitch.errors import CheckpointError, ConfigError, UnknownExpertError
from meswitch.units import parse_bytes


def _size(value: Any) -> Any:
    """A text such as `16GiB` as a number of bytes, anything else as it is."""
    try:
        return parse_bytes(value) if isinstance(value, str) else value
    except ConfigError as error:
        raise ValueError(str(error)) from None


Bytes = Annotated[int, BeforeValidator(_size)]
_ENGINE = EngineOptions()
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of an expert, and of an API key
RESERVED = ("auto", "other", "error")  # mean something where requests are routed
ORIGIN = r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$"  # of a site, as browsers write it: no path, no slash at the end


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseSection(_Section):
    """`[base]`: the checkpoint that all experts share."""

    name: str = "base"
    path: str  # a directory (relative to the file) or a hub id


class _Compress(_Section):
    """`[compress]`: how `meswitch compress --family` makes the artifacts; one for all experts."""

    @model_validator(mode="after")
    def _effect(self) -> "_Compress":
        try:
            check_given(self.given())
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def given(self) -> dict[str, Any]:
        """What the file says, as `compression.options` takes it: name -> value."""
        said = {name: getattr(self, name) for name in self.model_fields_set}
        return {name: None if value == SETTINGS[name].none else value for name, value in said.items()}


def _compress_field(setting: Setting, default: Any) -> tuple[Any, Any]:
    """The type of a field and its default."""
    if isinstance(setting.kind, tuple):
        return Literal[setting.kind] | None, default
    kind: Any = Annotated[setting.kind, Field(ge=setting.least, le=setting.most)]
    word = setting.word if setting.none is None else setting.none
    if word is None:
        return kind | None, default

    def or_word(value: Any, check: Any) -> Any:  # a union would tell of both its halves what is wrong
        if value == word:
            return value
        if isinstance(value, str):
            raise ValueError(f"{value!r} is neither a number nor {word!r}")
        return check(value)

    return Annotated[kind, WrapValidator(or_word)], default


if TYPE_CHECKING:
    CompressSection = _Compress
else:
    # the options of a compression that all experts of a family can share, stated in `compression.options`
    CompressSection = create_model(
        "CompressSection",
        __base__=_Compress,
        __doc__=_Compress.__doc__,
        **{
            field.name: _compress_field(SETTINGS[field.name], field.default)
            for field in dataclasses.fields(Options)
            if field.name in SETTINGS and SETTINGS[field.name].shared
        },
    )


class ExpertSection(_Section):
    """`[[expert]]`: one fine-tune."""

    name: str = Field(pattern=NAME)
    delta: str  # the artifact: a directory, relative to the file, or hf://org/name
    source: str | None = None  # the full fine-tune: a directory or hub id; needed only to compress
    calibration: str | None = None  # text for calibration; needed only to compress
    questions: str | None = None  # a file of questions that `meswitch eval` asks it, relative to the file
    checker: str | None = None  # when a reply to them is right, as `meswitch eval --checker`
    description: str = ""  # what it is good at: the router's label and the models page
    examples: tuple[Annotated[str, Field(min_length=1)], ...] = ()  # queries for it, for the router; five do much


class RouterSection(_Section):
    """`[router]`: what `model: "auto"` does."""

    path: str = "router"
    encoder: str | None = None  # of a router by descriptions: a directory or hub id; None: the base
    bits: Literal[8, 32] = 32  # of that encoder's linear layers; 8 on a CPU only
    fallback: str = "base"  # an expert's or the base's name: who answers when the router abstains; or "error"
    threshold: float | None = Field(default=None, ge=0.0, le=1.0)  # None: the router's own, calibrated


class EngineSection(_Section):
    """`[engine]`: the embedded engine. Fields, defaults and limits are those of `EngineOptions`."""

    device: str = Field(default=_ENGINE.device, pattern=rf"^({DEVICE})$")
    dtype: DtypeName = "auto"
    backend: BackendName = "auto"
    runner: RunnerName = _ENGINE.runner
    slots: int = Field(default=_ENGINE.slots, ge=LEAST["slots"])
    host_bytes: Bytes | None = Field(default=_ENGINE.host_bytes, ge=LEAST["host_bytes"])
    merged_bytes: Bytes | None = Field(default=_ENGINE.merged_bytes, ge=LEAST["merged_bytes"])
    cuda_graphs: bool = _ENGINE.cuda_graphs
    max_batch_tokens: int = Field(default=_ENGINE.max_batch_tokens, ge=LEAST["max_batch_tokens"])
    kv_cache_tokens: int = Field(default=_ENGINE.kv_cache_tokens, ge=LEAST["kv_cache_tokens"])
    max_queue: int = Field(default=_ENGINE.max_queue, ge=LEAST["max_queue"])


class ServerSection(_Section):
    """`[server]`: the HTTP API."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    allow_origins: tuple[Annotated[str, Field(pattern=ORIGIN)], ...] = ()
    root_path: str = Field(default="", pattern=r"^(/[^\s?#]*[^\s?#/])?$")  # under which a proxy serves it
    tls_cert: str | None = None  # PEM files, relative to the file
    tls_key: str | None = None
    keys: str | None = None  # a file of API keys, relative to this one
    experts_dir: str | None = None  # from where experts may be loaded while the server runs
    watch_experts: bool = False  # serve what appears there
    connections: int = Field(default=1024, ge=8)
    grace_seconds: float = Field(default=30.0, ge=0.0, le=3600.0)  # for running answers at the end

    @model_validator(mode="after")
    def _watched(self) -> "ServerSection":
        if self.watch_experts and self.experts_dir is None:
            raise ValueError("watch_experts: which directory? set experts_dir")
        return self


class Family(_Section):
    """A validated `family.toml`; `directory` is where its relative paths start."""

    directory: Path
    base: BaseSection
    expert: tuple[ExpertSection, ...] = ()
    compress: CompressSection = CompressSection()
    router: RouterSection = RouterSection()
    engine: EngineSection = EngineSection()
    server: ServerSection = ServerSection()
    _file: Path | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _base_is_the_fallback(cls, data: Any) -> Any:
        """Where nobody is named, the base takes what no expert is for, whatever its name."""
        base, router = data.get("base"), data.get("router", {})
        if isinstance(base, dict) and isinstance(base.get("name"), str) and isinstance(router, dict):
            return {**data, "router": {"fallback": base["name"], **router}}
        return data

    @model_validator(mode="after")
    def _names(self) -> "Family":
        names = [self.base.name, *(e.name for e in self.expert)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"expert.name: {name!r} is used twice; every expert and the base need their own")
        for name in RESERVED:
            if name in names:
                raise ValueError(f"expert.name: {name!r} is reserved for routing; choose another name")
        if self.router.fallback not in (*names, "error"):
            raise ValueError(f"router.fallback: {self.router.fallback!r} is none of {', '.join(names)}, error")
        return self

    @classmethod
    def load(cls, path: str | Path) -> "Family":
        """Read `family.toml` (or the directory that holds it).

        Raises:
            ConfigError: no such file, not TOML, or a field that is unknown or has a wrong value.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "family.toml"
        try:
            data = tomllib.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{file}: no such file; give a family.toml or the directory that holds one") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: not valid TOML: {error}") from None
        if "directory" in data:  # of the class alone
            raise ConfigError(f"{file}: directory: no such field; paths are relative to the file's own directory")
        try:
            family = cls.model_validate({**data, "directory": file.resolve().parent})
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(file, item, data) for item in error.errors())) from None
        family._file = file
        return family

    @property
    def file(self) -> Path:
        """Where it was read from."""
        return self.directory / "family.toml" if self._file is None else self._file

    @property
    def names(self) -> list[str]:
        """The experts' names, in the file's order; the base is not among them."""
        return [e.name for e in self.expert]

    def get(self, name: str) -> ExpertSection:
        for section in self.expert:
            if section.name == name:
                return section
        raise UnknownExpertError(f"no expert {name!r}; this family has {', '.join(self.names) or 'none'}")

    def resolve(self, path: str) -> Path:
        """A path of the file, relative to it; an artifact of the hub (`hf://org/name`), fetched."""
        if path.startswith("hf://"):
            from meswitch.artifact.remote import local_artifact

            return local_artifact(path)
        return (self.directory / path).resolve()

    def resolve_model(self, source: str, field: str) -> str:
        """A directory, relative to the file, if there is one; otherwise a hub id, as it stands.

        Args:
            source: what the file says.
            field: where it says so, for messages: `base.path`.

        Raises:
            ConfigError: it is neither.
        """
        from meswitch.hub import check_model, is_hub_id

        local = (self.directory / source).resolve()
        if local.exists():
            return str(local)
        if not is_hub_id(source):
            raise ConfigError(
                f"{self.file}: {field}: {local}: no such directory; give a checkpoint's directory, or a hub id such as "
                "org/name"
            )
        try:
            check_model(source)
        except CheckpointError as error:
            raise ConfigError(f"{self.file}: {field}: {error}") from error
        return source

    def base_source(self) -> str:
        """The base: a directory or a hub id. Raises as `resolve_model`."""
        return self.resolve_model(self.base.path, "base.path")

    def source_of(self, section: ExpertSection) -> str:
        """An expert's full fine-tune: a directory or a hub id. Raises as `resolve_model`, and where none is named."""
        field = f"expert {section.name!r}: source"
        if section.source is None:
            raise ConfigError(f"{self.file}: {field}: is missing; name the full fine-tune, a directory or a hub id")
        return self.resolve_model(section.source, field)

    def deltas(self) -> dict[str, Path]:
        return {e.name: self.resolve(e.delta) for e in self.expert}


def _explain(file: Path, item: Any, data: dict[str, Any]) -> str:
    field = _named(item["loc"], data)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), _fields(item["loc"][:-1]), n=1)
        message = f"no such field; {f'did you mean {near[0]}? ' if near else ''}all fields are in docs/use/family.md"
    elif item["type"] == "missing":
        message = "this field is required"
    elif item["loc"] == ("expert",) and isinstance(item["input"], dict):
        message = "is one table; write [[expert]] above each expert's fields"
    elif item["type"] == "tuple_type":
        message = f"{item['input']!r} is not a list"
    elif item["type"] == "string_pattern_mismatch" and item["loc"][-1] == "device":
        message = f"{item['input']!r} is none of auto, cpu, cuda, cuda:1 and so on"
    elif item["type"] == "string_pattern_mismatch" and item["loc"][-1] == "name":
        message = f"{item['input']!r}: letters, digits, '.', '_' and '-', beginning with a letter or a digit"
    elif "input" in item and item["loc"] and repr(item["input"]) not in message:
        message = f"{message} (got {item['input']!r})"
    return f"{file}: {field}: {message}" if field else f"{file}: {message}"


def _named(place: tuple[int | str, ...], data: dict[str, Any]) -> str:
    """A field as a person finds it: `engine.slots`, and of an expert `expert 'math': source`."""
    if len(place) < 2 or place[0] != "expert":
        return ".".join(map(str, place))
    name = data["expert"][place[1]].get("name") if isinstance(data["expert"][place[1]], dict) else None
    which = f"expert {name!r}" if isinstance(name, str) else f"expert number {int(place[1]) + 1}"
    return f"{which}: {'.'.join(map(str, place[2:]))}".removesuffix(": ")


def _fields(place: tuple[int | str, ...]) -> list[str]:
    """The fields that a section has, or the sections of the file."""
    sections: dict[str, type[BaseModel]] = {
        "base": BaseSection, "compress": CompressSection, "expert": ExpertSection, "router": RouterSection,
        "engine": EngineSection, "server": ServerSection,
    }  # fmt: skip
    if not place:
        return list(sections)
    section = sections.get(str(place[0]))
    return list(section.model_fields) if section is not None else []
