"""Experts' way from disk through host memory into device slots. See `store` for the embedded engine's; the host
tier and the tables of `layout` are both engines'."""

from meswitch.slots.store import ExpertStore, Held, Residency
from meswitch.slots.tiers import HostTier, Loader
from meswitch.slots.versions import Version

__all__ = ["ExpertStore", "Held", "HostTier", "Loader", "Residency", "Version"]
