"""Training what is 16 bit against the full expert."""

import json

import pytest
import torch

import meswitch
from meswitch import Artifact
from meswitch.compression.merge import load_merged
from meswitch.compression.options import TrainingRecipe
from meswitch.errors import ArtifactError, ConfigError


@pytest.fixture
def text(family, tmp_path):
    """40 conversations of the math domain."""
    lines = (family / "calibration" / "math.jsonl").read_text().splitlines()[:40]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return tmp_path / "text.jsonl"


@pytest.mark.slow
def test_distillation_lowers_the_divergence_on_held_out_text_and_costs_no_bytes(family, tmp_path, text):
    plain = meswitch.compress(family / "base", family / "math", tmp_path / "plain", calibration=text, distill=0)
    artifact = meswitch.compress(
        family / "base",
        family / "math",
        tmp_path / "delta",
        calibration=text,
        distill=TrainingRecipe(steps=12, codes=False),
    )
    artifact.verify()
    info = artifact.manifest.method.distillation
    assert info.steps == 12
    assert info.held_out_after < 0.95 * info.held_out_before
    assert artifact.nbytes == plain.nbytes
    for name, entry in plain.manifest.tensors.items():
        assert artifact.manifest.tensors[name].kind == entry.kind
        if entry.kind == "packed":  # the codes are the same: only what is 16 bit was trained
            assert torch.equal(artifact.read(name).packed, plain.read(name).packed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta", "plain", "text.jsonl"]


@pytest.mark.parametrize(
    ("arch", "case", "options"),
    [
        ("mistral", {"added_tokens": 2}, {}),
        ("llama", {"tied": True}, {"group_size": None}),
        ("qwen2", {}, {"embeddings": "exact"}),
        ("qwen3", {}, {"bits": 3, "salient": 0}),
    ],
    ids=["added", "tied", "biases", "qk-norms"],
)
def test_other_models_can_be_distilled(pair, tmp_path, text, arch, case, options):
    base, expert = pair(arch, change=0.3, **case)
    out = tmp_path / "delta"
    artifact = meswitch.compress(base, expert, out, calibration=text, distill=5, **options)
    info = artifact.manifest.method.distillation
    assert info.held_out_after <= info.held_out_before
    # what was trained is what is stored: the merged model diverges as little as training said
    rows = [json.loads(line)["messages"] for line in text.read_text().splitlines()]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(expert)
    full, merged = AutoModelForCausalLM.from_pretrained(expert, dtype=torch.float32), load_merged(base, out)
    total = tokens = 0.0
    for row in rows:
        prompt = tokenizer.apply_chat_template(row, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            p, q = (m(ids).logits.log_softmax(-1) for m in (full, merged))
        total += (p.exp() * (p - q)).sum().item()
        tokens += ids.numel()
    assert total / tokens == pytest.approx(info.held_out_after, rel=0.5)


def test_a_distilled_artifact_is_served_like_any_other(family, tmp_path, text):
    meswitch.compress(family / "base", family / "math", tmp_path / "delta", calibration=text, distill=2)
    with meswitch.Engine(family / "base", {"math": tmp_path / "delta"}, device="cpu") as engine:
        (answer,) = engine.generate([[{"role": "user", "content": "How many? 2*3"}]], model="math", max_new_tokens=8)
        assert answer.tokens


def test_distillation_needs_text(family, tmp_path, text):
    with pytest.raises(ConfigError, match="distill: needs calibration text"):
        meswitch.compress(family / "base", family / "math", tmp_path / "delta", distill=5)
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(text.read_text().splitlines()[:3]))
    with pytest.raises(ConfigError, match="distill: 3 calibration sequences are too few"):
        meswitch.compress(family / "base", family / "math", tmp_path / "delta", calibration=few, distill=5)
    assert not list(tmp_path.glob("delta*"))


def test_an_artifact_that_exists_is_noticed_before_the_work(family, tmp_path, text):
    meswitch.compress(family / "base", family / "math", tmp_path / "delta")
    with pytest.raises(ArtifactError, match="already exists"):
        meswitch.compress(
            family / "base",
            family / "math",
            tmp_path / "delta",
            calibration=text,
            distill=5,
            progress=lambda *_: pytest.fail("work began"),
        )
    assert Artifact.open(tmp_path / "delta").manifest.method.distillation is None
