"""The on-disk format: manifest, fingerprint, reading, writing, byte accounting. See docs/concepts/format.md."""

from meswitch.artifact.accounting import Accounting, account
from meswitch.artifact.fingerprint import fingerprint
from meswitch.artifact.manifest import Calibration, Entry, Manifest, Method
from meswitch.artifact.reader import Artifact, ReadAhead, delta_from_parts
from meswitch.artifact.writer import ArtifactWriter, rewrite

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
