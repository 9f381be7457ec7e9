"""meswitch deltas inside vLLM: `--worker-cls meswitch.vllm.DeltaWorker`. See docs/use/vllm.md.

Nothing here is imported by the rest of the package, and vLLM only when a name is asked for.
"""

from typing import Any

__all__ = ["DeltaWorker"]


def __getattr__(name: str) -> Any:
    if name != "DeltaWorker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from meswitch.vllm.worker import DeltaWorker

    return DeltaWorker
