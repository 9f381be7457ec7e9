"""Training one decoder block after the other, for experts that do not fit into memory twice."""

import dataclasses
import gc
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import meswitch
from meswitch import Artifact
from meswitch.artifact.manifest import Manifest
from meswitch.checkpoint import Checkpoint
from meswitch.compression.distill.blockwise import train_blocks
from meswitch.compression.distill.student import TrainablePacked, read_batch
from meswitch.compression.options import TrainingRecipe, recipe_for
from meswitch.compression.partial_model import PartialModel
from meswitch.compression.text import load_calibration
from meswitch.errors import ConfigError

CPU = torch.device("cpu")
SHORT = TrainingRecipe(steps=12, batch=8, scope="block")


@pytest.fixture
def text(family, tmp_path):
    """40 conversations of the math domain."""
    lines = (family / "calibration" / "math.jsonl").read_text().splitlines()[:40]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return tmp_path / "text.jsonl"


def divergence(base, expert, delta, text):
    """KL of the merged model from the full one, in nats a token of the text."""
    sequences = load_calibration(text, expert).sequences
    full, ours = AutoModelForCausalLM.from_pretrained(expert, dtype=torch.float32), meswitch.load_merged(base, delta)
    total = tokens = 0.0
    for ids in sequences:
        with torch.no_grad():
            p, q = (read_batch(model, [ids], CPU).logits.log_softmax(-1) for model in (full, ours))
        total += (p.exp() * (p - q)).sum().item()
        tokens += len(ids)
    return total / tokens


@pytest.mark.slow
def test_the_divergence_falls_and_the_artifact_costs_no_more_bytes_and_is_served(family, tmp_path, text):
    pair = family / "base", family / "math"
    plain = meswitch.compress(*pair, tmp_path / "plain", calibration=text, distill=0)
    lines = []
    artifact = meswitch.compress(
        *pair, tmp_path / "delta", calibration=text, distill=SHORT, progress=lambda *said: lines.append(said)
    )
    artifact.verify()
    artifact.check_base(Checkpoint.open(family / "base"), full=True)
    info = artifact.manifest.method.distillation
    assert (info.scope, info.steps) == ("block", 12)
    assert info.held_out_after < 0.9 * info.held_out_before
    assert divergence(*pair, tmp_path / "delta", text) < 0.95 * divergence(*pair, tmp_path / "plain", text)
    assert artifact.nbytes == plain.nbytes
    trained = [name for name, entry in plain.manifest.tensors.items() if entry.role in ("linear", "head", "norm")]
    for name, entry in plain.manifest.tensors.items():
        now = artifact.manifest.tensors[name]
        assert now.kind == entry.kind
        assert (now.stored != entry.stored) <= (name in trained), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta", "plain", "text.jsonl"]
    assert lines[-1][:3] == ("training", 7 * 12, 7 * 12)
    with meswitch.Engine(family / "base", {"math": tmp_path / "delta"}, device="cpu") as engine:
        (answer,) = engine.generate([[{"role": "user", "content": "How many? 2*3"}]], model="math", max_new_tokens=8)
        assert answer.tokens


@pytest.mark.parametrize(
    ("arch", "case", "options"),
    [
        ("mistral", {"added_tokens": 2}, {"bits": 1}),
        ("llama", {"tied": True}, {"group_size": None}),
        ("qwen2", {}, {"embeddings": "exact"}),
        ("qwen3", {}, {"bits": 3, "salient": 0}),
        ("mistral", {"sliding_window": 8}, {}),
    ],
    ids=["added", "tied", "biases", "qk-norms", "sliding-window"],
)
def test_what_was_trained_is_what_is_stored(pair, tmp_path, text, arch, case, options):
    base, expert = pair(arch, change=0.3, **case)
    everywhere = dataclasses.replace(SHORT, question_weight=1.0)
    made = meswitch.compress(base, expert, tmp_path / "delta", calibration=text, distill=everywhere, **options)
    info = made.manifest.method.distillation
    assert info.held_out_after < info.held_out_before
    # a further run that may not move starts where the stored one ended
    words, still = load_calibration(text, expert), dataclasses.replace(everywhere, steps=0)
    _, again = train_blocks(Checkpoint.open(base), Checkpoint.open(expert), made, words, still, device=CPU)
    assert again.held_out_before == pytest.approx(info.held_out_after, rel=5e-2)
    # and it is the merged model's divergence
    assert divergence(base, expert, tmp_path / "delta", text) == pytest.approx(info.held_out_after, rel=0.5)


@pytest.mark.parametrize("arch", ["mistral", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_taken_apart_computes_what_the_whole_does(pair, arch, tied):
    _, expert = pair(arch, tied=tied)
    checkpoint = Checkpoint.open(expert)
    whole = AutoModelForCausalLM.from_pretrained(expert, dtype=torch.float32)
    batch = [[5, 6, 7, 8, 9], [10, 11]]
    parts = PartialModel(checkpoint, CPU, torch.float32)
    with torch.no_grad():
        said = read_batch(whole, batch, CPU)
        ids = torch.tensor([batch[0], batch[1] + [0, 0, 0]])
        hidden = parts.enter(ids)
        for call in parts.calls(ids, embedded=False):
            hidden = call.after(parts.passed_on(hidden)).run(parts.block(call.block))
        found = parts.leave(torch.cat([hidden[0], hidden[1, :2]]))
    assert torch.allclose(found, said.logits[said.real], atol=1e-4)


def test_weights_of_one_block_are_in_memory_at_a_time(pair, tmp_path, text):
    base, expert = pair(num_hidden_layers=5, intermediate_size=192)
    made = meswitch.compress(base, expert, tmp_path / "delta", calibration=text, distill=0)
    most = []

    def modules():
        gc.collect()
        return [thing for thing in gc.get_objects() if isinstance(thing, nn.Module)]

    others = {id(module): module for module in modules()}  # of other tests; held, so that no id is used again

    def count(*_):
        held = [thing for thing in modules() if id(thing) not in others]
        packed = [thing for thing in held if isinstance(thing, TrainablePacked)]
        weights = [thing._parameters.get("weight") for thing in held if isinstance(thing, nn.Linear)]
        linears = [weight for weight in weights if weight is not None and weight.device.type == "cpu"]
        most.append((len(packed), len(linears)))

    train_blocks(
        Checkpoint.open(base),
        Checkpoint.open(expert),
        made,
        load_calibration(text, expert),
        dataclasses.replace(SHORT, steps=1),
        device=CPU,
        progress=count,
    )
    # seven matrices of a block; at the end the student's head, and the expert's
    assert most == [(7, 0)] * 5 + [(1, 1)]


def test_training_that_does_not_help_changes_nothing(family, tmp_path, text):
    pair = family / "base", family / "math"
    plain = meswitch.compress(*pair, tmp_path / "plain", calibration=text, distill=0)
    wild = dataclasses.replace(SHORT, steps=2, learning_rate=100.0)
    made = meswitch.compress(*pair, tmp_path / "delta", calibration=text, distill=wild)
    info = made.manifest.method.distillation
    assert info.held_out_after == info.held_out_before
    for name, entry in plain.manifest.tensors.items():
        now = made.manifest.tensors[name]
        assert {s: p.sha256 for s, p in now.stored.items()} == {s: p.sha256 for s, p in entry.stored.items()}


def test_the_same_run_twice_is_the_same(pair, tmp_path, text):
    base, expert = pair()
    once, twice = (
        meswitch.compress(base, expert, tmp_path / name, calibration=text, distill=2, distill_scope="block")
        for name in ("once", "twice")
    )
    assert once.manifest.tensors == twice.manifest.tensors


def test_an_interrupted_run_leaves_nothing_loadable_and_is_taken_up(pair, tmp_path, text):
    class Stop(BaseException):
        pass

    def stop(phase, done, of, line):
        if line.startswith("block 2 of 2"):
            raise Stop

    base, expert = pair()
    options = {"calibration": text, "distill": 2, "distill_scope": "block"}
    with pytest.raises(Stop):
        meswitch.compress(base, expert, tmp_path / "delta", progress=stop, **options)
    assert not (tmp_path / "delta").exists()
    meswitch.compress(base, expert, tmp_path / "delta", **options).verify()
    assert not list(tmp_path.glob("delta?*"))


def test_naming_the_scope_asks_for_training_whatever_the_size(pair, tmp_path, text, monkeypatch):
    monkeypatch.setattr("meswitch.compression.pipeline.DISTILL_BYTES", 1)

    def stop(phase, done, of, line):
        if line.startswith("block"):
            assert of == 3 * recipe_for("me-switch", scope="block").steps
            raise KeyboardInterrupt

    base, expert = pair()
    assert meswitch.compress(base, expert, tmp_path / "a", calibration=text).manifest.method.distillation is None
    with pytest.raises(KeyboardInterrupt):
        meswitch.compress(base, expert, tmp_path / "b", calibration=text, distill_scope="block", progress=stop)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": None}, "distill: needs calibration text"),
        ({"distill": 0}, "distill_scope: block: 0 steps train nothing"),
        ({"distill": TrainingRecipe(steps=3)}, "distill_scope: block: the recipe says model"),
        ({"method": "bitdelta"}, "distill_scope: block: bitdelta's published recipe trains end to end"),
        ({"method": "svd"}, "distill: the method svd has no scales to train"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_go_together_is_refused_before_the_work(pair, tmp_path, text, options, message):
    base, expert = pair()
    given = {"calibration": text, "distill_scope": "block"} | options
    with pytest.raises(ConfigError, match=message):
        meswitch.compress(base, expert, tmp_path / "delta", progress=lambda *_: pytest.fail("work began"), **given)
    assert not list(tmp_path.glob("delta*"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scope": "layer"}, "recipe: scope: 'layer' is none of model, block"),
        ({"scope": "block", "loss": "mse"}, "recipe: scope: block by block, the loss is kl, not mse"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainingRecipe(**values)


def test_our_recipe_trains_methods_that_store_signs_too(pair, tmp_path, text):
    base, expert = pair(change=0.3)
    made = meswitch.compress(base, expert, tmp_path / "delta", method="bitdelta", calibration=text, distill=SHORT)
    info = made.manifest.method.distillation
    assert info.held_out_after < info.held_out_before


def test_a_manifest_from_before_there_were_scopes_is_read(pair, tmp_path, text):
    base, expert = pair()
    meswitch.compress(base, expert, tmp_path / "delta", calibration=text, distill=1)
    file = tmp_path / "delta" / "meswitch.json"
    data = json.loads(file.read_text())
    assert data["method"]["distillation"].pop("scope") == "model"
    assert Manifest.from_json(json.dumps(data), file) == Artifact.open(tmp_path / "delta").manifest
