"""Other architectures, vocabularies and compressions: in vLLM as merged."""

import pytest
import torch

import meswitch
from meswitch.compression.merge import merge
from tests.support.vllm_engines import PROMPT, ask, running, with_deltas

pytestmark = pytest.mark.vllm


def settings(**fields):
    return {"additional_config": {"meswitch": fields}}


@pytest.mark.parametrize(
    ("arch", "case", "options"),
    [
        ("llama", {"tied": True}, {"bits": 4, "group_size": 32}),
        ("qwen2", {"hidden_size": 128}, {"bits": 1}),
        ("qwen3", {"tied": True}, {"bits": 3, "salient": 5}),
        ("mistral", {}, {"bits": 2, "group_size": None, "embeddings": "exact"}),
        ("qwen2", {"tied": True, "hidden_size": 128}, {"target_bpw": 2.6, "group_size": 16}),
    ],
    ids=["llama-tied", "qwen2-biases", "qwen3-qk-norms-tied", "exact", "qwen2-mixed-bits"],
)
def test_other_architectures(pair, tmp_path, arch, case, options):
    base, expert = pair(arch, change=0.3, head_dim=32, **case)
    delta = meswitch.compress(base, expert, tmp_path / "delta", **options).directory
    merged = merge(base, delta, tmp_path / "merged", dtype="float32")
    prompts = [PROMPT, PROMPT[3:], PROMPT]
    with running(merged) as engine:
        theirs = ask(engine, prompts)
    with running(base) as engine:
        ours = ask(engine, prompts)
    assert ours[0] != theirs[0]
    with with_deltas(base, **settings(experts=[str(delta)])) as engine:
        adapter = ("expert", 1, delta)
        answers = ask(engine, [*prompts, *prompts], [adapter] * 3 + [None] * 3)
    assert answers == [*theirs, *ours]


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 4, "embeddings": "exact"}], ids=["quantised", "exact"])
@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
def test_tokens_that_only_the_expert_has(pair, tmp_path, options, tied):
    base, expert = pair("llama", change=0.3, head_dim=32, added_tokens=3, tied=tied)
    delta = meswitch.compress(base, expert, tmp_path / "delta", **options).directory
    merged = merge(base, delta, tmp_path / "merged", dtype="float32")
    theirs, ours = [*PROMPT, 2048, 2050, 2049], PROMPT
    with running(merged) as engine:
        wanted = ask(engine, [theirs, ours])
    with running(base) as engine:
        (plain,) = ask(engine, [ours])
    with with_deltas(base, tokenizer=str(expert), **settings(experts=[str(delta)], lora=False)) as engine:
        adapter = ("expert", 1, delta)
        assert ask(engine, [theirs, ours, ours], [adapter, None, adapter]) == [wanted[0], plain, wanted[1]]


def test_what_cannot_be_served_is_refused_by_name_when_it_is_loaded(pair, tmp_path):
    from vllm.lora.request import LoRARequest

    base, expert = pair("llama", change=0.3, head_dim=32)
    small = meswitch.compress(base, expert, tmp_path / "small", bits=1).directory
    large = meswitch.compress(base, expert, tmp_path / "large", bits=4).directory
    other, stranger = pair("qwen2", change=0.3)
    foreign = meswitch.compress(other, stranger, tmp_path / "foreign").directory
    with with_deltas(base, **settings(experts=[str(small)])) as engine:
        for name, path, reason in (
            ("large", large, r"does not fit the slots.*bits: 4, in a place made for 1"),
            ("foreign", foreign, "fingerprint"),
        ):
            with pytest.raises(Exception, match=reason):
                engine.llm_engine.add_lora(LoRARequest(name, 5, str(path)))
        assert ask(engine, [PROMPT], [("small", 1, small)])  # the engine goes on


def test_layers_are_traced_without_a_break(family, deltas):
    """vLLM does not compile on a CPU where LoRA is on: the layers by themselves, with the tokens' number unknown."""
    from meswitch.vllm.delta_op import _current

    with with_deltas(family / "base", **settings(lora=False)) as engine:
        ask(engine, [PROMPT], [("math", 1, deltas["math"])], max_tokens=1)

        def compare(model):
            step = _current[0]
            found = []
            for tokens in (6, 7):
                step.tokens.fill([0, -1] * 3 + [0] * (tokens - 6))
                x, residual = torch.randn(2, tokens, model.config.hidden_size)
                layer = model.model.layers[1]
                for module, arguments in ((layer.mlp, (x,)), (layer.post_attention_layernorm, (x, residual))):
                    traced = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
                    wanted, seen = module(*arguments), traced(*arguments)
                    found.append(all(map(torch.allclose, wanted, seen)))
                    step.tokens.fill([-1] * tokens)
                    found.append(not torch.allclose(wanted[0], traced(*arguments)[0]))
                    step.tokens.fill([0, -1] * 3 + [0] * (tokens - 6))
            return found

        assert all(engine.apply_model(compare)[0])
