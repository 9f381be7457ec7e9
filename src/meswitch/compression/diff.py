"""What a fine-tune changed: weights, configuration, tokenizer. Two checkpoints, read one pair of tensors at a time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from meswitch.adapter import find_adapter, open_expert
from meswitch.architecture import architecture_of
from meswitch.artifact.reader import layer_type
from meswitch.checkpoint import Checkpoint
from meswitch.compression.compatibility import ANOTHER_BASE, LARGE, another_base, matched
from meswitch.compression.merge import as_checkpoint
from meswitch.configuration import FieldDifference, config_differences
from meswitch.errors import CheckpointError, ConfigError, MeswitchError
from meswitch.jsonfile import read_json
from meswitch.loaded import alike
from meswitch.tokenizer import has_tokenizer, load_tokenizer
from meswitch.units import Progress, silent

_BLOCK = 1 << 21  # weights in float64 at a time
_NOT_A_CHANGE = {"_from_model_config", "_name_or_path", "transformers_version"}


@dataclass(frozen=True, slots=True)
class WeightChange:
    """How far weights moved: one tensor's, or several tensors' together.

    Args:
        base_norm: Frobenius norm of the base's.
        delta_norm: Frobenius norm of the delta.
        largest: of |delta|.
        unchanged: weights that are exactly equal.
        kurtosis: excess kurtosis of the delta, 0 for a normal distribution, more with heavy tails; None if it is
            constant.
        not_finite: weights that are NaN or infinite in one of the two; they count in nothing else.
    """

    weights: int
    base_norm: float
    delta_norm: float
    largest: float
    unchanged: int
    kurtosis: float | None
    not_finite: int = 0

    @property
    def relative_norm(self) -> float | None:
        """||delta|| / ||base||; None where the base is all zero."""
        return self.delta_norm / self.base_norm if self.base_norm else None

    @property
    def unchanged_share(self) -> float:
        return self.unchanged / self.weights if self.weights else 1.0

    @classmethod
    def together(cls, parts: Iterable["WeightChange"]) -> "WeightChange":
        """Norms and counts add up; the kurtosis is the parts' mean, weighted by their size."""
        parts = list(parts)
        tailed = [(part.kurtosis, part.weights) for part in parts if part.kurtosis is not None]
        return cls(
            weights=sum(part.weights for part in parts),
            base_norm=sum(part.base_norm**2 for part in parts) ** 0.5,
            delta_norm=sum(part.delta_norm**2 for part in parts) ** 0.5,
            largest=max((part.largest for part in parts), default=0.0),
            unchanged=sum(part.unchanged for part in parts),
            kurtosis=sum(k * n for k, n in tailed) / sum(n for _, n in tailed) if tailed else None,
            not_finite=sum(part.not_finite for part in parts),
        )


@dataclass(frozen=True, slots=True)
class TensorChange:
    """One tensor that both have.

    Args:
        layer: index of its block, None outside the blocks.
        type: its layer type.
        rows: compared rows of an embedding or head (0 for other tensors).
        unchanged_rows: those that are exactly equal.
        added_rows: rows that only the expert has, negative if it has fewer.
    """

    name: str
    layer: int | None
    type: str
    change: WeightChange
    rows: int = 0
    unchanged_rows: int = 0
    added_rows: int = 0


@dataclass(frozen=True, slots=True)
class FieldChange:
    """One field of a file in which the two differ; None is a value that is missing."""

    field: str
    base: Any
    expert: Any


@dataclass(frozen=True, slots=True)
class TokenizerChange:
    """In what two tokenizers differ.

    Args:
        added: (id, text) of tokens that only the expert has.
        removed: (id, text) of tokens that only the base has.
        moved: tokens that both have under different ids.
        special: bos, eos, pad and the like.
    """

    added: tuple[tuple[int, str], ...]
    removed: tuple[tuple[int, str], ...]
    moved: int
    special: tuple[FieldChange, ...]
    chat_template: Literal["same", "differs", "added", "removed", "none"]


@dataclass(frozen=True, slots=True)
class Diff:
    """Everything that differs.

    Args:
        obstacle: why the two cannot share a base, or None if they can.
        hints: what to look at next, in a line each.
        other_shape: tensor -> the base's and the expert's shape, where they do not correspond.
        config: of `config.json`.
        generation: of `generation_config.json`.
        tokenizer: None if one of the two has none that can be read.
    """

    base: str
    expert: str
    tensors: tuple[TensorChange, ...]
    only_base: tuple[str, ...]
    only_expert: tuple[str, ...]
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    config: tuple[FieldDifference, ...]
    generation: tuple[FieldChange, ...]
    tokenizer: TokenizerChange | None
    obstacle: str | None
    hints: tuple[str, ...] = ()

    @property
    def total(self) -> WeightChange:
        return WeightChange.together(item.change for item in self.tensors)

    def by_type(self) -> dict[str, WeightChange]:
        """Layer type -> its tensors of all layers together."""
        return self._grouped(lambda item: item.type)

    def by_layer(self) -> dict[tuple[int, str], WeightChange]:
        """(layer, layer type) -> change, for what lies in a block."""
        return self._grouped(lambda item: None if item.layer is None else (item.layer, item.type))

    def _grouped(self, key: Callable[[TensorChange], Any]) -> dict[Any, WeightChange]:
        groups: dict[Any, list[WeightChange]] = {}
        for item in self.tensors:
            if key(item) is not None:
                groups.setdefault(key(item), []).append(item.change)
        return {name: WeightChange.together(parts) for name, parts in groups.items()}


def diff(base: str | Path, expert: str | Path, *, progress: Progress = silent) -> Diff:
    """Compare a fine-tune with its base. Pairs that do not fit are compared as far as they correspond.

    Args:
        base: a checkpoint directory or hub id.
        expert: the fine-tune, likewise; it may be a PEFT adapter.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    ours, theirs, obstacle = _opened(base, expert)
    vocabulary = _vocabulary(theirs)
    tensors: list[TensorChange] = []
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    shared = [name for name in theirs.tensors if ours.info(name) is not None]
    read, total = 0, sum(theirs.tensors[name].nbytes for name in shared)
    for name in shared:
        item = _compare(name, ours.read(name), theirs.read(name), name in vocabulary)
        if isinstance(item, TensorChange):
            tensors.append(item)
        else:
            other_shape[name] = item
        read += theirs.tensors[name].nbytes
        progress("comparing", read, total, name)
    tokenizer = _compare_tokenizers(ours.directory, theirs.directory)
    found = Diff(
        base=str(base),
        expert=str(expert),
        tensors=tuple(tensors),
        only_base=tuple(name for name in ours.tensors if theirs.info(name) is None),
        only_expert=tuple(name for name in theirs.tensors if ours.info(name) is None),
        other_shape=other_shape,
        config=tuple(
            item for item in config_differences(ours.config, theirs.config) if item.field not in _NOT_A_CHANGE
        ),
        generation=_field_changes(_generation(ours), _generation(theirs)),
        tokenizer=tokenizer,
        obstacle=obstacle,
    )
    return replace(found, hints=tuple(_hints(found, ours, theirs)))


def measure(base: Tensor, expert: Tensor) -> tuple[WeightChange, int]:
    """Compare two tensors of one shape [rows, ...]; also the number of exactly equal rows."""
    rows = base.shape[0] if base.dim() > 1 else 1
    ours, theirs = base.reshape(rows, -1), expert.reshape(rows, -1)
    powers, base_square, largest = torch.zeros(4, dtype=torch.float64), 0.0, 0.0
    unchanged = unchanged_rows = not_finite = 0
    step = max(1, _BLOCK // max(1, ours.shape[1]))
    for left, right in zip(ours.split(step), theirs.split(step), strict=True):
        left, right = left.double(), right.double()
        equal = left == right
        unchanged += int(equal.sum())
        unchanged_rows += int(equal.all(dim=1).sum())
        finite = left.isfinite() & right.isfinite()
        if not finite.all():
            not_finite += int((~finite).sum())
            left, right = left.where(finite, 0.0), right.where(finite, 0.0)
        delta = right - left
        base_square += float(left.square().sum())
        if delta.numel():
            largest = max(largest, float(delta.abs().max()))
        square = delta.square()
        powers += torch.stack([delta.sum(), square.sum(), (square * delta).sum(), square.square().sum()])
    count = base.numel()
    change = WeightChange(
        weights=count,
        base_norm=base_square**0.5,
        delta_norm=float(powers[1]) ** 0.5,
        largest=largest,
        unchanged=unchanged,
        kurtosis=_excess_kurtosis(powers.tolist(), count - not_finite),
        not_finite=not_finite,
    )
    return change, unchanged_rows


def _excess_kurtosis(powers: list[float], count: int) -> float | None:
    """From the sums of the first four powers."""
    if not count:
        return None
    mean, second, third, fourth = (power / count for power in powers)
    variance = second - mean**2
    if variance <= 1e-12 * second:  # constant: what is left is rounding
        return None
    return (fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / variance**2 - 3


def _compare(
    name: str, base: Tensor, expert: Tensor, is_vocabulary: bool
) -> TensorChange | tuple[tuple[int, ...], tuple[int, ...]]:
    vocabulary = base.dim() == 2 and is_vocabulary and base.shape[1:] == expert.shape[1:]
    if base.shape != expert.shape and not vocabulary:
        return tuple(base.shape), tuple(expert.shape)
    rows = min(len(base), len(expert)) if vocabulary else 0
    change, unchanged_rows = measure(base[:rows], expert[:rows]) if vocabulary else measure(base, expert)
    layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
    if not vocabulary:
        return TensorChange(name, layer, layer_type(name), change)
    return TensorChange(name, layer, layer_type(name), change, rows, unchanged_rows, len(expert) - len(base))


def _opened(base: str | Path, expert: str | Path) -> tuple[Checkpoint, Checkpoint, str | None]:
    """Both, and why they cannot share a base. Names are the model's, as far as it loads both."""
    ours = Checkpoint.open(base)
    adapter = find_adapter(expert, ours)
    theirs = Checkpoint.open(expert) if adapter is None else as_checkpoint(ours, open_expert(adapter, ours))
    _ = ours.config, theirs.config  # what cannot be read is an error, not a difference
    try:
        return *matched(ours, theirs), None
    except MeswitchError as error:
        obstacle = str(error)
    try:
        return *alike(ours, theirs), obstacle
    except MeswitchError:
        return ours, theirs, obstacle


def _vocabulary(checkpoint: Checkpoint) -> set[str]:
    try:
        return architecture_of(checkpoint.config).vocabulary(checkpoint.tensors)
    except CheckpointError:
        return set()


def _hints(found: Diff, base: Checkpoint, expert: Checkpoint) -> Iterator[str]:
    """What to look at next: the right base, or a nearer one."""
    matrices = [item for item in found.tensors if not item.rows and len(expert.tensors[item.name].shape) > 1]
    moved = [item.change.relative_norm or 0.0 for item in matrices]
    if moved and min(moved) >= ANOTHER_BASE:
        yield another_base(expert, len(moved), min(moved))
        return
    origin = read_json(expert.directory / "config.json").get("_name_or_path")
    named = isinstance(origin, str) and origin and Path(origin).name != Path(base.source).name
    chats = found.tokenizer is not None and found.tokenizer.chat_template == "added"
    if named or chats or (found.total.relative_norm or 0.0) >= LARGE:
        why = f"the expert's config.json names {origin}" if named else "an expert is often tuned from an instruct model"
        nearer = origin if named else "INSTRUCT"
        yield (
            f"{why}: the nearer base compresses better; compare `change` of all with that of "
            f"`meswitch diff --base {nearer} --expert {found.expert}`"
        )


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    file = checkpoint.directory / "generation_config.json"
    return read_json(file) if file.is_file() else {}


def _field_changes(base: dict[str, Any], expert: dict[str, Any]) -> tuple[FieldChange, ...]:
    names = sorted((base.keys() | expert.keys()) - _NOT_A_CHANGE)
    return tuple(FieldChange(n, base.get(n), expert.get(n)) for n in names if base.get(n) != expert.get(n))


def _compare_tokenizers(base: Path, expert: Path) -> TokenizerChange | None:
    if not (has_tokenizer(base) and has_tokenizer(expert)):
        return None
    try:
        ours, theirs = load_tokenizer(base), load_tokenizer(expert)
    except ConfigError:  # `compress` says what is wrong with it
        return None
    left, right = ours.get_vocab(), theirs.get_vocab()
    return TokenizerChange(
        added=tuple(sorted((right[token], token) for token in right.keys() - left.keys())),
        removed=tuple(sorted((left[token], token) for token in left.keys() - right.keys())),
        moved=sum(left[token] != right[token] for token in left.keys() & right.keys()),
        special=_field_changes(ours.special_tokens_map, theirs.special_tokens_map),
        chat_template=_template_change(ours.chat_template, theirs.chat_template),
    )


def _template_change(base: Any, expert: Any) -> Literal["same", "differs", "added", "removed", "none"]:
    if base == expert:
        return "same" if base else "none"
    if not base:
        return "added"
    return "differs" if expert else "removed"
