"""Steps over static buffers serve whatever is asked: every answer is that of its own merged model."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

import meswitch
from meswitch import Engine, SamplingParams
from meswitch.compression.merge import load_merged
from meswitch.engine import context, joined, layers
from meswitch.engine.batching import Batch
from meswitch.errors import MeswitchError
from tests.engine.test_kernels import keep_tokens, logits_alone
from tests.support.adapters import pairs, write_adapter

pytest.importorskip("triton")

REFUSED = 295  # a token that the model does not take
TARGETS = ("q_proj", "down_proj", "embed_tokens", "lm_head")
CASES = {
    "one slot, and steps of an odd size": {"slots": 1, "max_batch_tokens": 70},
    "a cache in which requests lose their pages": {"slots": 3, "max_batch_tokens": 200, "kv_cache_tokens": 448},
    "a model that computes all logits": {"slots": 2, "max_batch_tokens": 130},
}


def requests_of(draw, count=40):
    """Prompts with three beginnings that come again, of all lengths; some are only scored, some are refused."""
    beginnings = [[draw.randrange(5, 290) for _ in range(length)] for length in (0, 70, 130)]
    for _ in range(count):
        prompt = draw.choice(beginnings) + [draw.randrange(5, 290) for _ in range(draw.choice([1, 2, 9, 40, 100]))]
        if draw.random() < 0.1:
            prompt[-1] = REFUSED
        scores = 0 if draw.random() < 0.1 else None
        new, never = draw.choice([0, 1, 4, 20]), {REFUSED: -100.0}
        yield prompt, SamplingParams(max_new_tokens=new, prompt_logprobs=scores, logit_bias=never)


@pytest.mark.parametrize("case", CASES)
def test_requests_of_all_kinds_come_cancel_and_fail(case, pair, tmp_path, monkeypatch):
    for module in (context, joined, layers):  # the kernels' place in the engine, without the interpreter's time
        monkeypatch.setattr(module, "TRITON", "reference")
    base, expert = pair("mistral", change=0.5, num_hidden_layers=2, vocab_size=300, sliding_window=50)
    keep_tokens(base, 300), keep_tokens(expert, 300)
    experts = {"one": tmp_path / "one", "three": tmp_path / "three"}
    meswitch.compress(base, expert, experts["one"], bits=1, salient=0)
    meswitch.compress(base, expert, experts["three"], bits=3, salient=5)
    adapted = pairs(base, *TARGETS, size=0.5)
    experts["adapter"] = write_adapter(tmp_path / "adapter", adapted, target_modules=list(TARGETS))
    models = {name: load_merged(base, path) for name, path in experts.items()}
    models["base"] = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if "all logits" in case:
        start = Batch.__init__

        def without_a_cut(self, *args, **options):
            start(self, *args, **options)
            self._cuts_rows = False

        monkeypatch.setattr(Batch, "__init__", without_a_cut)

    def refuse(module, args, options):
        if bool((options["input_ids"] == REFUSED).any()):
            raise IndexError("no such token")

    draw = random.Random(0)
    options = {"device": "cpu", "dtype": "float16", "backend": "triton"} | CASES[case]
    with Engine(base, experts, **options) as engine:
        slots, graphs = CASES[case]["slots"], engine._batch.static_graphs
        assert {count for size, count in graphs if 3 < size <= 64} == {0, 1, 2, 3} - set(range(slots + 1, 4))
        assert {count for size, count in graphs if size > 64} == {slots}
        assert [size for size, _ in graphs] == sorted((size for size, _ in graphs), reverse=True)
        engine.model.register_forward_pre_hook(refuse, with_kwargs=True)
        before, asked = engine._batch.table_steps, []
        for prompt, params in requests_of(draw):
            name = draw.choice(list(models))
            asked.append((engine.submit(prompt, model=name, params=params), name, prompt))
            if draw.random() < 0.1:
                engine.cancel(draw.choice(asked)[0])
        answered = 0
        for request, name, prompt in asked:
            error, tokens = None, []
            try:
                tokens = list(request.result(timeout=300).tokens)
            except MeswitchError as raised:
                error = str(raised)
            assert error is None or error.endswith(
                ("no such token", "cancelled") if REFUSED in prompt else "cancelled"
            ), error
            if tokens:
                logits = logits_alone(models[name], prompt + tokens)[len(prompt) - 1 : -1]
                logits[:, REFUSED] -= 100
                chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
                assert (logits.max(1).values - chosen).max() < 0.03 * logits.std(), (name, len(prompt))
                answered += 1
        assert answered >= 15
        assert engine._batch.table_steps - before >= 15
        assert engine._batch.reused_tokens > 0
