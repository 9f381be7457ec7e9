"""How to distil: the default recipe, and that of a method that was published with one."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from meswitch.errors import ConfigError

LOSSES = ("kl", "mse")
SCOPES = ("model", "block")
Scope = Literal["model", "block"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train.

    steps, batch: sequences a step. learning_rate: of AdamW, falling to 0 as a cosine, after ten steps of rising.
    relative: the learning rate is a share of what is trained: 0.02 moves a scale by about 2 % a step at most. If not,
    it moves a scale by that much itself; packed tensors are always trained relatively. betas: of AdamW.

    loss: `kl`, the divergence from the full expert, or `mse` of the logits. hidden: weight of a second loss, the
    squared error of every block's output, relative to that output. question_weight: what a token that is not the
    assistant's counts in both, against 1 for one that is. length: training sequences are cut at so many tokens; None
    uses them whole.

    norms: train them too. codes: train the codes of packed tensors with their scales. check_every: steps between looks
    at the held-out text (a tenth of the sequences).

    scope: `model` trains end to end, `block` one block after the other and the head last, so many steps each; the loss
    on logits is then that of the head, `hidden` has no meaning (`compression.distill.blockwise`).
    """

    steps: int = 300
    learning_rate: float = 2e-2
    relative: bool = True
    betas: tuple[float, float] = (0.8, 0.99)
    batch: int = 16
    loss: Literal["kl", "mse"] = "kl"
    hidden: float = 5.0
    question_weight: float = 0.1
    length: int | None = None
    norms: bool = True
    codes: bool = True
    check_every: int = 100
    seed: int = 0
    scope: Scope = "model"

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ConfigError(f"recipe: scope: {self.scope!r} is none of {', '.join(SCOPES)}")
        if self.scope == "block" and self.loss != "kl":
            raise ConfigError(f"recipe: scope: block by block, the loss is kl, not {self.loss}")
        if self.loss not in LOSSES:
            raise ConfigError(f"recipe: loss: {self.loss!r} is none of {', '.join(LOSSES)}")
        for name in ("batch", "length", "check_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"recipe: {name}: {value} is not a positive number")
        if self.steps < 0 or not self.learning_rate > 0:
            raise ConfigError(f"recipe: {self.steps} steps at learning rate {self.learning_rate}: nothing to train")


_BLOCKWISE = Recipe(steps=100, scope="block")


def recipe_for(method: str, steps: int | None = None, scope: Scope = "model") -> Recipe:
    """A method's own recipe: the published one, or the default. steps: instead of its own.

    Raises:
        ConfigError: a published recipe is to be followed block by block.
    """
    from meswitch.codec import find_codec  # reading the options' help needs no torch

    published = find_codec(method).recipe
    if scope == "block" and published is not None:
        raise ConfigError(f"distill_scope: block: {method}'s published recipe trains end to end; leave it out")
    recipe = _BLOCKWISE if scope == "block" else published or Recipe()
    return recipe if steps is None else dataclasses.replace(recipe, steps=steps)
