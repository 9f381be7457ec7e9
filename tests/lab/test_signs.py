"""Training the scales of the methods that store signs, by the recipes they were published with, or ours."""

import dataclasses

import pytest
import torch

import meswitch
from meswitch import Artifact
from meswitch.artifact.manifest import Calibration
from meswitch.checkpoint import Checkpoint
from meswitch.codec import encode_coded, find_codec
from meswitch.compression.distill.training import train_end_to_end
from meswitch.compression.merge import load_merged, merged_tensors
from meswitch.compression.options import Options, TrainingRecipe, recipe_for
from meswitch.compression.text import CalibrationSet
from meswitch.errors import ConfigError
from meswitch_lab.signs import TrainableSigns

SCALES = {"bitdelta": "sign_scale", "per-axis": "axis_scale"}
TEN_PAIRS = CalibrationSet([[1, 2]] * 10, Calibration("ten pairs", "", 10, 20))
CPU = torch.device("cpu")
# the least that shows a change: the published ones take hundreds of steps
SHORT = {"published": {"steps": 6}, "ours": {"steps": 6, "batch": 4}}


def short(method, recipe):
    start = recipe_for(method) if recipe == "published" else TrainingRecipe()
    return dataclasses.replace(start, **SHORT[recipe])


@pytest.fixture
def text(family, tmp_path):
    """40 conversations of the math domain."""
    lines = (family / "calibration" / "math.jsonl").read_text().splitlines()[:40]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return tmp_path / "text.jsonl"


@pytest.mark.parametrize("recipe", SHORT)
@pytest.mark.parametrize("method", SCALES)
def test_only_scales_change_and_norms_if_the_recipe_says_so(family, tmp_path, text, method, recipe):
    pair = family / "base", family / "math"
    seeing = {"calibration": text, "distill": 0} if find_codec(method).uses_inputs else {}
    plain = meswitch.compress(*pair, tmp_path / "plain", method=method, **seeing)
    made = meswitch.compress(*pair, tmp_path / "delta", method=method, calibration=text, distill=short(method, recipe))
    artifact = Artifact.open(made.directory)
    artifact.verify()
    artifact.check_base(Checkpoint.open(family / "base"), full=True)
    info = artifact.manifest.method.distillation
    assert info.held_out_after < info.held_out_before
    assert artifact.nbytes == plain.nbytes
    for name, entry in plain.manifest.tensors.items():
        now = artifact.manifest.tensors[name]
        assert (now.kind, now.method, now.meta) == (entry.kind, entry.method, entry.meta)
        changed = {s for s, part in entry.stored.items() if now.stored[s].sha256 != part.sha256}
        assert changed <= ({SCALES[method]} if entry.kind == "coded" else {""})
        assert not changed or entry.kind == "coded" or (recipe == "ours" and entry.role == "norm"), name
    assert any(entry.role == "norm" for entry in artifact.manifest.tensors.values())


@pytest.mark.parametrize("method", SCALES)
@pytest.mark.parametrize("case", [{"added_tokens": 2}, {"tied": True}], ids=["added", "tied"])
def test_what_was_trained_is_what_is_stored(pair, tmp_path, text, method, case):
    base, expert = pair(change=0.3, **case)
    out = tmp_path / "delta"
    recipe = TrainingRecipe(steps=12, batch=4, hidden=0.3, seed=3)
    made = meswitch.compress(base, expert, out, method=method, calibration=text, embeddings="quantised", distill=recipe)
    info = made.manifest.method.distillation
    assert info.held_out_after < info.held_out_before
    assert info.seed == 3
    # a further run that may not move starts where the stored one ended
    from meswitch.compression.text import load_calibration

    words = load_calibration(text, expert)
    still = dataclasses.replace(recipe, steps=0)
    source, target = Checkpoint.open(base), Checkpoint.open(expert)
    changed, again = train_end_to_end(source, target, made, words, still, device=CPU)
    assert again.held_out_before == pytest.approx(info.held_out_after, rel=1e-2)
    for name, delta in changed.items():
        if not isinstance(delta, torch.Tensor):
            assert all(torch.equal(made.read(name).tensors()[s], part) for s, part in delta.tensors().items())
    merged = load_merged(base, out).state_dict()
    for name, value in merged_tensors(Checkpoint.open(base), made, torch.float32):
        assert torch.equal(merged[name], value)


@pytest.mark.parametrize("method", SCALES)
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("shape", [(6, 40), (40, 6)], ids=str)
def test_a_trainable_matrix_starts_as_the_stored_one(method, relative, shape):
    generator = torch.Generator().manual_seed(0)
    base, delta = (torch.randn(*shape, generator=generator) for _ in range(2))
    extra = torch.ones(2, shape[1])
    coded = encode_coded(method, delta, Options(method=method).request("linear", *shape, 0), name="a", extra=extra)
    recipe = TrainingRecipe(relative=relative)
    module = find_codec(method).trainable(base, coded, recipe, CPU, torch.float32)
    assert isinstance(module, TrainableSigns)
    assert torch.allclose(module.matrix(), torch.cat([base + coded.dequantize(), extra]), atol=1e-6)
    assert all(torch.equal(module.trained().tensors()[s], part) for s, part in coded.tensors().items())
    module.matrix().square().sum().backward()
    ((parameters, factor),) = module.groups()
    assert factor == 1
    assert all(p.grad.abs().sum() > 0 for p in parameters)


def test_training_that_does_not_help_leaves_the_start(family, tmp_path, text):
    pair = family / "base", family / "math"
    plain = meswitch.compress(*pair, tmp_path / "plain", method="bitdelta")
    wild = dataclasses.replace(recipe_for("bitdelta", 3), learning_rate=10.0)
    made = meswitch.compress(*pair, tmp_path / "delta", method="bitdelta", calibration=text, distill=wild)
    info = made.manifest.method.distillation
    assert info.held_out_after == info.held_out_before
    for name, entry in plain.manifest.tensors.items():
        now = made.manifest.tensors[name]
        assert {s: p.sha256 for s, p in now.stored.items()} == {s: p.sha256 for s, p in entry.stored.items()}


def test_published_recipes_are_those_of_the_papers():
    bitdelta, per_axis = recipe_for("bitdelta"), recipe_for("per-axis")
    assert (bitdelta.steps, bitdelta.batch, bitdelta.learning_rate, bitdelta.length) == (200, 4, 1e-4, 128)
    assert (per_axis.steps, per_axis.batch, per_axis.learning_rate, per_axis.length) == (750, 1, 1e-5, 128)
    for recipe in (bitdelta, per_axis):
        assert (recipe.loss, recipe.relative, recipe.norms) == ("mse", False, False)
    assert recipe_for("bitdelta", 7) == dataclasses.replace(bitdelta, steps=7)
    assert recipe_for("me-switch") == recipe_for("rtn") == TrainingRecipe()


@pytest.mark.parametrize(("method", "steps"), [("bitdelta", 200), ("per-axis", 750), ("rtn", 300), ("me-switch", 300)])
def test_with_text_a_method_is_distilled_by_its_own_recipe(pair, tmp_path, text, method, steps):
    def stop(phase, done, of, line):
        if "divergence" in line:
            assert (done, of) == (1, steps)
            raise KeyboardInterrupt

    base, expert = pair()
    with pytest.raises(KeyboardInterrupt):
        meswitch.compress(base, expert, tmp_path / "delta", method=method, calibration=text, progress=stop)


def test_steps_alone_leave_the_rest_of_the_recipe_as_published(pair, tmp_path, text):
    base, expert = pair()
    made = meswitch.compress(base, expert, tmp_path / "delta", method="bitdelta", calibration=text, distill=3)
    info = made.manifest.method.distillation
    assert (info.steps, info.batch, info.learning_rate) == (3, 4, 1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "l1"}, "recipe: loss: 'l1' is none of kl, mse"),
        ({"batch": 0}, "recipe: batch: 0"),
        ({"length": 0}, "recipe: length: 0"),
        ({"check_every": 0}, "recipe: check_every: 0"),
        ({"steps": -1}, "recipe: -1 steps"),
        ({"learning_rate": 0.0}, "recipe: 300 steps at learning rate 0.0"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainingRecipe(**values)


def test_text_that_is_too_short_to_train_on_by_default_is_not_ignored(pair, tmp_path, text):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(text.read_text().splitlines()[:12]))
    with pytest.raises(ConfigError, match="calibration: the method bitdelta makes no use of it without distillation"):
        meswitch.compress(*pair(), tmp_path / "delta", method="bitdelta", calibration=few)


def test_a_method_without_scales_is_not_trained(pair, tmp_path, text):
    base, expert = pair()
    made = meswitch.compress(base, expert, tmp_path / "delta", method="svd")
    with pytest.raises(ConfigError, match="distill: the method svd has no scales to train"):
        train_end_to_end(
            Checkpoint.open(base), Checkpoint.open(expert), made, TEN_PAIRS, TrainingRecipe(steps=1), device=CPU
        )
