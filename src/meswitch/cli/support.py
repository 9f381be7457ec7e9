"""What can be done with a base of some architecture, said before any work: `plan` and `diff` show it."""

from typing import Any


def support(config: Any) -> dict[str, Any]:
    """For JSON: the model type, the class that is served, and how the embedded engine serves it.

    `runner` is `batch`, `turns` or None; None with `tried` false is a model type that nobody tried: what runs it is
    proven when an engine opens. `reason` says why it is not the batch.
    """
    from meswitch.architecture import model_class, served_how

    known = served_how(config.model_type)
    runner, reason = known or (None, None)
    return {
        "model_type": config.model_type,
        "class": model_class(config, text_only=True).__name__,
        "embedded_engine": {"tried": known is not None, "runner": runner, "reason": reason},
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
