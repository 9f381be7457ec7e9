"""Linear layers of a quantised base that keep its codes of 8 or 4 bits, where the kernels of a GPU compute.

Steps of up to `MAX_TOKENS` rows read the codes. For larger ones a layer's weights are restored in a room that all
layers of the model share, and then computed with like any weights. Where no kernels run, a base has no such layers:
its weights are restored as it is read.
"""

import logging
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.checkpoint import Checkpoint
from meswitch.loaded import LazyModel
from meswitch.ops import Routing, SlotLinear, fused_linear, uses_kernels
from meswitch.ops.codes import Codes
from meswitch.ops.layout import Variant
from meswitch.ops.routing import MAX_TOKENS, PIECE
from meswitch.ops.triton.ahead import Compilation, compile_ahead, dequantise_job, fused_jobs
from meswitch.quantised import QuantisedTensor, linear_layers
from meswitch.units import format_bytes

logger = logging.getLogger("meswitch.opening")

_TRITON = "triton"
_ROWS = 5  # of the inputs that layers are proven with
_CLOSE = 0.01  # of the norm of a product: several times what rounding a layer's weights to 16 bits makes of it


class Workspace:
    """What the layers of one model share. One of them computes at a time.

    Args:
        dtype: of restored weights.

    Attributes:
        lock: is held while a layer computes: several threads may route by one model. Their kernels run on one stream,
            so that what is in the room is read before the next layer is restored.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.lock = threading.Lock()
        self.largest = 0
        """Weights of the largest layer."""
        self._room: Tensor | None = None
        self._layers: dict[tuple[int, int], SlotLinear] = {}
        self._routings: dict[int, Routing] = {}

    @property
    def nbytes(self) -> int:
        """Of device memory."""
        return self.largest * self.dtype.itemsize

    def restored(self, codes: Codes) -> Tensor:
        """[rows, in_features], until the next call."""
        if self._room is None:
            self._room = torch.empty(self.largest, dtype=self.dtype, device=codes.codes.device)
        return codes.into(self._room[: math.prod(codes.shape)].view(codes.shape), _TRITON)

    def of_base(self, codes: Codes, rows: int) -> tuple[SlotLinear, Routing]:
        """What the fused kernel is given for rows that are all the base's."""
        device, (height, width) = codes.codes.device, codes.shape
        if codes.shape not in self._layers:
            self._layers[codes.shape] = SlotLinear.empty(height, width, device)
        if rows not in self._routings:
            none, order = torch.zeros(1, dtype=torch.int32, device=device), torch.arange(rows, dtype=torch.int32)
            self._routings[rows] = Routing(none[:0], none, order.to(device), PIECE, 1)
        return self._layers[codes.shape], self._routings[rows]


class CodedLinear(nn.Module):
    """As nn.Linear, of a weight that is held as codes: [..., in_features] -> [..., out_features].

    A tensor that `torch.func.functional_call` puts in the place of `weight` is computed with instead.

    Args:
        codes: the weight.
        bias: [out_features], or None.
        workspace: of the model.
    """

    bias: nn.Parameter | None

    def __init__(self, codes: Codes, bias: nn.Parameter | None, workspace: Workspace) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.workspace = workspace
        workspace.largest = max(workspace.largest, math.prod(codes.shape))
        self.register_buffer("codes", codes.codes, persistent=False)
        self.register_buffer("scale", codes.scale, persistent=False)
        self.register_parameter("bias", bias)
        self._parameters["weight"] = None

    @property
    def held(self) -> Codes:
        """The weight, as it is held."""
        buffers: dict[str, Any] = self._buffers
        return Codes(buffers["codes"], buffers["scale"])

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features]: the weights that the codes stand for, made anew by each look."""
        own = self._parameters["weight"]
        if own is not None:
            return own
        held = self.held
        return held.into(torch.empty(held.shape, dtype=self.workspace.dtype, device=held.codes.device), _TRITON)

    @property
    def restored(self) -> Tensor:
        """[out_features, in_features]: the same in the workspace, until another layer asks for its own."""
        return self.workspace.restored(self.held)

    @property
    def outline(self) -> Tensor:
        """As large as the weight, of its dtype and on its device; without its numbers."""
        return torch.empty((), dtype=self.workspace.dtype, device=self.held.codes.device).expand(self.held.shape)

    def forward(self, x: Tensor) -> Tensor:
        own = self._parameters["weight"]
        if own is not None:
            return nn.functional.linear(x, own, self.bias)
        return self.product(x.reshape(-1, x.shape[-1]), self.bias).view(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Of rows that are all the base's: [rows, in_features] -> [rows, out_features]."""
        with self.workspace.lock:
            if not 0 < len(x) <= MAX_TOKENS:
                return nn.functional.linear(x, self.restored, bias)
            held = self.held
            return fused_linear(x.contiguous(), held, *self.workspace.of_base(held, len(x)), bias, _TRITON)

    def extra_repr(self) -> str:
        kind = str(self.held.codes.dtype).removeprefix("torch.")
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}"


def hold_codes(weights: LazyModel, checkpoint: Checkpoint, *, backend: str | None, device: torch.device) -> None:
    """Put layers that keep their codes into a model whose weights are not read yet, if the kernels will compute it.

    These are linear layers with one scale a row, or one for all rows, or codes of 4 bits in groups of `GROUP` channels,
    and without zero points. The head is none of them: it is kept in 16 bit.

    Args:
        weights: the model.
        checkpoint: the quantised base, under the names that the model loads.
        backend: the one asked for, None for that of the device and dtype.
        device: on which it will compute.
    """
    if not uses_kernels(backend, device, weights.dtype):
        return
    model, plan, workspace = weights.model, weights.plan, Workspace(weights.dtype)
    shared = {*plan.tied, *plan.tied.values()}
    layers, found = linear_layers(model, plan), 0
    for stored, path in layers.items():
        info, name = checkpoint.tensors[stored], f"{path}.weight"
        if not isinstance(info, QuantisedTensor) or name in shared or weights.dtype_of(name) != weights.dtype:
            continue
        codes = _codes(info)
        if codes is not None:
            model.set_submodule(path, CodedLinear(codes, model.get_submodule(path).bias, workspace))
            found += 1
    if not found:
        logger.info("the base's weights are restored in 16 bit: its codes have zero points, or scales of other groups")
        return
    nbytes, whole = codes_bytes(model), sum(2 * math.prod(layer.held.shape) for _, layer in coded_layers(model))
    logger.info(
        "%d of the base's %d linear layers are held as their codes: %s instead of %s",
        *(found, len(layers), format_bytes(nbytes), format_bytes(whole)),
    )


def _codes(stored: QuantisedTensor) -> Codes | None:
    """A stored matrix as it is held; None if it cannot be."""
    if not stored.held_bytes:
        return None
    codes, scale = stored.codes()
    if scale.shape[1] > 1:
        is_whole = bool((codes >= -8).all() & (codes < 8).all())  # codes that are stored in bytes may be any
        return Codes.paired(codes, scale) if is_whole else None
    if codes.is_floating_point() and bool((codes.view(torch.int8) & 0x7F == 0x7F).any()):
        return None  # NaN, which the kernels do not know
    return Codes(codes, scale[:, 0].contiguous())


def coded_layers(model: nn.Module) -> Iterator[tuple[str, CodedLinear]]:
    """The layers that are held as codes, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, CodedLinear))


def codes_bytes(model: nn.Module) -> int:
    """Of the codes and scales of these layers."""
    return sum(layer.held.nbytes for _, layer in coded_layers(model))


def workspace_bytes(model: nn.Module) -> int:
    """Of the room in which these layers' weights are restored."""
    return next((layer.workspace.nbytes for _, layer in coded_layers(model)), 0)


def restore_weights(model: nn.Module) -> None:
    """Make plain layers of those that are held as codes, in place."""
    for name, layer in list(coded_layers(model)):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.weight)
        plain.register_parameter("bias", layer.bias)
        model.set_submodule(name, plain)


def share_codes(model: nn.Module, other: nn.Module, prefix: str) -> None:
    """Give another model of the same layers the codes of one that holds them, and a workspace of its own.

    Args:
        model: its layers may be wrapped.
        other: with plain layers in their place.
        prefix: of the names in `model`.
    """
    workspaces: dict[torch.dtype, Workspace] = {}
    for name, layer in coded_layers(model):
        if name.startswith(prefix):
            path = f"{name}.".replace(".base.", ".").removeprefix(prefix).rstrip(".")
            workspace = workspaces.setdefault(layer.workspace.dtype, Workspace(layer.workspace.dtype))
            bias = other.get_submodule(path)._parameters["bias"]
            other.set_submodule(path, CodedLinear(layer.held, bias, workspace))


@torch.no_grad()
def codes_fault(model: nn.Module) -> str | None:
    """What layers give that is not what their codes' weights give; None if there is nothing.

    Each layer's weights are restored, and compared with plain arithmetic, and some rows are computed both ways. On a
    GPU all kernels for rows of the base are compiled for it first.
    """
    layers = list(coded_layers(model))
    if not layers:
        return None
    first = layers[0][1].held.codes.device
    if first.type == "cuda":
        with torch.cuda.device(first):
            compile_ahead(job for _, layer in layers for job in _jobs(layer))
    draw = torch.Generator().manual_seed(0)
    for name, layer in layers:
        held, restored = layer.held, layer.restored
        wanted = held.into(torch.empty_like(restored), "reference")
        if not _error(restored, wanted) <= torch.finfo(restored.dtype).eps:  # the interpreter cuts off
            return f"{name}: restored weights are not those of its codes"
        x = torch.randn(_ROWS, layer.in_features, generator=draw).to(first, restored.dtype)
        error = _error(layer.product(x, layer.bias), nn.functional.linear(x, wanted, layer.bias))
        if not error <= _CLOSE:
            return f"{name}: the kernel's product differs by {error:.2g} of its norm from that of restored weights"
    return None


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-30))


def _jobs(layer: CodedLinear) -> Iterator[Compilation]:
    """What a layer launches for the base's rows."""
    (rows, width), codes, dtype = layer.held.shape, layer.held.codes.dtype, layer.workspace.dtype
    sizes = [(columns, 0, 1) for columns in (8, 16, 32, MAX_TOKENS)]
    for bias in {False, layer.bias is not None}:
        yield from fused_jobs(rows, width, Variant(0, False, 0, 0), dtype, bias, sizes, codes)
    yield dequantise_job(rows, width, dtype, codes)
