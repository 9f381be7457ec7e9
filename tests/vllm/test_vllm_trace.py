"""What vLLM compiles: the operators in a traced model whose number of tokens stays free. No vLLM needed."""

import torch

from meswitch.ops import SlotLinear, embedding_rows
from meswitch.ops.routing import TOKENS, Step
from meswitch.vllm import delta_op
from tests.support.deltas import random_delta


def test_one_trace_serves_steps_of_all_sizes_with_and_without_experts():
    deltas = [random_delta(64, 128, 2, 64, salient=2, seed=seed) for seed in range(3)]
    table = [random_delta(50, 128, 2, 64, seed=seed) for seed in range(3, 6)]
    layer, embedding = SlotLinear.build(deltas), SlotLinear.build(table)
    step = Step(200, 3, torch.device("cpu"))
    delta_op.read_step(step)
    draw = torch.Generator().manual_seed(0)
    words = torch.randn(50, 128, generator=draw)
    weight, bias = torch.randn(64, 128, generator=draw), torch.randn(64, generator=draw)
    slots = step.tokens.token_slots

    def model(ids):
        x = embedding_rows(ids, words, embedding, slots[: ids.shape[0]])
        y = delta_op.linear(x, weight, bias, layer)
        again = x @ weight.T
        delta_op.add_delta(again, x, layer, TOKENS)
        return y, again + bias

    def alone(ids, own):
        """In float64, token by token."""
        rows = []
        for token, slot in zip(ids.tolist(), own, strict=True):
            word, matrix = words[token].double(), weight.double()
            if slot >= 0:
                word, matrix = word + table[slot].dequantize()[token], matrix + deltas[slot].dequantize()
            rows.append(matrix @ word + bias)
        return torch.stack(rows)

    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for own in ([0, -1, 2, 2, 1], [-1] * 7, [1] * 64, [2, 0, -1] * 60, [-1, -1], [0] * 9):
            ids = torch.randint(0, 50, (len(own),), generator=draw)
            torch._dynamo.mark_dynamic(ids, 0)
            step.tokens.fill(own)
            for y in compiled(ids):
                assert torch.allclose(y.double(), alone(ids, own), atol=1e-3)
