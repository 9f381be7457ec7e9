"""A model of which only parts are in memory: run forward layer by layer, or taken apart into its decoder blocks.

The model is built on the meta device, so none of its weights is loaded before it is asked for, and the code is the
architecture's own. `walk` runs it with a hook before each module that owns parameters, which reads them from the
checkpoint, and one after it, which drops them again: one pass over the whole calibration batch shows every layer its
inputs, at the cost of one layer's weights. `BlockwiseModel` gives its blocks one by one, and the frame around them
(embedding, final norm, head) is the model with blocks that do not compute: masks, positions, scaled embeddings and
capped logits are the architecture's, whatever it is.
"""

import contextlib
import copy
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


class _LastBlockReached(Exception):
    """There is nothing more to see."""


class BlockwiseModel:
    """A model's decoder blocks one by one, and the frame around them; weights are not loaded before they are asked for.

    Args:
        dtype: in which it computes.

    Raises:
        IncompatibleError: the architecture has no list of decoder blocks.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.model: Any = skeleton(checkpoint)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        wanted = checkpoint.config.get_text_config().num_hidden_layers
        lists = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == wanted and name.count(".") <= 1
        ]
        if len(lists) != 1:
            raise IncompatibleError(
                f"{checkpoint.directory}: {checkpoint.config.model_type}: no list of {wanted} decoder blocks; "
                "distil the whole model at once (--distill-scope model)"
            )
        self.prefix, blocks = lists[0]
        self._originals = [copy.deepcopy(block) for block in blocks]
        self._seen: list[tuple[Tensor, dict[str, Any]]] = []
        self._leaving: Tensor | None = None
        for block in blocks:
            block._modules.clear()
            block.forward = self._pass(last=block is blocks[-1])

    def __len__(self) -> int:
        return len(self._originals)

    def _pass(self, *, last: bool) -> Callable[..., Tensor]:
        """What a block does instead of computing: note its arguments, or end with what is to leave the last one."""

        def forward(hidden: Tensor, **arguments: Any) -> Tensor:
            if self._leaving is not None:
                return self._leaving
            self._seen.append((hidden, arguments))
            if last:
                raise _LastBlockReached
            return hidden

        return forward

    def name(self, index: int) -> str:
        """What the names of a block's tensors begin with."""
        return f"{self.prefix}.{index}."

    def block(self, index: int) -> nn.Module:
        """A new copy of a block, with the checkpoint's weights."""
        block = copy.deepcopy(self._originals[index])
        load_parameters(block, self.checkpoint, self.name(index), self.device, self.dtype)
        return block

    def load(self, *, leaving: bool) -> None:
        """Load what `leave` needs (final norm and head), or what `enter` does (embeddings)."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        for name, module in self.model.named_modules():
            if module is not (embedding if leaving else head):
                load_own(module, self.checkpoint, f"{name}." if name else "", self.device, self.dtype)

    def enter(self, ids: Tensor) -> Tensor:
        """What the first block sees of token ids: [sequences, length] -> [sequences, length, hidden_size]."""
        return self._visit(input_ids=ids)[0][0]

    def arguments(self, hidden: Tensor) -> list[dict[str, Any]]:
        """What every block is given beside hidden states of this shape: positions, masks. Padding is on the right."""
        return [arguments for _, arguments in self._visit(inputs_embeds=torch.empty_like(hidden))]

    def leave(self, hidden: Tensor) -> Tensor:
        """Logits of what the last block gave: [tokens, hidden_size] -> [tokens, vocabulary] float32."""
        self._leaving = hidden[:, None]  # each token a sequence of its own: here none sees another
        try:
            return self.model(inputs_embeds=hidden[:, None], use_cache=False).logits[:, 0].float()
        finally:
            self._leaving = None

    def _visit(self, **inputs: Any) -> list[tuple[Tensor, dict[str, Any]]]:
        self._seen = []
        with contextlib.suppress(_LastBlockReached):
            self.model.base_model(**inputs, use_cache=False)
        seen, self._seen = self._seen, []
        return seen
