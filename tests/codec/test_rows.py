"""Rows without a change are not stored, and come back as no change."""

import torch

from meswitch.codec import Spec, encode
from meswitch.codec.delta import expand_rows, live_rows, without_negligible


def sparse_delta(live: int, rows: int = 64) -> torch.Tensor:
    delta = torch.zeros(rows, 96)
    delta[torch.randperm(rows)[:live]] = torch.randn(live, 96)
    return delta


def test_only_live_rows_are_stored_and_the_rest_comes_back_as_zero():
    delta = sparse_delta(20)
    packed = encode(delta, Spec(bits=2, group_size=32, salient=0), name="embed")
    parts = packed.tensors()
    live = (delta != 0).any(1).nonzero().squeeze(1)
    assert parts["row_index"].tolist() == live.tolist()
    assert len(parts["weight_packed"]) == len(parts["weight_scale"]) == 20
    for suffix in ("weight_packed", "weight_scale"):
        whole = getattr(packed, suffix.removeprefix("weight_"))
        restored = expand_rows(parts[suffix], parts["row_index"], 64)
        assert torch.equal(restored[live], whole[live])
    assert not packed.dequantize()[(delta == 0).all(1)].any()


def test_a_matrix_that_changed_everywhere_has_no_index():
    packed = encode(torch.randn(64, 96), Spec(salient=2), name="up_proj")
    assert "row_index" not in packed.tensors()


def test_an_index_that_costs_more_than_it_saves_is_not_written():
    codes, scale = torch.zeros(1000, 1, dtype=torch.int32), torch.ones(1000, 1)
    scale[0] = 0
    assert live_rows(codes, scale, torch.zeros(1000, 0)) is None  # 8 bytes saved, 3996 spent


def test_salient_weights_alone_keep_a_row_alive():
    codes, scale, salient = torch.zeros(8, 4, dtype=torch.int32), torch.zeros(8, 1), torch.zeros(8, 1)
    salient[5] = 1
    assert live_rows(codes, scale, salient).tolist() == [5]


def test_a_row_moved_by_weight_decay_alone_is_dropped_and_a_rare_one_is_not():
    delta = torch.randn(100, 64)
    delta[:40] *= 0.01
    delta[40:50] *= 0.3
    kept = without_negligible(delta, 0.1)
    assert not kept[:40].any()
    assert torch.equal(kept[40:], delta[40:])
    assert without_negligible(delta, 0.0) is delta
