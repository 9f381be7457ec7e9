"""What can be done with a base of some architecture, said before any work: `plan` and `diff` show it."""

import dataclasses
from typing import Any


def support(config: Any) -> dict[str, Any]:
    """For JSON: the model type, the class that is served, what was tried with it, and why vLLM does not serve it.

    `tried` is None for a model type that nobody tried: whether it can be calibrated is found out when compression
    starts, and what serves it is proven when an engine opens. See `meswitch.architecture.Tried` for its fields.
    """
    from meswitch.architecture import architecture_of, model_class, tried
    from meswitch.vllm.support import vllm_support

    known = tried(config.model_type)
    return {
        "model_type": config.model_type,
        "class": model_class(config, text_only=True).__name__,
        "tried": known and dataclasses.asdict(known),
        "vllm": vllm_support(architecture_of(config)),  # reasons why not, none if it is served
    }


def statements(found: dict[str, Any]) -> dict[str, str]:
    """What `support` found, as lines to read; all reasons for each no."""
    import transformers

    known, name = found["tried"], found["class"]
    in_vllm = "\n".join(f"no: {reason}" for reason in found["vllm"]) or "yes"
    if known is None:
        return {
            "compresses": f"{name}: not tried with this model type; what cannot be compressed or calibrated is refused "
            "before any work",
            "served here": "not tried with this model type; proven when an engine opens, which names what it refuses",
            "served in vLLM": in_vllm,
        }
    ways = {
        "batch": "all experts in one running batch",
        "turns": f"experts by turns, slower: {known['reason']}",
        None: f"no: {known['reason']}",
    }
    version = known["transformers"]
    other = "" if version == transformers.__version__ else f" (with transformers {version})"
    return {
        "compresses": f"{name}: " + ("yes" if known["compressed"] else f"no: {known['reason']}"),
        "calibrates": "yes" if known["calibrated"] else f"no: {known['uncalibrated']}",
        "served here": ways[known["runner"]] + other,
        "served in vLLM": in_vllm,
    }
