"""Checkpoint pair -> artifact, and back."""

from meswitch.compression.merge import load_merged, merge
from meswitch.compression.pipeline import Options, compress
from meswitch.compression.plan import outline, predict

__all__ = ["Options", "compress", "load_merged", "merge", "outline", "predict"]
