"""The compressed expert as a model that can be trained: the expert's own, with matrices made from base and artifact."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import AutoModelForCausalLM

from meswitch.artifact import Artifact
from meswitch.checkpoint import TIED_EMBEDDING, TIED_HEAD, Checkpoint
from meswitch.codec import CodedDelta, PackedDelta
from meswitch.compression.recipe import Recipe
from meswitch.compression.trainable import Group, RestoredPacked, Trainable
from meswitch.compression.trainable_signs import RestoredSigns
from meswitch.errors import IncompatibleError

_NORMS = 0.05  # their steps are not relative to their values, which are around 1, and move whole channels


@dataclass(frozen=True, slots=True)
class Student:
    """model: the compressed expert. matrices, norms: what is trained, by tensor name."""

    model: Any
    matrices: dict[str, Trainable]
    norms: dict[str, nn.Parameter]

    def groups(self) -> list[Group]:
        """All trained parameters, by their learning rate."""
        found: dict[float, list[nn.Parameter]] = {_NORMS: list(self.norms.values())}
        for matrix in self.matrices.values():
            for parameters, factor in matrix.groups():
                found.setdefault(factor, []).extend(parameters)
        return [(parameters, factor) for factor, parameters in found.items() if parameters]

    def trained(self, artifact: Artifact) -> dict[str, PackedDelta | CodedDelta | Tensor]:
        """What is to be stored instead of what `artifact` stores, by tensor name."""
        changed: dict[str, PackedDelta | CodedDelta | Tensor] = {
            name: matrix.trained() for name, matrix in self.matrices.items()
        }
        for name, parameter in self.norms.items():
            stored = artifact.read(name)
            assert isinstance(stored, Tensor)
            changed[name] = parameter.detach().cpu().to(stored.dtype)
        return changed


def frozen(expert: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """The full expert, its parameters not trained."""
    model = AutoModelForCausalLM.from_pretrained(expert.directory, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Said:
    """What a model makes of a batch.

    logits: [sequences, length, vocabulary] float32. hidden: the output of every block, [sequences, length,
    hidden_size] each, if asked for. real: [sequences, length] bool, what is not padding.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...]
    real: Tensor


def read_batch(model: Any, batch: list[list[int]], device: torch.device, *, hidden: bool = False) -> Said:
    """Run a batch of token ids through a model."""
    length = max(map(len, batch))
    ids = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens in batch], device=device)
    lengths = torch.tensor([len(tokens) for tokens in batch], device=device)
    real = torch.arange(length, device=device) < lengths[:, None]
    # no mask: padding is on the right, where no token looks
    found = model(input_ids=ids, use_cache=False, output_hidden_states=hidden)
    return Said(found.logits.float(), tuple(found.hidden_states[1:]) if hidden else (), real)


def build(
    base: Checkpoint,
    expert: Checkpoint,
    artifact: Artifact,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
) -> Student:
    """Make the student of an artifact.

    Raises:
        IncompatibleError: the model has other layers than the artifact. ConfigError: its method cannot be trained.
    """
    student = attach(frozen(expert, device, dtype), base, expert, artifact, recipe, device, dtype)
    if expert.aliases and TIED_EMBEDDING in student.matrices:
        _replace(student.model, TIED_HEAD.rpartition(".")[0], _Linear(student.matrices[TIED_EMBEDDING], None))
    return student


def attach(
    model: Any,
    base: Checkpoint,
    expert: Checkpoint,
    artifact: Artifact,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    names: Callable[[str], str | None] = lambda name: name,
) -> Student:
    """Put what the artifact stores in the place of a model's own weights.

    Args:
        model: the expert, or a part of it. names: of an artifact's tensor in `model`; None if it is elsewhere.

    Raises:
        IncompatibleError: the model has other layers than the artifact. ConfigError: its method cannot be trained.
    """
    modules = dict(model.named_modules())
    matrices: dict[str, Trainable] = {}
    norms: dict[str, nn.Parameter] = {}
    for name, entry in artifact.manifest.tensors.items():
        inside = names(name)
        if entry.kind == "same" or inside is None:
            continue
        path, _, leaf = inside.rpartition(".")
        module = modules.get(path)
        if module is None:
            raise IncompatibleError(f"{artifact.directory}: {name}: {expert.config.model_type} has no such layer")
        value = artifact.read(name)
        if isinstance(value, PackedDelta | CodedDelta):
            full = expert.read(name) if recipe.codes else None
            matrices[name] = _trainable(base.read(name), value, full, recipe, device, dtype)
            is_embedding = isinstance(module, nn.Embedding)
            new = _Embedding(matrices[name]) if is_embedding else _Linear(matrices[name], module.bias)
            _replace(model, path, new)
        elif entry.role == "norm" and recipe.norms:
            assert isinstance(value, Tensor)
            norms[name] = nn.Parameter(getattr(module, leaf).detach().float())
            setattr(module, leaf, norms[name])
            register_parametrization(module, leaf, _AsStored(value.dtype, dtype), unsafe=True)  # it changes the dtype
    return Student(model, matrices, norms)


def _trainable(
    base: Tensor,
    delta: PackedDelta | CodedDelta,
    full: Tensor | None,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
) -> Trainable:
    if isinstance(delta, PackedDelta):
        return RestoredPacked(base, delta, full, device, dtype)
    return RestoredSigns(base, delta, recipe.relative, device, dtype)


class _Linear(nn.Module):
    def __init__(self, weight: Trainable, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.restored, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.restored.matrix(), self.bias)


class _Embedding(nn.Module):
    def __init__(self, weight: Trainable) -> None:
        super().__init__()
        self.restored = weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.restored.matrix())


class _AsStored(nn.Module):
    """A parameter rounded to the dtype it will be stored in; the gradient passes as if it were not."""

    def __init__(self, stored: torch.dtype, computed: torch.dtype) -> None:
        super().__init__()
        self.stored, self.computed = stored, computed

    def forward(self, value: Tensor) -> Tensor:
        return (value + (value.to(self.stored).float() - value).detach()).to(self.computed)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
