"""What a PEFT adapter asks for: `adapter_config.json`. What it asks for and is not applied here is refused by name."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meswitch.errors import CheckpointError
from meswitch.jsonfile import read_json

_MERGE = (
    "merge it with PEFT (`PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(...)`) and "
    "compress the result"
)
# Of these nothing can be merged: they add tokens or keys and values, not weights.
_PROMPTS = {
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "CARTRIDGE",
}
# Variants of LoRA that compute something else than base + scale * B A, by the field that switches them on.
_VARIANTS = {
    "use_qalora": "QALoRA averages groups of input channels first",
    "alora_invocation_tokens": "activated LoRA (aLoRA) changes the model only after its invocation tokens",
    "layer_replication": "it repeats layers of the base",
    "use_bdlora": "BD-LoRA multiplies with block-diagonal matrices",
    "arrow_config": "arrow routing mixes several adapters by the token",
    "kasa_config": "KaSA truncates the base's weights too",
    "monteclora_config": "MonteCLoRA samples its weights",
    "enable_lora": "a merged linear of an early PEFT",
}
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Fields that training alone reads, that say where the adapter is from, or that another field switches on.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",  # PEFT sets it by the module's class, so the class decides here too
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "merge_weights",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",  # saves memory in the backward pass
}


@dataclass(frozen=True)
class AdapterConfig:
    """What decides the result, of an adapter whose every such field is applied here.

    Args:
        file: where it is from.
        rank: of a pair.
        alpha: a pair is multiplied with `alpha / rank`.
        rank_pattern: pattern of a module's name -> its own rank.
        alpha_pattern: the same for alpha.
        rank_stabilised: whether a pair is multiplied with `alpha / sqrt(rank)` instead.
        dora: whether each row has a length of its own (DoRA).
        bias: `none`, `all` or `lora_only`: whose biases were trained too.
        lora_bias: whether B has a bias.
        modules_to_save: names of modules that were trained whole.
        target_modules: names, or a pattern, of modules that have a pair; None if the file does not say.
        exclude_modules: of those, modules that have none.
        layers: layers that have pairs; None for all.
        layers_pattern: names of the lists of layers that `layers` counts; none for any.
        token_indices: embedding module, None for the model's own -> rows that were trained whole.
        target_parameters: names of parameters that have a pair.
        ties: whether what is trained of a tied embedding is stored for the head too.
        base_name: the base as the adapter names it, None if it does not.
        notes: what a person should know, a line each.
    """

    file: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    dora: bool
    bias: str
    lora_bias: bool
    modules_to_save: tuple[str, ...]
    target_modules: tuple[str, ...] | str | None
    exclude_modules: tuple[str, ...] | str
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    token_indices: Mapping[str | None, tuple[int, ...]]
    target_parameters: tuple[str, ...]
    ties: bool
    base_name: str | None
    notes: tuple[str, ...]

    @classmethod
    def read(cls, file: Path) -> "AdapterConfig":
        """Read and check.

        Raises:
            CheckpointError: missing, not JSON, a field of a wrong type, or one that asks for what is not applied here.
        """
        return _Reader(file, read_json(file)).read()

    def scale(self, module: str) -> float:
        """What the pair of a module is multiplied with."""
        rank, alpha = self.rank_of(module), _of_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank

    def rank_of(self, module: str) -> int:
        return _of_pattern(self.rank_pattern, module, self.rank)

    def targets(self, module: str, all_linear: Iterable[str]) -> bool:
        """Whether PEFT gives a module a pair.

        Args:
            module: its name in the model.
            all_linear: the modules that `all-linear` means.
        """
        if _named(self.exclude_modules, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save):
            return False
        wanted = self.target_modules
        if wanted is None:
            return not self.target_parameters
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            return module in all_linear
        return _named(wanted, module) and (isinstance(wanted, str) or self._in_layers(module))

    def _in_layers(self, module: str) -> bool:
        if self.layers is None:
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
        return found is not None and int(found[1]) in self.layers

    def saves(self, module: str) -> bool:
        """Whether a module, or one around it, was trained whole."""
        parts = module.split(".")
        around = [".".join(parts[: end + 1]) for end in range(len(parts))]
        return any(name.endswith(wanted) for name in around for wanted in self.modules_to_save)


class _Reader:
    """The fields of one file, checked one by one."""

    def __init__(self, file: Path, data: dict[str, Any]) -> None:
        self._file, self._data = file, data
        self._read: set[str] = set()

    def read(self) -> AdapterConfig:
        self._check_method()
        self._check_variants()
        self._check_base_unchanged()
        layers = self._get("layers_to_transform", (int, list), None)
        patterns = self._get("layers_pattern", (str, list), None)
        found = AdapterConfig(
            file=self._file,
            rank=self._positive("r", self._get("r", (int,), 8)),
            alpha=float(self._get("lora_alpha", (int, float), 8)),
            rank_pattern=self._numbers("rank_pattern", whole=True),
            alpha_pattern=self._numbers("alpha_pattern", whole=False),
            rank_stabilised=self._get("use_rslora", (bool,), False),
            dora=self._get("use_dora", (bool,), False),
            bias=self._get("bias", (str,), "none"),
            lora_bias=self._get("lora_bias", (bool,), False),
            modules_to_save=self._names("modules_to_save"),
            target_modules=self._names_or_pattern("target_modules"),
            exclude_modules=self._names_or_pattern("exclude_modules") or (),
            layers=None if layers in (None, []) else self._indices("layers_to_transform", layers),
            layers_pattern=(patterns,) if isinstance(patterns, str) and patterns else self._texts("layers_pattern"),
            token_indices=self._token_indices(),
            target_parameters=self._names("target_parameters"),
            ties=self._get("ensure_weight_tying", (bool,), False),
            base_name=self._get("base_model_name_or_path", (str,), None) or None,
            notes=self._notes(),
        )
        if found.bias not in ("none", "all", "lora_only"):
            raise self._error("bias", f"{found.bias!r} is none of none, all, lora_only")
        return found

    def _check_method(self) -> None:
        kind = self._get("peft_type", (str,), None)
        if kind is None:
            raise self._error("peft_type", "missing field; it should say LORA: save the adapter with PEFT again")
        if kind in _PROMPTS:
            raise self._error("peft_type", f"{kind} trains a prompt, not weights: it can be neither merged nor served")
        if kind != "LORA":
            raise self._error("peft_type", f"{kind}: of PEFT's methods only LORA is read; {_MERGE}")
        task = self._get("task_type", (str,), None)
        if task not in (None, "CAUSAL_LM"):
            raise self._error("task_type", f"{task}: only adapters of models that generate text (CAUSAL_LM) are served")

    def _check_variants(self) -> None:
        for name, what in _VARIANTS.items():
            self._read.add(name)
            if self._data.get(name) not in (None, False, [], {}):
                raise self._error(name, f"{what}, which is not served; train without it")

    def _check_base_unchanged(self) -> None:
        start = self._get("init_lora_weights", (bool, str), True)
        if isinstance(start, bool) or start in _KEEPS_BASE:
            return
        if start.lower().startswith(_CHANGES_BASE):
            raise self._error(
                "init_lora_weights",
                f"{start!r} changes the base's weights before training, so the adapter does not belong to the base as "
                "it is; save it with `save_pretrained(..., path_initial_model_for_weight_conversion=...)`, or "
                f"{_MERGE}",
            )
        raise self._error("init_lora_weights", f"{start!r} is not known, and may have changed the base; {_MERGE}")

    def _notes(self) -> tuple[str, ...]:
        """Fields that this version does not know. PEFT switches what it computes by `true` or by a configuration."""
        unknown = [name for name in self._data if name not in self._read | _WITHOUT_EFFECT]
        for name in unknown:
            value = self._data[name]
            if value is True or (isinstance(value, dict | list) and value):
                raise self._error(
                    name,
                    f"unknown field, and {json.dumps(value):.60} may change what is computed; it is of another "
                    f"version of PEFT: remove it if it does not, or {_MERGE}",
                )
        ignored = [name for name in unknown if self._data[name] not in (None, False, [], {}, "")]
        return tuple(f"{self._file}: {name}: unknown field, not used" for name in sorted(ignored))

    def _get(self, name: str, kinds: tuple[type, ...], default: Any) -> Any:
        self._read.add(name)
        value = self._data.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise self._error(name, f"expected {wanted}, found {value!r:.60}")
        return value

    def _positive(self, name: str, value: Any) -> Any:
        if value < 1:
            raise self._error(name, f"{value} is not a positive number")
        return value

    def _numbers(self, name: str, *, whole: bool) -> dict[str, Any]:
        found = self._get(name, (dict,), {})
        for key, value in found.items():
            self._check_pattern(name, key)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise self._error(f"{name}.{key}", f"expected a number, found {value!r:.60}")
            if whole:
                self._positive(f"{name}.{key}", value)
        return dict(found)

    def _texts(self, name: str) -> tuple[str, ...]:
        found = self._get(name, (list, str), [])
        found = found if isinstance(found, list) else [found] if found else []
        if not all(isinstance(item, str) and item for item in found):
            raise self._error(name, f"expected a list of names, found {found!r:.60}")
        return tuple(found)

    def _names(self, name: str) -> tuple[str, ...]:
        found = self._texts(name)
        for item in found:
            self._check_pattern(name, item)
        return found

    def _names_or_pattern(self, name: str) -> tuple[str, ...] | str | None:
        found = self._get(name, (list, str), None)
        if isinstance(found, str):
            self._check_pattern(name, found)
            return found
        return None if found is None else self._texts(name)

    def _check_pattern(self, name: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise self._error(name, f"{pattern!r} is not a pattern: {error}") from None

    def _indices(self, name: str, value: Any) -> tuple[int, ...]:
        found = [value] if isinstance(value, int) else value
        if not isinstance(found, list) or not all(
            isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in found
        ):
            raise self._error(name, f"expected numbers from 0, found {value!r:.60}")
        return tuple(found)

    def _token_indices(self) -> dict[str | None, tuple[int, ...]]:
        name = "trainable_token_indices"
        given = self._get(name, (list, dict), {})
        if isinstance(given, list):
            return {None: self._indices(name, given)} if given else {}
        return {module: self._indices(f"{name}.{module}", rows) for module, rows in given.items()}

    def _error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: {name}: {problem}")


def _of_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches, as PEFT finds it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _named(wanted: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(wanted, str):
        return bool(wanted) and re.fullmatch(wanted, module) is not None
    return module in wanted or any(module.endswith(f".{name}") for name in wanted)
