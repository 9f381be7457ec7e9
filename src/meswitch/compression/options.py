"""What decides the bytes of an artifact, checked before any work."""

from dataclasses import dataclass
from typing import Literal

import torch

from meswitch.architecture import EMBEDDING, HEAD, LINEAR, STACKS, TRANSPOSED
from meswitch.artifact.manifest import Calibration, Method, Solver
from meswitch.codec import BASELINES, ME_SWITCH, METHODS, RTN, Request, Spec, nbytes, stored_shapes
from meswitch.codec.baselines.coded import Baseline
from meswitch.errors import ConfigError

DROP = 0.9  # of `dare`
ROW_FLOOR = 0.1  # rows of an embedding that changed less than this share of the average are taken as unchanged
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

    target_bpw: instead of one number of bits, bits and salient channels are shared out over the tensors within this
    budget (`compression.budget`). salient_rule, scales, feedback, refit: see `codec.Spec`.
    """

    bits: int = 2
    group_size: int | None = 128
    salient: int | None = None
    damping: float = 0.01
    embeddings: Embeddings | None = None
    calibration_tokens: int = 524288
    method: str = ME_SWITCH
    rank: int | None = None
    drop: float | None = None
    seed: int = 0
    target_bpw: float | None = None
    salient_rule: str = "error"
    scales: str = "mse"
    feedback: bool = True
    refit: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method: {self.method!r} is none of {', '.join(METHODS)}")
        if self.target_bpw is not None and not (0 < self.target_bpw <= 16 and self.method == ME_SWITCH):
            raise ConfigError(f"target_bpw: {self.target_bpw}: between 0 and 16, and for the method {ME_SWITCH} only")
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
    def solver(self) -> Solver:
        return Solver(self.salient_rule, self.scales, self.feedback, self.refit)

    @property
    def exact_embeddings(self) -> bool:
        if self.embeddings is None:
            return self.baseline is not None and self.baseline.blocks_only
        return self.embeddings == "exact"

    @property
    def has_scales(self) -> bool:
        """Whether distillation has something to train."""
        return self.baseline is None or self.baseline.scale is not None

    def check_distillation(self, steps: int | None, has_text: bool) -> None:
        """Refuse what would do nothing. steps: None if that is not yet decided.

        Raises:
            ConfigError: the method has no scales to train, or no use for calibration text.
        """
        if steps and not self.has_scales:
            raise ConfigError(f"distill: the method {self.method} has no scales to train: 0 steps, or another method")
        if has_text and not self.uses_inputs and (steps == 0 or (steps is None and not self.has_scales)):
            use = " without distillation" if self.has_scales else ""
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
        fixed = self.bits if baseline is None or baseline.bits is None else baseline.bits
        return Method(
            name=self.method,
            bits=fixed if self.target_bpw is None else None,
            target_bpw=self.target_bpw,
            solver=None if self.solver == Options().solver else self.solver,
            group_size=self.group_size,
            salient=self.salient if self.method == ME_SWITCH else 0,
            embeddings="exact" if self.exact_embeddings else "quantised",
            damping=self.damping,
            calibration=calibration,
            parameters=parameters or None,
        )

    def spec(self, role: str, in_features: int) -> Spec:
        """How one matrix is quantised, or would be by the default method."""
        # an embedding's "input" picks a row; the experts of a stack see different tokens: no salient channels for them
        salient = max(1, in_features // 512) if self.salient is None else self.salient
        salient = 0 if role in (EMBEDDING, *STACKS) else salient
        if self.method == RTN:
            return Spec(self.bits, self.group_size, 0, scales=self.scales)
        floor = ROW_FLOOR if role == EMBEDDING else 0.0
        return Spec(
            self.bits,
            self.group_size,
            salient,
            self.damping,
            floor,
            self.salient_rule,
            self.scales,
            self.feedback,
            self.refit,
        )

    def packs(self, role: str) -> bool:
        """Whether a tensor that changed is compressed, not stored whole."""
        if role in (EMBEDDING, HEAD):
            return not self.exact_embeddings
        return role in (LINEAR, TRANSPOSED, *STACKS)
