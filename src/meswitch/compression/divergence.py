"""How far one model's predictions are from another's, differentiable in few passes over the logits."""

from typing import Any

import torch
from torch import Tensor


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(softmax(wanted) || softmax(found)) in nats.

    Args:
        wanted, found: [..., vocabulary] float32 logits; the gradient is `found`'s alone.

    Returns:
        [...] float32.
    """
    result: Tensor = _Divergence.apply(wanted, found)
    return result


class _Divergence(torch.autograd.Function):
    """The gradient is the difference of the probabilities; autograd would take it apart into passes over all logits."""

    @staticmethod
    def forward(ctx: Any, wanted: Tensor, found: Tensor) -> Tensor:
        theirs, ours = wanted.log_softmax(-1), found.log_softmax(-1)
        probability = theirs.exp()
        ctx.save_for_backward(probability, ours)
        return torch.linalg.vecdot(probability, theirs.sub_(ours))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        probability, ours = ctx.saved_tensors
        return None, ours.exp().sub_(probability).mul_(gradients[0][..., None])
