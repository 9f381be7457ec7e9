"""One GPU, many full fine-tunes of one base LLM: compress, route, serve."""

import importlib
from typing import TYPE_CHECKING, Any

from meswitch.cpu import wait_passively

__version__ = "0.1.0"

wait_passively()

if TYPE_CHECKING:
    from meswitch.artifact import Artifact
    from meswitch.compression import Options, compress, load_merged
    from meswitch.compression.merge import merge
    from meswitch.engine import Chunk, Completion, Engine, SamplingParams
    from meswitch.engine_options import EngineOptions
    from meswitch.errors import MeswitchError
    from meswitch.family import Family

# Where each public name lives: torch is imported when the first one that needs it is used.
_HOME = {
    "Artifact": "artifact",
    "Chunk": "engine",
    "Completion": "engine",
    "Engine": "engine",
    "EngineOptions": "engine_options",
    "Family": "family",
    "MeswitchError": "errors",
    "SamplingParams": "engine",
    "Options": "compression",
    "compress": "compression",
    "load_merged": "compression",
    "merge": "compression.merge",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'meswitch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"meswitch.{_HOME[name]}"), name)


__all__ = [
    "Artifact",
    "Chunk",
    "Completion",
    "Engine",
    "EngineOptions",
    "Family",
    "MeswitchError",
    "Options",
    "SamplingParams",
    "__version__",
    "compress",
    "load_merged",
    "merge",
]
