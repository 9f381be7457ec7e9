"""Model types that transformers generates text with and that are not tried here, each with its reason."""

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.architectures.tiny import FIELDS

VISION_LANGUAGE = ("gemma3", "gemma4", "llama4", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl")
_DECODER = "the decoder of an encoder-decoder model"
_ENCODER = "an encoder that can be trained as a decoder, not a decoder-only model"
_REASONS = {
    "blt": "reads bytes through patches of another model",
    "dots3_note_text": "its sizes cannot be made small by its configuration alone",
    "cohere_compass_text": "its sizes cannot be made small by its configuration alone",
    "hy_v4": "its sizes cannot be made small by its configuration alone",
    "inkling2_loop_text": "its sizes cannot be made small by its configuration alone",
    "inkling2_text": "its sizes cannot be made small by its configuration alone",
    "qwen4_exp_text": "its sizes cannot be made small by its configuration alone",
    "reformer": "needs prompts of fixed lengths",
    "xlm": "an encoder",
    "xlnet": "generates by permutation, not from left to right",
    "xmod": "an encoder",
    "zamba": "transformers 5.24 cannot lay out a small one",
}


def reason_left_out(model_type: str) -> str | None:
    """Why a model type is not tried; None if it is."""
    if model_type in _REASONS:
        return _REASONS[model_type]
    if model_type in FIELDS:
        return None
    kind = CONFIG_MAPPING[model_type]
    if kind.sub_configs:
        return "several models in one: its language model has a model type of its own"
    plain = kind().to_dict()
    if (
        plain.get("is_encoder_decoder")
        or "encoder_layers" in plain
        or model_type in ("musicgen", "trocr", "prophetnet")
    ):
        return _DECODER
    if plain.get("is_decoder") is False:
        return _ENCODER
    return None


ALL = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VISION_LANGUAGE})
TRIED = [model_type for model_type in ALL if reason_left_out(model_type) is None]
