"""What can be done with a base of some architecture, said before any work: `plan` and `diff` show it."""

from typing import Any


def support(config: Any) -> dict[str, Any]:
    """For JSON: the model type, the class that is served, how the embedded engine serves it, and why vLLM does not.

    `runner` is `batch`, `turns` or None; None with `tried` false is a model type that nobody tried: what runs it is
    proven when an engine opens. `reason` says why it is not the batch.
    """
    from meswitch.architecture import architecture_of, model_class, served_how
    from meswitch.vllm.support import vllm_support

    known = served_how(config.model_type)
    runner, reason = known or (None, None)
    return {
        "model_type": config.model_type,
        "class": model_class(config, text_only=True).__name__,
        "embedded_engine": {"tried": known is not None, "runner": runner, "reason": reason},
        "vllm": vllm_support(architecture_of(config)),  # reasons why not, none if it is served
    }


def served(found: dict[str, Any]) -> str:
    """How the embedded engine serves it, in one line."""
    engine = found["embedded_engine"]
    reason = engine["reason"]
    if not engine["tried"]:
        how = "not tried with this model type; proven when an engine opens, which names what it refuses"
    elif engine["runner"] == "batch":
        how = "all experts in one running batch"
    elif engine["runner"] == "turns":
        how = f"experts by turns, slower: {reason}"
    else:
        how = f"no: {reason}"
    return f"{found['class']}: {how}"


def served_in_vllm(found: dict[str, Any]) -> str:
    """Whether vLLM with meswitch serves an expert that changes every tensor; all reasons if not."""
    return "\n".join(f"no: {reason}" for reason in found["vllm"]) or "yes"
