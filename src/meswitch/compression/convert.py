"""One pass over a checkpoint pair: every tensor is encoded and written.

Without calibration the tensors are taken in the order of their names. With calibration the expert runs forward once
over the text (`walk`), and each linear layer is compressed the moment its inputs are known. Either way a few tensors
are in memory at a time, files are read and written beside the encoder (`ahead`), and a run that was interrupted goes on
after its last finished shard.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from meswitch.artifact import Artifact, ArtifactWriter, Manifest, fingerprint
from meswitch.artifact.manifest import BaseInfo, ExpertInfo, Provenance
from meswitch.artifact.writer import companion_digests
from meswitch.checkpoint import Checkpoint
from meswitch.codec import CodedDelta, PackedDelta, Spec, encode, encode_baseline
from meswitch.compression.ahead import Behind, Reader
from meswitch.compression.calibration import CalibrationSet
from meswitch.compression.compatibility import role_of
from meswitch.compression.large_delta import LargeDeltas
from meswitch.compression.options import Options
from meswitch.compression.walk import compute_dtype, walk
from meswitch.errors import IncompatibleError, MeswitchError
from meswitch.tensorfile import NAMES
from meswitch.threads import fitting_threads
from meswitch.version import __version__

# (tensors done, tensors in all, name of the last one)
Progress = Callable[[int, int, str], None]


class Conversion:
    """One pass: the pair, the writer, and what is done so far.

    Args:
        specs: of tensors that do not follow the options. text: recorded in the manifest. moments: token ids over which
            the inputs of layers are measured; None compresses data-free.
    """

    def __init__(
        self,
        base: Checkpoint,
        expert: Checkpoint,
        out: Path,
        options: Options,
        specs: Mapping[str, Spec] | None,
        text: CalibrationSet | None,
        moments: list[list[int]] | None,
        device: torch.device,
        overwrite: bool,
        progress: Progress | None,
    ) -> None:
        self.base, self.expert, self.options, self.specs = base, expert, options, specs or {}
        self.text, self.moments, self.device, self.progress = text, moments, device, progress
        self.base_fingerprint = fingerprint(base)
        plan = [__version__, self.base_fingerprint, fingerprint(expert), asdict(options), text and asdict(text.info)]
        plan.append({name: asdict(spec) for name, spec in self.specs.items()})
        self.writer = ArtifactWriter(out, hashlib.sha256(json.dumps(plan).encode()).hexdigest(), overwrite=overwrite)
        self.done = set(self.writer.entries)
        self.large = LargeDeltas()
        self._moment_of: tuple[Tensor, Tensor] | None = None  # the last inputs seen, and their second moment
        self._reader = Reader(base, expert, pinned=device.type == "cuda")
        self._behind = Behind()

    def run(self) -> Artifact:
        with self._reader, self._behind:
            if self.moments is not None and self.options.uses_inputs and len(self.done) < len(self.expert.tensors):
                walk(
                    self.expert,
                    self.moments,
                    self._visit,
                    device=self.device,
                    dtype=compute_dtype(self.device),
                    plan=lambda modules: self._expect(f"{module}.weight" for module in modules),
                )
            self._expect(self.expert.tensors)
            for name in self.expert.tensors:
                self._compress(name, None)
        entries = self.writer.final_entries()
        self.large.see_resumed(entries, self.expert, self.base)
        companions = list(self.expert.companions())
        self.writer.finish(self._manifest(entries, companions), companions)
        return Artifact.open(self.writer.out)

    def _expect(self, names: Iterable[str]) -> None:
        self._reader.expect(name for name in names if name in self.expert.tensors and name not in self.done)

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
        info = self.expert.tensors[name]
        role = role_of(name, len(info.shape))
        pair = self._reader.take(name)
        ours, base = pair.ours, pair.base
        kind: str
        parts: dict[str, Tensor]
        delta: PackedDelta | CodedDelta | None = None
        if pair.same:
            kind, parts = "same", {}
        elif base is None or not self.options.packs(role, len(info.shape)):
            if not ours.isfinite().all():
                raise MeswitchError(f"{name}: the expert has NaN or infinite values; repair the checkpoint")
            kind, parts = "dense", {"": ours}
        else:
            # reading the text deserves all threads, these small matrices may not
            with fitting_threads(self.device, self.expert.config.hidden_size):
                delta = self._encode(name, role, ours, base, moment)
            kind, parts = "coded" if isinstance(delta, CodedDelta) else "packed", delta.tensors()
        self._behind.call(
            self.writer.add,
            name,
            {suffix: part.cpu() for suffix, part in parts.items()},
            kind=kind,
            role=role,
            shape=info.shape,
            base_sha256=pair.base_sha256,
            bits=delta.bits if isinstance(delta, PackedDelta) else None,
            group_size=delta.group_size if isinstance(delta, PackedDelta) else None,
            method=delta.baseline.name if isinstance(delta, CodedDelta) else None,
            meta=dict(delta.meta) if isinstance(delta, CodedDelta) else None,
        )
        self.done.add(name)
        if self.progress is not None:
            self.progress(len(self.done), len(self.expert.tensors), name)

    def _encode(
        self, name: str, role: str, ours: Tensor, base: Tensor, moment: Tensor | None
    ) -> PackedDelta | CodedDelta:
        rows = min(len(ours), len(base))
        # moved in their own dtype: half the bytes, and the device converts faster
        theirs = base[:rows].to(self.device, non_blocking=True)
        delta = ours[:rows].to(self.device, non_blocking=True).to(torch.float32).sub_(theirs.to(torch.float32))
        self.large.see(name, delta, theirs)
        del theirs
        extra = ours[rows:].contiguous() if len(ours) > rows else None
        options = self.options
        if options.baseline is None:
            spec = self.specs.get(name) or options.spec(role, delta.shape[1])
            return encode(delta, spec, name=name, second_moment=moment, extra=extra)
        request = options.request(role, rows, delta.shape[1], zlib.crc32(name.encode()) + options.seed)
        return encode_baseline(options.method, delta, request, name=name, second_moment=moment, extra=extra)

    def _manifest(self, entries: dict, companions: list[Path]) -> Manifest:
        import transformers

        return Manifest(
            base=base_info(self.base, self.base_fingerprint),
            expert=expert_info(self.expert),
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


def base_info(base: Checkpoint, content: str) -> BaseInfo:
    """The base as a manifest records it. content: its fingerprint."""
    return BaseInfo(Path(base.source).name, content, base.config.model_type, base.config.vocab_size)


def expert_info(expert: Checkpoint) -> ExpertInfo:
    """The full fine-tune as a manifest records it."""
    return ExpertInfo(
        name=Path(expert.source).name,
        parameters=expert.parameters,
        bytes=expert.nbytes,
        dtype="+".join(sorted({NAMES[info.dtype] for info in expert.tensors.values()})),
        vocab_size=expert.config.vocab_size,
        tied_head=bool(expert.aliases),
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
