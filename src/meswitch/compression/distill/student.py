"""The compressed expert as a model that can be trained: the expert's own, with matrices made from base and artifact.

Of a packed delta scales and salient weights are trained, and codes if the recipe says so; of a pair both sides; another
codec brings what is trained of it (`codec.Trainable`).
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached, register_parametrization

from meswitch.architecture import NORM, architecture_of, as_matrix
from meswitch.artifact import Artifact, Manifest
from meswitch.checkpoint import Checkpoint
from meswitch.codec import Change, CodedDelta, Group, LowRankDelta, PackedDelta, Trainable, pack, unpack
from meswitch.codec.delta import SALIENT_DTYPE
from meswitch.codec.quantize import SCALE_DTYPE, expand_scale, levels
from meswitch.codec.words import nearest_words, signs_of
from meswitch.compression.inputs import assembly, places_of
from meswitch.compression.options import Scope, TrainingRecipe
from meswitch.compression.partial_model import BlockCall, PartialModel, working_dtype
from meswitch.errors import ConfigError, IncompatibleError
from meswitch.loaded import LazyModel
from meswitch.tensorfile import DTYPES

logger = logging.getLogger(__name__)

_NORMS = 0.05  # their steps are not relative to their values, which are around 1, and move whole channels
PAIR_RATE = 0.25
CODES_RATE = 0.5  # the steps of latent weights, whose levels are 2 apart, against those of scales
_WITHIN = 0.9  # of a level: half the distance to the next is 1
_FEW = 5  # tokens that a block is tried with
REORDERED = "{} is reordered while it is loaded, in a way that gradients do not pass"


class Compressed(Protocol):
    """What a student is made of: an artifact, or one with trained tensors in it."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def directory(self) -> Path: ...

    def read(self, name: str) -> Change | Tensor | None: ...


class TrainablePacked(nn.Module):
    """Base + levels x scales + salient, with trainable scales and salient weights, and codes if they are to be trained.

    Scales and salient weights are trained as steps relative to their start, so that one learning rate fits all. Codes
    are trained through a latent weight for each, in units of its group's scale: the nearest level is used, and its
    gradient is the latent weight's while that is within the range of levels (a straight-through estimator,
    arXiv 1308.3432; learning codes together with scales follows LSQ, 1902.08153). A latent weight starts at the full
    delta, moved no further than needed for its level to be the code that error feedback chose.

    Args:
        base: [at least delta.rows, in_features].
        full: of the same shape, the expert's own weights; None leaves the codes as they are.
    """

    def __init__(
        self, base: Tensor, delta: PackedDelta, full: Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.delta = delta
        self.base = base[: delta.rows].to(device, dtype)
        self.top = 2**delta.bits - 1
        self.start = delta.scale.to(device, torch.float32)
        self.salient_index = delta.salient_index.long().to(device)
        self.salient_start = delta.salient_weight.to(device, torch.float32)
        # relative to the root mean square of all salient weights: single ones may be near zero
        self.salient_unit = self.salient_start.square().mean().sqrt() if self.salient_start.numel() else 0.0
        self.extra = None if delta.extra is None else delta.extra.to(device, dtype)
        self.scale_step = nn.Parameter(torch.zeros_like(self.start))
        self.salient_step = nn.Parameter(torch.zeros_like(self.salient_start))
        # rows left out of the artifact stay so
        self.live = ((self.start != 0).any(1) | (self.salient_start != 0).any(1))[:, None].float()
        codes = levels(unpack(delta.packed, delta.bits, delta.in_features), delta.bits).to(device)
        self.levels = codes.to(torch.int8)
        self.latent = None if full is None else nn.Parameter(self._latent(full[: delta.rows].to(device), codes))

    def _latent(self, full: Tensor, codes: Tensor) -> Tensor:
        """[rows, in_features] float32: the full delta in units of the scales, kept within its code's interval."""
        change = full.float() - self.base.float()
        if self.salient_index.numel():
            change.index_add_(1, self.salient_index, -self.salient_start)
        step = expand_scale(self.start, codes.shape[1], self.delta.group_size)
        rest = torch.where(step > 0, change / step - codes, 0.0)
        return codes + rest.clamp(-_WITHIN, _WITHIN)

    @property
    def scale(self) -> Tensor:
        return self.start * (1 + self.scale_step)

    @property
    def salient(self) -> Tensor:
        return self.salient_start + self.salient_unit * self.salient_step * self.live

    def groups(self) -> list[Group]:
        # every bit halves the error that training is to repair, and what steps of one size do harm besides
        rate = 2.0 ** (1 - self.delta.bits)
        found: list[Group] = [([self.scale_step, self.salient_step], rate)]
        return found if self.latent is None else [*found, ([self.latent], CODES_RATE * rate)]

    def matrix(self) -> Tensor:
        trained = self.levels if self.latent is None else self.latent
        matrix = _RestoreMatrix.apply(
            trained,
            self.scale,
            self.salient,
            self.base,
            self.salient_index,
            self.delta.group_size,
            self.top,
            self.delta.block,
        )
        return matrix if self.extra is None else torch.cat([matrix, self.extra])

    def trained(self) -> PackedDelta:
        delta = self.delta
        packed = delta.packed
        if self.latent is not None:
            codes = (_nearest(self.latent.detach(), self.top, delta.block) + self.top) / 2
            packed = pack(codes.to(torch.uint8).cpu(), delta.bits)
        return PackedDelta(
            packed,
            self.scale.detach().cpu().to(SCALE_DTYPE),
            delta.salient_index,
            self.salient.detach().cpu().to(SALIENT_DTYPE),
            delta.bits,
            delta.group_size,
            delta.in_features,
            delta.extra,
            delta.block,
        )


def _nearest(latent: Tensor, top: int, block: int | None = None) -> Tensor:
    """The level (odd integer in [-top, top]) nearest to each latent weight, or the signs of the nearest words."""
    if block is not None:
        return signs_of(nearest_words(latent, block), block)
    return latent.add(top).div_(2).round_().clamp_(0, top).mul_(2).sub_(top)


class _RestoreMatrix(torch.autograd.Function):
    """base + nearest levels x scales + salient, in few passes: every step does it for every matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        scale: Tensor,
        salient: Tensor,
        base: Tensor,
        index: Tensor,
        group: int | None,
        top: int,
        block: int | None,
    ) -> Tensor:
        chosen = _nearest(latent, top, block) if latent.is_floating_point() else latent.float()
        ctx.save_for_backward(latent, chosen, scale, index)
        ctx.group, ctx.top = group, top
        matrix = _scaled(chosen, scale, group)
        matrix = matrix.add_(base) if base.dtype == matrix.dtype else base + matrix.to(base.dtype)
        return matrix.index_add_(1, index, salient.to(matrix.dtype)) if index.numel() else matrix

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        latent, chosen, scale, index = ctx.saved_tensors
        gradient = gradients[0].float()
        to_scale = _by_group(gradient * chosen, ctx.group).sum(-1)
        to_latent = None
        if ctx.needs_input_grad[0]:
            edge = float(ctx.top + 1)
            inside = torch.ops.aten.hardtanh_backward(gradient, latent, -edge, edge)  # 0 beyond the edges, in one pass
            to_latent = _scaled(inside, scale, ctx.group)
        return to_latent, to_scale, gradient[:, index], None, None, None, None, None


def _by_group(values: Tensor, group: int | None) -> Tensor:
    """[rows, in_features] -> [rows, groups, group], the last group filled up with zeros."""
    rows, width = values.shape
    group = width if group is None else group
    if width % group:
        values = torch.nn.functional.pad(values, (0, -width % group))
    return values.reshape(rows, -1, group)


def _scaled(values: Tensor, scale: Tensor, group: int | None) -> Tensor:
    """[rows, in_features] times the scale of each group."""
    return (_by_group(values, group) * scale[:, :, None]).view(len(values), -1)[:, : values.shape[1]]


class TrainablePair(nn.Module):
    """Base + left x right, with both sides trainable.

    Each direction is trained in steps relative to the root mean square of its column or row.

    Args:
        base: [at least delta.rows, in_features].
    """

    def __init__(self, base: Tensor, delta: LowRankDelta, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.delta = delta
        self.base = base[: delta.rows].to(device, dtype)
        self.extra = None if delta.extra is None else delta.extra.to(device, dtype)
        self.left_start = delta.left.to(device, torch.float32)
        self.right_start = delta.right.to(device, torch.float32)
        self.left_unit = self.left_start.square().mean(0, keepdim=True).sqrt()
        self.right_unit = self.right_start.square().mean(1, keepdim=True).sqrt()
        self.live = (self.left_start != 0).any(1, keepdim=True).float()  # rows left out of the artifact stay so
        self.left_step = nn.Parameter(torch.zeros_like(self.left_start))
        self.right_step = nn.Parameter(torch.zeros_like(self.right_start))

    @property
    def left(self) -> Tensor:
        return self.left_start + self.left_unit * self.left_step * self.live

    @property
    def right(self) -> Tensor:
        return self.right_start + self.right_unit * self.right_step

    def groups(self) -> list[Group]:
        return [([self.left_step, self.right_step], PAIR_RATE)]

    def matrix(self) -> Tensor:
        matrix = self.base + ((self.left @ self.right) * self.delta.scale).to(self.base.dtype)
        return matrix if self.extra is None else torch.cat([matrix, self.extra])

    def trained(self) -> LowRankDelta:
        left, right = (side.detach().cpu().to(self.delta.left.dtype) for side in (self.left, self.right))
        return dataclasses.replace(self.delta, left=left, right=right)


class _Maker:
    """Makes all trained matrices, and takes their gradients to what is trained.

    On a GPU each way is one CUDA graph: a model of 100 million parameters has hundreds of matrices, each takes dozens
    of small kernels, and to start them one by one takes many times as long as they run.
    """

    def __init__(self, matrices: Sequence[Trainable]) -> None:
        self._matrices = matrices
        self._trained = [one for matrix in matrices for group, _ in matrix.groups() for one in group]
        self._made: list[Tensor] = []
        self._given: list[Tensor] = []
        self._taken: tuple[Tensor, ...] = ()
        self._graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None
        bases = [one.base for one in matrices if isinstance(one, TrainablePacked | TrainablePair)]
        # other codecs' matrices may do what a graph cannot hold
        if bases and len(bases) == len(matrices) and bases[0].is_cuda:
            try:
                with torch.cuda.device(bases[0].device):  # what another GPU does is not recorded, without an error
                    self._capture()
            except RuntimeError as error:
                logger.warning("training starts its kernels one by one, which is slower: %s", error)
                self._given, self._taken = [], ()

    def make(self, *, learns: bool) -> list[Tensor]:
        """The matrices as they are now. learns: `take` follows."""
        if self._graphs:
            self._graphs[0].replay()
        else:
            with torch.set_grad_enabled(learns):
                self._made = [matrix.matrix() for matrix in self._matrices]
        return [matrix.detach() for matrix in self._made]

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """Leave the gradients of what is trained, given those of the matrices made last; None is zero."""
        if self._graphs:
            for own, gradient in zip(self._given, gradients, strict=True):
                if gradient is None:
                    own.zero_()
                else:
                    own.copy_(gradient)
            self._graphs[1].replay()
            for parameter, gradient in zip(self._trained, self._taken, strict=True):
                parameter.grad = gradient
            return
        made = [(matrix, new) for matrix, new in zip(self._made, gradients, strict=True) if new is not None]
        self._made = []
        torch.autograd.backward([matrix for matrix, _ in made], [new for _, new in made])

    def _capture(self) -> None:
        def forward() -> list[Tensor]:
            return [matrix.matrix() for matrix in self._matrices]

        def backward(made: list[Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(made, self._trained, self._given)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.enable_grad():
            with torch.cuda.stream(side):  # libraries set themselves up at their first call
                made = forward()
                self._given = [torch.zeros_like(matrix) for matrix in made]
                backward(made)
                del made
            torch.cuda.current_stream().wait_stream(side)
            there, back = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(there):
                made = forward()
            with torch.cuda.graph(back, pool=there.pool()):
                self._taken = backward(made)
        self._made = [matrix.detach() for matrix in made]
        self._graphs = there, back


@dataclass(frozen=True)
class Student:
    """The compressed expert, to be trained.

    Args:
        model: of transformers.
        matrices: that are trained, by tensor name.
        norms: likewise.
        made: the matrices while they are held; the model's parameters are then these.
    """

    model: Any
    matrices: dict[str, Trainable]
    norms: dict[str, nn.Parameter]
    made: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def _maker(self) -> _Maker:
        return _Maker(list(self.matrices.values()))

    @contextlib.contextmanager
    def held(self, *, learns: bool) -> Iterator[None]:
        """Make the matrices once for all that the model is given inside.

        Args:
            learns: at the end their gradients are passed on to what is trained.
        """
        made = [matrix.requires_grad_(learns) for matrix in self._maker.make(learns=learns)]
        self.made.update(zip(self.matrices, made, strict=True))
        try:
            yield
            if learns:
                self._maker.take([matrix.grad for matrix in made])
        finally:
            self.made.clear()

    def groups(self) -> list[Group]:
        """All trained parameters, by their learning rate."""
        found: dict[float, list[nn.Parameter]] = {_NORMS: list(self.norms.values())}
        for matrix in self.matrices.values():
            for parameters, factor in matrix.groups():
                found.setdefault(factor, []).extend(parameters)
        return [(parameters, factor) for factor, parameters in found.items() if parameters]

    def trained(self, artifact: Artifact) -> dict[str, PackedDelta | LowRankDelta | CodedDelta | Tensor]:
        """What is to be stored instead of what `artifact` stores, by tensor name."""
        changed: dict[str, PackedDelta | LowRankDelta | CodedDelta | Tensor] = {
            name: matrix.trained() for name, matrix in self.matrices.items()
        }
        for name, parameter in self.norms.items():
            stored = artifact.read(name)
            assert isinstance(stored, Tensor)
            changed[name] = parameter.detach().cpu().to(stored.dtype)
        return changed


def frozen(expert: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """The full expert, its parameters not trained."""
    return LazyModel.of(expert, device, dtype).load()


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model makes of a batch.

    Args:
        logits: [sequences, length, vocabulary] float32.
        hidden: the output of every block, [sequences, length, hidden_size] each, if asked for.
        real: [sequences, length] bool, what is not padding.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...]
    real: Tensor


def read_batch(model: Any, batch: list[list[int]], device: torch.device, *, hidden: bool = False) -> Outputs:
    """Run a batch of token ids through a model."""
    length = max(map(len, batch))
    ids = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens in batch], device=device)
    lengths = torch.tensor([len(tokens) for tokens in batch], device=device)
    real = torch.arange(length, device=device) < lengths[:, None]
    # no mask: padding is on the right, where no token looks
    with cached():  # a restored parameter may be asked for many times: by every expert of a mixture
        found = model(input_ids=ids, use_cache=False, output_hidden_states=hidden)
    states = (found.hidden_states or ())[1:] if hidden else ()
    return Outputs(found.logits.float(), tuple(s for s in states if s.dim() == 3 and s.shape[:2] == ids.shape), real)


def build_student(
    base: Checkpoint,
    expert: Checkpoint,
    artifact: Artifact,
    recipe: TrainingRecipe,
    device: torch.device,
    dtype: torch.dtype,
) -> Student:
    """Make the student of an artifact.

    Raises:
        IncompatibleError: the model has other layers than the artifact. ConfigError: its method cannot be trained.
    """
    return attach(frozen(expert, device, dtype), base, expert, artifact, recipe, device, dtype)


def attach(
    model: Any,
    base: Checkpoint,
    expert: Checkpoint,
    artifact: Compressed,
    recipe: TrainingRecipe,
    device: torch.device,
    dtype: torch.dtype,
    names: Callable[[str], str | None] = lambda name: name,
) -> Student:
    """Put what the artifact stores in the place of a model's own weights.

    The modules stay as they are, whatever they do with their parameters; a parameter is made anew of the stored
    matrices each time it is asked for.

    Args:
        model: the expert, or a part of it.
        names: of the expert's parameter in `model`; None if it is elsewhere.

    Raises:
        IncompatibleError: the model has other layers than the artifact, or reorders a matrix while it is loaded.
        ConfigError: the artifact's method cannot be trained.
    """
    entries = artifact.manifest.tensors
    architecture = architecture_of(expert.config)
    plan = architecture.load_plan(entries)
    changed = {name for name, entry in entries.items() if entry.kind != "same"}
    if unknown := changed & set(plan.unneeded):
        raise IncompatibleError(
            f"{artifact.directory}: {min(unknown)}: {expert.config.model_type} has no such parameter"
        )
    shapes = {name: entry.shape for name, entry in entries.items()}
    roles = {name: entry.role for name, entry in entries.items()}
    matrices: dict[str, Trainable] = {}
    norms: dict[str, nn.Parameter] = {}
    made: dict[str, Tensor] = {}
    nothing = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
    for rule in plan.conversions:
        inside = {target: [here for name in plan.alike(target) if (here := names(name))] for target in rule.targets}
        if changed.isdisjoint(rule.sources) or not any(inside.values()):
            continue
        if any(entries[name].kind in ("packed", "lowrank", "coded") for name in rule.sources):
            own: dict[str, Trainable | Tensor] = {}
            for name in rule.sources:
                value = artifact.read(name)
                if isinstance(value, PackedDelta | LowRankDelta | CodedDelta):
                    before, full = (as_matrix(side.read(name), roles[name]) for side in (base, expert))
                    given = full if recipe.codes else None
                    own[name] = matrices[name] = _trainable(before, value, given, recipe, device, dtype)
                else:
                    own[name] = as_matrix(expert.read(name), roles[name]).to(device).to(dtype)
            places = places_of(architecture, rule, shapes, roles)
            for target, found in inside.items():
                put = assembly(places, target, architecture.parts[target].shape) if found else None
                if found and put is None:
                    raise _untrainable(REORDERED.format(rule.sources[0]))
                for here in found:
                    assert put is not None
                    _train(model, here, nothing, _Restored(put, own, made))
        elif rule.renames and roles[rule.sources[0]] == NORM and recipe.norms:
            (name,), (found,) = rule.sources, inside.values()
            norms[name] = nn.Parameter(expert.read(name).to(device, torch.float32))
            stored = DTYPES[entries[name].stored[""].dtype]
            for here in found:
                _train(model, here, norms[name], _AsStored(stored, dtype))
    return Student(model, matrices, norms, made)


def check_trainable(expert: Checkpoint, scope: Scope, device: torch.device) -> None:
    """Refuse what cannot be trained, by trying one block of each kind with a few tokens.

    Raises:
        IncompatibleError: naming the reason.
    """
    parts = PartialModel(expert, device, working_dtype(device, expert.parameters))
    architecture, plan = parts.weights.architecture, parts.weights.plan
    shapes = {name: info.shape for name, info in expert.tensors.items()}
    roles = architecture.roles(shapes)
    for rule in plan.conversions:
        if rule.renames or any(len(shapes[name]) < 2 for name in rule.sources):
            continue
        places = places_of(architecture, rule, shapes, roles)
        if any(assembly(places, target, architecture.parts[target].shape) is None for target in rule.targets):
            raise _untrainable(REORDERED.format(rule.sources[0]))
    ids = torch.zeros(2, _FEW, dtype=torch.int64, device=device)
    calls = parts.calls(ids, embedded=False)
    hidden = parts.enter(ids)
    if scope == "block":
        in_order = [call.block for call in calls] == list(range(len(parts)))
        plain = all(set(call.links.values()) == {0} for call in calls)
        shared = any(isinstance(value, Mapping) for call in calls for value in call.keywords.values())
        if not in_order or not plain or shared or hidden.shape[:2] != ids.shape or hidden.dim() != 3:
            raise _untrainable(
                f"the blocks of a {type(parts.model).__name__} hand on more than hidden states; distil the whole model "
                "at once (--distill-scope model)"
            )
    tried: set[tuple[str, ...]] = set()
    for call in calls:
        block = parts.block(call.block)
        kind = tuple(type(module).__name__ for module in block.modules())
        if kind not in tried:
            tried.add(kind)
            _try_gradient(parts, block.requires_grad_(), call, hidden)


def _try_gradient(parts: PartialModel, block: nn.Module, call: BlockCall, hidden: Tensor) -> None:
    leaving = hidden.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            given = call.after(parts.passed_on(leaving)).run(block)
            (given[0] if isinstance(given, tuple) else given).float().sum().backward()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise _untrainable(f"{parts.name(call.block)} of a {type(parts.model).__name__}: {reason}") from error


def _untrainable(reason: str) -> IncompatibleError:
    return IncompatibleError(f"distill: {reason}; or 0 steps, which train nothing (--distill 0)")


def _trainable(
    base: Tensor,
    delta: PackedDelta | LowRankDelta | CodedDelta,
    full: Tensor | None,
    recipe: TrainingRecipe,
    device: torch.device,
    dtype: torch.dtype,
) -> Trainable:
    if isinstance(delta, PackedDelta):
        return TrainablePacked(base, delta, full, device, dtype)
    if isinstance(delta, LowRankDelta):
        return TrainablePair(base, delta, device, dtype)
    if not delta.codec.is_trainable:
        raise ConfigError(f"distill: the method {delta.codec.name} has no scales to train")
    return delta.codec.trainable(base, delta, recipe, device, dtype)


class _Restored(nn.Module):
    """A parameter, made of stored matrices.

    Args:
        put: puts the matrices together.
        matrices: stored name -> a matrix that is trained, or one that is not.
        made: of the trained ones those that are there already (`Student.held`).
    """

    def __init__(
        self,
        put: Callable[[Mapping[str, Tensor]], Tensor],
        matrices: Mapping[str, Trainable | Tensor],
        made: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self._put = put
        self._matrices = [matrices]  # not as modules: one may be a part of several parameters
        self._made = made

    def forward(self, value: Tensor) -> Tensor:
        (matrices,) = self._matrices
        return self._put({name: self._matrix(name, own) for name, own in matrices.items()})

    def _matrix(self, name: str, own: Trainable | Tensor) -> Tensor:
        if isinstance(own, Tensor):
            return own
        return self._made[name] if name in self._made else own.matrix()


class _AsStored(nn.Module):
    """A parameter rounded to the dtype it will be stored in; the gradient passes as if it were not."""

    def __init__(self, stored: torch.dtype, computed: torch.dtype) -> None:
        super().__init__()
        self.stored, self.computed = stored, computed

    def forward(self, value: Tensor) -> Tensor:
        return (value + (value.to(self.stored).float() - value).detach()).to(self.computed)


def _train(model: nn.Module, name: str, value: nn.Parameter, becomes: nn.Module) -> None:
    """Let a parameter be what `becomes` makes of a value; its own is forgotten."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    module._parameters[leaf] = value
    register_parametrization(module, leaf, becomes, unsafe=True)  # it may change the dtype
