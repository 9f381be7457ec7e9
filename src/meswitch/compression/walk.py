"""Running a checkpoint forward without ever holding it: each module's weights exist while it computes.

The model is built on the meta device. A hook before each module that owns parameters reads them from the checkpoint,
one after it drops them again. One pass over the whole calibration batch then shows every layer its inputs, in the
model's own order and with its own attention masks, at the cost of one layer's weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from meswitch.checkpoint import Checkpoint
from meswitch.errors import IncompatibleError

# (module name, inputs [tokens, in_features]); called before the module computes
Visit = Callable[[str, Tensor], None]


def compute_dtype(device: torch.device) -> torch.dtype:
    """In which a model computes on a device: CPUs are slow in bfloat16, other devices short of memory in float32."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def skeleton(checkpoint: Checkpoint) -> Any:
    """The checkpoint's model with parameters on the meta device and real buffers."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(checkpoint.config, attn_implementation="sdpa")
    return model.eval()


def walk(
    checkpoint: Checkpoint,
    sequences: list[list[int]],
    visit: Visit,
    *,
    device: torch.device,
    dtype: torch.dtype,
    plan: Callable[[list[str]], None] | None = None,
) -> None:
    """Run the sequences through the model and show `visit` the inputs of every linear layer, the head included.

    Args:
        sequences: token ids; padded on the right to one batch, padding is not shown.
        plan: is told beforehand the names of the linear layers, in the order in which the model lists them.

    Raises:
        IncompatibleError: the checkpoint lacks a tensor that its architecture has.
    """
    model = skeleton(checkpoint)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    if plan is not None:
        plan([name for name, module in model.named_modules() if isinstance(module, nn.Linear)])
    length = max(len(tokens) for tokens in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    ids, mask = ids.to(device), mask.to(device)
    real = mask.bool()
    head = model.get_output_embeddings()
    head_name = next((name for name, module in model.named_modules() if module is head), None)

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            load_own(module, checkpoint, f"{name}.", device, dtype)
            if isinstance(module, nn.Linear) and args[0].shape[:2] == real.shape:
                visit(name, args[0][real])

        return hook

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    for name, module in model.named_modules():
        if module._parameters and module is not head:
            module.register_forward_pre_hook(before(name))
            module.register_forward_hook(after)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    if head_name is not None:  # its logits are not needed: tokens x vocabulary would be the largest tensor of all
        visit(head_name, hidden[real])


def load_parameters(
    module: nn.Module, checkpoint: Checkpoint, prefix: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Give a part of a skeleton its weights, not to be trained. prefix: what their names begin with.

    Raises:
        IncompatibleError: the checkpoint lacks a tensor that its architecture has.
    """
    for name, part in module.named_modules():
        load_own(part, checkpoint, f"{prefix}{name}." if name else prefix, device, dtype)


def load_own(module: nn.Module, checkpoint: Checkpoint, prefix: str, device: torch.device, dtype: torch.dtype) -> None:
    """The same, of a module without those inside it."""
    for key in list(module._parameters):
        tensor = _parameter(checkpoint, f"{prefix}{key}", module._parameters[key])
        if tensor is not None:
            # moved in its own dtype: half the bytes, and the device converts faster
            module._parameters[key] = nn.Parameter(tensor.to(device).to(dtype), requires_grad=False)


def _parameter(checkpoint: Checkpoint, name: str, slot: nn.Parameter | None) -> Tensor | None:
    if slot is None:
        return None
    if checkpoint.info(name) is None:
        raise IncompatibleError(
            f"{checkpoint.directory}: {checkpoint.config.model_type} needs a tensor {name}, which is not stored; "
            "compress without calibration (--calibration none), or re-save it with the installed transformers"
        )
    return checkpoint.read(name)
