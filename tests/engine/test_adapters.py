"""PEFT adapters beside deltas in one running batch: each answers as its own merged model does alone."""

import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config

import meswitch
from meswitch import Engine, SamplingParams
from meswitch.compression.merge import load_merged
from meswitch.errors import IncompatibleError
from tests.support.adapters import pairs, write_adapter
from tests.support.models import TINY

NEW_TOKENS = 16
PROMPT = [{"role": "user", "content": "Tom has 23 apples. Tom buys 4 bags with 5 apples each. How many now?"}]
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")


def alone(model, tokens, eos=(3,)):
    """Greedy continuation by a model itself, one request."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=list(eos),
            pad_token_id=1,
        )
    return tuple(out[0, len(tokens) :].tolist())


def merged_by_peft(base, adapter):
    """By PEFT where it is installed; its tests hold that ours is the same to the last bit."""
    try:
        from peft import PeftModel
    except ImportError:
        return load_merged(base, adapter)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


@pytest.fixture(scope="module")
def adapter(family, tmp_path_factory):
    tensors = pairs(family / "base", *TARGETS, size=0.15)
    return write_adapter(tmp_path_factory.mktemp("adapters") / "poet", tensors, target_modules=list(TARGETS))


@pytest.fixture(scope="module")
def engine(family, deltas, adapter):
    experts = {"math": deltas["math"], "code": deltas["code"], "poet": adapter}
    with Engine(family / "base", experts, device="cpu", slots=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(family, deltas, adapter, engine):
    models = {name: load_merged(family / "base", deltas[name]) for name in ("math", "code")}
    models["base"] = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.float32)
    models["poet"] = merged_by_peft(family / "base", adapter)
    readers = engine.tokenizers
    return {name: alone(model, readers[name].encode(PROMPT), readers[name].ends) for name, model in models.items()}


def test_the_adapter_answers_otherwise_than_the_deltas_and_the_base(expected):
    assert len(set(expected.values())) == 4


def test_identical_prompts_for_deltas_adapter_and_base_at_once(engine, expected):
    assert not engine.by_turns
    names = engine.names * 2  # four models, two slots
    answers = engine.generate([PROMPT] * len(names), model=names, max_new_tokens=NEW_TOKENS)
    for name, answer in zip(names, answers, strict=True):
        assert answer.tokens == expected[name], name


def test_staggered_requests_of_all(engine, expected):
    failures = []

    def ask(name, delay):
        time.sleep(delay)
        request = engine.submit(PROMPT, model=name, params=SamplingParams(max_new_tokens=NEW_TOKENS))
        if request.result(timeout=120).tokens != expected[name]:
            failures.append((name, delay))

    jobs = [
        threading.Thread(target=ask, args=(name, 0.03 * i + 0.05 * j))
        for i, name in enumerate(engine.names)
        for j in range(3)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert not failures


def test_a_slot_is_as_large_as_the_pairs_not_as_the_matrices(family, adapter):
    with Engine(family / "base", {"poet": adapter}, device="cpu") as engine:
        stored = sum(tensor.nbytes for tensor in load_file(adapter / "adapter_model.safetensors").values())
        assert engine.memory()["slots"] < stored + 256 * 200


def test_an_adapter_converted_beforehand_answers_as_the_directory_does(family, adapter, tmp_path, engine, expected):
    from meswitch.adapter import Adapter, write_artifact
    from meswitch.checkpoint import Checkpoint

    write_artifact(Checkpoint.open(family / "base"), Adapter.open(adapter), tmp_path / "poet")
    with Engine(family / "base", {"poet": tmp_path / "poet"}, device="cpu", backend="reference") as other:
        (answer,) = other.generate([PROMPT], model="poet", max_new_tokens=NEW_TOKENS)
    assert answer.tokens == expected["poet"]


def of_dora(base):
    tensors = pairs(base, "q_proj", "v_proj")
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.linspace(0.5, 3, len(tensors[name]))
    return tensors, {"use_dora": True}


def of_whole_modules(base):
    plain = load_file(base / "model.safetensors")
    tensors = pairs(base, "q_proj", "v_proj")
    tensors |= {name: plain[name].float().flip(0) for name in ("lm_head.weight", "model.norm.weight")}
    tensors["model.layers.0.self_attn.q_proj.base_layer.bias"] = torch.ones(64)
    return tensors, {"modules_to_save": ["lm_head", "norm"], "bias": "lora_only"}


def of_added_tokens(base):
    plain = load_file(base / "model.safetensors")
    tensors = pairs(base, "q_proj", "v_proj")
    tensors["model.embed_tokens.token_adapter.trainable_tokens_delta"] = torch.randn(3, 64)
    for name in ("model.embed_tokens.token_adapter.base_layer", "lm_head"):
        whole = plain[f"{'lm_head' if name == 'lm_head' else 'model.embed_tokens'}.weight"].float()
        tensors[f"{name}.weight"] = torch.cat([whole, torch.randn(2, 64)])
    return tensors, {"trainable_token_indices": [7, 2048, 2049]}


@pytest.mark.parametrize(
    ("of", "backend"), [(of_dora, "cpu"), (of_whole_modules, "reference"), (of_added_tokens, "cpu")]
)
def test_what_an_adapter_holds_beside_pairs(pair, tmp_path, of, backend):
    torch.manual_seed(0)
    base, expert = pair("llama", change=0.3, attention_bias=True)
    meswitch.compress(base, expert, tmp_path / "delta", bits=4)
    tensors, fields = of(base)
    adapter = write_adapter(tmp_path / "adapter", tensors, **fields)
    tokens = [*range(5, 30), 7]
    with Engine(base, {"d": tmp_path / "delta", "a": adapter}, device="cpu", backend=backend) as engine:
        prompts = [tokens, tokens, tokens, [*tokens, *([2049] if of is of_added_tokens else [9])]]
        answers = engine.generate(prompts, model=["base", "d", "a", "a"], max_new_tokens=NEW_TOKENS)
    models = [AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), load_merged(base, tmp_path / "delta")]
    models += [load_merged(base, adapter)] * 2
    for answer, model, prompt in zip(answers, models, prompts, strict=True):
        assert answer.tokens == alone(model, prompt), answer.model


def test_pairs_of_transposed_linears(family, tmp_path):
    config = GPT2Config(vocab_size=2048, n_embd=64, n_layer=2, n_head=4, n_positions=128, eos_token_id=3)
    torch.manual_seed(0)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(family / "base").save_pretrained(base)
    adapter = write_adapter(
        tmp_path / "adapter", pairs(base, "c_attn", "wte", size=2), target_modules=["c_attn", "wte"]
    )
    tokens = list(range(5, 30))
    with Engine(base, {"a": adapter}, device="cpu") as engine:
        assert not engine.by_turns
        plain, ours = engine.generate([tokens] * 2, model=["base", "a"], max_new_tokens=NEW_TOKENS)
    assert ours.tokens == alone(load_merged(base, adapter), tokens)
    assert plain.tokens == alone(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tokens)
    assert plain.tokens != ours.tokens


def test_pairs_of_a_mixture_s_stacks(family, tmp_path):
    few = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **(TINY | few))).save_pretrained(base)
    AutoTokenizer.from_pretrained(family / "base").save_pretrained(base)
    name = "model.layers.0.mlp.experts"
    tensors = {f"{name}.lora_A.weight": torch.randn(16, 32), f"{name}.lora_B.weight": torch.randn(64, 16)}
    adapter = write_adapter(
        tmp_path / "adapter", tensors, target_modules=[], target_parameters=["mlp.experts.down_proj"]
    )
    tokens = list(range(5, 30))
    with Engine(base, {"a": adapter}, device="cpu") as engine:
        plain, ours = engine.generate([tokens] * 2, model=["base", "a"], max_new_tokens=NEW_TOKENS)
    assert ours.tokens == alone(load_merged(base, adapter), tokens)
    assert plain.tokens == alone(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tokens)
    assert plain.tokens != ours.tokens


def test_an_adapter_of_another_base_is_refused_before_anything_is_loaded(family, pair, tmp_path):
    base, _ = pair("llama")
    adapter = write_adapter(tmp_path / "adapter", pairs(base, "q_proj", "v_proj"))
    with pytest.raises(IncompatibleError, match=r"adapter_model\.safetensors: model\.layers\.0\.\S+: a pair for"):
        Engine(family / "base", {"x": adapter}, device="cpu")
