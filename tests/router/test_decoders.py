"""States of small random decoders, against transformers."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaModel, MistralConfig, MistralModel, Qwen3Config, Qwen3Model

from meswitch.router import Encoder
from meswitch.router.layers import DecoderLayers, is_llama_like

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "mistral": lambda vocab: MistralModel(
        MistralConfig(vocab_size=vocab, **SHAPE, num_key_value_heads=2, sliding_window=24)
    ),
    "wide heads": lambda vocab: MistralModel(
        MistralConfig(vocab_size=vocab, **SHAPE, num_key_value_heads=4, head_dim=12)
    ),
    "llama": lambda vocab: LlamaModel(
        LlamaConfig(vocab_size=vocab, **SHAPE, num_key_value_heads=4, attention_bias=True)
    ),
    "llama 3": lambda vocab: LlamaModel(
        LlamaConfig(vocab_size=vocab, **SHAPE, num_key_value_heads=1, rope_parameters=LLAMA3)
    ),
}
TEXTS = ["How many apples?", "Write a function.", "", "many words make a long text " * 9]


@pytest.fixture(scope="module", params=list(MODELS))
def small(request, base):
    """A random decoder with the base's tokenizer; of the first, the longest text exceeds the window."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    model = MODELS[request.param](len(tokenizer)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)  # biases and norms too
    return Encoder(model, tokenizer, "random")


def test_states_are_those_of_transformers_padded_or_not(small):
    layers = (0, 1, 3)
    assert is_llama_like(small.model)
    expected = []
    for text in TEXTS:
        ids = small._tokens(text, 64)
        with torch.inference_mode():
            states = small.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        expected.append(torch.cat([states[layer][0, min(1, len(ids) - 1) :].mean(0) for layer in layers]))
    torch.testing.assert_close(small.encode(TEXTS, layers, 64), torch.stack(expected), atol=1e-4, rtol=1e-4)
    alone = torch.cat([small.encode([text], layers, 64) for text in TEXTS])
    torch.testing.assert_close(alone, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_the_familys_base_gives_the_same_bits(encoder):
    ids = torch.randint(5, 2000, (3, 27), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs = encoder.model(ids, output_hidden_states=True).hidden_states
        ours = DecoderLayers(encoder.model, 6)(ids, (0, 2, 4, 6))
    for layer, state in zip((0, 2, 4, 6), ours, strict=True):
        torch.testing.assert_close(state, theirs[layer], atol=1e-6, rtol=1e-5)


def test_other_architectures_and_types_are_left_to_transformers(encoder):
    assert not is_llama_like(Qwen3Model(Qwen3Config(vocab_size=100, **SHAPE, num_key_value_heads=2)))
    assert not is_llama_like(LlamaModel(LlamaConfig(vocab_size=100, **SHAPE, num_key_value_heads=2)).bfloat16())
