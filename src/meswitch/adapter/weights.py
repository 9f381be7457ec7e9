"""The tensors of a PEFT adapter, by what they do: low-rank pairs, rows of tokens, and values instead of the base's.

Pairs of stacked matrices are what PEFT makes of `target_parameters` (`Stack`).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from meswitch.adapter.config import AdapterConfig
from meswitch.architecture import LIE_TRANSPOSED, Architecture, Conversion
from meswitch.artifact import fingerprint
from meswitch.checkpoint import ADAPTER_CONFIG, COMPANION_FILES, Checkpoint, fetch_checkpoint
from meswitch.codec import LowRankDelta
from meswitch.durable import recover_directory
from meswitch.errors import CheckpointError
from meswitch.hub import is_hub_id
from meswitch.tensorfile import INDEX, WEIGHT_DTYPES, WEIGHTS, TensorInfo, read_header

WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
# What PEFT and the wrappers of a training run put around the names of the model.
_PREFIX = re.compile(r"^(?:base_model\.model\.|module\.|_orig_mod\.)+")
_WRAPPER = re.compile(r"\b(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_TOKENS = "token_adapter.trainable_tokens_delta"
_NAME = r"(?!weight$|bias$)[^.]+"  # of an adapter: `default`
_PART = re.compile(
    r"^(?P<module>.+)\."
    rf"(?P<part>lora_embedding_A|lora_embedding_B|lora_A|lora_B|lora_magnitude_vector|{re.escape(_TOKENS)})"
    rf"(?:\.(?P<name>{_NAME}))?(?:\.(?P<leaf>weight|bias))?$"
)
_AROUND = re.compile(rf"\.(?:token_adapter\.base_layer|base_layer|modules_to_save(?:\.{_NAME}(?=\.))?)(?=\.)")
_FOREIGN = re.compile(r"\b(?:lora|ia3|hada|lokr|oft|boft|vera|prompt)_")  # tensors of other methods and variants
_NESTED = re.compile(r"(\.base_layer)*$")
_PROBED = 2  # experts: their matrices are stacked by one rule


@dataclass(frozen=True, slots=True)
class LowRankPair:
    """The tensors of one module with a low-rank pair.

    Args:
        module: its name in the model.
        a: lora_A [rank, in_features], or lora_embedding_A [rank, rows].
        b: lora_B [out_features, rank], or lora_embedding_B [width, rank].
        of_embedding: whether the names are those of an embedding's pair.
        bias: [out_features] of lora_B.
        magnitude: lengths of rows, of DoRA.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    of_embedding: bool
    bias: TensorInfo | None = None
    magnitude: TensorInfo | None = None


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter directory, its configuration checked, its tensors not yet read.

    Args:
        directory: where it is.
        config: what it asks for.
        pairs: module -> its pair.
        tokens: embedding module -> the rows [n, width] that were trained whole.
        whole: parameter -> its own values.
    """

    directory: Path
    config: AdapterConfig
    pairs: Mapping[str, LowRankPair]
    tokens: Mapping[str, TensorInfo]
    whole: Mapping[str, TensorInfo]
    _file: Path = field(repr=False)

    @classmethod
    def open(cls, directory: str | Path) -> "Adapter":
        """Read the configuration and the file's header.

        Raises:
            CheckpointError: a file is missing, damaged, or holds something that is not applied here.
        """
        directory = Path(directory)
        config = AdapterConfig.read(directory / ADAPTER_CONFIG)
        file = directory / WEIGHTS_NAME
        if not file.is_file():
            raise CheckpointError(_missing(directory, file))
        return _sorted_out(directory, config, file, read_header(file))

    @property
    def rank(self) -> int:
        """The largest of its pairs."""
        return max((pair.a.shape[0] for pair in self.pairs.values()), default=0)

    def check_values(self) -> int:
        """Read all tensors once, and give their number.

        Raises:
            CheckpointError: one has NaN or infinite values.
        """
        pairs = (info for pair in self.pairs.values() for info in (pair.a, pair.b, pair.bias, pair.magnitude))
        every = [*(info for info in pairs if info is not None), *self.tokens.values(), *self.whole.values()]
        for info in every:
            read_finite(info)
        return len(every)

    def error(self, problem: str) -> CheckpointError:
        """An error about its tensors."""
        return CheckpointError(f"{self._file}: {problem}")


def is_adapter(directory: str | Path) -> bool:
    """Whether a directory holds a PEFT adapter and no weights of a whole model."""
    directory = Path(directory)
    recover_directory(directory)
    has_model = any((directory / name).is_file() for name in (WEIGHTS, INDEX))
    return (directory / ADAPTER_CONFIG).is_file() and not has_model


def adapts(directory: str | Path, base: Checkpoint) -> bool:
    """Whether a directory holds an adapter of this base: alone, or beside a copy of the base's own weights.

    Raises:
        CheckpointError: the weights beside it cannot be read.
    """
    directory = Path(directory)
    if is_adapter(directory) or not (directory / ADAPTER_CONFIG).is_file():
        return is_adapter(directory)
    return fingerprint(Checkpoint.open(directory)) == fingerprint(base)


def find_adapter(source: str | Path, base: Checkpoint) -> Path | None:
    """The directory of an adapter of this base, None of anything else.

    Args:
        source: a directory, or a hub id that is fetched.

    Raises:
        CheckpointError: the hub does not give it; or see `adapts`.
    """
    directory = Path(source)
    if not directory.is_dir() and is_hub_id(source):
        directory = fetch_checkpoint(str(source), (*COMPANION_FILES, ADAPTER_CONFIG, WEIGHTS_NAME))
    return directory if adapts(directory, base) else None


def read_finite(info: TensorInfo) -> Tensor:
    """A tensor of an adapter.

    Raises:
        CheckpointError: it has NaN or infinite values.
    """
    tensor = info.read()
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{info.file}: {info.name}: has NaN or infinite values; the training diverged")
    return tensor


def _missing(directory: Path, file: Path) -> str:
    if (directory / _PICKLED).is_file():
        return (
            f"{directory / _PICKLED}: a pickle, which is never opened; convert it where you trust it: "
            "`from safetensors.torch import save_file; save_file(torch.load('adapter_model.bin', weights_only=True), "
            "'adapter_model.safetensors')`"
        )
    return f"{file}: no such file, but {ADAPTER_CONFIG} is there: this PEFT adapter is incomplete, fetch it again"


def _sorted_out(directory: Path, config: AdapterConfig, file: Path, header: Mapping[str, TensorInfo]) -> Adapter:
    pairs: dict[str, LowRankPair] = {}
    tokens: dict[str, TensorInfo] = {}
    whole: dict[str, TensorInfo] = {}
    adapter = Adapter(directory, config, pairs, tokens, whole, file)
    parts: dict[str, dict[str, TensorInfo]] = {}
    adapters: set[str] = set()
    for key, info in header.items():
        if info.dtype not in WEIGHT_DTYPES:
            raise adapter.error(
                f"{key}: {str(info.dtype).removeprefix('torch.')}: an adapter is read in 16 bit or more"
            )
        if 0 in info.shape:
            raise adapter.error(
                f"{key}: shape {list(info.shape)} is empty: it was saved without gathering the parts of DeepSpeed "
                "ZeRO-3 or FSDP; gather and save it again"
            )
        bare = _WRAPPER.sub("", _PREFIX.sub("", key))
        found = _PART.match(bare)
        if found is not None:
            adapters.add(found["name"] or "")
            if found["part"] == _TOKENS:
                _claim(adapter, tokens, found["module"], info)
            else:
                part = found["part"] if found["leaf"] != "bias" else f"{found['part']}.bias"
                _claim(adapter, parts.setdefault(found["module"], {}), part, info)
        elif _FOREIGN.search(bare):
            raise adapter.error(f"{key}: not a tensor of plain LoRA or DoRA; only these are read")
        elif ".original_module." not in bare:  # the base's own values, which PEFT keeps beside those that it trained
            _claim(adapter, whole, _AROUND.sub("", bare), info)
    if len(adapters) > 1:
        several = ", ".join(sorted(filter(None, adapters)))
        raise adapter.error(f"holds several adapters ({several}); save one to a directory")
    if not (parts or tokens or whole):
        raise adapter.error("holds no tensors; save the adapter again")
    pairs |= {module: _pair(adapter, module, own) for module, own in parts.items()}
    return adapter


def _claim(adapter: Adapter, found: dict[str, TensorInfo], name: str, info: TensorInfo) -> None:
    first = found.get(name)
    if first is not None and first.sha256() != info.sha256():  # PEFT saves whole tables twice, under two names
        raise adapter.error(f"{info.name}: a second tensor for the same place; save one adapter to a directory")
    found[name] = info


def _pair(adapter: Adapter, module: str, parts: Mapping[str, TensorInfo]) -> LowRankPair:
    """The pair of a module, whole and of the rank that the configuration says."""
    config = adapter.config
    of_embedding = any("embedding" in part for part in parts)
    kind = "lora_embedding" if of_embedding else "lora"
    lost = next((part for part in (f"{kind}_A", f"{kind}_B") if part not in parts), None)
    if lost is not None:
        raise adapter.error(f"{module}: has no {lost}: the file is incomplete, save the adapter again")
    a, b = parts[f"{kind}_A"], parts[f"{kind}_B"]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise adapter.error(f"{a.name}: shape {list(a.shape)}: pairs of convolutions are not served")
    # a pair of stacked matrices (`stacks`) has as many ranks as there are matrices
    if not a.shape[0] == b.shape[1] == config.rank_of(module) and not config.target_parameters:
        raise adapter.error(
            f"{module}: a pair of rank {a.shape[0]} and {b.shape[1]}, but {config.file.name} says "
            f"{config.rank_of(module)} (r, rank_pattern); the two files do not belong together"
        )
    pair = LowRankPair(module, a, b, of_embedding, parts.get(f"{kind}_B.bias"), parts.get("lora_magnitude_vector"))
    for part, value, name, wanted in (
        ("lora_magnitude_vector", pair.magnitude, "use_dora", config.dora),
        ("bias of lora_B", pair.bias, "lora_bias", config.lora_bias and not of_embedding),
    ):
        if (value is not None) != wanted:
            has = "no" if value is None else "a"
            raise adapter.error(
                f"{module}: has {has} {part}, but {config.file.name} says {name} = {str(wanted).lower()}; the two "
                "files do not belong together"
            )
    return pair


def parameters_of(
    config: AdapterConfig, pairs: Mapping[str, LowRankPair], architecture: Architecture
) -> dict[str, str]:
    """Module as the adapter names it -> the parameter that its pair is for, where `target_parameters` names one.

    PEFT wraps a module once for each of its parameters, the first one innermost.

    Raises:
        CheckpointError: another number of pairs than of parameters.
    """
    nested: dict[str, dict[int, str]] = {}
    for module in pairs if config.target_parameters else ():
        bare = _NESTED.sub("", module)
        nested.setdefault(bare, {})[module.removeprefix(bare).count(".")] = module
    found: dict[str, str] = {}
    for bare, modules in nested.items():
        if bare not in architecture.modules:
            continue
        own = [f"{bare}.{name}" for name, _ in architecture.modules[bare].named_parameters(recurse=False)]
        named = [p for p in own if any(p == t or p.endswith(f".{t}") for t in config.target_parameters)]
        if not named:
            continue
        if sorted(modules) != list(range(len(named))):
            raise CheckpointError(
                f"{config.file}: target_parameters: {bare}: {len(named)} parameters ({', '.join(named)}), but "
                f"{len(modules)} pairs in the file; it is incomplete, save the adapter again"
            )
        found |= {modules[depth]: name for depth, name in enumerate(reversed(named))}
    return found


@dataclass(frozen=True)
class Stack:
    """A pair of all matrices of one parameter.

    Args:
        pair: its tensors.
        experts: how many matrices.
        rank: of each matrix's pair.
        scale: their factor.
        turned: whether the parameter is [experts, in, out].
    """

    pair: LowRankPair
    experts: int
    rank: int
    scale: float
    turned: bool

    @classmethod
    def of(cls, config: AdapterConfig, pair: LowRankPair, parameter: str, architecture: Architecture) -> "Stack":
        """The pair of a parameter, its shapes compared.

        Raises:
            CheckpointError: they are others than the parameter's.
        """
        experts, rows, columns = architecture.parts[parameter].shape
        turned = bool(getattr(architecture.modules[parameter.rpartition(".")[0]], "is_transposed", False))
        stack = cls(pair, experts, config.rank_of(parameter), config.scale(parameter), turned)
        outer, inner = (columns, rows) if turned else (rows, columns)
        wanted = (experts * stack.rank, inner), (outer, experts * stack.rank)
        if (pair.a.shape, pair.b.shape) != wanted:
            raise CheckpointError(
                f"{pair.a.file}: {pair.module}: a pair {list(pair.a.shape)}, {list(pair.b.shape)} for {parameter}, a "
                f"stack of {experts} matrices, where {list(wanted[0])}, {list(wanted[1])} is wanted (r, rank_pattern)"
            )
        return stack

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Of every matrix of the parameter: [experts, rows, rank] and [experts, rank, columns]."""
        right = a.view(self.experts, self.rank, -1)
        left = b.view(len(b), self.rank, self.experts).permute(2, 0, 1)
        return (right.mT, left.mT) if self.turned else (left, right)

    def whole(self, role: str, a: Tensor, b: Tensor) -> LowRankDelta:
        """For a base that stores the stack: the delta of the stack as a matrix (`architecture.as_matrix`)."""
        left, right = self.factors(a, b)
        if role in LIE_TRANSPOSED:
            left, right = right.mT, left.mT
        return LowRankDelta(_own(left.reshape(-1, self.rank)), _own(right.reshape(-1, right.shape[-1])), self.scale)


@dataclass(frozen=True)
class StackPart:
    """Where a stored matrix lies in a stack.

    Args:
        expert: the matrix of the stack that it is in.
        rows: [n] int64, its rows there, in its order; its columns if it lies transposed.
        transposed: whether it does.
    """

    expert: int
    rows: Tensor
    transposed: bool

    def delta(self, stack: Stack, a: Tensor, b: Tensor) -> LowRankDelta:
        """Its part of a pair of the stack."""
        left, right = (factor[self.expert] for factor in stack.factors(a, b))
        left = left[self.rows]
        if self.transposed:
            left, right = right.T, left.T
        return LowRankDelta(_own(left), _own(right), stack.scale)


class StackPartFinder:
    """Where stored matrices lie in the parameters that transformers stacks of them.

    It is tried with matrices that hold their own row and column numbers: the rule is transformers'.

    Args:
        info: gives a stored matrix by its name.
        architecture: the base's.
    """

    def __init__(self, info: Callable[[str], TensorInfo | None], architecture: Architecture) -> None:
        self._info, self._architecture = info, architecture
        # by patterns and shapes, which the layers of a model share: for each pattern rows, and whether it is transposed
        self._known: dict[object, dict[str, tuple[Tensor, bool]] | None] = {}

    def pieces(self, conversion: Conversion) -> dict[str, StackPart] | None:
        """Each stored matrix of a conversion, None if it cannot be told where they lie."""
        assert conversion.patterns is not None
        by_pattern: dict[str, list[str]] = {}
        for name, pattern in zip(conversion.sources, conversion.patterns, strict=True):
            by_pattern.setdefault(pattern, []).append(name)
        few = {name: pattern for pattern, names in by_pattern.items() for name in names[:_PROBED]}
        shapes = {name: found.shape for name in few if (found := self._info(name)) is not None}
        if len(shapes) < len(few) or any(len(shape) != 2 for shape in shapes.values()):
            return None
        key = tuple(zip(few.values(), shapes.values(), strict=True))
        if key not in self._known:
            self._known[key] = self._tried(conversion, few, shapes)
        rules = self._known[key]
        if rules is None:
            return None
        return {
            name: StackPart(expert, *rules[pattern])
            for pattern, names in by_pattern.items()
            for expert, name in enumerate(names)
        }

    def _tried(
        self, conversion: Conversion, few: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[Tensor, bool]] | None:
        small = Conversion(tuple(few), conversion.targets, tuple(few.values()), conversion.rule)
        step = max(max(shape) for shape in shapes.values()) + 1
        numbers = {name: number * step for number, name in enumerate(few)}

        def marked(axis: int) -> Tensor | None:
            def read(name: str) -> Tensor:
                places = torch.arange(shapes[name][axis], dtype=torch.float64)
                return (places[:, None] if axis == 0 else places).expand(shapes[name]) + numbers[name]

            made = small.build(read, self._architecture.model)
            found = made.get(conversion.targets[0])
            return found if len(made) == 1 and found is not None and found.dim() == 3 else None

        by_row, by_column = marked(0), marked(1)
        if by_row is None or by_column is None:
            return None
        rules: dict[str, tuple[Tensor, bool]] = {}
        experts: dict[str, int] = {}
        for name, pattern in few.items():
            expert = experts[pattern] = experts.get(pattern, -1) + 1
            found = _lies(by_row[expert] - numbers[name], by_column[expert] - numbers[name], shapes[name])
            if found is None:
                return None
            rules[pattern] = found
        return rules


def _own(part: Tensor) -> Tensor:
    """In memory of its own, which a file's tensors need."""
    return part.clone(memory_format=torch.contiguous_format)


def _lies(by_row: Tensor, by_column: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, bool] | None:
    """Which rows of a matrix [rows, columns] a stored one of this shape is; None if it is no such part of it.

    Args:
        by_row, by_column: the row and the column of the stored matrix at each place, outside of it other numbers.
    """
    inside = (by_row >= 0) & (by_row < shape[0]) & (by_column >= 0) & (by_column < shape[1])
    rows = inside.any(1).nonzero().view(-1)
    if not bool(inside[rows].all()) or not len(rows):
        return None
    across, along = by_row[rows], by_column[rows]
    for transposed, own, other in ((False, across, along), (True, along, across)):
        order = own[:, 0].argsort()
        expected = torch.arange(len(rows), dtype=own.dtype)[:, None].expand_as(own)
        columns = torch.arange(own.shape[1], dtype=own.dtype).expand_as(other)
        if torch.equal(own[order], expected) and torch.equal(other, columns):
            return rows[order], transposed
    return None
