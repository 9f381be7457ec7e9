"""Residency of compressed experts: disk, host memory, device slots."""

from meswitch.slots.store import ExpertStore, Residency

__all__ = ["ExpertStore", "Residency"]
