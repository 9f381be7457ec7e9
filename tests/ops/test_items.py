"""Every linear and step gets items, and none so small that its start costs more than its work."""

import itertools

import pytest

from meswitch.ops.routing import MAX_TOKENS, most_pieces
from meswitch.ops.triton.items import choose_fused

# rows, input channels: of large and of small models, of parts of one on several GPUs, and odd ones
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (14336, 4096), (7680, 5120)]
SHAPES += [(2560, 9728), (3072, 4096), (2048, 2048), (4096, 1024), (19456, 2560), (200, 1100), (64, 96)]


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_every_step_of_every_shape_has_items(rows: int, width: int) -> None:
    counts = range(1, most_pieces(MAX_TOKENS, MAX_TOKENS) + 1)
    for columns, pieces, planes in itertools.product((8, 16, 32, 64), counts, (1, 2)):
        config = choose_fused(rows, width, pieces, columns, planes)
        assert config.columns == columns
        assert config.base_split == 1 or width // config.base_split >= 512
        assert config.delta.split == 1 or width // config.delta.split >= 512
        assert config.delta.rows % config.base_rows == 0
        assert 0 <= config.before <= 1
        assert config.every >= 1


def test_a_linear_of_few_rows_is_not_cut_into_more_base_items_than_are_worth_their_sums() -> None:
    for rows in range(128, 8193, 128):
        config = choose_fused(rows, 8192, 4, 8)
        assert config.base_split == 1 or rows // config.base_rows * config.base_split <= 400
