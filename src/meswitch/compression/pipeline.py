"""Checkpoint pair -> artifact, tensor by tensor.

Without calibration the tensors are taken in the order of their names. With calibration the expert runs forward once
over the text (`walk`), and each linear layer is compressed the moment its inputs are known. Either way a few tensors
are in memory at a time, and a run that was interrupted goes on after its last finished shard.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from meswitch.artifact import Artifact, ArtifactWriter, Manifest, Method, fingerprint, rewrite
from meswitch.artifact.manifest import BaseInfo, ExpertInfo, Provenance
from meswitch.artifact.writer import check_destination, companion_digests
from meswitch.checkpoint import Checkpoint
from meswitch.codec import PackedDelta, Spec, encode
from meswitch.compression.calibration import CalibrationSet, load_calibration
from meswitch.compression.compatibility import check_same_computation, check_same_tensors, role_of
from meswitch.compression.distill import Recipe, check_text, train
from meswitch.compression.walk import walk
from meswitch.errors import ConfigError, IncompatibleError, MeswitchError
from meswitch.tensorfile import NAMES, tensor_bytes
from meswitch.threads import fitting_threads
from meswitch.version import __version__

DISTILL_STEPS, DISTILL_BYTES, DISTILL_SEQUENCES = 100, 256 << 20, 32
# (tensors done, tensors in all, name of the last one)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the bytes of an artifact.

    bits, group_size, damping: see `codec.Spec`. salient: input channels of each linear layer that stay 16 bit; None
    takes one in 512, at least one (0.03 bits a weight at the widths of a 7B model). embeddings: `quantised` treats the
    embedding and the head like any matrix, `exact` keeps the expert's own values. calibration_tokens: at most so many
    are used.
    """

    bits: int = 2
    group_size: int | None = 64
    salient: int | None = None
    damping: float = 0.01
    embeddings: Literal["quantised", "exact"] = "quantised"
    calibration_tokens: int = 32768

    def __post_init__(self) -> None:
        if self.embeddings not in ("quantised", "exact"):
            raise ConfigError(f"embeddings: {self.embeddings!r} is neither quantised nor exact")
        if self.calibration_tokens < 1:
            raise ConfigError(f"calibration_tokens: {self.calibration_tokens} is not a positive number")
        try:
            self.spec("linear", 512)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def spec(self, role: str, in_features: int) -> Spec:
        """How one matrix is quantised."""
        salient = max(1, in_features // 512) if self.salient is None else self.salient
        if role == "embedding":  # no input channels in the sense of saliency: its "input" picks a row
            salient = 0
        return Spec(self.bits, self.group_size, salient, self.damping)


def compress(
    base: str | Path,
    expert: str | Path,
    out: str | Path,
    *,
    bits: int = 2,
    salient: int | None = None,
    group_size: int | None = 64,
    calibration: str | Path | None = None,
    calibration_tokens: int = 32768,
    embeddings: Literal["quantised", "exact"] = "quantised",
    damping: float = 0.01,
    distill: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Compress a fine-tune into an artifact of its difference from the base.

    Args:
        base, expert: checkpoint directories or hub ids.
        out: the directory to create.
        bits: 1-4 a code. salient: input channels of each linear layer that stay 16 bit; None is one in 512.
        group_size: input channels that share a scale; None is one scale a row.
        calibration: text (`.txt`, `.jsonl`) that shows typical inputs; None compresses data-free.
        embeddings: `exact` keeps embedding and head whole.
        distill: steps of training scales, salient weights and norms against the full expert on the calibration text
            (`compression.distill`); 0 does not. It needs both models in memory: None is 100 if the expert has at
            most 256 MB and the text at least 32 sequences, else 0.
        device: where the arithmetic runs, `cpu` or `cuda`.

    Raises:
        MeswitchError: see `meswitch.errors`; nothing half-written is left under the name `out`.
    """
    options = Options(bits, group_size, salient, damping, embeddings, calibration_tokens)
    source, target = Checkpoint.open(base), Checkpoint.open(expert)
    check_same_computation(source, target)
    check_same_tensors(source, target)
    text = None if calibration is None else load_calibration(calibration, target.directory, calibration_tokens)
    if distill is None:
        enough = text is not None and len(text.sequences) >= DISTILL_SEQUENCES
        distill = DISTILL_STEPS if enough and target.nbytes <= DISTILL_BYTES else 0
    if distill and text is None:
        raise ConfigError("distill: needs calibration text to train on; give a calibration file")
    if distill and text is not None:
        check_text(text.sequences)
    out, where = Path(out), torch.device(device)
    check_destination(out, overwrite)
    stage = out.with_name(out.name + ".undistilled") if distill else out
    with fitting_threads(where, target.config.hidden_size):
        artifact = _Run(source, target, stage, options, text, where, overwrite or stage != out, progress).execute()
    if not distill or text is None:
        return artifact
    recipe = Recipe(steps=distill)
    changed, info = train(source, target, artifact, text.sequences, recipe, device=where, progress=progress)
    method = dataclasses.replace(artifact.manifest.method, distillation=info)
    artifact = rewrite(artifact, out, changed, method, overwrite=overwrite)
    shutil.rmtree(stage)
    return artifact


class _Run:
    """One compression: the pair, the writer, and what is done so far."""

    def __init__(
        self,
        base: Checkpoint,
        expert: Checkpoint,
        out: Path,
        options: Options,
        text: CalibrationSet | None,
        device: torch.device,
        overwrite: bool,
        progress: Progress | None,
    ) -> None:
        self.base, self.expert, self.options = base, expert, options
        self.text, self.device, self.progress = text, device, progress
        self.base_fingerprint = fingerprint(base)
        plan = [__version__, self.base_fingerprint, fingerprint(expert), asdict(options), text and asdict(text.info)]
        self.writer = ArtifactWriter(out, hashlib.sha256(json.dumps(plan).encode()).hexdigest(), overwrite=overwrite)
        self.done = set(self.writer.entries)
        self._moment_of: tuple[Tensor, Tensor] | None = None  # the last inputs seen, and their second moment

    def execute(self) -> Artifact:
        if self.text is not None and len(self.done) < len(self.expert.tensors):
            dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
            walk(self.expert, self.text.sequences, self._visit, device=self.device, dtype=dtype)
        for name in self.expert.tensors:
            self._compress(name, None)
        companions = list(self.expert.companions())
        entries = self.writer.final_entries()
        self.writer.finish(self._manifest(entries, companions), companions)
        return Artifact.open(self.writer.out)

    def _visit(self, module: str, inputs: Tensor) -> None:
        name = f"{module}.weight"
        if name in self.done or self.expert.info(name) is None:
            return
        # q, k and v (gate and up) see the same tensor: its second moment is computed once
        if self._moment_of is None or not _same_inputs(self._moment_of[0], inputs):
            self._moment_of = (inputs, second_moment(inputs))
        if name in self.expert.tensors:
            self._compress(name, self._moment_of[1])

    def _compress(self, name: str, moment: Tensor | None) -> None:
        if name in self.done:
            return
        info, theirs = self.expert.tensors[name], self.base.info(name)
        role = role_of(name, len(info.shape))
        ours, base = info.read(), None if theirs is None else theirs.read()
        digest = None if base is None else hashlib.sha256(tensor_bytes(base)).hexdigest()
        kind: str
        parts: dict[str, Tensor]
        packed: PackedDelta | None = None
        if base is not None and base.dtype == ours.dtype and torch.equal(base, ours):
            kind, parts = "same", {}
        elif self._keeps_exact(role, len(info.shape)) or base is None:
            if not ours.isfinite().all():
                raise MeswitchError(f"{name}: the expert has NaN or infinite values; repair the checkpoint")
            kind, parts = "dense", {"": ours}
        else:
            packed = self._encode(name, role, ours, base, moment)
            kind, parts = "packed", packed.tensors()
        self.writer.add(
            name,
            parts,
            kind=kind,
            role=role,
            shape=info.shape,
            base_sha256=digest,
            bits=packed.bits if packed else None,
            group_size=packed.group_size if packed else None,
        )
        self.done.add(name)
        if self.progress is not None:
            self.progress(len(self.done), len(self.expert.tensors), name)

    def _keeps_exact(self, role: str, dimensions: int) -> bool:
        if role in ("embedding", "head"):
            return self.options.embeddings == "exact"
        return role != "linear" or dimensions != 2

    def _encode(self, name: str, role: str, ours: Tensor, base: Tensor, moment: Tensor | None) -> PackedDelta:
        rows = min(len(ours), len(base))
        delta = ours[:rows].to(self.device, torch.float32).sub_(base[:rows].to(self.device, torch.float32))
        extra = ours[rows:].contiguous() if len(ours) > rows else None
        spec = self.options.spec(role, delta.shape[1])
        return encode(delta, spec, name=name, second_moment=moment, extra=extra)

    def _manifest(self, entries: dict, companions: list[Path]) -> Manifest:
        import transformers

        options, expert, base = self.options, self.expert, self.base
        dtypes = {NAMES[info.dtype] for info in expert.tensors.values()}
        return Manifest(
            base=BaseInfo(
                Path(base.source).name, self.base_fingerprint, base.config.model_type, base.config.vocab_size
            ),
            expert=ExpertInfo(
                name=Path(expert.source).name,
                parameters=expert.parameters,
                bytes=expert.nbytes,
                dtype="+".join(sorted(dtypes)),
                vocab_size=expert.config.vocab_size,
                tied_head=bool(expert.aliases),
            ),
            method=Method(
                name="me-switch",
                bits=options.bits,
                group_size=options.group_size,
                salient=options.salient,
                embeddings=options.embeddings,
                damping=options.damping,
                calibration=None if self.text is None else self.text.info,
            ),
            tensors=dict(sorted(entries.items())),
            companions=companion_digests(companions),
            provenance=Provenance(
                __version__,
                torch.__version__,
                transformers.__version__,
                datetime.now(UTC).isoformat(timespec="seconds"),
            ),
        )


def second_moment(inputs: Tensor) -> Tensor:
    """`X^T X / n` of [tokens, in_features] inputs: [in_features, in_features] float32.

    Raises:
        IncompatibleError: the inputs have NaN or infinite values.
    """
    inputs = inputs.float()
    moment = inputs.T @ inputs / len(inputs)
    if not moment.diagonal().isfinite().all():
        raise IncompatibleError("calibration: the expert's activations overflow; its weights are damaged")
    return moment


def _same_inputs(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)
