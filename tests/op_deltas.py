"""Random packed deltas for the tests of the expert ops."""

import torch

from meswitch.codec import PackedDelta, pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_delta(rows, in_features, bits, group_size=64, salient=0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    groups = 1 if group_size is None else -(-in_features // group_size)
    return PackedDelta(
        packed=pack(torch.randint(0, 2**bits, (rows, in_features), generator=draw), bits),
        scale=(torch.rand(rows, groups, generator=draw) * 0.01).bfloat16(),
        salient_index=torch.randperm(in_features, generator=draw)[:salient].sort().values.int(),
        salient_weight=(torch.randn(rows, salient, generator=draw) * 0.05).bfloat16(),
        bits=bits,
        group_size=group_size,
        in_features=in_features,
    )
