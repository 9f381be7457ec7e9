"""Layers of one input are computed in one launch, each as if alone, and alone where they are given something else."""

import pytest
import torch
from transformers.models.mistral.modeling_mistral import MistralMLP

import meswitch
from meswitch import Engine
from meswitch.compression.merge import load_merged
from meswitch.engine import context, joined, layers
from tests.engine.test_kernels import keep_tokens, logits_alone

pytest.importorskip("triton")

PROMPTS = [list(range(5, 12)), list(range(30, 41))]


@pytest.fixture
def served(pair, tmp_path, monkeypatch):
    """Opens an engine whose kernels are their reference; counts the products of several layers, by their rows."""

    def open_engine(arch="mistral", **case):
        for module in (context, joined, layers):  # the kernels' place in the engine, without the interpreter's time
            monkeypatch.setattr(module, "TRITON", "reference")
        launched, compute = [], joined.fused_linears

        def counted(x, weights, parts, *more):
            launched.append(tuple(part.rows for part in parts))
            return compute(x, weights, parts, *more)

        monkeypatch.setattr(joined, "fused_linears", counted)
        base, expert = pair(arch, change=0.5, num_hidden_layers=1, vocab_size=300, **case)
        keep_tokens(base, 300), keep_tokens(expert, 300)
        experts = {"one": tmp_path / "one", "three": tmp_path / "three"}
        meswitch.compress(base, expert, experts["one"], bits=1, salient=0)
        meswitch.compress(base, expert, experts["three"], bits=3, salient=5)
        engine = Engine(base, experts, device="cpu", dtype="float16", backend="triton", slots=2)
        return engine, {name: load_merged(base, path) for name, path in experts.items()}, launched

    return open_engine


def check(engine, models):
    """Both experts' answers in one batch are those of their merged models."""
    names = list(models)
    done = engine.generate(PROMPTS, model=names, max_new_tokens=4)
    for prompt, name, answer in zip(PROMPTS, names, done, strict=True):
        tokens = list(answer.tokens)
        logits = logits_alone(models[name], prompt + tokens)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (logits.max(1).values - chosen).max() < 0.02 * logits.std(), name


def groups_of(engine):
    found = {module.joined for module in engine.model.modules() if isinstance(module, layers.SwitchableLinear)}
    return sorted([member.name.rpartition(".")[2] for member in group.members] for group in found if group)


@pytest.mark.parametrize("arch", ["mistral", "qwen2"])
def test_queries_keys_and_values_are_one_launch_and_so_are_gate_and_up(served, arch):
    engine, models, launched = served(arch)
    with engine:
        assert groups_of(engine) == [["gate_proj", "up_proj"], ["q_proj", "k_proj", "v_proj"]]
        launched.clear()
        check(engine, models)
    assert len(launched) >= 6  # a step's layer takes two launches
    assert {len(rows) for rows in launched} == {2, 3}


@pytest.mark.parametrize(
    ("arch", "groups"),
    [
        ("starcoder2", [["q_proj", "k_proj", "v_proj"]]),
        ("stablelm", [["gate_proj", "up_proj"], ["q_proj", "k_proj", "v_proj"]]),
        ("gemma2", [["gate_proj", "up_proj"], ["q_proj", "k_proj", "v_proj"]]),
    ],
)
def test_layer_norms_with_a_bias_and_soft_caps_are_computed_from_tables(served, caplog, arch, groups):
    with caplog.at_level("WARNING"):
        engine, models, launched = served(arch)
    assert "without CUDA graphs" not in caplog.text
    with engine:
        assert groups_of(engine) == groups
        launched.clear()
        check(engine, models)
    assert launched


def changed_mlp(change):
    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(change(x)))

    return forward


def test_a_layer_that_is_given_another_tensor_computes_alone(served, monkeypatch):
    monkeypatch.setattr(MistralMLP, "forward", changed_mlp(lambda x: x * 2))
    engine, models, launched = served()
    with engine:
        assert groups_of(engine) == [["q_proj", "k_proj", "v_proj"]]
        launched.clear()
        check(engine, models)
    assert {len(rows) for rows in launched} == {3}


def test_a_layer_that_is_given_another_tensor_once_it_is_joined_computes_alone(served, monkeypatch):
    engine, _, launched = served()
    with engine:
        launched.clear()
        with monkeypatch.context() as later:
            later.setattr(MistralMLP, "forward", changed_mlp(lambda x: x * 2))
            doubled = [answer.tokens for answer in engine.generate(PROMPTS, model=["one", "three"], max_new_tokens=4)]
        assert {len(rows) for rows in launched} == {2, 3}
        for module in engine.model.modules():
            if isinstance(module, layers.SwitchableLinear):
                module.joined = None
        monkeypatch.setattr(MistralMLP, "forward", changed_mlp(lambda x: x * 2))
        alone = [answer.tokens for answer in engine.generate(PROMPTS, model=["one", "three"], max_new_tokens=4)]
    assert doubled == alone


def test_an_input_that_is_changed_in_between_is_found_when_the_engine_opens(served, monkeypatch, caplog):
    monkeypatch.setattr(MistralMLP, "forward", changed_mlp(lambda x: x.mul_(2)))
    with caplog.at_level("WARNING"):
        engine, models, launched = served()
    assert "steps run without CUDA graphs" in caplog.text
    with engine:
        launched.clear()
        check(engine, models)
    assert not launched
