"""Architectures beside Llama's: in vLLM as merged, token by token in a mixed batch, or refused before it is ready, for
the reasons that `vllm_support` gives without it."""

import pytest
from transformers import AutoConfig

import meswitch
from meswitch.architecture import architecture_of
from meswitch.compression.merge import merge
from meswitch.vllm.support import CONVOLVES, MIXTURE, ORDERED, ROUTES, STATE_SPACE, TABLE, TURNED, vllm_support
from tests.support.vllm_engines import PROMPT, ask, running, with_deltas

WIDE = {"hidden_size": 128, "head_dim": 32}  # heads of 32: the least that attention on a CPU takes
TIED = {"head_dim": 32, "tied": True}
ALL_HEADS = WIDE | {"num_key_value_heads": 4}
SERVED = {
    "gemma": ("gemma", TIED | {"num_key_value_heads": 1}),
    "gemma2": ("gemma2", TIED | {"initializer_range": 0.05}),  # more, and the scaled embedding answers its own token
    "gemma3": ("gemma3_text", TIED | {"initializer_range": 0.05, "sliding_window": 64}),
    "phi, a head with bias": ("phi", ALL_HEADS),
    "gpt-j, a head with bias": ("gptj", ALL_HEADS | {"rotary_dim": 16, "tie_word_embeddings": False}),
    "cohere, norms of each head": ("cohere", WIDE | TIED | {"use_qk_norm": True}),
    "cohere2": ("cohere2", WIDE | TIED | {"sliding_window": 64}),
    "olmo2": ("olmo2", WIDE),
    "stablelm": ("stablelm", WIDE | {"use_qkv_bias": True}),
    "gpt-neox": ("gpt_neox", ALL_HEADS),
    "falcon, one key head": ("falcon", WIDE | {"head_dim": None, "multi_query": True}),
    "glm4, gate and up stored as one": ("glm4", WIDE),
    "exaone4": ("exaone4", WIDE),
    "nemotron": ("nemotron", WIDE),
    "starcoder2": ("starcoder2", WIDE),
    "glm": ("glm", WIDE),
    "granite": ("granite", WIDE),
    "phi3, q, k and v stored as one": ("phi3", WIDE),
    "smollm3": ("smollm3", WIDE),
    "seed-oss": ("seed_oss", WIDE),
    "hunyuan, norms after heads and tokens were swapped": ("hunyuan_v1_dense", WIDE),
    "ernie4.5": ("ernie4_5", WIDE),
    "olmo": ("olmo", WIDE),
}
REFUSED = {
    "gpt2": ("gpt2", ALL_HEADS, {TURNED, TABLE}),
    "falcon, several key heads": ("falcon", WIDE | {"head_dim": None, "new_decoder_architecture": True}, {ORDERED}),
    "bloom": ("bloom", ALL_HEADS | {"n_head": 4, "n_layer": 2, "tied": True}, {ORDERED}),
    "gpt-bigcode": ("gpt_bigcode", ALL_HEADS | {"num_key_value_heads": 1}, {TABLE}),
    "mamba": ("mamba", {}, {STATE_SPACE, CONVOLVES}),
}


def options(*experts):
    return {"additional_config": {"meswitch": {"experts": [str(path) for path in experts]}}}


def support(base):
    return vllm_support(architecture_of(AutoConfig.from_pretrained(base)))


def reason_of(line):
    """Of `module and 3 more: class: reason`."""
    return line.split(": ", 2)[2]


def reasons_in(message):
    """All that a refusal gives."""
    lines = message.partition("to serve it without them: ")[2].partition("\n")[0]
    return {reason_of(line) for line in lines.split("; ")}


@pytest.mark.vllm
@pytest.mark.parametrize("case", SERVED)
def test_an_expert_is_served_beside_the_base(pair, tmp_path, case):
    arch, fields = SERVED[case]
    base, expert = pair(arch, change=0.3, **fields)
    delta = meswitch.compress(base, expert, tmp_path / "delta", bits=4, group_size=32).directory
    merged = merge(base, delta, tmp_path / "merged", dtype="float32")
    prompts = [PROMPT, PROMPT[3:], PROMPT]
    with running(merged) as engine:
        theirs = ask(engine, prompts)
    with with_deltas(base, **options(delta)) as engine:
        alone = ask(engine, prompts)  # vLLM's own code: nothing is switched on a CPU while no expert is asked
        adapter = ("expert", 1, delta)
        answers = ask(engine, [*prompts, *prompts], [adapter] * 3 + [None] * 3)
    assert answers == [*theirs, *alone]
    assert theirs[0] != alone[0]
    assert support(base) == []


@pytest.mark.vllm
def test_tokens_that_only_the_expert_has_get_capped_logits_too(pair, tmp_path):
    cap = {"final_logit_softcapping": 0.5, "initializer_range": 0.05}
    base, expert = pair("gemma2", change=0.3, added_tokens=3, **TIED, **cap)
    delta = meswitch.compress(base, expert, tmp_path / "delta", bits=4, group_size=32).directory
    merged = merge(base, delta, tmp_path / "merged", dtype="float32")
    theirs = [*PROMPT, 2048, 2050, 2049]

    def scores(engine, adapter=None):
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False)
        request = adapter and LoRARequest(*adapter)
        (output,) = engine.generate({"prompt_token_ids": theirs}, params, lora_request=request, use_tqdm=False)
        return {token: score.logprob for token, score in output.outputs[0].logprobs[0].items()}

    every = {"max_logprobs": -1}
    with running(merged, **every) as engine:
        wanted = scores(engine)
    settings = {"experts": [str(delta)], "lora": False}
    with with_deltas(base, tokenizer=str(expert), additional_config={"meswitch": settings}, **every) as engine:
        found = scores(engine, ("expert", 1, str(delta)))
    assert {token: found[token] for token in (7, 2048, 2049, 2050)} == pytest.approx(
        {token: wanted[token] for token in (7, 2048, 2049, 2050)}, abs=1e-4
    )


@pytest.mark.vllm
@pytest.mark.parametrize("case", REFUSED)
def test_an_expert_is_refused_before_the_engine_is_ready(pair, tmp_path, case):
    arch, fields, reasons = REFUSED[case]
    base, expert = pair(arch, change=0.3, **fields)
    delta = meswitch.compress(base, expert, tmp_path / "delta", bits=4, group_size=32).directory
    with (
        pytest.raises(Exception, match="changes layers that cannot be switched") as refusal,
        with_deltas(base, **options(delta)),
    ):
        pass
    assert reasons_in(str(refusal.value)) == reasons
    assert {reason_of(line) for line in support(base)} == reasons


@pytest.mark.vllm
def test_a_mixture_of_experts_is_refused_before_the_engine_is_ready(pair, tmp_path, monkeypatch, capfd):
    # in a process of its own: vLLM makes the groups of a mixture with a process's first engine
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    base, expert = pair("mixtral", change=0.3, num_local_experts=4, num_experts_per_tok=2, **WIDE)
    delta = meswitch.compress(base, expert, tmp_path / "delta", bits=4, group_size=32).directory
    with pytest.raises(Exception, match="Engine core initialization failed"), with_deltas(base, **options(delta)):
        pass
    printed = capfd.readouterr()
    assert reasons_in(printed.out + printed.err) == {MIXTURE, ROUTES}
    assert {reason_of(line) for line in support(base)} == {MIXTURE, ROUTES}


@pytest.mark.vllm
def test_a_fault_in_how_deltas_are_added_is_found_before_the_first_request(family, deltas, monkeypatch):
    from meswitch.vllm import layers

    def twice(*arguments):
        add_delta(*arguments)
        add_delta(*arguments)

    add_delta = layers.add_delta
    monkeypatch.setattr(layers, "add_delta", twice)
    reason = r"qkv_proj and \d more: QKVParallelLinear: disagrees with merged weights: 2\.00 of an expert's change"
    with pytest.raises(Exception, match=reason), with_deltas(family / "base", **options(deltas["math"])):
        pass
