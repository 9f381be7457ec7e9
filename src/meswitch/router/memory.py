"""What an embedding router keeps of its training rows, so that experts can be added to it without them."""

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 16  # of every label; measured: 64 change little


@dataclass(frozen=True, slots=True)
class Memory:
    """Features of ROWS training rows of every label, in the order of the router's labels; float32.

    states: [labels x ROWS, width]. known: [labels x ROWS, known width]. words: [labels x ROWS, experts], what the word
    head adds to the logits.
    """

    states: Tensor
    known: Tensor
    words: Tensor

    @classmethod
    def of(cls, states: Tensor, known: Tensor, words: Tensor, targets: Tensor, labels: int) -> "Memory":
        """Rows spread evenly over those of each label; of a label that has fewer, some more than once."""
        chosen = torch.cat([spread((targets == label).nonzero()[:, 0]) for label in range(labels)])
        return cls(states[chosen], known[chosen], words[chosen])

    def targets(self) -> Tensor:
        """[labels x ROWS] int64."""
        return torch.arange(len(self.states) // ROWS).repeat_interleave(ROWS)

    def with_expert(self, states: Tensor, known: Tensor) -> "Memory":
        """With rows of one more expert, behind those of the others, whose words count for nothing."""
        chosen, at = spread(torch.arange(len(states))), self.words.shape[1] * ROWS
        words = torch.cat([self.words[:at], torch.zeros(ROWS, self.words.shape[1]), self.words[at:]])
        return Memory(
            torch.cat([self.states[:at], states[chosen], self.states[at:]]),
            torch.cat([self.known[:at], known[chosen], self.known[at:]]),
            torch.cat([words, torch.zeros(len(words), 1)], 1),
        )


def spread(members: Tensor) -> Tensor:
    """[ROWS] of `members` [n], at even distances."""
    return members[(torch.arange(ROWS) * len(members)) // ROWS]
