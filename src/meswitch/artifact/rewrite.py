"""A new artifact from an old one: some tensors replaced, the rest copied."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from meswitch.artifact.manifest import Method
from meswitch.artifact.reader import Artifact
from meswitch.artifact.writer import ArtifactWriter
from meswitch.codec import CodedDelta, PackedDelta


def rewrite(
    artifact: Artifact,
    out: Path,
    changed: Mapping[str, PackedDelta | CodedDelta | Tensor],
    method: Method,
    *,
    overwrite: bool,
) -> Artifact:
    """Write `artifact` to `out` with the tensors in `changed`; shapes, dtypes and kinds stay as they are.

    Raises:
        ArtifactError: `out` exists, or cannot be written.
    """
    plan = f"{artifact.manifest.to_json()}{dataclasses.asdict(method)}"
    writer = ArtifactWriter(out, hashlib.sha256(plan.encode()).hexdigest(), overwrite=overwrite)
    for name, entry in artifact.manifest.tensors.items():
        if name in writer.entries:
            continue
        value = changed.get(name)
        if isinstance(value, PackedDelta | CodedDelta):
            parts = value.tensors()
        elif value is not None:
            parts = {"": value}
        else:
            parts = {suffix: artifact.read_stored(name, suffix) for suffix in entry.stored}
        writer.add(
            name,
            parts,
            kind=entry.kind,
            role=entry.role,
            shape=entry.shape,
            base_sha256=entry.base_sha256,
            bits=entry.bits,
            group_size=entry.group_size,
            method=entry.method,
            meta=entry.meta,
        )
    tensors = dict(sorted(writer.final_entries().items()))
    manifest = dataclasses.replace(artifact.manifest, tensors=tensors, method=method)
    writer.finish(manifest, [artifact.directory / name for name in artifact.manifest.companions])
    return Artifact.open(out)
