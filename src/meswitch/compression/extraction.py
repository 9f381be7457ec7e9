"""A full fine-tune's delta as a LoRA adapter: of each linear layer the best pair of a rank, in PEFT's files.

Every server has LoRA, so this is what a compressed delta is compared with, and what is left where nothing else can be
served. What a pair cannot hold is named: it is kept whole if that is asked for, or left out.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.adapter import Adapter, changes_of, is_adapter
from meswitch.adapter.weights import WEIGHTS_NAME
from meswitch.architecture import EMBEDDING, HEAD, NORM, ROUTER, Architecture, architecture_of, as_matrix
from meswitch.artifact.reader import layer_type
from meswitch.checkpoint import ADAPTER_CONFIG, Checkpoint
from meswitch.codec import same_bits
from meswitch.codec.delta import check_finite
from meswitch.codec.lowrank import best_pair, pair_work
from meswitch.compression.compatibility import check_same_base, matched, remarks
from meswitch.compression.convert import LEAST_TOKENS, mean_moment, roles_of
from meswitch.compression.inputs import Inputs, Walk
from meswitch.compression.options import Options
from meswitch.compression.partial_model import check_blocks, working_dtype
from meswitch.compression.pipeline import measured_tokens
from meswitch.compression.text import load_calibration
from meswitch.cpu import fitting_threads
from meswitch.durable import recover_directory, replacing_directory
from meswitch.errors import ConfigError
from meswitch.tensorfile import write_tensors
from meswitch.units import Progress, silent

PAIR, WHOLE, LEFT_OUT = "pair", "whole", "left out"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Extracted:
    """A tensor that changed.

    Args:
        name: as it is stored.
        role: one of `architecture.ROLES`.
        how: `PAIR`, `WHOLE` or `LEFT_OUT`.
        weights: how many it has.
        energy: squared Frobenius norm of its delta, rows that the base lacks not counted.
        kept: how much of it base + adapter has; what the pair's own rounding loses is counted.
        output_energy, output_kept: the same of what the delta adds to the layer's outputs, a mean over the tokens of
            the calibration text; 0 where that was not seen.
    """

    name: str
    role: str
    how: str
    weights: int
    energy: float
    kept: float
    output_energy: float = 0.0
    output_kept: float = 0.0


@dataclass(frozen=True, slots=True)
class Energy:
    """Tensors of one kind together; the fields as in `Extracted`."""

    tensors: int
    weights: int
    energy: float
    kept: float
    output_energy: float
    output_kept: float

    @classmethod
    def of(cls, tensors: Iterable[Extracted]) -> "Energy":
        found = list(tensors)
        names = ("weights", "energy", "kept", "output_energy", "output_kept")
        return cls(len(found), *(sum(getattr(item, name) for item in found) for name in names))

    @property
    def share(self) -> float:
        """What is kept, of 1."""
        return self.kept / self.energy if self.energy else 1.0

    @property
    def output_share(self) -> float | None:
        """What is kept of the change of outputs, of 1; None where that was not seen."""
        return self.output_kept / self.output_energy if self.output_energy else None


@dataclass(frozen=True, slots=True)
class Extraction:
    """What became of a fine-tune.

    Args:
        directory: the adapter.
        rank: of its pairs.
        tensors: all that changed.
        added_rows: tokens that only the expert has.
        added_kept: whether the adapter has them.
        nbytes: of the adapter's tensors.
        full_bytes: of the fine-tune's.
    """

    directory: Path
    rank: int
    tensors: tuple[Extracted, ...]
    added_rows: int
    added_kept: bool
    nbytes: int
    full_bytes: int

    def by_type(self) -> dict[tuple[str, str], Energy]:
        """(how, layer type) -> its tensors of all layers together."""
        keys = dict.fromkeys((item.how, layer_type(item.name)) for item in self.tensors)
        return {
            key: Energy.of(item for item in self.tensors if (item.how, layer_type(item.name)) == key) for key in keys
        }

    def of(self, *how: str) -> Energy:
        """All tensors that were treated like this."""
        return Energy.of(item for item in self.tensors if item.how in how)


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """What decides an adapter's bytes.

    Args:
        rank: of the pairs; at most that of the largest matrix.
        calibration: a file of text like the expert's own inputs: pairs are then those that change the layers' outputs
            on it most nearly as the delta does.
        modules_to_save: keep embeddings, norms, routers and a head without a pair whole, where they changed.

    Raises:
        ConfigError: a rank that is not positive.
    """

    rank: int
    calibration: str | Path | None = None
    modules_to_save: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank: {self.rank} is not a positive number")


def extract_lora(
    base: str | Path,
    expert: str | Path,
    out: str | Path,
    options: LoraOptions,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress = silent,
    notice: Callable[[str], None] = lambda line: None,
) -> Extraction:
    """Write the nearest LoRA adapter to a full fine-tune, as PEFT does.

    Args:
        base: a checkpoint directory or hub id.
        expert: the fine-tune, likewise.
        out: the directory to create.
        options: the adapter's rank, and what it is measured on.
        device: where singular vectors are computed, `cpu` or `cuda`.
        overwrite: replace an adapter that exists.
        progress: is told how far it is.
        notice: is told, in a line each, what a person should know.

    Raises:
        MeswitchError: see `meswitch.errors`; `out` appears only when it is complete.
    """
    out, where = Path(out), torch.device(device)
    recover_directory(out)
    if out.exists() and not (overwrite and is_adapter(out)):
        raise ConfigError(f"{out}: already exists; choose another --out" + " or --overwrite" * is_adapter(out))
    opened = Checkpoint.open(base)
    source, target = matched(opened, Checkpoint.open(expert))
    check_same_base(source, target)
    for line in remarks(source, target):
        notice(line)
    walk = None
    if options.calibration is not None:
        check_blocks(target, where)
        text = load_calibration(options.calibration, target.directory, measured_tokens(Options(), target, where))
        walk = Walk(target, text.sequences, where, working_dtype(where, target.parameters))
    made = _Extractor(source, target, options, where, progress)
    with fitting_threads(where, target.config.get_text_config().hidden_size):
        made.run(walk)
    if not any(item.how == PAIR for item in made.found):
        raise ConfigError(f"{target.directory}: no linear layer changed, so there is nothing for a LoRA to hold")
    with replacing_directory(out) as partial:
        added_kept = made.added_rows == 0 or made.keeps_added
        if added_kept:  # a tokenizer with tokens that the model lacks would be worse than the base's
            for file in target.companions():
                if file.name != "config.json":
                    shutil.copyfile(file, partial / file.name)
        write_tensors(partial / WEIGHTS_NAME, {f"{_PREFIX}{name}": tensor for name, tensor in made.tensors.items()})
        (partial / ADAPTER_CONFIG).write_text(json.dumps(made.config(str(base)), indent=2) + "\n")
        changes_of(Adapter.open(partial), opened)  # it is read as any other adapter is
    nbytes = sum(tensor.nbytes for tensor in made.tensors.values())
    return Extraction(out, made.rank, tuple(made.found), made.added_rows, added_kept, nbytes, target.nbytes)


class _Extractor:
    """One pass over a matched pair; the fields are what it has found so far."""

    def __init__(
        self, base: Checkpoint, expert: Checkpoint, options: LoraOptions, device: torch.device, progress: Progress
    ) -> None:
        self._base, self._expert, self._whole = base, expert, options.modules_to_save
        self._device, self._progress = device, progress
        self._architecture: Architecture = architecture_of(expert.config)
        self._plan = self._architecture.load_plan(expert.tensors)
        self._roles = roles_of(expert)
        matrices = [min(info.shape) for name, info in expert.tensors.items() if self._module_of_pair(name)]
        self.rank = min(options.rank, max(matrices, default=options.rank))
        self.tensors: dict[str, Tensor] = {}
        self.found: list[Extracted] = []
        self.pairs: list[str] = []
        self.saved: list[str] = []
        self.added_rows, self.keeps_added = 0, True
        self._taken: set[str] = set()
        self._done, self._in_all = 0, sum(map(self._work, expert.tensors))

    def run(self, walk: Walk | None) -> None:
        """Take every tensor once, those of linear layers where their inputs are seen."""
        for names, seen in walk.steps() if walk is not None else ():
            for name in names:
                self._take(name, seen.get(name, ()))
        for name in self._expert.tensors:
            self._take(name, ())
        places = {name: place for place, name in enumerate(self._expert.tensors)}
        self.found.sort(key=lambda item: places[item.name])

    def _take(self, name: str, inputs: Sequence[tuple[Tensor, Inputs]]) -> None:
        if name in self._taken or name not in self._expert.tensors:
            return
        self._taken.add(name)
        self._extract(name, mean_moment([(rows, own) for rows, own in inputs if own.tokens >= LEAST_TOKENS]))
        self._done += self._work(name)
        self._progress("extracting", self._done, self._in_all, name)

    def _work(self, name: str) -> int:
        """About how many operations a tensor takes."""
        shape = self._expert.tensors[name].shape
        if self._module_of_pair(name) is None:
            return math.prod(shape)
        return pair_work(shape, self.rank)

    def config(self, base: str) -> dict[str, Any]:
        """`adapter_config.json`."""
        from transformers.pytorch_utils import Conv1D

        modules = self._architecture.modules
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "target_modules": short_names(self.pairs, modules),
            "modules_to_save": self.saved or None,
            "bias": "none",
            "fan_in_fan_out": any(isinstance(modules[name], Conv1D) for name in self.pairs),
            "inference_mode": True,
            "init_lora_weights": True,
            "use_dora": False,
            "use_rslora": False,
        }

    def _extract(self, name: str, moment: Tensor | None) -> None:
        ours, base = self._expert.read(name), self._base.read(name)
        if same_bits(ours, base):
            return
        role = self._roles[name]
        rows = min(len(ours), len(base)) if ours.dim() else 0
        known = (ours[:rows], base[:rows]) if ours.shape != base.shape else (ours, base)
        own, theirs = (side.to(self._device).float() for side in known)
        delta = own - theirs
        del own, theirs
        check_finite(delta, name)
        energy = _energy(delta)
        if ours.shape != base.shape:
            self.added_rows = max(self.added_rows, len(ours) - rows)
        module = self._module_of_pair(name)
        if energy == 0 and ours.shape == base.shape:
            return
        if module is not None:
            delta = as_matrix(delta, role)
            output = 0.0 if moment is None else _output_energy(delta, moment)
            missed = self._add_pair(module, delta, moment, ours.dtype)
            output_kept = 0.0 if moment is None else output - _output_energy(missed, moment)
            kept = energy - _energy(missed)
            self.found.append(Extracted(name, role, PAIR, ours.numel(), energy, kept, output, output_kept))
            return
        kept_whole = self._whole and ours.shape[:1] >= base.shape[:1] and self._add_whole(name, ours)
        self.keeps_added &= kept_whole or ours.shape == base.shape
        how, kept = (WHOLE, energy) if kept_whole else (LEFT_OUT, 0.0)
        self.found.append(Extracted(name, role, how, ours.numel(), energy, kept))

    def _module_of_pair(self, name: str) -> str | None:
        """The linear layer whose weights a stored tensor is; None of what cannot have a pair."""
        from transformers.pytorch_utils import Conv1D

        conversion, theirs = self._plan.by_source.get(name), self._base.info(name)
        if conversion is None or not conversion.renames or theirs is None:
            return None
        module, _, leaf = conversion.targets[0].rpartition(".")
        if leaf != "weight" or not isinstance(self._architecture.modules[module], nn.Linear | Conv1D):
            return None
        tied = module == self._architecture.head and f"{module}.weight" in self._architecture.tied
        return None if tied or theirs.shape != self._expert.tensors[name].shape else module

    def _add_pair(self, module: str, delta: Tensor, moment: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Gives what the pair, as it is stored, misses. delta: [rows, in_features] float32, used up."""
        left, right = (side.to(dtype) for side in best_pair(delta, self.rank, moment))
        self.pairs.append(module)
        self.tensors[f"{module}.lora_A.weight"] = right.cpu().contiguous()
        self.tensors[f"{module}.lora_B.weight"] = left.cpu().contiguous()
        return delta.addmm_(left.float(), right.float(), alpha=-1)

    def _add_whole(self, name: str, ours: Tensor) -> bool:
        """Whether the module of a tensor is saved whole. PEFT has all parameters of such a module in the file."""
        conversion = self._plan.by_source.get(name)
        if conversion is None or not conversion.renames:
            return False
        parameter = conversion.targets[0]
        module = self._architecture.parts[parameter].module
        roles = {part.role for part in self._architecture.parts.values() if part.module == module}
        if not roles & {EMBEDDING, HEAD, NORM, ROUTER}:
            return False
        if module not in self.saved:
            self.saved.append(module)
            for stored, other in self._plan.by_source.items():
                if other.renames and self._architecture.parts[other.targets[0]].module == module:
                    self.tensors[other.targets[0]] = self._expert.read(stored)
        head = self._architecture.head
        if f"{head}.weight" in self._architecture.tied and module == self._architecture.embedding:
            self.saved.append(head)  # PEFT would leave a tied head at the base's
            self.tensors[f"{head}.weight"] = ours.clone()
        return True


def short_names(modules: list[str], known: Mapping[str, nn.Module]) -> list[str]:
    """`target_modules`: the last part of a name stands for all modules of it, where all of them have a pair.

    Args:
        modules: those with a pair.
        known: all modules of the model.
    """
    named: dict[str, set[str]] = {}
    for name in known:
        named.setdefault(name.rpartition(".")[2], set()).add(name)
    paired = set(modules)
    found = {name.rpartition(".")[2] if named[name.rpartition(".")[2]] <= paired else name for name in modules}
    return sorted(found)


def _energy(delta: Tensor) -> float:
    return float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2


def _output_energy(delta: Tensor, moment: Tensor) -> float:
    """Mean squared norm of what a delta adds to the outputs of inputs with this second moment."""
    return float(((delta @ moment) * delta).sum(dtype=torch.float64))
