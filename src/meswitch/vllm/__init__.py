"""meswitch deltas inside vLLM: `--worker-cls meswitch.vllm.DeltaWorker`. See docs/use/vllm.md.

Nothing here is imported by the rest of the package, and vLLM only when a name is asked for.
"""

from importlib.util import find_spec
from typing import Any

from meswitch.errors import ConfigError

__all__ = ["DeltaWorker"]


def __getattr__(name: str) -> Any:
    if name != "DeltaWorker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed; install meswitch[vllm] (on a CPU: see docs/use/vllm.md)")
    from meswitch.vllm.worker import DeltaWorker

    return DeltaWorker
