"""Slots as the GPU kernels read them: every delta is found where the tables say, after any number of loads."""

import pytest
import torch

import meswitch
from meswitch.artifact import Artifact
from meswitch.codec import PackedDelta
from meswitch.errors import ConfigError
from meswitch.ops.layout import read_slot
from meswitch.slots import ExpertStore
from meswitch.slots.layout import Layout, extra_name

CPU = torch.device("cpu")


@pytest.fixture
def artifacts(pair, tmp_path):
    base, expert = pair("qwen2", change=0.3, tied=True, added_tokens=2)
    for name, options in (("a", {"bits": 2}), ("b", {"bits": 3, "salient": 0})):
        meswitch.compress(base, expert, tmp_path / name, **options)
    return {name: Artifact.open(tmp_path / name) for name in ("a", "b")}


def check(store, slot, artifact):
    """The slot holds exactly this expert."""
    assert store.tables is not None
    tensors = store.tensors(slot)
    for name, entry in artifact.manifest.tensors.items():
        wanted = artifact.read(name)
        if not isinstance(wanted, PackedDelta):
            assert entry.kind == "same" or torch.equal(tensors[name], wanted)
            continue
        layer = store.tables.layers[name]
        row = layer.table[slot].tolist()
        found = read_slot(layer.arena, row, layer.rows, layer.in_features, layer.variant.group)
        assert torch.equal(found.dequantize(), wanted.dequantize())
        if wanted.extra is not None:
            assert torch.equal(tensors[extra_name(name)], wanted.extra)


def test_every_slot_holds_what_was_loaded_last(artifacts):
    store = ExpertStore(artifacts, device=CPU, slots=2, kernel=True)
    slots = {name: store.acquire(name) for name in ("a", "b")}
    for name, slot in slots.items():
        check(store, slot, artifacts[name])
    for slot in slots.values():
        store.release(slot)
    addresses = [layer.table.data_ptr() for layer in store.tables.layers.values()]
    one = ExpertStore(artifacts, device=CPU, slots=1, kernel=True)
    for name in ("a", "b", "a"):
        slot = one.acquire(name)
        check(one, slot, artifacts[name])
        one.release(slot)
    assert addresses == [layer.table.data_ptr() for layer in store.tables.layers.values()]


def test_a_tied_head_finds_the_embeddings_delta(artifacts):
    store = ExpertStore(artifacts, device=CPU, slots=2, kernel=True)
    slot = store.acquire("a")
    layers, tensors = store.tables.layers, store.tensors(slot)
    assert torch.equal(layers["lm_head.weight"].table[slot], layers["model.embed_tokens.weight"].table[slot])
    assert tensors[extra_name("lm_head.weight")] is tensors[extra_name("model.embed_tokens.weight")]


def test_device_bytes_count_slots_and_tables(artifacts):
    store = ExpertStore(artifacts, device=CPU, slots=2, kernel=True)
    sizes = [Layout.of(artifact, kernel=True).nbytes for artifact in artifacts.values()]
    counters = sum(layer.arrived.nbytes for layer in store.tables.layers.values())
    assert store.device_bytes == 2 * max(sizes) + len(store.tables.layers) * 2 * 8 * 8 + counters


def test_experts_that_no_kernel_reads_together_are_refused_by_tensor(pair, tmp_path):
    base, expert = pair()
    for name, group in (("a", 32), ("b", 64), ("c", 24)):
        meswitch.compress(base, expert, tmp_path / name, group_size=group)
    opened = {name: Artifact.open(tmp_path / name) for name in ("a", "b", "c")}
    with pytest.raises(ConfigError, match=r"lm_head\.weight: group_size: .*\[0, 32\].*'reference' serves any"):
        ExpertStore({name: opened[name] for name in ("a", "b")}, device=CPU, slots=2, kernel=True)
    with pytest.raises(ConfigError, match=r"c: \S+\.weight: group_size: 24: .*'reference' serves any"):
        ExpertStore({"c": opened["c"]}, device=CPU, slots=1, kernel=True)
    ExpertStore(opened, device=CPU, slots=1)
