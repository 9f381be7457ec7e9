"""PEFT adapters (LoRA, rsLoRA, DoRA): read, checked against a base, and opened as an artifact."""

from meswitch.adapter.artifact import METHOD, open_expert, planned_artifact, write_artifact
from meswitch.adapter.changes import Changes, changes_of
from meswitch.adapter.config import AdapterConfig
from meswitch.adapter.weights import Adapter, find_adapter, is_adapter

__all__ = [
    "METHOD",
    "Adapter",
    "AdapterConfig",
    "Changes",
    "changes_of",
    "find_adapter",
    "is_adapter",
    "open_expert",
    "planned_artifact",
    "write_artifact",
]
