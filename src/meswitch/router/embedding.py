"""The first router: the base model's hidden states and the query's words, with calibrated linear heads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from meswitch.router.base import OTHER, Messages, Router, text_of
from meswitch.router.encoder import Encoder, Progress
from meswitch.router.lexical import Bags, bags
from meswitch.router.storage import KIND, BaseInfo, Calibration, Provenance, RouterFile, Settings, write_router
from meswitch.threads import fitting_threads


@dataclass(frozen=True, slots=True)
class Features:
    """What the heads see of `n` texts: words, and hidden states [n, width] float32."""

    words: Bags
    states: Tensor

    def select(self, rows: Tensor) -> "Features":
        return Features(self.words.select(rows), self.states[rows])


@dataclass(frozen=True, slots=True)
class Heads:
    """The two linear heads; their logits add up.

    words: [buckets, labels]. mean, scale: [width], applied to the states before weight: [width, labels].
    bias: [labels]. All float32.
    """

    words: Tensor
    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, features: Features) -> Tensor:
        """[n, labels] float32, before the temperature."""
        states = (features.states - self.mean) * self.scale
        return features.words.weighted(self.words) + states @ self.weight + self.bias


class EmbeddingRouter(Router):
    """See the module's docstring; `meswitch.router.train.train_router` makes one, `save` and `load_router` keep it."""

    def __init__(
        self,
        encoder: Encoder,
        heads: Heads,
        experts: Sequence[str],
        settings: Settings,
        calibration: Calibration,
        provenance: Provenance,
        *,
        fallback: str = "base",
        threshold: float | None = None,
    ) -> None:
        self.experts = tuple(experts)
        self.fallback = fallback
        self.threshold = calibration.threshold if threshold is None else threshold
        self.encoder = encoder
        self.heads = heads
        self.settings = settings
        self.calibration = calibration
        self.provenance = provenance
        self.labels = (*self.experts, OTHER) if len(heads.bias) > len(self.experts) else self.experts

    def scores(self, messages_batch: Sequence[Messages]) -> list[dict[str, float]]:
        if not messages_batch:
            return []
        with fitting_threads(self.encoder.model.device, self.encoder.hidden_size):
            features = extract(self.encoder, [text_of(messages) for messages in messages_batch], self.settings)
            logits = self.heads.logits(features) / self.calibration.temperature
            rows = logits.double().softmax(1).tolist()
        return [dict(zip(self.labels, row, strict=True)) for row in rows]

    def save(self, path: str | Path) -> None:
        """Write the router as a directory in one step; a router that is there is replaced.

        Raises:
            RouterError: `path` exists and is not a router, or cannot be written.
        """
        encoder = self.encoder
        file = RouterFile(
            kind=KIND,
            experts=self.experts,
            other=self.labels != self.experts,
            base=BaseInfo(encoder.fingerprint, encoder.hidden_size, encoder.vocab_size),
            settings=self.settings,
            calibration=self.calibration,
            provenance=self.provenance,
        )
        heads = self.heads
        tensors = {
            "words.weight": heads.words,
            "states.mean": heads.mean,
            "states.scale": heads.scale,
            "states.weight": heads.weight,
            "bias": heads.bias,
        }
        write_router(Path(path), file, tensors)


def extract(encoder: Encoder, texts: Sequence[str], settings: Settings, progress: Progress | None = None) -> Features:
    """Everything that the heads see of some texts."""
    states = encoder.encode(texts, settings.layers, settings.max_tokens, progress)
    with torch.inference_mode(False):  # plain tensors, so that training may differentiate through them
        return Features(bags(texts, settings.buckets), states.clone())
