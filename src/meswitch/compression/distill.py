"""Distillation: with the codes fixed, train what is 16 bit so that the compressed expert says what the full one says.

End to end on logits, as BitDelta (arXiv 2402.10193, section 3.1) and ME-Switch (2406.09041) train their scales. Ours:
the loss is the KL divergence from the full expert, salient weights and norms are trained with the scales (they are
stored in 16 bit anyway), every scale is trained relative to its start, and the best state on held-out text is kept. It
needs both models in memory, unlike the rest of compression.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from meswitch.artifact import Artifact
from meswitch.artifact.manifest import Distillation
from meswitch.checkpoint import TIED_EMBEDDING, TIED_HEAD, Checkpoint
from meswitch.codec import PackedDelta, unpack
from meswitch.codec.delta import SALIENT_DTYPE
from meswitch.codec.quantize import SCALE_DTYPE, expand_scale, levels
from meswitch.errors import ConfigError, IncompatibleError

# (steps done, steps in all, a line with the losses)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. learning_rate is relative: 0.005 moves a scale by about half a percent a step at most.

    batch: sequences a step. check_every: steps between looks at the held-out text (a tenth of the sequences).
    """

    steps: int = 100
    learning_rate: float = 5e-3
    batch: int = 16
    check_every: int = 20
    seed: int = 0


class _Restored(nn.Module):
    """A matrix of the student: base + levels x scales + salient, with trainable scales and salient weights."""

    def __init__(self, base: Tensor, delta: PackedDelta, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.delta = delta
        self.base = base[: delta.rows].to(device, dtype)
        self.levels = levels(unpack(delta.packed, delta.bits, delta.in_features), delta.bits).to(device, torch.int8)
        self.start = delta.scale.to(device, torch.float32)
        self.salient_index = delta.salient_index.long().to(device)
        self.salient_start = delta.salient_weight.to(device, torch.float32)
        # relative to the root mean square of all salient weights: single ones may be near zero
        self.salient_unit = self.salient_start.square().mean().sqrt() if self.salient_start.numel() else 0.0
        self.extra = None if delta.extra is None else delta.extra.to(device, dtype)
        self.scale_step = nn.Parameter(torch.zeros_like(self.start))
        self.salient_step = nn.Parameter(torch.zeros_like(self.salient_start))

    @property
    def scale(self) -> Tensor:
        return self.start * (1 + self.scale_step)

    @property
    def salient(self) -> Tensor:
        return self.salient_start + self.salient_unit * self.salient_step

    def matrix(self) -> Tensor:
        """[rows + extra, in_features] in the base's compute dtype, differentiable."""
        scale = expand_scale(self.scale, self.levels.shape[1], self.delta.group_size)
        change = self.levels * scale
        if self.salient_index.numel():
            change = change.index_add(1, self.salient_index, self.salient)
        matrix = self.base + change.to(self.base.dtype)
        return matrix if self.extra is None else torch.cat([matrix, self.extra])

    def trained(self) -> PackedDelta:
        """The delta with its new scales and salient weights."""
        delta = self.delta
        return PackedDelta(
            delta.packed,
            self.scale.detach().cpu().to(SCALE_DTYPE),
            delta.salient_index,
            self.salient.detach().cpu().to(SALIENT_DTYPE),
            delta.bits,
            delta.group_size,
            delta.in_features,
            delta.extra,
        )


class _Linear(nn.Module):
    def __init__(self, weight: _Restored, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.restored, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.restored.matrix(), self.bias)


class _Embedding(nn.Module):
    def __init__(self, weight: _Restored) -> None:
        super().__init__()
        self.restored = weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.restored.matrix())


def check_text(sequences: list[list[int]]) -> None:
    """Refuse text too short to train on and to hold a part out.

    Raises:
        ConfigError: fewer than 10 sequences.
    """
    if len(sequences) < 10:
        raise ConfigError(f"distill: {len(sequences)} calibration sequences are too few; give at least 10")


def train(
    base: Checkpoint,
    expert: Checkpoint,
    artifact: Artifact,
    sequences: list[list[int]],
    recipe: Recipe,
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[dict[str, PackedDelta | Tensor], Distillation]:
    """Train an artifact's scales, salient weights and norms on text.

    Returns:
        the tensors that changed, by name, and what was done. Held-out divergence never rises: if training does not
        help, the start is returned.

    Raises:
        ConfigError: fewer than 10 sequences. IncompatibleError: the model has other layers than the artifact.
    """
    check_text(sequences)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    teacher = _frozen(expert, device, dtype)
    student, restored, dense = _student(base, expert, artifact, device, dtype)
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.randperm(len(sequences), generator=generator).tolist()
    held = [sequences[i] for i in order[: max(1, len(order) // 10)]]
    rest = [sequences[i] for i in order[len(held) :]]

    parameters = [p for module in restored.values() for p in (module.scale_step, module.salient_step)]
    groups: list[dict[str, Any]] = [
        {"params": parameters},
        {"params": list(dense.values()), "lr": recipe.learning_rate / 5},  # not relative, and around 1
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, recipe.steps))
    trained = [*parameters, *dense.values()]
    before = best = _held_out(teacher, student, held, recipe.batch, device)
    kept = [p.detach().clone() for p in trained]
    for step in range(1, recipe.steps + 1):
        chosen = torch.randint(len(rest), (recipe.batch,), generator=generator).tolist()
        loss = _divergence(teacher, student, [rest[i] for i in chosen], device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % recipe.check_every == 0 or step == recipe.steps:
            now = _held_out(teacher, student, held, recipe.batch, device)
            if now < best:
                best, kept = now, [p.detach().clone() for p in trained]
            if progress is not None:
                progress(step, recipe.steps, f"held-out divergence {now:.4f} nats a token, {before:.4f} before")
    with torch.no_grad():
        for parameter, value in zip(trained, kept, strict=True):
            parameter.copy_(value)
    changed: dict[str, PackedDelta | Tensor] = {name: module.trained() for name, module in restored.items()}
    for name, parameter in dense.items():
        stored = artifact.read(name)
        assert isinstance(stored, Tensor)
        changed[name] = parameter.detach().cpu().to(stored.dtype)
    info = Distillation(
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        batch=recipe.batch,
        seed=recipe.seed,
        held_out_before=round(before, 6),
        held_out_after=round(best, 6),
    )
    return changed, info


def _frozen(expert: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(expert.directory, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def _student(
    base: Checkpoint, expert: Checkpoint, artifact: Artifact, device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, _Restored], dict[str, nn.Parameter]]:
    """The compressed expert as a model, its trainable matrices, and its trainable norms, by tensor name."""
    model = _frozen(expert, device, dtype)
    modules = dict(model.named_modules())
    restored: dict[str, _Restored] = {}
    dense: dict[str, nn.Parameter] = {}
    for name, entry in artifact.manifest.tensors.items():
        path, _, leaf = name.rpartition(".")
        if entry.kind == "same":
            continue
        module = modules.get(path)
        if module is None:
            raise IncompatibleError(f"{artifact.directory}: {name}: {expert.config.model_type} has no such layer")
        value = artifact.read(name)
        if isinstance(value, PackedDelta):
            restored[name] = _Restored(base.read(name), value, device, dtype)
            new = _Embedding(restored[name]) if entry.role == "embedding" else _Linear(restored[name], module.bias)
            _replace(model, path, new)
        elif entry.role == "norm":
            parameter = getattr(module, leaf)
            parameter.requires_grad_(True)
            dense[name] = parameter
    if expert.aliases and TIED_EMBEDDING in restored:
        _replace(model, TIED_HEAD.rpartition(".")[0], _Linear(restored[TIED_EMBEDDING], None))
    return model, restored, dense


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _divergence(teacher: Any, student: Any, batch: list[list[int]], device: torch.device) -> Tensor:
    """Mean KL(teacher || student) in nats over all tokens of a batch."""
    length = max(map(len, batch))
    ids = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens in batch], device=device)
    mask = torch.tensor([[1] * len(tokens) + [0] * (length - len(tokens)) for tokens in batch], device=device)
    with torch.no_grad():
        wanted = teacher(input_ids=ids, attention_mask=mask).logits[mask.bool()].float().log_softmax(-1)
    found = student(input_ids=ids, attention_mask=mask).logits[mask.bool()].float().log_softmax(-1)
    return F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()


@torch.no_grad()
def _held_out(teacher: Any, student: Any, held: list[list[int]], batch: int, device: torch.device) -> float:
    total = tokens = 0.0
    for part in _parts(held, batch):
        count = sum(map(len, part))
        total += _divergence(teacher, student, part, device).item() * count
        tokens += count
    return total / tokens


def _parts(sequences: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    for start in range(0, len(sequences), size):
        yield sequences[start : start + size]
