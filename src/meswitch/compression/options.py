"""What decides the bytes of an artifact, checked before any work."""

from dataclasses import dataclass
from typing import Literal

import torch

from meswitch.artifact.manifest import Calibration, Method
from meswitch.codec import BASELINES, ME_SWITCH, METHODS, RTN, Request, Spec, nbytes, stored_shapes
from meswitch.codec.baselines.coded import Baseline
from meswitch.errors import ConfigError

DROP = 0.9  # of `dare`
Embeddings = Literal["quantised", "exact"]


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the bytes of an artifact.

    bits, group_size, damping: see `codec.Spec`. salient: input channels of each linear layer that stay 16 bit; None
    takes one in 512, at least one (0.03 bits a weight at the widths of a 7B model). embeddings: `quantised` treats the
    embedding and the head like any matrix, `exact` keeps the expert's own values. calibration_tokens: at most so many
    are used.

    method: one of `codec.METHODS`. embeddings None: whole for methods whose paper leaves them so, else quantised. rank:
    of `svd`; None takes what the default method's bytes allow. drop, seed: of `dare`.
    """

    bits: int = 2
    group_size: int | None = 64
    salient: int | None = None
    damping: float = 0.01
    embeddings: Embeddings | None = None
    calibration_tokens: int = 32768
    method: str = ME_SWITCH
    rank: int | None = None
    drop: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method: {self.method!r} is none of {', '.join(METHODS)}")
        if self.embeddings not in ("quantised", "exact", None):
            raise ConfigError(f"embeddings: {self.embeddings!r} is neither quantised nor exact")
        if self.calibration_tokens < 1:
            raise ConfigError(f"calibration_tokens: {self.calibration_tokens} is not a positive number")
        if self.rank is not None and (self.method != "svd" or self.rank < 1):
            raise ConfigError(f"rank: {self.rank}: at least 1, and for the method svd only")
        if self.drop is not None and (self.method != "dare" or not 0 <= self.drop < 1):
            raise ConfigError(f"drop: {self.drop}: at least 0 and less than 1, and for the method dare only")
        if self.method == "deltazip" and (self.group_size or 0) % 2:
            raise ConfigError(f"group_size: {self.group_size}: two weights of four share a scale: give an even number")
        try:
            self.spec("linear", 512)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def baseline(self) -> Baseline | None:
        """The method, if it does not make packed tensors."""
        return BASELINES.get(self.method)

    @property
    def uses_inputs(self) -> bool:
        """Whether calibration text changes the codes."""
        return self.method == ME_SWITCH if self.baseline is None else self.baseline.uses_inputs

    @property
    def exact_embeddings(self) -> bool:
        if self.embeddings is None:
            return self.baseline is not None and self.baseline.blocks_only
        return self.embeddings == "exact"

    def check_distillation(self, steps: int | None, has_text: bool) -> None:
        """Refuse what would do nothing.

        Raises:
            ConfigError: the method has no scales to train, or no use for calibration text.
        """
        if steps and self.baseline is not None:
            raise ConfigError(
                f"distill: it trains packed tensors; the method {self.method} has none: 0 steps, or {RTN}"
            )
        if has_text and not self.uses_inputs and not steps:
            use = " without distillation" if self.baseline is None else ""
            raise ConfigError(f"calibration: the method {self.method} makes no use of it{use}; leave it out")

    def request(self, role: str, rows: int, in_features: int, seed: int) -> Request:
        """What a baseline is asked for; its budget is what the default method would store for this matrix."""
        shapes = stored_shapes(rows, in_features, self.spec(role, in_features), 0, torch.float32)
        drop = DROP if self.drop is None else self.drop
        return Request(self.bits, self.group_size, nbytes(shapes), self.rank, drop, seed, self.damping)

    def describe(self, calibration: Calibration | None) -> Method:
        """As the manifest records it."""
        baseline, parameters = self.baseline, {}
        if self.rank is not None:
            parameters["rank"] = float(self.rank)
        if self.method == "dare":
            parameters = {"drop": DROP if self.drop is None else self.drop, "seed": float(self.seed)}
        return Method(
            name=self.method,
            bits=self.bits if baseline is None or baseline.bits is None else baseline.bits,
            group_size=self.group_size,
            salient=self.salient if self.method == ME_SWITCH else 0,
            embeddings="exact" if self.exact_embeddings else "quantised",
            damping=self.damping,
            calibration=calibration,
            parameters=parameters or None,
        )

    def spec(self, role: str, in_features: int) -> Spec:
        """How one matrix is quantised, or would be by the default method."""
        salient = max(1, in_features // 512) if self.salient is None else self.salient
        if role == "embedding":  # no input channels in the sense of saliency: its "input" picks a row
            salient = 0
        if self.method == RTN:
            salient = 0
        return Spec(self.bits, self.group_size, salient, self.damping)
