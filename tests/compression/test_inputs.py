"""What matrices are multiplied with is seen where it is done, and few tokens count for little."""

import pytest
import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from meswitch.compression.inputs import Inputs, Observer, Rows

TOKENS, WIDTH, OUT, EXPERTS = 7, 6, 5, 3


def seen(parameters, run):
    """Run under an observer: rows of parameters -> X^T X of what they were multiplied with."""
    observer = Observer(parameters)
    with torch.no_grad(), observer:
        run()
    return {rows: inputs._fold() for rows, inputs in observer.seen.items()}


def moment(x):
    x = x.reshape(-1, x.shape[-1])
    return x.T @ x


@pytest.fixture
def x():
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: F.linear(x, w, torch.ones(OUT)),
        lambda x, w: x @ w.T,
        lambda x, w: torch.einsum("bti,oi->bto", x, w),
        lambda x, w: (w @ x.flatten(0, 1).T).T,
        lambda x, w: F.linear(x[0], w) + F.linear(x[1], w),
    ],
    ids=["linear", "with a bias", "matmul", "einsum", "the weight on the left", "in two calls"],
)
def test_a_matrix_is_seen_however_it_is_multiplied(x, multiply):
    weight = torch.randn(OUT, WIDTH)
    found = seen({"w": weight}, lambda: multiply(x, weight))
    assert list(found) == [Rows("w", False, 0, OUT)]
    assert torch.allclose(found[Rows("w", False, 0, OUT)], moment(x), atol=1e-4)


def test_a_matrix_that_lies_transposed_is_seen_as_such(x):
    layer = Conv1D(OUT, WIDTH)
    found = seen({"w": layer.weight}, lambda: layer(x))
    assert torch.allclose(found[Rows("w", True, 0, OUT)], moment(x), atol=1e-4)


def test_rows_of_a_matrix_are_seen_alone(x):
    weight = torch.randn(OUT, WIDTH)
    found = seen({"w": weight}, lambda: (F.linear(x, weight[:2]), F.linear(2 * x, weight[2:])))
    assert torch.allclose(found[Rows("w", False, 0, 2)] * 4, found[Rows("w", False, 2, OUT)])


@pytest.mark.parametrize("transposed", [False, True])
def test_an_expert_of_a_stack_is_seen_with_its_own_tokens(x, transposed):
    stack = torch.randn(EXPERTS, WIDTH, OUT) if transposed else torch.randn(EXPERTS, OUT, WIDTH)
    tokens = x.flatten(0, 1)

    def run():
        for expert, mine in enumerate(([0, 3], [1, 2, 4, 5])):
            tokens[mine] @ (stack[expert] if transposed else stack[expert].T)

    found = seen({"w": stack}, run)
    assert set(found) == {Rows("w", transposed, 0, OUT), Rows("w", transposed, OUT, 2 * OUT)}
    assert torch.allclose(found[Rows("w", transposed, OUT, 2 * OUT)], moment(tokens[[1, 2, 4, 5]]), atol=1e-4)


def test_a_stack_that_is_multiplied_whole_leaves_out_tokens_that_are_zero(x):
    stack, tokens = torch.randn(EXPERTS, WIDTH, OUT), x.flatten(0, 1)
    routed = torch.stack([tokens * (torch.arange(len(tokens)) % EXPERTS == expert)[:, None] for expert in range(3)])
    observer = Observer({"w": stack})
    with torch.no_grad(), observer:
        torch.bmm(routed, stack)
    counts = [observer.seen[Rows("w", True, e * OUT, (e + 1) * OUT)].tokens for e in range(EXPERTS)]
    assert counts == [5, 5, 4]


def test_parameters_that_see_the_same_tensor_share_its_moment(x):
    q, k, o = (torch.randn(OUT, WIDTH) for _ in range(3))
    observer = Observer({"q": q, "k": k, "o": o})
    with torch.no_grad(), observer:
        F.linear(x, q), F.linear(x, k), F.linear(x + 1, o)
    found = {rows.parameter: inputs for rows, inputs in observer.seen.items()}
    assert found["q"] is found["k"]
    assert found["q"] is not found["o"]
    assert found["q"].tokens == 2 * TOKENS


def test_what_few_tokens_say_of_pairs_of_channels_counts_for_little():
    x = torch.randn(40, WIDTH)
    inputs = Inputs()
    for part in x.split(3):
        inputs.add(part)
    whole = x.T @ x / len(x)
    kept = whole.diagonal().diag()
    assert torch.allclose(inputs.moment, kept + (whole - kept) * (40 / (40 + WIDTH)), atol=1e-5)
    assert torch.allclose(inputs.energy, x.square().mean(0))


def test_energies_alone_are_the_same(x):
    with_pairs, without = Inputs(), Inputs(pairs=False)
    for inputs in (with_pairs, without):
        inputs.add(x[0])
        inputs.add(x[1])
    assert torch.allclose(with_pairs.energy, without.energy)
