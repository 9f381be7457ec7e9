"""The configuration of a model, in what two of them differ, and what of it changes the computation.

It is read from `config.json`, of a directory or of the Hugging Face hub, without ever running a repository's own code.

Values are compared as their class parses them: defaults filled in, old spellings turned into new ones. A field counts
if the code of the model reads it. That is looked up in transformers' source: the modules that define the parts of the
model, and of what they share the masks and caches. Every attribute and every string there is taken for something that
may be read of a configuration, so a field may count that does not matter, and none that matters is missed.
"""

import ast
import copy
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from meswitch.architecture import architecture_of
from meswitch.errors import CheckpointError
from meswitch.hub import from_hub, is_hub_id
from meswitch.jsonfile import read_json

# Why a field does not change what is computed.
METADATA = "says nothing of the computation"
OF_EACH = "served for each expert"
TRAINING = "matters in training only"
UNREAD = "no code of the model reads it"
INACTIVE = "has no effect here"
_METADATA = re.compile(
    r"_name_or_path|_from_model_config|_commit_hash|transformers_version|architectures|auto_map|(torch_)?dtype"
    r"|use_cache|return_dict|use_return_dict|output_(attentions|hidden_states|router_logits)|id2label|label2id"
    r"|num_labels|problem_type|is_encoder_decoder|chunk_size_feed_forward|_?attn_implementation.*|quantization_config"
)
_OF_EACH = re.compile(r"(bos|eos|pad|sep|eod|unk|cls|mask|decoder_start)_token_id|tie_word_embeddings")
_TRAINING = re.compile(
    r"dropout|pdrop$|drop_path|drop_rate|layerdrop|^initializer|^init_std$|loss|gradient_checkpointing"
)
_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern")
_ROPE, _LENGTH = "rope_parameters", "max_position_embeddings"
_SHARED_CODE = ("transformers.masking_utils", "transformers.cache_utils")


def read_config(source: str | Path) -> Any:
    """A model's configuration as transformers understands it.

    Args:
        source: a directory with a `config.json`, such a file, or a hub id.

    Returns:
        a `transformers.PreTrainedConfig`.

    Raises:
        CheckpointError: no such file, a damaged one, a `model_type` that the installed transformers does not have, or
            a value that its class does not take.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file = Path(source)
    if file.is_dir():
        file = file / "config.json"
    elif is_hub_id(source):
        file = _fetch_config(str(source))
    elif not file.exists():
        raise CheckpointError(f"{source}: no such file or directory; give a config.json, a checkpoint or a hub id")
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; a checkpoint needs its configuration")
    fields = read_json(file)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"{file}: {_unknown(fields)}")
    try:
        config = transformers.AutoConfig.from_pretrained(
            file.parent if file.name == "config.json" else file, trust_remote_code=False
        )
        config._attn_implementation = None  # of whoever saved it; what is not installed here is no obstacle
        return config
    except Exception as error:  # a configuration's own checks raise whatever they like
        raise CheckpointError(
            f"{file}: transformers {transformers.__version__} does not take it as {model_type!r}: {_one_line(error)}"
        ) from error


def _fetch_config(source: str) -> Path:
    """The `config.json` of a repository, in the Hugging Face cache.

    Raises:
        CheckpointError: the hub does not give it.
    """
    from huggingface_hub import snapshot_download

    # a snapshot, for of a single file the library asks again and again for half a minute where there is no hub
    return from_hub(source, lambda: snapshot_download(source, allow_patterns=["config.json"])) / "config.json"


def without_quantisation(config: Any) -> Any:
    """A copy of a configuration that says nothing of how weights are stored."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def _unknown(fields: dict[str, Any]) -> str:
    """Why a configuration belongs to no class of transformers, and what to do."""
    import transformers

    model_type, code = fields.get("model_type"), fields.get("auto_map")
    if code:
        named = code.get("AutoModelForCausalLM") or code.get("AutoConfig") if isinstance(code, dict) else None
        return (
            f"auto_map: {model_type!r} is code of the checkpoint's own ({named or 'custom'}), which meswitch does not "
            "run; load it with transformers and `trust_remote_code=True` and save it as an architecture that "
            "transformers has, if it computes one"
        )
    if model_type is None:
        what = "an adapter's" if "peft_type" in fields else "no model's"
        return f"model_type: missing: this is {what} configuration; give that of a transformers checkpoint"
    return (
        f"model_type: {model_type!r} is none that transformers {transformers.__version__} has; correct it, or "
        "upgrade with `pip install --upgrade transformers`"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True, slots=True)
class FieldDifference:
    """A field in which two configurations differ.

    Args:
        field: its name; of a part of the configuration with its path, as `text_config.rope_parameters.rope_theta`.
        base: the base's value, None if it has none.
        expert: the expert's value.
        reason: why it does not change what is computed; None if it does.
    """

    field: str
    base: Any
    expert: Any
    reason: str | None

    @property
    def changes_computation(self) -> bool:
        return self.reason is None


def config_differences(base: Any, expert: Any) -> list[FieldDifference]:
    """The fields in which two configurations differ, those of their parts too, by name.

    Args:
        base: a `transformers.PreTrainedConfig`.
        expert: another.

    Raises:
        CheckpointError: transformers cannot lay out the base's model.
    """
    code = _Code(base)
    found = list(_differing(base, expert, ""))
    return [FieldDifference(place.path, place.base, place.expert, _reason(place, code)) for place in found]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where two values differ.

    Args:
        path: of the field, with its name.
        name: of the field.
        base: the base's value.
        expert: the expert's.
        owners: the configurations that it belongs to, the base's and the expert's.
        layer_type: the type of layer that it is for, where a rotary embedding has its own for each.
        in_rope: whether it is a field of the rotary embedding.
    """

    path: str
    name: str
    base: Any
    expert: Any
    owners: tuple[Any, Any]
    layer_type: str | None = None
    in_rope: bool = False


def _differing(base: Any, expert: Any, path: str) -> Iterator[_Place]:
    left, right = base.to_dict(), expert.to_dict()
    for name in sorted(left.keys() | right.keys()):
        ours, theirs = left.get(name), right.get(name)
        if name in base.sub_configs and isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differing(getattr(base, name), getattr(expert, name), f"{path}{name}.")
        elif name == _ROPE and isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differing_rope(ours, theirs, f"{path}{name}.", (base, expert), None)
        elif not _same(ours, theirs):
            yield _Place(f"{path}{name}", name, ours, theirs, (base, expert))


def _differing_rope(
    base: dict[str, Any], expert: dict[str, Any], path: str, owners: tuple[Any, Any], layer_type: str | None
) -> Iterator[_Place]:
    for name in sorted(base.keys() | expert.keys()):
        ours, theirs = base.get(name), expert.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differing_rope(ours, theirs, f"{path}{name}.", owners, name)
        elif not _same(ours, theirs) and name != "type":  # the old spelling of rope_type, which is there too
            yield _Place(f"{path}{name}", name, ours, theirs, owners, layer_type, in_rope=True)


def _same(base: Any, expert: Any) -> bool:
    return bool(base == expert) or (base != base and expert != expert)


def _reason(place: _Place, code: "_Code") -> str | None:
    """Why a field does not change what is computed; None if it does."""
    name, values = place.name, (place.base, place.expert)
    if _METADATA.fullmatch(name):
        return METADATA
    if _OF_EACH.fullmatch(name) or place.path in ("vocab_size", "text_config.vocab_size"):
        return OF_EACH
    if _TRAINING.search(name):
        return TRAINING
    if place.in_rope:
        return None if any(_rope_reads(place, owner, code) for owner in place.owners) else INACTIVE
    if name == _LENGTH and not any(_scales_with_length(owner) for owner in place.owners):
        return OF_EACH
    spellings = {name} | {alias for alias, real in place.owners[0].attribute_map.items() if real == name}
    if spellings.isdisjoint(code.names):
        return UNREAD
    if spellings.isdisjoint(code.attributes) and all(name in (getattr(o, _ROPE, None) or {}) for o in place.owners):
        return INACTIVE  # left over beside the rotary embedding's own fields, which are compared
    if None in values and next((v for v in values if v is not None), None) in _defaults(place, code):
        return INACTIVE
    if name in _WINDOW and not any(_has_windows(owner, code) for owner in place.owners):
        return INACTIVE
    return None


def _defaults(place: _Place, code: "_Code") -> list[Any]:
    """What the code takes for the field where it is missing, if that is one value."""
    owner = place.owners[0]
    if place.name == "head_dim":
        return [owner.hidden_size // owner.num_attention_heads]
    given = code.defaults.get(place.name, [])
    return given if len(given) == 1 else []


def _rope_reads(place: _Place, config: Any, code: "_Code") -> bool:
    """Whether the rotary embedding of a configuration reads a field: its type's function does, or the model's code."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, types = getattr(config, _ROPE), getattr(config, "layer_types", None)
    if place.layer_type is not None:
        if types and place.layer_type not in types:
            return False
        rope = rope[place.layer_type]
    if place.name == "partial_rotary_factor" and None in (place.base, place.expert):
        return 1 not in (place.base, place.expert)  # what is taken where it is missing
    function = ROPE_INIT_FUNCTIONS.get(rope.get("rope_type", "default"))
    own = set() if function is None else _read(inspect.getsource(function)).names
    return place.name == "rope_type" or place.name in own | code.names


def _scales_with_length(config: Any) -> bool:
    """Whether the rotary embedding depends on how long texts may be."""
    rope = getattr(config, _ROPE, None) or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return any(
        "dynamic" in (kind := rope.get("rope_type") or "default")
        or (kind in ("yarn", "longrope") and rope.get("factor") is None)
        for rope in kinds
    )


def _has_windows(config: Any, code: "_Code") -> bool:
    """Whether some layer may attend to a window: by the layers' types, and by what they hold."""
    types = getattr(config, "layer_types", None)
    return not types or any(kind != "full_attention" for kind in types) or any(code.windows) or not code.windows


@dataclass(frozen=True, slots=True)
class _Read:
    """What a piece of source may read of a configuration.

    Args:
        names: attributes and strings.
        attributes: what is read as an attribute, or by `getattr`.
        defaults: name -> constants that `getattr` takes for it where it is missing.
    """

    names: set[str]
    attributes: set[str]
    defaults: dict[str, list[Any]]


class _Code:
    """The source of a model. config: the model's."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @cached_property
    def _read(self) -> _Read:
        modules = {type(module).__module__ for module in architecture_of(self.config).modules.values()}
        wanted = sorted(name for name in modules if name.startswith("transformers.models."))
        found = _Read(set(), set(), {})
        for module in (*wanted, *_SHARED_CODE):
            read = _read(_source(module))
            found.names.update(read.names)
            found.attributes.update(read.attributes)
            for name, values in read.defaults.items():
                known = found.defaults.setdefault(name, [])
                known += [value for value in values if value not in known]
        for config in _parts(self.config):
            by_class = _read_by_class(type(config), found.names)
            found.names.update(by_class)
            found.attributes.update(by_class)
        return found

    @property
    def names(self) -> set[str]:
        return self._read.names

    @property
    def attributes(self) -> set[str]:
        return self._read.attributes

    @property
    def defaults(self) -> dict[str, list[Any]]:
        return self._read.defaults

    @cached_property
    def windows(self) -> list[Any]:
        """Sizes of the windows that layers hold, None for those that have none. Empty where layers do not say."""
        modules = architecture_of(self.config).modules.values()
        return [module.sliding_window for module in modules if hasattr(module, "sliding_window")]


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            yield from _parts(getattr(config, name))


def _read_by_class(kind: type, names: set[str]) -> set[str]:
    """What the properties and methods of a configuration's class read, of those that the model's code names."""
    found: set[str] = set()
    for parent in kind.__mro__:
        if not parent.__module__.startswith("transformers.models."):
            continue
        tree = ast.parse(_source(parent.__module__))
        (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == parent.__name__)
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name in names:
                found |= _read(ast.unparse(node)).names
    return found


def _source(module: str) -> str:
    return inspect.getsource(importlib.import_module(module))


@functools.cache
def _read(source: str) -> _Read:
    names: set[str] = set()
    attributes: set[str] = set()
    defaults: dict[str, list[Any]] = {}
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr=name):
                names.add(name)
                attributes.add(name)
            case ast.Constant(value=str(name)):
                names.add(name)
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), default]):
                attributes.add(name)
                # a default that is worked out is none that is known
                defaults.setdefault(name, []).append(default.value if isinstance(default, ast.Constant) else ...)
    return _Read(names, attributes, defaults)
