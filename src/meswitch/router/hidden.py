"""Hidden states of the first layers of a transformers model, without computing the rest."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def stack_of(model: Any) -> nn.ModuleList | None:
    """The layers, where most decoders (`layers`) and most encoders (`encoder.layer`) keep them; None elsewhere."""
    for stack in (getattr(model, "layers", None), getattr(getattr(model, "encoder", None), "layer", None)):
        if isinstance(stack, nn.ModuleList):
            return stack
    return None


def hidden_states(model: Any, layers: Sequence[int], depth: int, inputs: dict[str, Any]) -> list[Tensor]:
    """The states [batch, tokens, hidden] after each of `layers`; 0: before the first, depth: the model's output.

    Hooks for this one pass rather than `output_hidden_states`, whose own hooks stay on the layers and count double
    where a shortened model shares them with a whole one.
    """
    stack = stack_of(model)
    if stack is None:
        states = model(**inputs, output_hidden_states=True).hidden_states
        return [states[layer] for layer in layers]
    found: dict[int, Tensor] = {}

    def keep(layer: int, value: Any) -> None:
        found[layer] = value[0] if isinstance(value, tuple) else value

    handles = []
    for layer in {*layers} - {depth}:
        if layer == 0:
            handles.append(stack[0].register_forward_pre_hook(lambda _, args: keep(0, args[0])))
        else:
            handles.append(stack[layer - 1].register_forward_hook(lambda _, __, out, layer=layer: keep(layer, out)))
    try:
        found[depth] = model(**inputs).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    return [found[layer] for layer in layers]


def first_layers(model: Any, count: int, depth: int) -> Any:
    """The model up to its layer `count`, on the same weights; the whole one where that is not known to be possible."""
    stack = stack_of(model)
    if count >= depth or stack is None:
        return model
    kept = stack[: max(1, count)]
    short = copy.copy(model)
    short.config = copy.copy(model.config)
    short.config.num_hidden_layers = len(kept)
    if stack is getattr(model, "layers", None):
        short._modules = {**model._modules, "layers": kept}
    else:
        short._modules = {**model._modules, "encoder": copy.copy(model.encoder)}
        short.encoder._modules = {**model.encoder._modules, "layer": kept}
        short.encoder.config = short.config
        if "pooler" in short._modules:
            short._modules["pooler"] = None
    return short
