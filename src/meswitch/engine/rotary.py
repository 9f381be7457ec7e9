"""Rotary embeddings that turn otherwise in long texts than in short ones.

`longrope` (Phi-3, Phi-4) has two sets of frequencies and takes one of them for everything that is computed together:
the long one as soon as a single text is longer than those of pretraining. A short text beside a long one, and the part
of a long text that was computed while it was short, would come out otherwise than alone.
"""

from typing import Any


def longest_unturned(config: Any) -> int | None:
    """Tokens of a text up to which the rotary embedding is that of short texts; None if it is the same for all.

    Args:
        config: of a model, a `transformers.PreTrainedConfig`.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    limits = [
        int(kind["original_max_position_embeddings"])
        for kind in kinds
        if kind.get("rope_type") == "longrope" and kind.get("short_factor") != kind.get("long_factor")
    ]
    return min(limits, default=None)
