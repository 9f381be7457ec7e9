"""Attention by request: what one mask over all requests' keys gives, for every layout of a step."""

import itertools
from types import SimpleNamespace

import pytest
import torch

import meswitch
from meswitch import Engine
from meswitch.compression.merge import load_merged
from meswitch.engine.attention import BY_REQUEST, Spans, attention_by_request, say

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
STEPS = {
    "one token each, of like lengths": [(1, 9), (1, 9), (1, 9)],
    "one token each, of other lengths": [(1, 3), (1, 40), (1, 5), (1, 1), (1, 33)],
    "prompts": [(5, 5), (7, 7)],
    "one prompt": [(6, 6)],
    "one token of one request": [(1, 12)],
    "a prompt's second part, alone": [(4, 10)],
    "tokens, a prompt and a part of one": [(1, 4), (6, 6), (1, 20), (3, 11), (1, 4)],
}


def whole(query, key, value, lengths, window):
    """With one mask for all."""
    mask = torch.full((query.shape[2], key.shape[2]), -torch.inf)
    row = column = 0
    for rows, keys in lengths:
        for i in range(rows):
            last = column + keys - rows + i
            first = column if window is None else max(column, last - window + 1)
            mask[row + i, first : last + 1] = 0
        row, column = row + rows, column + keys
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("reads", [False, True], ids=["keys as they come", "keys read in groups"])
@pytest.mark.parametrize("lengths", STEPS.values(), ids=STEPS)
def test_each_request_sees_its_own_keys(lengths, reads, window):
    if window is not None:  # a layer with a window has no more keys in its cache
        lengths = [(rows, min(keys - rows, window - 1) + rows) for rows, keys in lengths]
    bounds = [[0, *itertools.accumulate(each)] for each in zip(*lengths, strict=True)]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, bounds[0][-1], WIDTH, generator=generator)
    key, value = (torch.randn(1, KEY_HEADS, bounds[1][-1], WIDTH, generator=generator) for _ in range(2))
    wanted = whole(query, key, value, lengths, window)
    spans = Spans(*bounds, window)
    if reads:
        order = spans.read(torch.arange(bounds[1][-1]))
        key, value = key[:, :, order], value[:, :, order]
    ends = torch.tensor(bounds[1], dtype=torch.int32)
    say(ends, spans)
    module = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, is_causal=True)
    found, _ = attention_by_request(module, query, key, value, None, cu_seq_lens_k=ends, is_causal=True)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_padding_is_at_most_as_much_again():
    keys = [0, *itertools.accumulate([900, 30, 31, 450, 17, 8, 460])]
    spans = Spans(list(range(8)), keys)
    assert sum(group.requests * group.width for group in spans.groups) <= 2 * keys[-1]


@pytest.mark.parametrize("arch", ["mistral", "qwen2"])
def test_windows_shorter_than_the_prompt(pair, tmp_path, arch):
    """Prompts longer than the window, whole and in parts, then tokens that leave it: each as its model alone."""
    base, expert = pair(
        arch, change=0.3, sliding_window=12, **({"use_sliding_window": True} if arch == "qwen2" else {})
    )
    meswitch.compress(base, expert, tmp_path / "delta", bits=4)
    model = load_merged(base, tmp_path / "delta")
    prompts = [list(range(5, 5 + count)) for count in (40, 7, 23)]
    for batch_tokens in (2048, 16):
        with Engine(base, {"e": tmp_path / "delta"}, device="cpu", max_batch_tokens=batch_tokens) as engine:
            assert not engine.by_turns
            assert model.config._attn_implementation != engine.model.config._attn_implementation == BY_REQUEST
            answers = engine.generate(prompts, model="e", max_new_tokens=16)
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([prompt])
            settings = {
                "max_new_tokens": len(answer.tokens),
                "do_sample": False,
                "pad_token_id": 0,
                "eos_token_id": None,
            }
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
            assert out[0, len(prompt) :].tolist() == list(answer.tokens)
