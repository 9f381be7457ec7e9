"""The mean of a training run's weights over its last steps: flatter than any one of them, and better on what is new.

Averaging along the way is stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407, section 3).
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class Average:
    """mean: name -> the mean so far, of float32 weights; empty before the first step that counts."""

    def __init__(self, weights: Mapping[str, Tensor], steps: int, share: float) -> None:
        """share: of the steps, the last ones; 0 averages nothing."""
        self._weights = weights
        self._first = steps - round(share * steps)
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, done: int) -> None:
        """Take the weights after `done` steps in, if these are some of the last."""
        count = done - self._first
        if count < 1:
            return
        for name, value in self._weights.items():
            if count == 1:
                self.mean[name] = value.detach().clone()
            else:
                self.mean[name].lerp_(value, 1 / count)

    @torch.no_grad()
    def put(self) -> None:
        """Make the mean the weights, in place."""
        for name, value in self.mean.items():
            self._weights[name].copy_(value)
