"""Training codes together with their scales."""

import torch

from meswitch.codec import Spec, encode, unpack
from meswitch.compression.distill.student import TrainablePacked

SPEC = Spec(bits=2, group_size=32, salient=1)


def pair(rows: int = 24, width: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(rows, width)
    return base, base + 0.1 * torch.randn(rows, width)


def trainable(base: torch.Tensor, full: torch.Tensor) -> TrainablePacked:
    inputs = torch.randn(200, base.shape[1])
    packed = encode(full - base, SPEC, name="w", second_moment=inputs.T @ inputs / 200)
    return TrainablePacked(base, packed, full, torch.device("cpu"), torch.float32)


def test_before_training_the_matrix_is_the_artifacts():
    base, full = pair()
    matrix = trainable(base, full)
    assert torch.allclose(matrix.matrix(), base + matrix.delta.dequantize(), atol=1e-6)
    assert torch.equal(matrix.trained().packed, matrix.delta.packed)


def test_training_changes_codes_where_that_lowers_the_loss():
    base, full = pair()
    matrix = trainable(base, full)
    goal = base + (full - base) * torch.randn(24, 96).sign()  # half of the codes have to change
    optimizer = torch.optim.Adam([{"params": p, "lr": 0.02 * f} for p, f in matrix.groups()])
    start = (matrix.matrix() - goal).square().mean().item()
    for _ in range(300):
        loss = (matrix.matrix() - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * start
    stored = matrix.trained()
    before = unpack(matrix.delta.packed, 2, 96)
    assert (unpack(stored.packed, 2, 96) != before).float().mean() > 0.3
    # what is stored is what was trained, up to bfloat16
    assert torch.allclose(base + stored.dequantize(), matrix.matrix(), atol=2e-3)


def test_the_gradient_stops_where_a_latent_weight_has_left_the_levels():
    base, full = pair()
    matrix = trainable(base, full)
    with torch.no_grad():
        matrix.latent[0, 0] = 5.0  # levels end at 3, their intervals at 4
        matrix.latent[0, 1] = 3.9
    matrix.matrix().sum().backward()
    assert matrix.latent.grad[0, 0] == 0
    assert matrix.latent.grad[0, 1] != 0


def test_rows_that_are_not_stored_stay_without_a_change():
    base, full = pair()
    full[3] = base[3]
    matrix = trainable(base, full)
    with torch.no_grad():
        matrix.salient_step += 1.0
        matrix.latent += 1.0
        matrix.scale_step += 0.5
    stored = matrix.trained()
    assert not stored.dequantize()[3].any()
