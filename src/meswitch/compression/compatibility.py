"""Can this expert share the base in one batch? If not, say which field is in the way."""

from typing import Any

from meswitch.checkpoint import Checkpoint
from meswitch.errors import IncompatibleError

# Fields that do not change what a forward pass computes for given weights, or that are served for each expert.
_FREE = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "max_position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "sep_token_id",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",
}


def config_differences(base: Any, expert: Any) -> dict[str, tuple[Any, Any]]:
    """All fields in which two configurations differ: name -> (base's, expert's)."""
    left, right = base.to_dict(), expert.to_dict()
    names = sorted(set(left) | set(right))
    return {name: (left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)}


def changes_computation(field: str) -> bool:
    return field not in _FREE


def check_same_computation(base: Checkpoint, expert: Checkpoint) -> None:
    """Refuse a pair whose configurations compute different things, or whose weights are not there as numbers.

    Raises:
        IncompatibleError: naming the field and both values.
    """
    for checkpoint in (base, expert):
        if checkpoint.is_quantised:
            raise IncompatibleError(
                f"{checkpoint.directory}/config.json: quantization_config: a delta is taken between weights; give the "
                "checkpoint in 16 bit that this was made from"
            )
    differences = config_differences(base.config, expert.config)
    for field, (ours, theirs) in sorted(differences.items(), key=lambda item: item[0] != "model_type"):
        if changes_computation(field):
            raise IncompatibleError(
                f"{expert.directory}/config.json: {field}: the expert has {theirs!r}, the base {ours!r}; they cannot "
                "share one batch. If the weights do not depend on it, set the field to the base's value"
            )


def check_same_tensors(base: Checkpoint, expert: Checkpoint) -> None:
    """Refuse a pair whose tensors do not correspond (rows of the vocabulary may differ).

    Raises:
        IncompatibleError: naming the tensor.
    """
    if expert.aliases and not base.aliases:
        raise IncompatibleError(
            f"{expert.directory}/config.json: tie_word_embeddings: the expert ties its head to the embedding, the base "
            "does not; save the expert with an untied head"
        )
    for name, info in expert.tensors.items():
        theirs = base.info(name)
        if theirs is None:
            raise IncompatibleError(f"{expert.directory}: tensor {name} has no counterpart in {base.directory}")
        same_width = len(info.shape) == 2 and info.shape[1:] == theirs.shape[1:]
        if info.shape != theirs.shape and not (same_width and is_vocabulary(name)):
            raise IncompatibleError(
                f"{expert.directory}: tensor {name}: shape {list(info.shape)} against the base's {list(theirs.shape)}"
            )
    for name in base.tensors:
        if expert.info(name) is None:
            raise IncompatibleError(f"{expert.directory}: lacks the tensor {name} of {base.directory}")


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row a token: the embedding and the head."""
    return role_of(name, 2) in ("embedding", "head")


def role_of(name: str, dimensions: int) -> str:
    """`embedding`, `head`, `linear`, `norm`, `bias` or `other`, from the stored name."""
    if name in ("lm_head.weight", "embed_out.weight"):
        return "head"
    if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight", "tok_embeddings.weight")):
        return "embedding"
    if name.endswith(".bias"):
        return "bias"
    if dimensions == 2 and name.endswith(".weight"):
        return "linear"
    return "norm" if dimensions == 1 and "norm" in name.lower() else "other"
