"""How vLLM's layers get their deltas.

Linear layers, embeddings and heads ask their `quant_method` for the product, whichever class they are and whether or
not LoRA wraps them, and before any communication between ranks. So a method around that method sees the rank's own rows
and columns, and no class of vLLM's layers has to be copied. Norms have no such method and are wrapped, as vLLM's LoRA
wraps linear layers.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from meswitch.errors import IncompatibleError, MeswitchError
from meswitch.ops import embedding_rows, expert_linear
from meswitch.ops.backend import KERNEL_DTYPES
from meswitch.ops.routing import HEAD as HEAD_SIDE
from meswitch.ops.routing import TOKENS, Step, is_idle, part
from meswitch.vllm import compat
from meswitch.vllm.arena import Arena, Layer
from meswitch.vllm.delta_op import DeltaNorm, add_delta, linear
from meswitch.vllm.places import EMBEDDING, FUSED, HEAD, LINEAR, NORM


class DeltaMethod(QuantizeMethodBase):
    """The base's method, then the deltas."""

    def __init__(self, inner: Any, layer: Layer, step: Step) -> None:
        self.inner, self.layer, self.step = inner, layer, step
        self.fused = _fuses(inner, layer)

    def __getattr__(self, name: str) -> Any:  # vLLM asks methods for what they support
        return getattr(self.__dict__["inner"], name)

    def create_weights(self, layer: nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        self.inner.create_weights(layer, *weight_args, **extra_weight_attrs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.inner.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in_features] -> [..., rows]."""
        own, inputs = self.layer, x.reshape(-1, x.shape[-1])
        if self.fused and own.slots is not None:
            weight: Any = layer.weight
            y = linear(inputs, weight, bias, own.slots).view(*x.shape[:-1], -1)
        else:
            y = self.inner.apply(layer, x, bias)
        if is_idle(self.step, x):
            return y
        outputs = y.view(-1, y.shape[-1])
        # a tied embedding multiplies too, as the head
        if own.place.kind == LINEAR:
            if own.slots is not None and not self.fused:
                add_delta(outputs, inputs, own.slots, TOKENS)
            if own.vectors is not None:
                outputs += own.vectors[self.step.tokens.token_slots[: inputs.shape[0]]].to(outputs.dtype)
        else:
            self._logits(outputs, inputs, bias)
        return y

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """[tokens] int64 -> [tokens, features]."""
        if is_idle(self.step, ids):
            base: Tensor = self.inner.embedding(layer, ids)
            return base
        own, flat = self.layer, ids.reshape(-1)
        slots = self.step.tokens.token_slots[: flat.shape[0]]
        rows = own.place.used_rows
        weight = own.place.module.weight[:rows]
        if own.slots is not None:
            y = embedding_rows(flat, weight, own.slots, slots, own.extra)
        else:
            y = self.inner.embedding(layer, flat.clamp(max=rows - 1))
            if own.extra is not None:
                theirs = own.extra[slots.long(), (flat - rows).clamp(min=0)]
                y = torch.where((flat >= rows)[:, None], theirs, y)
        if own.own is not None and own.has_own is not None:
            chosen = own.has_own[slots.long()] & (slots >= 0) & (flat < rows)
            y = torch.where(chosen[:, None], own.own[slots.long(), flat.clamp(max=rows - 1)], y)
        return y.view(*ids.shape, -1)

    def _logits(self, outputs: Tensor, inputs: Tensor, bias: Tensor | None) -> None:
        rows = self.layer.place.used_rows
        first = first_row(inputs, self.step)
        slots = head_slots(inputs, self.step, first)
        if slots is None:
            return
        if self.layer.slots is not None:
            if first is None:
                add_delta(outputs[:, :rows], inputs, self.layer.slots, HEAD_SIDE)
            elif (routing := part(self.step.tokens, first, len(inputs))) is not None:
                expert_linear(outputs[:, :rows], inputs, self.layer.slots, routing)
        if self.layer.own is not None and self.layer.has_own is not None:
            for slot in sorted({slot for slot in slots if slot >= 0}):
                own = torch.tensor([slot == other for other in slots], device=inputs.device)
                theirs = inputs @ self.layer.own[slot].T
                if bias is not None:
                    theirs = theirs + bias[:rows]
                chosen = (own & self.layer.has_own[slot])[:, None]
                outputs[:, :rows] = torch.where(chosen, theirs.to(outputs.dtype), outputs[:, :rows])
        if self.layer.vectors is not None:
            outputs += self.layer.vectors[torch.tensor(slots, device=outputs.device)].to(outputs.dtype)


def _fuses(inner: Any, layer: Layer) -> bool:
    """Whether one kernel can compute the base's product and the deltas."""
    weight = getattr(layer.place.module, "weight", None)
    return (
        layer.place.kind == LINEAR
        and layer.slots is not None
        and weight is not None
        and weight.is_cuda
        and weight.dtype in KERNEL_DTYPES
        and weight.shape == (layer.slots.rows, layer.slots.in_features)
        and compat.is_plain(inner)
    )


def first_row(inputs: Tensor, step: Step) -> int | None:
    """Where the head's inputs start among the step's tokens, or None if they are the rows to sample from.

    For the logits of a prompt, vLLM passes the head a part of the step's hidden states; else a copy of chosen rows.
    """
    if len(inputs) == len(step.head.host) and inputs.untyped_storage().nbytes() == inputs.nbytes:
        return None
    return inputs.storage_offset() // inputs.stride(0) if inputs.dim() == 2 else 0


def head_slots(inputs: Tensor, step: Step, first: int | None) -> list[int] | None:
    """The slot of each of the head's rows, None if all are the base's.

    Raises:
        MeswitchError: the rows are not known, and some request has an expert.
    """
    if not (step.head.active or step.tokens.active):
        return None
    slots = step.head.host if first is None else step.tokens.host[first : first + len(inputs)]
    if len(slots) != len(inputs):
        if step.dummy:
            return None
        raise MeswitchError(
            f"{len(inputs)} rows for the head in a step of {len(step.head.host)} requests and "
            f"{len(step.tokens.host)} tokens: whose they are is not known"
        )
    return slots if any(slot >= 0 for slot in slots) else None


def install(model: nn.Module, arena: Arena, step: Step, replace: Any) -> None:
    """Give every layer of the arena its deltas; `model` is changed in place.

    Args:
        replace: `(model, name, module)`, sets a submodule.

    Raises:
        IncompatibleError: experts have tokens of their own, and this model does not say which they are.
    """
    for layer in arena.layers:
        place = layer.place
        if place.kind == NORM:
            assert layer.vectors is not None
            replace(model, place.name, DeltaNorm(place.module, layer.vectors, step, place.axis))
        elif layer.is_switched:
            place.module.quant_method = DeltaMethod(place.module.quant_method, layer, step)
            if hasattr(place.module, FUSED):
                setattr(place.module, FUSED, False)
    heads = [layer for layer in arena.layers if layer.place.kind == HEAD] or [
        layer for layer in arena.layers if layer.place.kind == EMBEDDING
    ]
    if arena.extra_rows and heads:
        _widen(model, heads[-1], arena, step)


def uninstall(model: nn.Module, arena: Arena, names: Collection[str], replace: Any) -> None:
    """Give layers back to vLLM; no expert can change them then.

    Args:
        names: of the layers.
        replace: as of `install`.
    """
    for layer in arena.drop(names):
        module = layer.place.module
        if layer.place.kind == NORM:
            replace(model, layer.place.name, module)
        elif isinstance(module.quant_method, DeltaMethod):
            module.quant_method = module.quant_method.inner


def _widen(model: nn.Module, head: Layer, arena: Arena, step: Step) -> None:
    """Logits of the experts' own tokens after the base's, and none for tokens that a request's model lacks."""
    processors = [module for name, module in model.named_modules() if name.split(".")[-1] == "logits_processor"]
    if len(processors) != 1 or head.place.module.tp_size != 1:
        raise IncompatibleError("an expert's own tokens need one logits processor and no tensor parallelism")
    scale, cap = processors[0].scale, processors[0].soft_cap

    def widen(_: nn.Module, arguments: tuple[Any, ...], logits: Tensor | None) -> Tensor | None:
        if logits is None:
            return None
        inputs = arguments[1]
        first = first_row(inputs, step)
        slots = head_slots(inputs, step, first) or [-1] * len(inputs)
        index = torch.tensor(slots, device=logits.device)
        if head.extra is not None:
            every = torch.einsum("th,seh->tse", inputs, head.extra).to(logits.dtype)
            every = (every if cap is None else torch.tanh(every / cap) * cap) * scale
            logits = torch.cat([logits, every[torch.arange(len(index), device=logits.device), index]], dim=1)
        beyond = torch.arange(logits.shape[1], device=logits.device) >= arena.sizes[index][:, None]
        return logits.masked_fill(beyond, -torch.inf)

    processors[0].register_forward_hook(widen)
