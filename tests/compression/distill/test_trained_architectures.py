"""Every kind of architecture is trained as what the artifact restores, or refused before any work."""

import dataclasses

import pytest
import torch

import meswitch
from meswitch.checkpoint import Checkpoint
from meswitch.compression.distill.student import build_student, read_batch
from meswitch.compression.merge import load_merged
from meswitch.compression.options import TrainingRecipe
from meswitch.errors import IncompatibleError
from tests.architectures import tiny

CPU = torch.device("cpu")
SHORT = TrainingRecipe(steps=8, batch=8, check_every=2, question_weight=1.0)
# expert matrices one by one; Conv1D and a tied head; stacks that lie transposed; a scaled embedding; linear attention
MODELS = ("mixtral", "gpt2", "gpt_oss", "gemma", "qwen3_next")


@pytest.fixture
def pair(tmp_path, family):
    def build(model_type, **fields):
        base = tiny.write(tiny.config_of(model_type, **fields), tmp_path / "base", family / "base")
        return base, tiny.tune(base, tmp_path / "expert", 1)

    return build


@pytest.fixture
def text(family, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join((family / "calibration/math.jsonl").read_text().splitlines()[:20]))
    return file


@pytest.mark.parametrize("model_type", MODELS)
def test_a_student_computes_what_the_merged_model_does(pair, tmp_path, model_type):
    base, expert = pair(model_type)
    made = meswitch.compress(base, expert, tmp_path / "delta")
    checkpoints = Checkpoint.open(base).loaded, Checkpoint.open(expert).loaded
    student = build_student(*checkpoints, made, SHORT, CPU, torch.float32)
    merged = load_merged(base, tmp_path / "delta")
    with torch.no_grad():
        ours, theirs = (read_batch(model, [[5, 77, 1200], [9]], CPU) for model in (student.model, merged))
    assert torch.allclose(ours.logits[ours.real], theirs.logits[theirs.real], atol=1e-4)


@pytest.mark.parametrize("scope", ["model", "block"])
@pytest.mark.parametrize("model_type", MODELS)
def test_training_lowers_the_divergence(pair, tmp_path, text, model_type, scope):
    base, expert = pair(model_type)
    recipe = dataclasses.replace(SHORT, scope=scope)
    made = meswitch.compress(base, expert, tmp_path / "delta", bits=1, calibration=text, distill=recipe)
    made.verify()
    info = made.manifest.method.distillation
    assert info.held_out_after < info.held_out_before


def test_blocks_that_share_more_than_hidden_states_are_not_trained_one_by_one(pair, tmp_path, text):
    base, expert = pair("gemma4_text")
    options = {"calibration": text, "distill": dataclasses.replace(SHORT, scope="block")}
    with pytest.raises(IncompatibleError, match=r"Gemma4ForCausalLM hand on more than hidden states.*scope model"):
        meswitch.compress(base, expert, tmp_path / "delta", progress=lambda *_: pytest.fail("work began"), **options)
    assert not list(tmp_path.glob("delta?*"))
