"""Checkpoint pair -> artifact, tensor by tensor.

Without calibration the tensors are taken in the order of their names. With calibration the expert runs forward once
over the text (`walk`), and each linear layer is compressed the moment its inputs are known. Either way a few tensors
are in memory at a time, and a run that was interrupted goes on after its last finished shard.
"""

import dataclasses
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from meswitch.artifact import Artifact, ArtifactWriter, Manifest, fingerprint, rewrite
from meswitch.artifact.manifest import BaseInfo, ExpertInfo, Provenance
from meswitch.artifact.writer import check_destination, companion_digests
from meswitch.checkpoint import Checkpoint
from meswitch.codec import CodedDelta, PackedDelta, encode, encode_baseline
from meswitch.compression.calibration import CalibrationSet, load_calibration
from meswitch.compression.compatibility import check_same_computation, check_same_tensors, role_of
from meswitch.compression.distill import Recipe, check_text, train
from meswitch.compression.options import Embeddings, Options
from meswitch.compression.walk import walk
from meswitch.errors import ConfigError, IncompatibleError, MeswitchError
from meswitch.tensorfile import NAMES, tensor_bytes
from meswitch.threads import fitting_threads
from meswitch.version import __version__

DISTILL_STEPS, DISTILL_BYTES, DISTILL_SEQUENCES = 100, 256 << 20, 32
# (tensors done, tensors in all, name of the last one)
Progress = Callable[[int, int, str], None]


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
    embeddings: Embeddings | None = None,
    damping: float = 0.01,
    distill: int | None = None,
    method: str = "me-switch",
    rank: int | None = None,
    drop: float | None = None,
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
        embeddings: `exact` keeps embedding and head whole, `quantised` compresses them like other matrices; None is
            `quantised`, unless the method's paper leaves them whole.
        distill: steps of training scales, salient weights and norms against the full expert on the calibration text
            (`compression.distill`); 0 does not. It needs both models in memory: None is 100 if the expert has at
            most 256 MB and the text at least 32 sequences, else 0.
        method: `me-switch`, or another paper's for comparison (`codec.METHODS`, docs/baselines.md). rank: of `svd`.
            drop: share of weights that `dare` sets to zero, 0.9 by default.
        device: where the arithmetic runs, `cpu` or `cuda`.

    Raises:
        MeswitchError: see `meswitch.errors`; nothing half-written is left under the name `out`.
    """
    options = Options(bits, group_size, salient, damping, embeddings, calibration_tokens, method, rank, drop)
    options.check_distillation(distill, calibration is not None)
    source, target = Checkpoint.open(base), Checkpoint.open(expert)
    check_same_computation(source, target)
    check_same_tensors(source, target)
    text = None if calibration is None else load_calibration(calibration, target.directory, calibration_tokens)
    if distill is None:
        enough = text is not None and len(text.sequences) >= DISTILL_SEQUENCES
        distill = DISTILL_STEPS if enough and options.baseline is None and target.nbytes <= DISTILL_BYTES else 0
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
    distilled = dataclasses.replace(artifact.manifest.method, distillation=info)
    artifact = rewrite(artifact, out, changed, distilled, overwrite=overwrite)
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
        if self.text is not None and self.options.uses_inputs and len(self.done) < len(self.expert.tensors):
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
        delta: PackedDelta | CodedDelta | None = None
        if base is not None and base.dtype == ours.dtype and torch.equal(base, ours):
            kind, parts = "same", {}
        elif self._keeps_exact(role, len(info.shape)) or base is None:
            if not ours.isfinite().all():
                raise MeswitchError(f"{name}: the expert has NaN or infinite values; repair the checkpoint")
            kind, parts = "dense", {"": ours}
        else:
            delta = self._encode(name, role, ours, base, moment)
            kind, parts = "coded" if isinstance(delta, CodedDelta) else "packed", delta.tensors()
        self.writer.add(
            name,
            parts,
            kind=kind,
            role=role,
            shape=info.shape,
            base_sha256=digest,
            bits=delta.bits if isinstance(delta, PackedDelta) else None,
            group_size=delta.group_size if isinstance(delta, PackedDelta) else None,
            method=delta.baseline.name if isinstance(delta, CodedDelta) else None,
            meta=dict(delta.meta) if isinstance(delta, CodedDelta) else None,
        )
        self.done.add(name)
        if self.progress is not None:
            self.progress(len(self.done), len(self.expert.tensors), name)

    def _keeps_exact(self, role: str, dimensions: int) -> bool:
        if role in ("embedding", "head"):
            return self.options.exact_embeddings
        return role != "linear" or dimensions != 2

    def _encode(
        self, name: str, role: str, ours: Tensor, base: Tensor, moment: Tensor | None
    ) -> PackedDelta | CodedDelta:
        rows = min(len(ours), len(base))
        delta = ours[:rows].to(self.device, torch.float32).sub_(base[:rows].to(self.device, torch.float32))
        extra = ours[rows:].contiguous() if len(ours) > rows else None
        options = self.options
        if options.baseline is None:
            spec = options.spec(role, delta.shape[1])
            return encode(delta, spec, name=name, second_moment=moment, extra=extra)
        request = options.request(role, rows, delta.shape[1], zlib.crc32(name.encode()) + options.seed)
        return encode_baseline(options.method, delta, request, name=name, second_moment=moment, extra=extra)

    def _manifest(self, entries: dict, companions: list[Path]) -> Manifest:
        import transformers

        expert, base = self.expert, self.base
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
            method=self.options.describe(None if self.text is None else self.text.info),
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
