"""Tiles with salient channels of their own: what several matrices in one need."""

import dataclasses

import pytest
import torch

from meswitch.codec import pack, unpack
from meswitch.errors import ConfigError
from meswitch.ops import Routing, SlotLinear, embedding_rows, fused_linear
from meswitch.ops.layout import Shape, Variant, read, salient_of_tiles, write
from meswitch.ops.prefill import merged_rows
from tests.support.deltas import DEVICE, TOLERANCE, error, expected, random_delta

ROWS = [256, 128, 128]  # q, k and v of one matrix


def joined(seed=0):
    """Three parts with 12 salient channels each, and room for the 12 of a part in every tile."""
    delta = random_delta(sum(ROWS), 512, 2, 128, salient=36, seed=seed)
    starts = [0, 256, 384, 512]
    for part in range(3):
        others = [channel for channel in range(36) if channel % 3 != part]
        delta.salient_weight[starts[part] : starts[part + 1], others] = 0
    return delta, Shape(sum(ROWS), 512, 2, 128, 16)


def layer():
    delta, shape = joined()
    arena = torch.zeros(shape.nbytes, dtype=torch.uint8)
    write(delta, arena, shape)
    table = torch.tensor([shape.table_row(0)])
    return delta, SlotLinear.over(arena.to(DEVICE), table.to(DEVICE), sum(ROWS), 512, Variant.of([shape]))


def test_a_tile_has_the_channels_of_the_parts_that_it_meets():
    assert salient_of_tiles([8, 8, 8], ROWS) == 8
    assert salient_of_tiles([8, 8, 9], [200, 100, 100]) == 17  # rows 128 to 256 are of two parts, 256 to 384 too
    assert salient_of_tiles([3, 4, 5], [40, 40, 40]) == 12
    assert salient_of_tiles([7], [1000]) == 7


def test_reading_gives_back_what_was_written():
    delta, shape = joined()
    buffer = torch.zeros(shape.nbytes, dtype=torch.uint8)
    write(delta, buffer, shape)
    assert torch.equal(read(shape, buffer).dequantize(), delta.dequantize())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("width", [16, 256, 1000])
def test_codes_lie_where_a_step_of_a_matrix_unit_reads_them(bits, width):
    delta = random_delta(5, width, bits, None)
    shape = Shape.of(delta)
    buffer = torch.zeros(shape.nbytes, dtype=torch.uint8)
    write(delta, buffer, shape)
    planes = shape.views(buffer)["two"]
    codes = unpack(delta.packed, bits, width)
    for row, channel in ((0, 0), (1, 1), (2, 15), (3, width // 2), (4, width - 1), (0, width - 7)):
        block, place = divmod(channel, 256)
        code, word = divmod(place, 16)
        held = [int(plane[block, row, word]) >> 2 * code & 3 for plane in planes]
        assert sum(part << 2 * number for number, part in enumerate(held)) == codes[row, channel]
    assert delta.packed.equal(pack(codes, bits))  # what was laid out is as it was


def test_a_tile_of_more_channels_than_there_is_room_for_is_refused():
    delta = random_delta(300, 512, 2, 128, salient=20)
    with pytest.raises(ConfigError, match="20 channels, in a place made for 16"):
        write(delta, torch.zeros(1 << 20, dtype=torch.uint8), Shape(300, 512, 2, 128, 16))


@pytest.mark.parametrize("backend", ["triton", "reference"] + ["cpu"] * (DEVICE == "cpu"))
def test_every_backend_uses_each_tiles_own(backend):
    delta, own = layer()
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    weight = torch.zeros(sum(ROWS), 512).bfloat16().to(DEVICE)
    y = fused_linear(x, weight, own, Routing.build([0, -1, 0], DEVICE), backend=backend)
    wanted = expected(torch.zeros(3, sum(ROWS), device=DEVICE).double(), x, [delta], [0, -1, 0])
    assert error(y, wanted) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_merged_weights_and_embeddings_too(backend):
    delta, own = layer()
    weight = torch.zeros(sum(ROWS), 512).bfloat16().to(DEVICE)
    dense = delta.dequantize()
    out = torch.empty(1, 256, 512, dtype=torch.bfloat16, device=DEVICE)
    merged_rows(weight, own, torch.zeros(1, dtype=torch.int32, device=DEVICE), 192, 448, out, backend)
    assert torch.allclose(out[0].cpu().float(), dense[192:448], rtol=1e-2, atol=1e-4)
    ids = torch.tensor([0, 127, 128, 255, 256, 383, 384, 511], device=DEVICE)
    rows = embedding_rows(ids, weight, own, torch.zeros(8, dtype=torch.int32, device=DEVICE), backend=backend)
    assert torch.allclose(rows.cpu().float(), dense[ids.cpu()], rtol=1e-2, atol=1e-4)


def test_a_range_that_starts_within_a_tile_is_refused():
    _, own = layer()
    weight = torch.zeros(sum(ROWS), 512).bfloat16().to(DEVICE)
    out = torch.empty(1, 16, 512, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ConfigError, match="first: 8 is no multiple of 32"):
        merged_rows(weight, own, torch.zeros(1, dtype=torch.int32, device=DEVICE), 8, 24, out)


def test_room_for_more_channels_than_there_are():
    delta = random_delta(60, 256, 2, 128, salient=3)
    shape = dataclasses.replace(Shape.of(delta), salient=32)
    buffer = torch.zeros(shape.nbytes, dtype=torch.uint8)
    write(delta, buffer, shape)
    assert torch.equal(read(shape, buffer).dequantize(), delta.dequantize())
