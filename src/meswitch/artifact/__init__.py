"""The on-disk format: manifest, reading, writing, byte accounting. See docs/concepts/format.md."""

from meswitch.artifact.manifest import Calibration, Entry, Manifest, Method
from meswitch.artifact.reader import Accounting, Artifact, ReadAhead, account, delta_from_parts
from meswitch.artifact.writer import ArtifactWriter, rewrite
from meswitch.checkpoint import fingerprint

__all__ = [
    "Accounting",
    "Artifact",
    "ArtifactWriter",
    "Calibration",
    "Entry",
    "Manifest",
    "Method",
    "ReadAhead",
    "account",
    "delta_from_parts",
    "fingerprint",
    "rewrite",
]
