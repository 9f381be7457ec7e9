"""Which weights training may change: all of them, or low-rank adapters through PEFT (the extra `lora`)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.errors import ConfigError
from meswitch.router.base import RouterError

_A, _B = ".lora_A.weight", ".lora_B.weight"


def add_adapters(model: Any, rank: int, alpha: int, top: float = 1.0) -> dict[str, nn.Parameter]:
    """Put LoRA adapters on all linear layers but the head, in place; the adapters' parameters by name.

    top: the share of the blocks, from the last one down, that get them. Gradients go no further down than they must,
    so half the blocks cost three quarters of the time.

    Raises:
        ConfigError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError(
            "weights: 'lora' needs PEFT; install it with `pip install 'meswitch[lora]'`, or train with `--weights full`"
        ) from None
    head = model.get_output_embeddings()
    lowest = round(model.config.get_text_config().num_hidden_layers * (1 - top))
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and _block(name) >= lowest
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets), model)
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _block(name: str) -> int:
    """The number of the block that a module belongs to: `model.layers.7.mlp.up_proj` -> 7."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def take_adapters(model: nn.Module) -> dict[str, Tensor]:
    """The adapters under plain names (`<module>.lora_A.weight` [rank, in], `.lora_B.weight` [out, rank]), removed.

    The model is again what it was before `add_adapters`, with its own linear layers.
    """
    from peft.tuners.lora import LoraLayer

    tensors: dict[str, Tensor] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        tensors[name + _A] = module.lora_A["default"].weight.detach().cpu().float().contiguous()
        tensors[name + _B] = module.lora_B["default"].weight.detach().cpu().float().contiguous()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    return tensors


@torch.no_grad()
def merge_adapters(model: nn.Module, tensors: Mapping[str, Tensor], rank: int, alpha: int) -> None:
    """weight += alpha / rank x B A, in place; needs no PEFT.

    Raises:
        RouterError: a name without its layer or its other half, or another shape.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in sorted(tensors):
        layer = name.removesuffix(_A).removesuffix(_B)
        if layer not in modules or {layer + _A, layer + _B} - tensors.keys():
            raise RouterError(f"{name}: no adapter of a linear layer of this model; train the router again")
        weight, a, b = modules[layer].weight, tensors[layer + _A], tensors[layer + _B]
        if a.shape != (rank, weight.shape[1]) or b.shape != (weight.shape[0], rank):
            raise RouterError(f"{name}: shapes {tuple(a.shape)}, {tuple(b.shape)} do not fit; train the router again")
        if name.endswith(_A):
            weight += ((alpha / rank) * (b.float() @ a.float())).to(weight)


@torch.no_grad()
def replace_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put fully trained weights in place.

    Raises:
        RouterError: not exactly the model's parameters.
    """
    parameters: Mapping[str, Any] = dict(model.named_parameters())
    for name in tensors.keys() | parameters.keys():
        if name not in tensors or name not in parameters or tensors[name].shape != parameters[name].shape:
            raise RouterError(f"{name}: the stored weights are not those of this model; train the router again")
        parameters[name].copy_(tensors[name])
