"""Merged weights that are kept: the merged model's, within the budget, and of the expert that the slot holds."""

import pytest
import torch

from meswitch import Engine
from meswitch.artifact import Artifact
from meswitch.checkpoint import Checkpoint
from meswitch.compression.merge import load_merged, restored_tensor
from meswitch.engine.parameters import _RESTS, MergedWeights
from meswitch.slots import ExpertStore
from tests.support.models import continued

PROMPT = [{"role": "user", "content": "Tom has 23 apples. Tom buys 4 bags with 5 apples each. How many now?"}]


@pytest.fixture(scope="module")
def base(family):
    return Checkpoint.open(family / "base")


@pytest.fixture
def store(deltas):
    artifacts = {name: Artifact.open(path) for name, path in deltas.items()}
    return ExpertStore(artifacts, device=torch.device("cpu"), slots=2)


def begin(kept, store, *slots):
    kept.begin({slot: store.tensors(slot) for slot in slots})


def test_every_tensor_is_what_merge_makes(base, store, deltas):
    kept = MergedWeights(1 << 30)
    slot = store.acquire("math")
    begin(kept, store, slot)
    artifact = Artifact.open(deltas["math"])
    for name in artifact.manifest.tensors:
        weight = kept.weight(slot, name, base.read(name).float())
        assert torch.equal(weight, restored_tensor(base, artifact, name, torch.float32)), name


def test_a_slot_that_is_loaded_anew_forgets(base, store):
    name = "model.layers.0.mlp.up_proj.weight"
    kept, weight = MergedWeights(1 << 30), base.read("model.layers.0.mlp.up_proj.weight").float()
    found = {}
    for expert in ("math", "code", "sql", "math"):
        slot = store.acquire(expert)
        begin(kept, store, slot)
        own = kept.weight(slot, name, weight)
        assert kept.weight(slot, name, weight) is own
        if expert in found:
            assert torch.equal(own, found[expert])
        assert not any(torch.equal(own, other) for known, other in found.items() if known != expert)
        found[expert] = own.clone()
        store.release(slot)
    assert store.evictions >= 2
    assert kept.nbytes == 2 * weight.nbytes


def test_no_more_than_the_budget_and_the_idle_go_first(base, store):
    name = "model.layers.0.mlp.up_proj.weight"
    weight = base.read(name).float()
    kept = MergedWeights(int(1.5 * weight.nbytes))
    first, second = store.acquire("math"), store.acquire("code")
    begin(kept, store, first, second)
    assert kept.weight(first, name, weight) is not None
    assert kept.weight(second, name, weight) is None  # both run: neither pushes the other out
    for _ in range(_RESTS):
        begin(kept, store, second)
    assert kept.weight(second, name, weight) is not None
    assert kept.nbytes == weight.nbytes <= kept.budget


@pytest.mark.parametrize("room", [0, 100_000, 3_000_000, None], ids=["none", "a few", "half", "all"])
def test_answers_are_the_merged_models_with_any_budget(family, deltas, room):
    experts = {name: deltas[name] for name in ("math", "sql")}
    with Engine(family / "base", experts, device="cpu", merged_bytes=room) as engine:
        assert not engine.takes_turns
        names = ["sql", "base", "math", "sql", "math"]
        answers = engine.generate([PROMPT] * len(names), model=names, max_new_tokens=12)
        alone = {name: engine.generate([PROMPT], model=name, max_new_tokens=12)[0].tokens for name in names}
        if room is not None:
            assert engine.memory()["merged"] <= room
        else:
            assert engine.memory()["merged"] >= 2 * 1_900_000 * 4
    ids = engine.tokenizers["math"].encode(PROMPT)
    for name in experts:
        model = load_merged(family / "base", deltas[name])
        expected = continued(model, ids, engine.tokenizers[name].ends, 12)
        assert alone[name] == expected
        assert {answer.tokens for answer in answers if answer.model == name} == {expected}
