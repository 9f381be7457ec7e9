"""Checkpoint pair -> artifact, and back."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meswitch.compression.merge import load_merged
    from meswitch.compression.options import Options
    from meswitch.compression.pipeline import compress
    from meswitch.compression.plan import outline, predict

# Where each public name lives: the command line reads the options' help (`options`) without torch.
_HOME = {
    "Options": "options",
    "compress": "pipeline",
    "load_merged": "merge",
    "outline": "plan",
    "predict": "plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


__all__ = ["Options", "compress", "load_merged", "outline", "predict"]
