"""Training codes together with their scales."""

import pytest
import torch

from meswitch.codec import Rank, Spec, encode, encode_pair, unpack
from meswitch.codec.words import fold, nearest_words, signs_of
from meswitch.compression.distill.student import Student, TrainablePacked, TrainablePair

SPEC = Spec(bits=2, group_size=32, salient=1)
WORDS = Spec(bits=1, group_size=None, salient=0, block=8)


def pair(rows: int = 24, width: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(rows, width)
    return base, base + 0.1 * torch.randn(rows, width)


def trainable(base: torch.Tensor, full: torch.Tensor, spec: Spec = SPEC, device: str = "cpu") -> TrainablePacked:
    inputs = torch.randn(200, base.shape[1])
    packed = encode(full - base, spec, name="w", second_moment=inputs.T @ inputs / 200)
    return TrainablePacked(base, packed, full, torch.device(device), torch.float32).to(device)


def adam(matrix: TrainablePacked | TrainablePair, goal: torch.Tensor, steps: int) -> tuple[float, float]:
    """The mean squared error before and after."""
    optimizer = torch.optim.Adam([{"params": p, "lr": 0.02 * f} for p, f in matrix.groups()])
    start = (matrix.matrix() - goal).square().mean().item()
    for _ in range(steps):
        loss = (matrix.matrix() - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return start, loss.item()


@pytest.mark.parametrize("spec", [SPEC, WORDS], ids=["codes", "words"])
def test_before_training_the_matrix_is_the_artifacts(spec):
    base, full = pair()
    matrix = trainable(base, full, spec)
    assert torch.allclose(matrix.matrix(), base + matrix.delta.dequantize(), atol=1e-6)
    assert torch.equal(matrix.trained().packed, matrix.delta.packed)


def test_training_changes_codes_where_that_lowers_the_loss():
    base, full = pair()
    matrix = trainable(base, full)
    goal = base + (full - base) * torch.randn(24, 96).sign()  # half of the codes have to change
    start, end = adam(matrix, goal, 300)
    assert end < 0.5 * start
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


def test_trained_words_stay_words():
    base, full = pair()
    matrix = trainable(base, full, WORDS)
    goal = base + (full - base) * torch.randn(24, 96).sign()
    start, end = adam(matrix, goal, 300)
    assert end < 0.8 * start
    stored = matrix.trained()
    signs = unpack(stored.packed, 1, 96).float() * 2 - 1
    assert torch.equal(signs_of(nearest_words(signs, 8), 8), signs)
    assert not torch.equal(fold(stored.packed, 96, 8), fold(matrix.delta.packed, 96, 8))
    assert torch.allclose(base + stored.dequantize(), matrix.matrix(), atol=2e-3)


def test_both_sides_of_a_pair_are_trained_and_its_empty_rows_are_not():
    base, full = pair()
    full[3] = base[3]
    matrix = TrainablePair(base, encode_pair(full - base, Rank(4), name="w"), torch.device("cpu"), torch.float32)
    assert torch.allclose(matrix.matrix(), base + matrix.delta.dequantize(), atol=1e-6)
    goal = base + 0.05 * torch.randn(24, 4) @ torch.randn(4, 96)
    start, end = adam(matrix, goal, 200)
    assert end < 0.8 * start
    stored = matrix.trained()
    assert not stored.dequantize()[3].any()
    assert stored.left.dtype == torch.bfloat16
    assert torch.allclose(base + stored.dequantize(), matrix.matrix(), atol=5e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("unused", [True, False])
def test_matrices_that_are_held_pass_on_the_gradients_of_all_that_used_them(device, unused):
    base, full = pair()
    thin = encode_pair(full - base, Rank(4), name="w")
    matrices = {
        "codes": trainable(base, full, device=device),
        "words": trainable(base, full, WORDS, device),
        "pair": TrainablePair(base, thin, torch.device(device), torch.float32).to(device),
    }
    if unused:
        matrices["unused"] = trainable(base, full, device=device)
    student = Student(None, matrices, {})
    trained = [parameter for group, _ in student.groups() for parameter in group]
    inputs = torch.randn(3, 96, device=device)

    def losses(made):
        codes, words, low = (made[name] for name in ("codes", "words", "pair"))
        return [(codes @ inputs.T).square().sum() + (words @ inputs.T).sum(), (codes * low).sum()]

    for step in range(3):  # the matrices are other ones each time
        sum(losses({name: matrix.matrix() for name, matrix in matrices.items()})).backward()
        wanted = [None if parameter.grad is None else parameter.grad.clone() for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        with student.held(learns=True):
            for loss in losses(student.made):
                loss.backward()
        for parameter, gradient in zip(trained, wanted, strict=True):
            given = torch.zeros(()) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(given, torch.zeros_like(given) if gradient is None else gradient)
        with student.held(learns=False):
            for name, matrix in matrices.items():
                torch.testing.assert_close(student.made[name], matrix.matrix().detach())
        assert not student.made
        with torch.no_grad():
            for parameter in trained:
                parameter -= 0.01 * (step + 1) * torch.randn_like(parameter)
                parameter.grad = None
    if device == "cuda":
        assert student._maker._graphs
