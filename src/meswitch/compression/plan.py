"""What an artifact will take, from shapes alone.

`predict` makes the artifact that `compress` would write, without its bytes: whatever counts an artifact's bytes
(`artifact.account`, the layout of a slot) counts a predicted one by the same code.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from meswitch.adapter import Adapter, planned_artifact
from meswitch.architecture import architecture_of, matrix_shape
from meswitch.artifact import Artifact, Entry, Manifest
from meswitch.artifact.manifest import Provenance, Stored
from meswitch.checkpoint import Checkpoint, cache_bytes
from meswitch.codec import stored_shapes
from meswitch.compression.compatibility import matched
from meswitch.compression.convert import base_info, expert_info, roles_of
from meswitch.compression.options import Options, check_none_given
from meswitch.configuration import read_config, without_quantisation
from meswitch.errors import ConfigError
from meswitch.quantised import QuantisedTensor, held_bytes, linear_layers, quantisation_of
from meswitch.tensorfile import INDEX, NAMES, WEIGHTS, TensorInfo


@dataclass(frozen=True)
class Outline(Checkpoint):
    """A checkpoint known by its tensors' shapes and dtypes only. given: its configuration."""

    given: Any = None

    @cached_property
    def config(self) -> Any:
        return self.given


@dataclass(frozen=True, slots=True)
class Memory:
    """Device memory of one base and experts in slots, against as many full models. All in bytes.

    Args:
        base: the base's weights.
        slot: what one expert takes in its slot.
        full: one full fine-tune.
        kv: the KV cache, the same either way.
        experts: slots.
        limit: of the device, None if it was not given.
        scratch: where layers that are held as their codes are restored, one at a time.
    """

    base: int
    slot: int
    full: int
    kv: int
    experts: int
    limit: int | None = None
    scratch: int = 0

    @property
    def compressed(self) -> int:
        return self.base + self.scratch + self.experts * self.slot + self.kv

    @property
    def full_models(self) -> int:
        return self.experts * self.full + self.kv

    @property
    def experts_that_fit(self) -> int | None:
        """How many slots the limit leaves room for; None without a limit."""
        room = None if self.limit is None else self.limit - self.base - self.scratch - self.kv
        return None if room is None else max(0, room) // max(1, self.slot)

    @property
    def full_models_that_fit(self) -> int | None:
        return None if self.limit is None else max(0, self.limit - self.kv) // max(1, self.full)


def outline(source: str | Path, *, vocab_size: int | None = None, unquantised: bool = False) -> Checkpoint:
    """The tensors of a model, by shape and dtype.

    Args:
        source: a directory with weights (their headers are read), a directory or file with a configuration, or a hub
            id (only its configuration is fetched): then transformers lays the model out without memory.
        vocab_size: rows of embedding and head instead of the configuration's.
        unquantised: as the checkpoint was before it was quantised, if it is.

    Raises:
        CheckpointError: no configuration there, or one that transformers has no causal language model for.
        ConfigError: a vocabulary without tokens.
    """
    path = Path(source)
    # what has neither weights nor a configuration is told by what it holds
    has_weights = any((path / name).is_file() for name in (WEIGHTS, INDEX))
    opens = has_weights or (path.is_dir() and not (path / "config.json").is_file())
    found = Checkpoint.open(path) if opens else _from_config(source)
    if unquantised and found.is_quantised:
        found = _from_config(source, unquantised=True)
    return found if vocab_size is None else _with_vocabulary(found, vocab_size)


def predict(
    base: Checkpoint,
    expert: Checkpoint | Adapter,
    options: Options | None = None,
    *,
    changed_rows: Mapping[str, int] | None = None,
) -> Artifact:
    """The artifact that compressing `expert` writes: every shape and dtype, no bytes, no checksums.

    Args:
        base: with or without weights (`outline`).
        expert: likewise; or an adapter, of which all options stay unused.
        changed_rows: tensor -> how many of its rows changed, 0 if it equals the base's. What did not change costs
            nothing, but shapes cannot tell: without this the prediction is that of a fine-tune that changed every
            row of every tensor, an upper bound. Of exact bits it is the full size: what the coder saves depends on how
            far the weights moved.

    Raises:
        IncompatibleError: the two cannot share a base. ConfigError: a method whose sizes depend on the weights.
    """
    options = options or Options()
    if isinstance(expert, Adapter):
        check_none_given(options.given(), expert.directory)
        return planned_artifact(base, expert)
    if not options.makes_packed:
        raise ConfigError(f"method: {options.method}: only artifacts that can be served are planned; leave it out")
    if options.target_bpw is not None:
        raise ConfigError(f"target_bpw: {options.target_bpw}: is itself the size; a plan is for a number of bits")
    base, expert = matched(base, expert)
    known = changed_rows or {}
    roles = roles_of(expert)
    entries = {
        name: _entry(info, roles[name], base.info(name), options, known.get(name))
        for name, info in expert.tensors.items()
    }
    manifest = Manifest(
        base=base_info(base, ""),
        expert=expert_info(expert),
        method=options.describe(None),
        tensors=dict(sorted(entries.items())),
        companions={},
        provenance=Provenance("", "", "", ""),
    )
    return Artifact(expert.directory, manifest, {})


def base_bytes(base: Checkpoint) -> tuple[int, int]:
    """What the weights of a base take where the GPU kernels compute, and where they are restored, one at a time.

    Of a quantised base, linear layers whose codes the kernels read are held as these: see `quantised.held_bytes`.
    """
    config = quantisation_of(base.config.to_dict())
    if config is None:
        return base.nbytes, 0
    base, saved, largest = base.loaded, 0, 0
    for name, module in linear_layers(architecture_of(base.config).model, base.load_plan).items():
        info = base.tensors[name]
        held = info.held_bytes if isinstance(info, QuantisedTensor) else held_bytes(config, module, info.shape)
        if held:
            saved += info.nbytes - held
            largest = max(largest, info.nbytes)
    return base.nbytes - saved, largest


def kv_bytes(model: Checkpoint, tokens: int) -> int:
    """Bytes of keys and values of so many tokens, in the dtype of the model's weights."""
    return cache_bytes(model.config, widest_dtype(model)) * tokens


def widest_dtype(model: Checkpoint) -> torch.dtype:
    """What a model computes in that is loaded as it is stored."""
    return max((info.dtype for info in model.tensors.values()), key=lambda dtype: dtype.itemsize)


def _entry(info: TensorInfo, role: str, theirs: TensorInfo | None, options: Options, changed: int | None) -> Entry:
    """One tensor, as `compress` decides it (tests/compression/test_plan.py holds the two together).

    Args:
        theirs: the base's tensor, None if it has none.
        changed: how many rows of the matrix did; None: all.
    """
    kind, bits, group_size = "packed", None, None
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
    if changed == 0:
        kind, shapes = "same", {}
    elif theirs is None or options.is_exact or not options.packs(role):
        kind, shapes = "dense", {"": (info.shape, info.dtype)}
    else:
        (ours, columns), (before, _) = matrix_shape(info.shape, role), matrix_shape(theirs.shape, role)
        rows = min(ours, before)
        live = rows if changed is None else changed
        spec = options.spec(role, columns)
        bits, group_size = spec.bits, spec.group_size
        shapes = stored_shapes(live, columns, spec, ours - rows, info.dtype)
        if live < rows:
            shapes["row_index"] = ((live,), torch.int32)
    stored = {
        suffix: Stored("", NAMES[dtype], shape, torch.Size(shape).numel() * dtype.itemsize, "")
        for suffix, (shape, dtype) in shapes.items()
    }
    return Entry(kind, role, info.shape, stored, None, bits, group_size)


def _from_config(source: str | Path, *, unquantised: bool = False) -> Outline:
    """The layout of a model from its configuration, under the names that a saved checkpoint has."""
    config = read_config(source)
    if unquantised:
        config = without_quantisation(config)
    nowhere = Path()
    tensors = {
        name: TensorInfo(name, tensor.dtype, tuple(tensor.shape), nowhere, 0, tensor.numel() * tensor.itemsize)
        for name, tensor in sorted(architecture_of(config).stored_layout().items())
    }
    path = Path(source)
    directory = path.parent if path.is_file() else path
    return Outline(str(directory), directory, tensors, given=config)


def _with_vocabulary(model: Checkpoint, size: int) -> Outline:
    if size < 1:
        raise ConfigError(f"vocab_size: {size}: a vocabulary has at least one token")
    config = copy.deepcopy(model.config)
    config.get_text_config().vocab_size = size
    tensors = dict(model.tensors)
    for name in architecture_of(model.config).vocabulary(model.tensors):
        info = tensors[name]
        shape = (size, *info.shape[1:])
        tensors[name] = replace(info, shape=shape, nbytes=torch.Size(shape).numel() * info.dtype.itemsize)
    return Outline(model.source, model.directory, tensors, given=config)
