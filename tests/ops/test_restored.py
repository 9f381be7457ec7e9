"""The product that restores weights, against fp64: it needs a GPU with `wgmma`; where it may run needs none."""

import pytest
import torch

from meswitch.ops import PrefillRouting, SlotLinear, expert_prefill, static_prefill
from meswitch.ops.layout import Variant
from meswitch.ops.prefill import fits, restores
from meswitch.ops.routing import TILE_TOKENS as TOKENS
from meswitch.ops.routing import StaticRouting, tile_table, token_tiles
from meswitch.ops.triton import on_hopper
from meswitch.ops.triton.product import product as launch
from tests.support.deltas import DEVICE, random_delta

BF16, TWO = torch.bfloat16, Variant(1, False, 128, 16)
on_gpu = pytest.mark.skipif(not on_hopper(torch.device(DEVICE)), reason="needs a GPU of compute capability 9")


def test_tiles_cover_every_segment_and_none_begins_so_late_that_it_ends_after_the_step():
    segments = [(0, 700, 3), (700, 717, 1), (800, 1300, 0)]
    tiles = token_tiles(segments, 1310)
    assert [tile[1:] for tile in tiles] == [segments[0]] * 3 + [segments[1]] + [segments[2]] * 2
    for first, end, slot in segments:
        covered = {t for start, *own in tiles if own == [first, end, slot] for t in range(start, start + TOKENS)}
        assert covered >= set(range(first, end))
    assert max(start for start, *_ in tiles) == 1310 - TOKENS


def test_a_step_of_less_than_a_tile_begins_at_its_start():
    assert token_tiles([(0, 130, 0)], 140) == [(0, 0, 130, 0)]


@pytest.mark.parametrize(
    ("rows", "width", "variant", "dtype"),
    [
        (100, 4096, TWO, BF16),
        (128, 200, TWO, BF16),
        (128, 256, TWO, torch.float16),
        (128, 256, TWO._replace(group=64), BF16),
        (128, 256, Variant(2, False, 128, 16), BF16),
        (128, 256, Variant(1, True, 128, 16), BF16),
        (128, 256, Variant(0, True, 128, 16), BF16),
    ],
)
def test_layers_that_the_kernel_does_not_take(rows, width, variant, dtype):
    assert not fits(rows, width, variant, dtype)


def test_layers_that_it_takes():
    assert all(fits(6144, 4096, TWO._replace(group=group), BF16) for group in (0, 128, 256, 512))


def test_experts_of_four_bits_are_told_from_those_of_two():
    layers = [SlotLinear.build([random_delta(128, 256, bits, 128)]) for bits in (2, 4)]
    assert [fits(128, 256, layer.variant, BF16) for layer in layers] == [True, False]


def test_a_cpu_restores_nothing():
    assert not restores(torch.empty(128, 256, dtype=BF16), TWO)


CASES = {
    "one_tile": (256, 512, 128, 4, [256]),
    "ends_of_segments": (256, 512, 128, 4, [300, 17, 256, 700]),
    "whole_rows": (2048, 2048, None, 0, [512]),
    "wide_groups_many_salient": (2048, 2048, 512, 40, [513, 100]),
    "long_rows": (4096, 14336, 128, 28, [1024, 1024]),
}


def drawn(rows, width, group, salient, lengths, bias):
    draw = torch.Generator().manual_seed(1)
    deltas = [random_delta(rows, width, 2, group, salient=salient, seed=seed) for seed in range(len(lengths))]
    x = torch.randn(sum(lengths) + 5, width, generator=draw).to(DEVICE, BF16)
    weight = (torch.randn(rows, width, generator=draw) * 0.02).to(DEVICE, BF16)
    return deltas, x, weight, torch.randn(rows, generator=draw).to(DEVICE, BF16) if bias else None


def reference(x, weight, delta, bias):
    merged = weight.double() + (0 if delta is None else delta.dequantize().double().to(DEVICE))
    return x.double() @ merged.T + (0 if bias is None else bias.double())


@on_gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_against_fp64(case, bias):
    *shape, lengths = CASES[case]
    deltas, x, weight, bias = drawn(*shape, lengths, bias)
    if len(deltas) > 1:
        deltas[1] = None  # an expert that leaves this layer as it is
    layer = SlotLinear.build(deltas, DEVICE)
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    segments = [(ends[i], ends[i + 1], i) for i in range(len(lengths))]
    tiles = tile_table(segments, len(x)).to(DEVICE)
    y = torch.full((len(x), len(weight)), float("nan"), dtype=BF16, device=DEVICE)
    launch(y, x, weight, bias, layer, tiles)
    assert y[ends[-1] :].isnan().all()
    for first, end, slot in segments:
        expected = reference(x[first:end], weight, deltas[slot], bias)
        assert ((y[first:end].double() - expected).norm() / expected.norm()).item() < 1e-2


@on_gpu
@pytest.mark.parametrize("bias", [False, True])
def test_a_graph_serves_steps_of_any_segments(bias):
    """Tiles come and go in its buffer, the base's rows are in some, and there may be fewer than programs."""
    deltas, x, weight, bias = drawn(512, 1024, 128, 4, [145, 150, 212], bias)
    layer, device = SlotLinear.build(deltas, DEVICE), torch.device(DEVICE)
    routing, rows = StaticRouting(512, 3, device), len(x)
    steps = [[0] * 145 + [-1] * 5 + [1] * 150 + [2] * 212, [2, 1, -1, 0] * 128, [-1] * 512, [0] * 3 + [1] * 509]
    assert rows == 512
    routing.fill(steps[1])
    static_prefill(x, weight, layer, routing.part(rows), bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = static_prefill(x, weight, layer, routing.part(rows), bias)
    for slots in steps:
        routing.fill(slots)
        y.fill_(float("nan"))
        graph.replay()
        for slot in (-1, 0, 1, 2):
            own = [row for row, owner in enumerate(slots) if owner == slot]
            if own:
                expected = reference(x[own], weight, deltas[slot] if slot >= 0 else None, bias)
                assert ((y[own].double() - expected).norm() / expected.norm()).item() < 1e-2


@on_gpu
def test_a_tokens_bits_do_not_depend_on_what_else_is_in_the_step():
    deltas, x, weight, _ = drawn(512, 1024, 128, 4, [200, 300, 400], False)
    layer = SlotLinear.build(deltas, DEVICE)
    slots = [0] * 200 + [1] * 300 + [2] * 400 + [-1] * 5
    together = expert_prefill(x, weight, layer, PrefillRouting.build(slots, DEVICE))
    for slot, first, end in ((0, 0, 200), (1, 200, 500), (2, 500, 900)):
        alone = expert_prefill(x[first:end], weight, layer, PrefillRouting.build([slot] * (end - first), DEVICE))
        assert torch.equal(alone, together[first:end])


@on_gpu
@pytest.mark.parametrize("first", [0, 3])
def test_inputs_that_are_columns_of_a_matrix(first):
    deltas, x, weight, _ = drawn(256, 512, 128, 4, [300], False)
    layer, routing = SlotLinear.build(deltas, DEVICE), PrefillRouting.build([0] * 300 + [-1] * 5, DEVICE)
    wide = torch.zeros(len(x), 1024, dtype=BF16, device=DEVICE)
    wide[:, first : first + 512] = x
    own, expected = (expert_prefill(x, weight, layer, routing)[:300] for x in (wide[:, first : first + 512], x))
    assert torch.equal(own, expected)


@on_gpu
def test_restoring_and_merging_agree():
    deltas, x, weight, bias = drawn(512, 1024, 128, 4, [300, 400], True)
    layer = SlotLinear.build(deltas, DEVICE)
    routing = PrefillRouting.build([0] * 300 + [1] * 400 + [-1] * 5, DEVICE)
    restored, merged = (expert_prefill(x, weight, layer, routing, bias, restore=restore) for restore in (True, False))
    assert (restored.double() - merged.double()).norm() < 1e-2 * merged.double().norm()
