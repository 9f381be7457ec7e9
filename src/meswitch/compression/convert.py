"""One pass over a checkpoint pair: every tensor is encoded and written.

Without calibration the tensors are taken in the order of their names. With calibration the expert runs forward once
over the text (`inputs.Walk`), and the tensors of a block are compressed as soon as their inputs are known. Either way a
few tensors are in memory at a time: two threads read the next ones and write the last ones while one is encoded
(reading, SHA-256 and writing are done without Python's lock). A run that was interrupted goes on after its last
finished shard.
"""

import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from meswitch import __version__
from meswitch.architecture import STACKS, architecture_of, as_matrix
from meswitch.artifact import Artifact, ArtifactWriter, Entry, Manifest, Method, fingerprint
from meswitch.artifact.manifest import BaseInfo, ExpertInfo, Provenance, labels
from meswitch.artifact.writer import companion_digests, digest
from meswitch.checkpoint import Checkpoint
from meswitch.codec import (
    EXACT_DTYPES,
    CodedDelta,
    LowRankDelta,
    PackedDelta,
    Rank,
    Spec,
    encode,
    encode_coded,
    encode_exact,
    encode_pair,
    joined,
    same_bits,
)
from meswitch.compression.compatibility import SMALL, LargeDeltas
from meswitch.compression.inputs import Inputs, Walk
from meswitch.compression.options import Options, recipe_of
from meswitch.compression.partial_model import working_dtype
from meswitch.compression.text import CalibrationSet
from meswitch.cpu import fitting_threads
from meswitch.errors import MeswitchError
from meswitch.tensorfile import NAMES, TensorInfo, tensor_bytes
from meswitch.units import Progress

LEAST_TOKENS = 16  # an expert of a mixture that fewer reach is compressed data-free


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is known before the pass.

    Args:
        text: calibration text, recorded in the manifest.
        moments: token ids over which the inputs of layers are measured; None compresses data-free.
        specs: of tensors that do not follow the options.
    """

    text: CalibrationSet | None = None
    moments: list[list[int]] | None = None
    specs: Mapping[str, Spec | Rank] = field(default_factory=dict)


class Converter:
    """One pass: the pair, the writer, and what is done so far.

    Args:
        base: matched with the expert (`compatibility.matched`).
        expert: the full fine-tune.
        out: the artifact's directory.
        options: what decides its bytes.
        prepared: what was found out before the pass.
        device: where the arithmetic runs.
        overwrite: replace an artifact that exists.
        progress: is told how far it is.
    """

    def __init__(
        self,
        base: Checkpoint,
        expert: Checkpoint,
        out: Path,
        options: Options,
        prepared: Preparation,
        device: torch.device,
        overwrite: bool,
        progress: Progress,
    ) -> None:
        self.base, self.expert, self.options, self.specs = base, expert, options, prepared.specs
        self.text, self.moments, self.device, self.progress = prepared.text, prepared.moments, device, progress
        self.base_fingerprint = fingerprint(base)
        method, own = asdict(self._method()), {name: asdict(spec) for name, spec in self.specs.items()}
        self.plan = digest(__version__, self.base_fingerprint, fingerprint(expert), method, own, device.type)
        known = labels(Path(base.source).name, Path(expert.source).name, options.describe(None).name)
        self.writer = ArtifactWriter(out, self.plan, overwrite=overwrite, labels=known)
        self.done = set(self.writer.entries)
        self.roles = roles_of(expert)
        self._weights_done = sum(map(self._weights, self.done))
        self.large = LargeDeltas()
        self.shares: dict[str, float] = {}
        self._reader = PairReader(base, expert, pinned=device.type == "cuda")
        self._writing = WriterThread()

    def run(self, *, is_made: bool = False) -> Artifact:
        """Encode and write what is not done yet. is_made: all was, by a run that was interrupted afterwards."""
        if is_made:
            made = Artifact.open(self.writer.out)
            self.large.see_resumed(made.manifest.tensors, self.expert, self.base)
            return made
        self._tell("the first tensors")
        if len(self.done) < len(self.expert.tensors):
            self.shares = self._shares()
        with self.writer, self._reader, self._writing:
            if self.moments is not None and self.options.uses_inputs and len(self.done) < len(self.expert.tensors):
                walk = Walk(self.expert, self.moments, self.device, working_dtype(self.device, self.expert.parameters))
                self._expect(walk.order)
                for names, seen in walk.steps(self.done):
                    for name in names:
                        self._compress(name, seen.get(name, ()))
            self._expect(self.expert.tensors)
            for name in self.expert.tensors:
                self._compress(name)
        entries = self.writer.final_entries()
        self.large.see_resumed(entries, self.expert, self.base)
        companions = list(self.expert.companions())
        self.writer.finish(self._manifest(entries, companions), companions)
        return Artifact.open(self.writer.out)

    def _shares(self) -> dict[str, float]:
        """What a codec that compares the matrices found for each: name -> `CodecRequest.share`."""
        sharing = None if self.options.is_exact else self.options.codec.sharing
        if sharing is None:
            return {}
        measured: dict[str, tuple[float, int]] = {}
        for name, info in self.expert.tensors.items():
            theirs, role = self.base.info(name), self.roles[name]
            if theirs is None or not self.options.packs(role):
                continue
            ours, base = info.read(), theirs.read()
            if not same_bits(base, ours):
                delta = difference(ours, base, role, self.device).delta
                measured[name] = sharing.measure(delta), delta.numel()
        return sharing.allocate(measured, self.options.parameters)

    def _tell(self, name: str) -> None:
        self.progress("compressing", self._weights_done, self.expert.parameters, name)

    def _weights(self, name: str) -> int:
        return math.prod(self.expert.tensors[name].shape)

    def _expect(self, names: Iterable[str]) -> None:
        self._reader.expect(name for name in names if name in self.expert.tensors and name not in self.done)

    def _compress(self, name: str, inputs: Sequence[tuple[Tensor, Inputs]] = ()) -> None:
        """inputs: rows of the tensor's matrix, and what they are multiplied with."""
        if name in self.done:
            return
        info = self.expert.tensors[name]
        role = self.roles[name]
        pair = self._reader.take(name)
        ours, base = pair.ours, pair.base
        entry = Entry("same", role, info.shape, {}, pair.base_sha256)
        parts: dict[str, Tensor] = {}
        if pair.same:
            pass
        elif self.options.is_exact:
            entry, parts = self._exact(entry, ours, base)
        elif base is None or not self.options.packs(role):
            _check_finite(info, ours)
            entry, parts = replace(entry, kind="dense"), {"": ours}
        else:
            # reading the text deserves all threads, these small matrices may not
            with fitting_threads(self.device, self.expert.config.get_text_config().hidden_size):
                try:
                    delta = self._encode(name, role, ours, base, inputs)
                except MeswitchError:  # of a difference, which may have taken the expert's place; say which side it is
                    for side in filter(None, (info, self.base.info(name))):
                        _check_finite(side, side.read())
                    raise
            parts = delta.tensors()
            if isinstance(delta, PackedDelta):
                entry = replace(entry, kind="packed", bits=delta.bits, group_size=delta.group_size, block=delta.block)
            elif isinstance(delta, LowRankDelta):
                entry = replace(entry, kind="lowrank", scale=delta.scale)
            else:
                entry = replace(entry, kind="coded", method=delta.codec.name, meta=dict(delta.meta))
        self._writing.call(self.writer.add, name, entry, {suffix: part.cpu() for suffix, part in parts.items()})
        self.done.add(name)
        self._weights_done += self._weights(name)
        self._tell(name)

    def _exact(self, entry: Entry, ours: Tensor, base: Tensor | None) -> tuple[Entry, dict[str, Tensor]]:
        """The change bit for bit, or the tensor itself where that is no larger, as with most norms."""
        if base is not None and ours.dtype in EXACT_DTYPES and base.is_floating_point():
            with fitting_threads(self.device, self.expert.config.get_text_config().hidden_size):
                delta = encode_exact(ours, base)
            if delta.nbytes < ours.nbytes:
                return replace(entry, kind="exact", dtype=NAMES[ours.dtype]), delta.tensors()
        return replace(entry, kind="dense"), {"": ours}

    def _encode(
        self, name: str, role: str, ours: Tensor, base: Tensor, inputs: Sequence[tuple[Tensor, Inputs]]
    ) -> PackedDelta | LowRankDelta | CodedDelta:
        changed = difference(ours, base, role, self.device)
        delta, extra, rows = changed.delta, changed.extra, len(changed.delta)
        self.large.see(name, delta, changed.base)
        del changed
        options = self.options
        known = [(rows, own) for rows, own in inputs if own.tokens >= LEAST_TOKENS]
        if not options.makes_packed:
            seed = zlib.crc32(name.encode())
            request = options.request(role, rows, delta.shape[1], seed, self.shares.get(name))
            moment = mean_moment(known)
            return encode_coded(options.method, delta, request, name=name, second_moment=moment, extra=extra)
        spec = self.specs.get(name) or options.spec(role, delta.shape[1])
        if isinstance(spec, Rank):
            return encode_pair(delta, spec, name=name, second_moment=mean_moment(known), extra=extra)
        # what error feedback has made good of a large delta is lost by a longer one
        small = self.large.norms[name] < SMALL
        if role not in STACKS:
            moment = mean_moment(known)
            lengthen = small or moment is None
            return encode(delta, spec, name=name, second_moment=moment, lengthen=lengthen, extra=extra)
        rest = torch.ones(rows, dtype=torch.bool)
        parts = []
        for own_rows, own in known:
            rest[own_rows] = False
            own_rows = own_rows.to(self.device)
            found = encode(delta[own_rows], spec, name=name, second_moment=own.moment, lengthen=small)
            parts.append((own_rows, found))
        if bool(rest.any()):
            own_rows = rest.nonzero().view(-1).to(self.device)
            parts.append((own_rows, encode(delta[own_rows], spec, name=name, lengthen=True)))
        return joined(parts)

    def _method(self) -> Method:
        if self.text is None or self.moments is None:
            return self.options.describe(None)
        measured = sum(map(len, self.moments))
        whole = measured == self.text.info.tokens or not self.options.uses_inputs
        return self.options.describe(replace(self.text.info, measured_tokens=None if whole else measured))

    def _manifest(self, entries: dict, companions: list[Path]) -> Manifest:
        import transformers

        return Manifest(
            base=base_info(self.base, self.base_fingerprint),
            expert=expert_info(self.expert),
            method=self._method(),
            tensors=dict(sorted(entries.items())),
            companions=companion_digests(companions),
            provenance=Provenance(
                __version__,
                torch.__version__,
                transformers.__version__,
                datetime.now(UTC).isoformat(timespec="seconds"),
            ),
            recipe=recipe_of(self.options, self.base.source, self.expert.source),
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """What a fine-tune changed of one matrix.

    Args:
        delta: [rows, in_features] float32, of the rows that both have.
        base: [rows, in_features], the base's values, in their own dtype.
        extra: [extra_rows, in_features], rows that the base does not have, where they were; None if there are none.
    """

    delta: Tensor
    base: Tensor
    extra: Tensor | None


def difference(ours: Tensor, base: Tensor, role: str, device: torch.device) -> Difference:
    """Take the difference of an expert's tensor and the base's, as matrices, on a device. role: of both."""
    ours, base = as_matrix(ours, role), as_matrix(base, role)
    rows = min(len(ours), len(base))
    # moved in their own dtype: half the bytes, and the device converts faster
    theirs = base[:rows].to(device, non_blocking=True)
    delta = ours[:rows].to(device, non_blocking=True).to(torch.float32).sub_(theirs.to(torch.float32))
    return Difference(delta, theirs, ours[rows:].contiguous() if len(ours) > rows else None)


def roles_of(checkpoint: Checkpoint) -> dict[str, str]:
    """What each tensor of a checkpoint is: name -> one of `architecture.ROLES`."""
    return architecture_of(checkpoint.config).roles({name: info.shape for name, info in checkpoint.tensors.items()})


def base_info(base: Checkpoint, content: str) -> BaseInfo:
    """The base as a manifest records it. content: its fingerprint."""
    vocabulary = base.config.get_text_config().vocab_size
    return BaseInfo(Path(base.source).name, content, base.config.model_type, vocabulary)


def expert_info(expert: Checkpoint) -> ExpertInfo:
    """The full fine-tune as a manifest records it."""
    return ExpertInfo(
        name=Path(expert.source).name,
        parameters=expert.parameters,
        bytes=expert.nbytes,
        dtype="+".join(sorted({NAMES[info.dtype] for info in expert.tensors.values()})),
        vocab_size=expert.config.get_text_config().vocab_size,
        tied_head=bool(expert.aliases),
    )


def mean_moment(inputs: Sequence[tuple[Tensor, Inputs]]) -> Tensor | None:
    """The second moment of all inputs of a matrix: [in_features, in_features] float32; None if there are none."""
    different = list({id(own): own for _, own in inputs}.values())
    if len(different) < 2:
        return different[0].moment if different else None
    tokens = sum(own.tokens for own in different)
    return torch.stack([own.moment * (own.tokens / tokens) for own in different]).sum(0)


@dataclass(frozen=True, slots=True)
class TensorPair:
    """A tensor of the expert and the base's of that name, if there is one. same: nothing changed."""

    ours: Tensor
    base: Tensor | None
    base_sha256: str | None
    same: bool


def _check_finite(info: TensorInfo, tensor: Tensor) -> None:
    if not bool(tensor.isfinite().all()):
        raise MeswitchError(f"{info.file}: {info.name}: has NaN or infinite values; repair the checkpoint")


class PairReader:
    """Reads tensor pairs; when one is taken, it starts on the one that is expected next.

    Args:
        pinned: into host memory from which a GPU copies fast.
    """

    def __init__(self, base: Checkpoint, expert: Checkpoint, *, pinned: bool) -> None:
        self._base, self._expert, self._pinned = base, expert, pinned
        self._after: dict[str, str] = {}
        self._ahead: tuple[str, Future[TensorPair]] | None = None
        self._thread = ThreadPoolExecutor(1, "reader")

    def expect(self, names: Iterable[str]) -> None:
        """Say in which order the pairs will be taken. Others may be taken as well: they are read when asked for."""
        order = list(names)
        self._after = dict(pairwise(order))
        self._drop()
        if order:
            self._ahead = order[0], self._thread.submit(self._read, order[0])

    def take(self, name: str) -> TensorPair:
        """A pair; what reading it raised is raised here."""
        if self._ahead is None or self._ahead[0] != name:
            self._drop()
            self._ahead = name, self._thread.submit(self._read, name)
        (_, taken), self._ahead = self._ahead, None
        if name in self._after:
            self._ahead = self._after[name], self._thread.submit(self._read, self._after[name])
        return taken.result()

    def _drop(self) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
            self._ahead = None

    def _read(self, name: str) -> TensorPair:
        ours = self._expert.tensors[name].read(pinned=self._pinned)
        theirs = self._base.info(name)
        if theirs is None:
            return TensorPair(ours, None, None, False)
        base = theirs.read(pinned=self._pinned)
        digest = hashlib.sha256(tensor_bytes(base)).hexdigest()
        return TensorPair(ours, base, digest, same_bits(base, ours))

    def __enter__(self) -> "PairReader":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)


class WriterThread:
    """Calls a function in another thread, one call at a time and in order; an error is raised by the next call.

    Leaving the `with` block waits for the last call.
    """

    def __init__(self) -> None:
        self._last: Future[Any] | None = None
        self._thread = ThreadPoolExecutor(1, "writer")

    def call(self, function: Callable[..., None], *args: Any, **keywords: Any) -> None:
        """Wait for the call before, then start this one."""
        self.wait()
        self._last = self._thread.submit(function, *args, **keywords)

    def wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> "WriterThread":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()
