"""The LLM router: a causal LM answers a multiple-choice question over the experts' descriptions.

One forward pass; the probabilities are those of the option letters at the last position. An expert is nothing but its
description, so one more can be added without training.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.router.base import OTHER, Messages, Router, text_of
from meswitch.router.letters import LetterModel
from meswitch.router.prompt import NONE_OF_THESE, Prompt
from meswitch.router.records import Calibration, LlmFile, LlmSettings, ModelInfo, Provenance
from meswitch.router.storage import write_router
from meswitch.threads import fitting_threads


class LlmRouter(Router):
    """See the module's docstring; `train_llm_router` makes one, `save` and `load_router` keep it.

    Args:
        model, tokenizer: a transformers causal LM in eval mode with its tokenizer.
        info: which model that is. descriptions: of every expert, in the experts' order.
        tuned: what training changed, as `weights` of `settings` says; written by `save`.

    Raises:
        ConfigError: no experts, an empty description, or a tokenizer without letters.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        info: ModelInfo,
        descriptions: Mapping[str, str],
        settings: LlmSettings,
        calibration: Calibration,
        provenance: Provenance,
        *,
        tuned: Mapping[str, Tensor] | None = None,
        fallback: str = "base",
        threshold: float | None = None,
    ) -> None:
        check_descriptions(descriptions)
        self.experts = tuple(descriptions)
        self.labels = (*self.experts, OTHER)
        self.descriptions = dict(descriptions)
        self.fallback = fallback
        self.threshold = calibration.threshold if threshold is None else threshold
        self.info = info
        self.settings = settings
        self.calibration = calibration
        self.provenance = provenance
        self.tuned = dict(tuned or {})
        self.letters = LetterModel(model, Prompt(tokenizer, settings.max_tokens))

    def scores(self, messages_batch: Sequence[Messages]) -> list[dict[str, float]]:
        if not messages_batch:
            return []
        odds = self.log_odds([text_of(messages) for messages in messages_batch])
        rows = (odds.double() / self.calibration.temperature).softmax(1).tolist()
        return [dict(zip(self.labels, row, strict=True)) for row in rows]

    def log_odds(self, texts: Sequence[str]) -> Tensor:
        """[n, labels] float32: each expert's log-odds against "none of these" (the last column, 0).

        Averaged over `settings.permutations` orders of the options. More experts than a question has room for are
        asked for in several questions; "none of these" is in each and makes their answers comparable.
        """
        letters, options = self.letters, self.settings.max_options
        queries = [letters.prompt.query(text) for text in texts]
        room = min(options, len(letters.prompt.letter_ids)) - 1
        groups = [self.experts[i : i + room] for i in range(0, len(self.experts), room)]
        with fitting_threads(letters.model.device, letters.hidden_size):
            parts = [self._group_odds(queries, group) for group in groups]
        return torch.cat([*parts, torch.zeros(len(texts), 1)], 1)

    def with_descriptions(self, descriptions: Mapping[str, str]) -> "LlmRouter":
        """The same model and calibration over other experts, or over other words for the same ones."""
        return LlmRouter(
            self.letters.model,
            self.letters.prompt.tokenizer,
            self.info,
            descriptions,
            self.settings,
            self.calibration,
            self.provenance,
            tuned=self.tuned,
            fallback=self.fallback,
            threshold=self.threshold,
        )

    def save(self, path: str | Path) -> None:
        """Write the router as a directory in one step; a router that is there is replaced.

        The model itself is not written, only what training changed in it.

        Raises:
            RouterError: `path` exists and is not a router, or cannot be written.
        """
        file = LlmFile(
            kind="llm",
            experts=self.experts,
            descriptions=self.descriptions,
            model=self.info,
            settings=self.settings,
            calibration=self.calibration,
            provenance=self.provenance,
        )
        write_router(Path(path), file, self.tuned)

    def _group_odds(self, queries: Sequence[Sequence[int]], group: Sequence[str]) -> Tensor:
        """[n, len(group)] float32."""
        options = [*(self.descriptions[name] for name in group), NONE_OF_THESE]
        total = torch.zeros(len(queries), len(options))
        shifts = rotations(len(options), self.settings.permutations)
        for shift in shifts:
            order = [(i + shift) % len(options) for i in range(len(options))]
            logits = self.letters.answer(queries, [options[i] for i in order])
            total[:, order] += logits.log_softmax(1)
        return (total[:, :-1] - total[:, -1:]) / len(shifts)


def rotations(options: int, wanted: int) -> list[int]:
    """How far to turn the options' order for each question: `wanted` turns, evenly spread, at most one an option.

    With one an option, each option is at each letter once, and the average does not depend on where they started.
    """
    count = max(1, min(wanted, options))
    return [round(i * options / count) for i in range(count)]


def check_descriptions(descriptions: Mapping[str, str]) -> None:
    """
    Raises:
        ConfigError: no experts, or one without a description, or one that is called `other`.
    """
    if not descriptions:
        raise ConfigError("expert: none; an LLM router needs at least one expert with a description")
    for name, text in descriptions.items():
        if name == OTHER:
            raise ConfigError(f"expert.name: {OTHER!r} means 'no expert' in routing data; rename the expert")
        if not text.strip():
            raise ConfigError(
                f"expert.description: {name!r} has none; the LLM router chooses by descriptions, so say in a sentence "
                "what this expert is for"
            )
