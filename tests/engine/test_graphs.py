"""Attention over static buffers gives what attention over gathered keys gives, page by page and window by window."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from meswitch.engine.attention import PAGE, KVCache, Piece, StepPlaces
from meswitch.engine.graphs import StaticPlaces
from meswitch.errors import IncompatibleError
from tests.support.deltas import DEVICE

CONFIG = SimpleNamespace(num_hidden_layers=2, sliding_window=100, layer_types=["full_attention", "sliding_attention"])
PIECES = [
    [Piece(1, 0, [3])],
    [Piece(1, 5, [3]), Piece(1, PAGE, [7, 2]), Piece(1, 300, [9, 1, 30, 31, 5]), Piece(1, PAGE - 1, [12])],
    [Piece(1, 301, [9, 1, 30, 31, 5]), Piece(1, 6, [3]), Piece(1, 2 * PAGE - 1, [7, 2])],
    [Piece(1, 39 * PAGE, list(range(39, -1, -1))), Piece(1, 302, [9, 1, 30, 31, 5])],
    [Piece(1, 303, [9, 1, 30, 31, 5]), Piece(130, 0, [20, 33, 21]), Piece(9, 2 * PAGE, [7, 2, 13])],  # prompts
    [Piece(1, 2 * PAGE + 9, [7, 2, 13]), Piece(40, 130, [20, 33, 21])],
]


class Layer(nn.Module):
    """Its own attention is found where it is defined."""


def layer(number, groups):
    module = Layer()
    module.layer_idx, module.num_key_value_groups, module.is_causal = number, groups, True
    return module


@pytest.mark.parametrize(("heads", "cap"), [((6, 2), None), ((4, 4), None), ((8, 1), None), ((4, 2), 0.5)])
def test_steps_one_after_another(heads, cap):
    device, width = torch.device(DEVICE), 32
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    draw = torch.Generator(device).manual_seed(0)
    cache = KVCache(CONFIG, 40, "sdpa" if cap is None else "eager", device)
    options = {"scaling": 0.2, "softcap": cap}
    places = StaticPlaces(cache, [8, 160], 40 * PAGE, device)
    for pieces in PIECES:
        rows = sum(piece.length for piece in pieces)
        places.fill([1] * rows, pieces)
        gathered = StepPlaces(cache, pieces, device)
        for number in range(2):
            module = layer(number, heads[0] // heads[1])
            module = cache._layers[number][0] if number in cache._layers else module
            query, key, value = (
                torch.randn(1, count, rows, width, generator=draw, device=device, dtype=dtype)
                for count in (heads[0], heads[1], heads[1])
            )
            _, keys, values = cache.layer(module, key, value)
            if pieces is PIECES[0]:
                keys.normal_(generator=draw), values.normal_(generator=draw)
            found, _ = places.attend(module, query, key, value, options)
            kept = keys.clone(), values.clone()
            wanted, _ = gathered.attend(module, query, key, value, options)
            assert all(map(torch.equal, kept, (keys, values)))  # the step's own are written where they belong
            torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 1e-5)


def test_what_is_more_than_scaled_dot_products_is_refused():
    cache = KVCache(CONFIG, 4, "sdpa", torch.device("cpu"))
    places = StaticPlaces(cache, [2], 4 * PAGE, torch.device("cpu"))
    places.fill([1], [Piece(1, 0, [0])])
    numbers = torch.zeros(1, 2, 1, 32)
    with pytest.raises(IncompatibleError, match="softcap"):
        places.attend(layer(0, 1), numbers, numbers, numbers, {"softcap": 30.0})
    places = StaticPlaces(KVCache(CONFIG, 4, "eager", torch.device("cpu")), [2], 4 * PAGE, torch.device("cpu"))
    places.fill([1], [Piece(1, 0, [0])])
    with pytest.raises(IncompatibleError, match="s_aux"):
        places.attend(layer(0, 1), numbers, numbers, numbers, {"s_aux": torch.zeros(2)})


def with_sinks(*given, own=eager_attention_forward, **options):
    """More than its options say: a share of each head's attention goes nowhere."""
    attended, weights = own(*given, **options)
    return attended * torch.tensor([0.7, 0.9])[:, None], weights


def test_what_a_layer_s_own_attention_computes_besides_is_found_at_its_first_step(monkeypatch):
    numbers, module = torch.ones(1, 2, 1, 32), layer(0, 1)
    places = StaticPlaces(KVCache(CONFIG, 4, "eager", torch.device("cpu")), [2], 4 * PAGE, torch.device("cpu"))
    places.fill([1], [Piece(1, 0, [0])])
    options = {"scaling": 0.2, "softcap": None, "position_ids": None}
    with monkeypatch.context() as other:
        other.setitem(globals(), "eager_attention_forward", with_sinks)
        with pytest.raises(IncompatibleError, match="Layer: its attention differs from scaled dot products by 2"):
            places.attend(module, numbers, numbers, numbers, options)
    places.attend(module, numbers, numbers, numbers, options)
