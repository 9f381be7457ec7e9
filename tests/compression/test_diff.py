"""What a fine-tune changed, on pairs whose differences are known."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from meswitch.compression import diff as module
from meswitch.compression.diff import WeightChange, diff, measure
from meswitch.configuration import TRAINING, UNREAD
from tests.support.models import make_pair


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def by_name(found):
    return {item.name: item for item in found.tensors}


def test_measure_counts_what_changed():
    base = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    expert = base + torch.tensor([[0.0, 1.0, -2.0], [0.0, 0.0, 0.0]])
    change, unchanged_rows = measure(base, expert)
    assert (change.weights, change.unchanged, unchanged_rows) == (6, 4, 1)
    assert change.base_norm == pytest.approx(5.0)
    assert change.relative_norm == pytest.approx(5**0.5 / 5)
    assert change.largest == 2.0


@pytest.mark.parametrize(("kind", "kurtosis"), [("uniform", -1.2), ("normal", 0.0), ("laplace", 3.0)])
def test_kurtosis_tells_heavy_tails(kind, kurtosis):
    torch.manual_seed(0)
    draw = {
        "uniform": lambda: torch.rand(400, 500),
        "normal": lambda: torch.randn(400, 500),
        "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((400, 500)),
    }[kind]
    change, _ = measure(torch.zeros(400, 500), draw() * 1e-4 + 3e-4)
    assert change.kurtosis == pytest.approx(kurtosis, abs=0.2)


def test_a_constant_change_has_no_kurtosis_and_an_empty_base_no_relative_norm():
    change, _ = measure(torch.zeros(4, 4), torch.full((4, 4), 0.25))
    assert change.kurtosis is None
    assert change.relative_norm is None


def test_values_that_are_not_finite_are_counted_apart():
    base, expert = torch.ones(2, 3), torch.ones(2, 3)
    expert[0, 0], expert[1, 2] = torch.nan, 2.0
    change, _ = measure(base, expert)
    assert (change.not_finite, change.unchanged, change.delta_norm) == (1, 4, 1.0)


def test_blocks_do_not_change_the_result(monkeypatch):
    torch.manual_seed(0)
    base = torch.randn(37, 20, dtype=torch.bfloat16)
    expert = base + torch.randn(37, 20, dtype=torch.bfloat16) * 0.1
    whole, rows = measure(base, expert)
    monkeypatch.setattr(module, "_BLOCK", 50)
    parts, same_rows = measure(base, expert)
    assert rows == same_rows
    assert parts.delta_norm == pytest.approx(whole.delta_norm, rel=1e-12)
    assert parts.kurtosis == pytest.approx(whole.kurtosis, rel=1e-9)


def test_changes_add_up():
    one, two = WeightChange(10, 3.0, 0.3, 0.1, 2, 1.0), WeightChange(30, 4.0, 0.4, 0.2, 0, 5.0)
    both = WeightChange.together([one, two])
    assert both.base_norm == pytest.approx(5.0)
    assert both.relative_norm == pytest.approx(0.1)
    assert (both.weights, both.unchanged, both.largest, both.kurtosis) == (40, 2, 0.2, 4.0)


def test_an_untouched_copy_shows_no_change(pair):
    base, expert = pair(change=0.0)
    found = diff(base, expert)
    assert found.total.delta_norm == 0
    assert found.total.unchanged_share == 1.0
    assert found.config == found.generation == ()
    assert by_name(found)["lm_head.weight"].unchanged_rows == 2048


def test_tensors_are_compared_one_after_another(pair):
    seen = []
    found = diff(*pair("qwen2"), progress=lambda *told: seen.append(told))
    assert [name for *_, name in seen] == [item.name for item in found.tensors]
    phase, done, total, _ = seen[-1]
    assert (phase, done) == ("comparing", total)
    assert set(found.by_layer()) >= {(0, "mlp.up_proj"), (1, "self_attn.q_proj.bias")}
    assert sum(change.weights for change in found.by_type().values()) == found.total.weights
    assert found.by_type()["mlp.up_proj"].relative_norm == pytest.approx(0.05, rel=0.1)


def test_added_tokens_are_rows_and_texts(pair):
    found = diff(*pair("mistral", added_tokens=2))
    assert by_name(found)["model.embed_tokens.weight"].added_rows == 2
    assert by_name(found)["lm_head.weight"].rows == 2048
    assert [text for _, text in found.tokenizer.added] == ["<added_0>", "<added_1>"]
    assert found.obstacle is None
    assert [item.field for item in found.config if item.changes_computation] == []


def test_template_end_token_and_context_length_are_named(pair):
    base, expert = pair()
    (expert / "chat_template.jinja").write_text("{{ messages[0].content }}")
    edit(expert / "generation_config.json", eos_token_id=[3, 2])
    edit(expert / "tokenizer_config.json", eos_token="</s>")
    edit(expert / "config.json", max_position_embeddings=4096)
    found = diff(base, expert)
    assert found.tokenizer.chat_template == "differs"
    assert [(item.field, item.base, item.expert) for item in found.generation] == [("eos_token_id", 3, [3, 2])]
    assert [(item.field, item.expert) for item in found.tokenizer.special] == [("eos_token", "</s>")]
    assert [(item.field, item.changes_computation) for item in found.config] == [("max_position_embeddings", False)]


def test_a_checkpoint_without_tokenizer_is_compared_all_the_same(pair):
    base, expert = pair()
    (expert / "tokenizer.json").unlink()
    found = diff(base, expert)
    assert found.tokenizer is None
    assert found.total.delta_norm > 0


def test_what_stands_in_the_way_is_named(pair):
    base, expert = pair()
    edit(expert / "config.json", rms_norm_eps=1e-5)
    found = diff(base, expert)
    assert [item.field for item in found.config if item.changes_computation] == ["rms_norm_eps"]
    assert "rms_norm_eps" in found.obstacle


def test_tensors_that_do_not_correspond_are_listed(pair):
    base, _ = pair()
    _, other = pair("qwen2", intermediate_size=96)
    found = diff(base, other)
    assert found.other_shape["model.layers.0.mlp.up_proj.weight"] == ((160, 64), (96, 64))
    assert "model.layers.1.self_attn.k_proj.bias" in found.only_expert
    assert found.only_base == ()
    assert found.obstacle is not None


def test_a_damaged_expert_shows_where(pair):
    base, expert = pair()
    model = AutoModelForCausalLM.from_pretrained(expert)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, :3] = torch.nan
    model.save_pretrained(expert)
    broken = {item.name: item.change.not_finite for item in diff(base, expert).tensors if item.change.not_finite}
    assert broken == {"model.layers.1.mlp.gate_proj.weight": 3}


def test_a_model_trained_apart_is_no_fine_tune(pair, tmp_path):
    base, _ = pair()
    _, other = make_pair(tmp_path / "apart", base, "mistral", seed=7)
    (hint,) = diff(base, other).hints
    assert hint.startswith(f"{other}: is no fine-tune of this base: all 14 matrices that were compared moved by 1.")


def test_a_nearer_base_that_the_configuration_names_is_shown_how_to_be_compared(pair):
    base, expert = pair()
    edit(expert / "config.json", _name_or_path="org/Base-Instruct")
    (hint,) = diff(base, expert).hints
    assert hint.startswith("the expert's config.json names org/Base-Instruct: the nearer base compresses better")
    assert f"`meswitch diff --base org/Base-Instruct --expert {expert}`" in hint


def test_an_expert_that_brings_a_template_to_a_base_without_one_is_often_tuned_from_an_instruct_model(pair):
    base, expert = pair()
    (base / "chat_template.jinja").unlink()
    (hint,) = diff(base, expert).hints
    assert f"`meswitch diff --base INSTRUCT --expert {expert}`" in hint


def test_a_fine_tune_near_its_base_needs_no_hint(pair):
    base, expert = pair()
    edit(expert / "config.json", _name_or_path=str(base))
    assert diff(base, expert).hints == ()


def test_what_a_field_without_effect_is_for_is_said(pair):
    base, expert = pair()
    edit(expert / "config.json", unsloth_version="2024.11.7", attention_dropout=0.1)
    reasons = {item.field: item.reason for item in diff(base, expert).config}
    assert reasons == {"unsloth_version": UNREAD, "attention_dropout": TRAINING}


def test_a_pair_that_is_stored_in_two_ways_is_compared_by_what_the_model_loads(pair):
    base, expert = pair(tied=True)
    tensors = load_file(expert / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    save_file(wrapped, expert / "model.safetensors", metadata={"format": "pt"})
    found = diff(base, expert)
    assert (found.only_base, found.only_expert, found.obstacle) == ((), (), None)
    assert found.total.relative_norm == pytest.approx(0.05, rel=0.2)
