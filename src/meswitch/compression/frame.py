"""A model taken apart: its decoder blocks one by one, and the frame around them (embedding, final norm, head).

The frame is the model's own code with blocks that do not compute. So masks, positions, scaled embeddings and capped
logits are the architecture's, whatever it is, and none of its weights is loaded before it is asked for.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.checkpoint import Checkpoint
from meswitch.compression.walk import load_own, load_parameters, skeleton
from meswitch.errors import IncompatibleError


class _LastBlockReached(Exception):
    """There is nothing more to see."""


class Frame:
    """A model around its blocks, weights not loaded.

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
        wanted = checkpoint.config.num_hidden_layers
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
