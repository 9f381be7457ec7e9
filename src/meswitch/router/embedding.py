"""The embedding router: an encoder's hidden states, the query's words and its style, with calibrated linear heads.

Two questions, two heads. *Which expert?* is learnt from the experts' rows alone, from states and words. *Any expert
at all?* is learnt against the rows of `other`, from states, words and perhaps style. The probability of an expert is
the product. Measured by leaving sources out with a sentence encoder, most unseen sources were chosen as well or better
than with one softmax over experts and `other` (one of six a little worse); for the base that made no clear difference.
"""

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from meswitch.artifact import fingerprint
from meswitch.checkpoint import Checkpoint
from meswitch.cpu import fitting_threads
from meswitch.router.base import OTHER, Messages, RouteOption, Router, RouterError, clip, text_of
from meswitch.router.described import Prior, Space
from meswitch.router.encoder import Encoder, Progress, TextEncoder, open_encoder, shipped_update
from meswitch.router.store import (
    OpenOptions,
    RouterProvenance,
    ScoreCalibration,
    read_tensors,
    register_router,
    write_router,
)

# The words of a query as a bag of hashed features: needs no model, takes microseconds.
#
# Word uni- and bigrams say what a query is about; its first and last words say what kind of request it is ("How
# many", "Write a", "?"). The opening is also taken with content words replaced by their shape, because that
# survives a change of topic: "which actors starred in Alien" and "which rivers run through Peru" both open with
# `which x x in`.


_CJK = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # written without spaces: every character is a word
_WORD = re.compile(rf"{_CJK}|[^\W\d_]+|\d+(?:\.\d+)?|[^\w\s]|_")

# Words that carry the form of a request rather than its topic.
_FORM = """
a an the of to in on at by for with from into about as is are was were be been do does did has have had can could will
would should may might must i you he she it we they me my your his her its our their them this that these those what
which who whom whose when where why how many much all each every any some no not and or but if than then there so more
most less least first last only also other same write find give list show tell make create explain describe name count
return get number function
"""
_FORM_WORDS = frozenset(_FORM.split())
WIDTH = 16
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_PERSON = re.compile(r"\b(?:i|my|me|you|your)\b")
ROWS = 16  # of every label; measured: 64 change little
KIND = "embedding"
BASE = "base"  # the encoder is the family's base


@dataclass(frozen=True, slots=True)
class Bags:
    """Features of `n` texts, laid end to end.

    Args:
        indices: [nnz] int64 buckets.
        offsets: [n] int64, where each text starts.
        values: [nnz] float32, 1/sqrt(features of the text), so that long texts do not score higher than short ones.
    """

    indices: Tensor
    offsets: Tensor
    values: Tensor

    def lengths(self) -> Tensor:
        """[n] int64: how many features each text has."""
        return torch.diff(self.offsets, append=torch.tensor([len(self.indices)]))

    def weighted(self, weight: Tensor) -> Tensor:
        """Sum of the texts' rows of `weight` [buckets, labels] float32: [n, labels] float32."""
        return torch.nn.functional.embedding_bag(
            self.indices, weight, self.offsets, mode="sum", per_sample_weights=self.values
        )

    def select(self, rows: Tensor) -> "Bags":
        """The bags of the texts `rows` [m] int64."""
        starts, lengths = self.offsets[rows], self.lengths()[rows]
        offsets = torch.cumsum(lengths, 0) - lengths
        flat = torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - offsets, lengths)
        return Bags(self.indices[flat], offsets, self.values[flat])


def bags(texts: Sequence[str], buckets: int) -> Bags:
    """Hash every text's distinct features into `buckets` buckets."""
    indices: list[int] = []
    offsets: list[int] = []
    values: list[float] = []
    for text in texts:
        # crc32 rather than hash(): the same in every process.
        found = sorted({zlib.crc32(feature.encode()) % buckets for feature in features(text)})
        offsets.append(len(indices))
        indices += found
        values += [len(found) ** -0.5] * len(found)
    return Bags(
        torch.tensor(indices, dtype=torch.int64),
        torch.tensor(offsets, dtype=torch.int64),
        torch.tensor(values, dtype=torch.float32),
    )


def features(text: str) -> list[str]:
    """Uni- and bigrams, the opening (as words and as shapes) and the ending of a text; never empty."""
    raw = _WORD.findall(clip(text))
    words = ["^", *("0" if word[0].isdigit() else word.lower() for word in raw), "$"]
    opening = words[1:-1]
    shapes = [_shape(word) for word in raw[:4]]
    return [
        *words[:-1],
        *(f"{a} {b}" for a, b in pairwise(words[:-1])),
        *("^^" + " ".join(opening[:n]) for n in (1, 2, 3, 4)),
        *("^~" + " ".join(shapes[:n]) for n in (1, 2, 3, 4)),
        *("$$" + " ".join(words[-n:]) for n in (2, 3)),
    ]


def _shape(word: str) -> str:
    if word[0].isdigit():
        return "0"
    lower = word.lower()
    if lower in _FORM_WORDS or not word.isalpha():
        return lower
    if len(word) > 1 and word.isupper():
        return "XX"
    return "Xx" if word[0].isupper() else "x"


# How a query is written, apart from what it says: 16 numbers that tell a request to an expert from other traffic.
#
# A shortcut to be used with care. Leaving sources out, these numbers alone reach an AUROC of 0.94 and 0.90 on the
# two sources of `other`, but those are all in lower case: with capitals and final marks put in, it falls to 0.53
# and 0.41. They are used beside states and words, and only with encoders that do not see the case.


def style(texts: Sequence[str]) -> Tensor:
    """[len(texts), WIDTH] float32."""
    return torch.tensor([_style(clip(text)) for text in texts], dtype=torch.float32).reshape(len(texts), WIDTH)


def _style(text: str) -> list[float]:
    words = text.split()
    characters = max(1, len(text))
    end = text.rstrip()[-1:]
    return [
        float(text[:1].isupper()),
        float(end == "?"),
        float(end == "."),
        float(end.isalnum()),
        sum(map(str.isupper, text)) / characters * 10,
        float(any(word[:1].isupper() for word in words[1:])),
        float(any(word.isupper() and len(word) > 1 for word in words)),
        float(any(map(str.isdigit, text))),
        sum(map(str.isdigit, text)) / characters * 10,
        float("\n" in text),
        math.log(max(1, len(words))),
        len(_SENTENCE_END.findall(text)) ** 0.5,
        float("," in text),
        float("'" in text),
        float(any(mark in text for mark in "([=_")),
        float(_PERSON.search(text.lower()) is not None),
    ]


# What an embedding router keeps of its training rows, so that experts can be added to it without them.


@dataclass(frozen=True, slots=True)
class KeptRows:
    """Features of ROWS training rows of every label, in the order of the router's labels; float32.

    Args:
        states: [labels x ROWS, width].
        known: [labels x ROWS, known width].
        words: [labels x ROWS, experts], what the word head adds to the logits.
    """

    states: Tensor
    known: Tensor
    words: Tensor

    @classmethod
    def of(cls, states: Tensor, known: Tensor, words: Tensor, targets: Tensor, labels: int) -> "KeptRows":
        """Rows spread evenly over those of each label; of a label that has fewer, some more than once."""
        chosen = torch.cat([spread((targets == label).nonzero()[:, 0]) for label in range(labels)])
        return cls(states[chosen], known[chosen], words[chosen])

    def targets(self) -> Tensor:
        """[labels x ROWS] int64."""
        return torch.arange(len(self.states) // ROWS).repeat_interleave(ROWS)

    def with_expert(self, states: Tensor, known: Tensor) -> "KeptRows":
        """With rows of one more expert, behind those of the others, whose words count for nothing."""
        chosen, at = spread(torch.arange(len(states))), self.words.shape[1] * ROWS
        words = torch.cat([self.words[:at], torch.zeros(ROWS, self.words.shape[1]), self.words[at:]])
        return KeptRows(
            torch.cat([self.states[:at], states[chosen], self.states[at:]]),
            torch.cat([self.known[:at], known[chosen], self.known[at:]]),
            torch.cat([words, torch.zeros(len(words), 1)], 1),
        )


def spread(members: Tensor) -> Tensor:
    """[ROWS] of `members` [n], at even distances."""
    return members[(torch.arange(ROWS) * len(members)) // ROWS]


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """The model whose hidden states the router reads.

    Args:
        fingerprint: identifies it by content.
        update: SHA-256 of the change that its weights have, see `meswitch.router.encoder.Update`; empty for none, as in
            routers of version 3 and before.
    """

    fingerprint: str
    hidden_size: int
    vocab_size: int
    update: str


@dataclass(frozen=True, slots=True)
class EmbeddingSettings:
    """What the heads see and how they are fitted.

    Args:
        layers: which hidden states are averaged (0: embeddings) to choose the expert.
        known_layers: to tell queries for some expert from others.
        max_tokens: of a query.
        buckets: of hashed words.
        smoothing: counts added by the word head.
        words: the word head's weight beside the states'.
        l2: on the state head's weights.
        folds: of the held-out calibration.
        encoder: whose states, `base` or a directory or hub id.
        bits: of its linear layers, 32 or 8.
        style: whether how a query is written counts for telling others.
        lower: whether that is also learnt from rows in lower case, for encoders that see the case.
        prior: where there is one, the weight of its log-odds beside the heads' (measured on 15 sources).
        own: where there is a prior, the weight of the heads' odds beside its own.
        tasks: whether the prior's form has what public sets taught; False in routers of version 2 and before.
        target_precision: what the threshold was chosen for.
        target_coverage: likewise; neither: to tell experts' queries from others.
    """

    layers: tuple[int, ...]
    known_layers: tuple[int, ...]
    max_tokens: int = 64
    buckets: int = 1 << 15
    smoothing: float = 0.7
    words: float = 1.0
    l2: float = 2e-5
    encoder: str = "base"
    bits: int = 32
    style: bool = False
    lower: bool = True
    prior: float = 1.0
    own: float = 0.15
    tasks: bool = True
    target_precision: float | None = None
    target_coverage: float | None = None
    folds: int = 5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class RouterFile:
    """`router.json` without its head (format, version) and the checksum of the tensors.

    Args:
        other: whether the router knows queries that no expert is for.
        added: how many of the experts, the last ones, were added by examples.
        routes: what is said of the experts, if that is where the router starts from.
    """

    kind: str
    experts: tuple[str, ...]
    other: bool
    added: int
    base: EncoderInfo
    settings: EmbeddingSettings
    calibration: ScoreCalibration
    provenance: RouterProvenance
    routes: tuple[RouteOption, ...]
    tensors_sha256: str = ""


@dataclass(frozen=True, slots=True)
class Features:
    """What the heads see of `n` texts.

    Args:
        words: of the texts.
        states: [n, width] float32, to choose the expert.
        known: [n, width] float32, to tell others.
        prior: [n, experts + 1] float32, see `Prior`; None without one.
    """

    words: Bags
    states: Tensor
    known: Tensor
    prior: Tensor | None = None

    def select(self, rows: Tensor) -> "Features":
        prior = None if self.prior is None else self.prior[rows]
        return Features(self.words.select(rows), self.states[rows], self.known[rows], prior)


@dataclass(frozen=True, slots=True)
class Linear:
    """x -> ((x - mean) * scale) @ weight + bias; mean, scale: [width], weight: [width, outputs], bias: [outputs]."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return ((x - self.mean) * self.scale) @ self.weight + self.bias

    def scaled(self, factor: float, shift: float | Tensor = 0.0) -> "Linear":
        """The same head with its outputs times `factor`, plus `shift`."""
        return Linear(self.mean, self.scale, self.weight * factor, self.bias * factor + shift)


@dataclass(frozen=True, slots=True)
class Heads:
    """The linear heads of both questions; float32.

    Args:
        words: [buckets, experts].
        states: width -> experts.
        known: width -> 1, the log-odds of "some expert's" together with `known_words`; None without rows of `other`.
            Each expert that was added by examples has a further column there, and the query is some expert's if any
            column says so.
        known_words: [buckets, 1], with as many columns.
    """

    words: Tensor
    states: Linear
    known: Linear | None
    known_words: Tensor | None

    def logits(self, features: Features, words: float) -> Tensor:
        """[n, experts] float32, before the temperature."""
        return words * features.words.weighted(self.words) + self.states(features.states)

    def odds(self, features: Features) -> Tensor | None:
        """[n] float32: log-odds that some expert is for the text; None if that was not learnt."""
        if self.known is None or self.known_words is None:
            return None
        return (self.known(features.known) + features.words.weighted(self.known_words)).logsumexp(1)

    def scores(self, features: Features, settings: EmbeddingSettings, temperature: float) -> Tensor:
        """[n, experts (+ 1 for other)] float64: log-probabilities."""
        logits = self.logits(features, settings.words).double() / temperature
        which = with_prior(logits, features, settings).log_softmax(1)
        odds = self.odds(features)
        if odds is None:
            return which
        known = odds_with_prior(odds.double(), features, settings)[:, None].clamp(
            -30, 30
        )  # never so sure that a threshold of 1 would let it answer
        return torch.cat([which + logsigmoid(known), logsigmoid(-known)], 1)


@dataclass(frozen=True, slots=True)
class Learnt:
    """What training made of an encoder's states.

    Args:
        heads: of both questions.
        rows: of the training rows, those that are kept.
        prior: where the router started from.
        added: how many of the experts, the last ones, were added by examples (`meswitch.router.train`).
    """

    heads: Heads
    rows: KeptRows
    prior: Prior | None = None
    added: int = 0


def with_prior(logits: Tensor, features: Features, settings: EmbeddingSettings) -> Tensor:
    """[n, experts] float64, of logits after their temperature."""
    return logits if features.prior is None else logits + settings.prior * features.prior[:, :-1].double()


def odds_with_prior(odds: Tensor, features: Features, settings: EmbeddingSettings) -> Tensor:
    """[n] float64, of calibrated log-odds that some expert is for the text."""
    return odds if features.prior is None else settings.own * odds + features.prior[:, -1].double()


@register_router(KIND)
class EmbeddingRouter(Router):
    """See the module's docstring; `meswitch.router.train.train_router` makes one, `save` and `load_router` keep it."""

    file = RouterFile
    unknown = ", or give each new [[expert]] of family.toml `examples`, five lines that are queries for it"

    def __init__(
        self,
        encoder: TextEncoder,
        learnt: Learnt,
        experts: Sequence[str],
        settings: EmbeddingSettings,
        calibration: ScoreCalibration,
        provenance: RouterProvenance,
        *,
        fallback: str = "base",
        threshold: float | None = None,
    ) -> None:
        self.experts = tuple(experts)
        self.fallback = fallback
        self.threshold = calibration.threshold if threshold is None else threshold
        self.encoder = encoder
        self.learnt = learnt
        self.heads = learnt.heads
        self.prior = learnt.prior
        self.settings = settings
        self.calibration = calibration
        self.provenance = provenance
        self.labels = self.experts if learnt.heads.known is None else (*self.experts, OTHER)

    def scores(self, messages_batch: Sequence[Messages]) -> list[dict[str, float]]:
        if not messages_batch:
            return []
        with fitting_threads(self.encoder.device, self.encoder.hidden_size):
            texts = [text_of(messages) for messages in messages_batch]
            features = extract(self.encoder, texts, self.settings, self.prior)
            logs = self.heads.scores(features, self.settings, self.calibration.temperature)
            rows = logs.exp().tolist()
        return [dict(zip(self.labels, row, strict=True)) for row in rows]

    def with_expert(self, option: RouteOption) -> "EmbeddingRouter":
        from meswitch.router.train import add_described  # training makes routers of this module

        return self if option.name in self.experts else add_described(self, [option])

    def nbytes(self) -> int:
        """Of the encoder and the heads in memory."""
        tensors = tensors_of(self.heads, self.learnt.rows).values()
        return self.encoder.nbytes() + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

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
            added=self.learnt.added,
            base=EncoderInfo(encoder.fingerprint, encoder.hidden_size, encoder.vocab_size, encoder.update),
            settings=self.settings,
            calibration=self.calibration,
            provenance=self.provenance,
            routes=() if self.prior is None else self.prior.options,
        )
        write_router(Path(path), file, tensors_of(self.heads, self.learnt.rows))

    @classmethod
    def open(cls, directory: Path, file: RouterFile, given: OpenOptions) -> "EmbeddingRouter":
        """
        Raises:
            RouterError: damaged, or trained with another encoder. CheckpointError: the encoder is gone.
        """
        settings = file.settings
        own = settings.encoder == BASE
        near = directory / settings.encoder  # a path is also looked for beside router.json
        source = given.base if own else near if near.is_dir() else settings.encoder
        found = fingerprint(Checkpoint.open(source))
        if found != file.base.fingerprint:
            raise RouterError(
                f"{directory}: base.fingerprint: trained on the hidden states of another base than {source} "
                f"({file.base.fingerprint:.24}..., this is {found:.24}...); train it again with `meswitch router train`"
            )
        if file.base.update and file.base.update != shipped_update().sha256:
            raise RouterError(
                f"{directory}: base.update: trained with weights that this meswitch does not have "
                f"({file.base.update:.16}...); train it again with `meswitch router train`, or use the version that "
                f"trained it ({file.provenance.meswitch})"
            )
        experts, width = len(file.experts), file.base.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"words.weight": (settings.buckets, experts)}
        shapes |= _shapes("states", len(settings.layers) * width, experts)
        known, columns = len(settings.known_layers) * width + WIDTH * settings.style, 1 + file.added
        if file.other:
            shapes |= _shapes("known", known, columns)
            shapes["known.words"] = (settings.buckets, columns)
        rows = (experts + file.other) * ROWS
        shapes |= {"memory.states": (rows, len(settings.layers) * width), "memory.words": (rows, experts)}
        shapes["memory.known"] = (rows, known)
        tensors = read_tensors(directory, file, shapes)
        encoder: TextEncoder
        if own and given.model is not None:
            encoder = Encoder(given.model, given.tokenizer, found)
        else:
            last = None if file.routes else max(*settings.layers, *settings.known_layers, 0)
            encoder = (
                Encoder.load(given.base, given.device, last)
                if own
                else open_encoder(source, given.device, settings.bits, updated=bool(file.base.update))
            )
            encoder.source = settings.encoder
        for name in ("hidden_size", "vocab_size", "update"):
            if getattr(encoder, name) != getattr(file.base, name):
                raise RouterError(
                    f"{directory}: base.{name}: {getattr(file.base, name)}, but the model has {getattr(encoder, name)}"
                )

        def head(name: str) -> Linear:
            return Linear(*(tensors[f"{name}.{part}"] for part in ("mean", "scale", "weight", "bias")))

        heads = Heads(
            tensors["words.weight"], head("states"), head("known") if file.other else None, tensors.get("known.words")
        )
        kept = KeptRows(*(tensors[f"memory.{part}"] for part in ("states", "known", "words")))
        prior = Prior.of(file.routes, Space(encoder, learnt=settings.tasks)) if file.routes else None
        return cls(
            encoder,
            Learnt(heads, kept, prior, file.added),
            file.experts,
            settings,
            file.calibration,
            file.provenance,
            fallback=given.fallback,
            threshold=given.threshold,
        )

    @classmethod
    def upgraded(cls, data: dict[str, Any], version: int) -> dict[str, Any]:
        settings, base = data.get("settings"), data.get("base")
        if not isinstance(settings, dict) or not isinstance(base, dict):
            return data
        data = data | {"base": {"update": ""} | base}
        if version == 3:
            return data
        if version < 2:
            data, settings = {"routes": []} | data, {"prior": 0.0, "own": 1.0} | settings
        return data | {"settings": {"tasks": False} | settings}


def tensors_of(heads: Heads, kept: KeptRows) -> dict[str, Tensor]:
    """Heads and kept rows by the names they have on disk."""
    tensors = {"words.weight": heads.words}
    tensors |= {f"memory.{part}": getattr(kept, part) for part in ("states", "known", "words")}
    for name, head in (("states", heads.states), ("known", heads.known)):
        if head is not None:
            tensors |= {f"{name}.{part}": getattr(head, part) for part in ("mean", "scale", "weight", "bias")}
    if heads.known_words is not None:
        tensors["known.words"] = heads.known_words
    return tensors


def extract(
    encoder: TextEncoder,
    texts: Sequence[str],
    settings: EmbeddingSettings,
    prior: Prior | None = None,
    progress: Progress | None = None,
) -> Features:
    """Everything that the heads see of some texts."""
    said = () if prior is None else prior.prototypes.layers
    layers = sorted({*settings.layers, *settings.known_layers, *said})
    states = encoder.encode(texts, layers, settings.max_tokens, progress)
    with torch.inference_mode(False):  # plain tensors, so that training may differentiate through them
        parts = dict(zip(layers, states.clone().split(encoder.hidden_size, 1), strict=True))
        known = [parts[layer] for layer in settings.known_layers] + ([style(texts)] if settings.style else [])
        chosen = torch.cat([parts[layer] for layer in settings.layers], 1)
        before = None if prior is None else prior(torch.cat([parts[layer] for layer in said], 1))
        return Features(bags(texts, settings.buckets), chosen, torch.cat(known, 1) if known else chosen[:, :0], before)


def _shapes(name: str, width: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.mean": (width,),
        f"{name}.scale": (width,),
        f"{name}.weight": (width, outputs),
        f"{name}.bias": (outputs,),
    }
