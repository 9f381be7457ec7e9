"""An artifact that is replaced while it is served: running requests keep the old version, new ones get the new."""

import os
import random
import shutil
import threading
import time
from collections import Counter

import pytest
import torch

import meswitch
from meswitch.errors import ArtifactError, IncompatibleError, LoadError
from meswitch.slots import versions
from meswitch.slots.layout import Layout
from tests.support.models import make_pair

SOON = 30
NORM = "model.norm.weight"


def put(source, target):
    """In the place of what is there, as `compress --overwrite` does it."""
    from meswitch.durable import replace_directory

    new = target.with_name("new.partial")
    shutil.copytree(source, new)
    replace_directory(new, target)


def norm(store, held):
    return store.tensors(held.slot)[NORM].clone()


@pytest.fixture
def norms(deltas):
    return {name: meswitch.Artifact.open(path).read(NORM) for name, path in deltas.items()}


def test_running_requests_keep_their_version_and_new_ones_get_the_new(own, deltas, norms, open_store):
    store = open_store(own, slots=3)
    before = store.version("math")
    old = store.request("math").result(SOON)
    put(deltas["sql"], own["math"])
    new = store.request("math").result(SOON)
    assert new.slot != old.slot
    assert torch.equal(norm(store, old), norms["math"])
    assert torch.equal(norm(store, new), norms["sql"])
    assert (old.version.key, new.version.key) == (before, store.version("math"))
    assert before != store.version("math")
    row = next(row for row in store.residency() if row.expert == "math")
    assert (row.slot, row.pins, row.version) == (new.slot, 2, new.version.key)
    store.release(old.slot)
    assert store.tensors(old.slot) == {}  # nothing of it is kept
    assert all(version != old.version for version in store.host.resident())
    store.release(new.slot)


def test_with_one_slot_the_new_version_waits_for_the_old_ones_requests(own, deltas, norms, open_store):
    store = open_store(own, slots=1)
    old = store.request("math").result(SOON)
    put(deltas["sql"], own["math"])
    new = store.request("math")
    assert torch.equal(norm(store, old), norms["math"])
    assert not new.done()
    store.release(old.slot)
    assert torch.equal(norm(store, new.result(SOON)), norms["sql"])
    store.release(new.result().slot)


def test_a_key_stands_for_one_expert_with_one_content(own, deltas, open_store):
    store = open_store(own)
    keys = {store.version(name) for name in own}
    assert len(keys) == len(own)
    again = open_store(own)
    assert {again.version(name) for name in own} == keys
    first = store.version("math")
    put(deltas["code"], own["math"])
    store.release(store.acquire("math", timeout=SOON))
    assert store.version("math") not in keys
    put(deltas["math"], own["math"])
    store.release(store.acquire("math", timeout=SOON))
    assert store.version("math") == first


def test_a_file_that_is_only_written_again_costs_no_load(own, deltas, open_store):
    store = open_store(own)
    store.release(store.acquire("math"))
    put(deltas["math"], own["math"])
    store.release(store.acquire("math", timeout=SOON))
    os.utime(own["math"] / "meswitch.json")
    store.release(store.acquire("math", timeout=SOON))
    assert store.loads == 1


def test_one_in_memory_is_served_while_its_directory_is_gone(own, open_store):
    store = open_store(own)
    store.release(store.acquire("math"))
    shutil.rmtree(own["math"])
    assert store.request("math").done()


def test_a_load_that_meets_the_replacement_half_way_begins_again(own, deltas, norms, disk, open_store):
    """The old manifest's checksums do not fit the new files: the waiting requests get the new version."""
    store = open_store(own)
    with disk.stopped(own["math"]):
        waiting = [store.request("math") for _ in range(2)]
        put(deltas["sql"], own["math"])
    for future in waiting:
        assert torch.equal(norm(store, future.result(SOON)), norms["sql"])
    assert store.failures == 0


def test_a_directory_that_is_just_being_renamed_is_waited_for(own, norms, open_store):
    store = open_store(own)
    away = own["math"].with_name("away")
    own["math"].rename(away)
    threading.Timer(0.1, lambda: away.rename(own["math"])).start()
    os.utime(away / "meswitch.json")
    assert torch.equal(norm(store, store.request("math").result(SOON)), norms["math"])


def test_one_that_was_replaced_before_the_store_looked_is_noticed(own, deltas, norms, open_store):
    store = open_store(own, watch=False)
    put(deltas["sql"], own["math"])
    store.watch()
    assert torch.equal(norm(store, store.request("math").result(SOON)), norms["sql"])


@pytest.mark.parametrize(
    ("case", "options", "reason"),
    [
        ({}, {"embeddings": "exact"}, r"lm_head\.weight: dense \[2048, 64\], as no expert stored it at the start"),
        ({"added_tokens": 2}, {}, "vocabulary: 2050 tokens, at most 2048 were planned"),
        ({}, {"bits": 4}, r"\d+ bytes, a slot has \d+"),
    ],
    ids=["kind", "vocabulary", "size"],
)
def test_a_version_that_does_not_fit_is_refused_by_name(family, tmp_path, open_store, case, options, reason):
    base, expert = make_pair(tmp_path / "first", family / "base", "llama")
    meswitch.compress(base, expert, tmp_path / "delta")
    store = open_store({"one": tmp_path / "delta"})
    held = store.request("one").result(SOON)
    kept = norm(store, held)
    base, expert = make_pair(tmp_path / "second", family / "base", "llama", change=0.3, **case)
    meswitch.compress(base, expert, tmp_path / "other", **options)
    good = shutil.copytree(tmp_path / "delta", tmp_path / "good")
    put(tmp_path / "other", tmp_path / "delta")
    for _ in range(2):
        with pytest.raises(LoadError, match=f"^expert 'one' was replaced by a version .* serve \\({reason}") as found:
            store.request("one").result(SOON)
        assert str(tmp_path) not in str(found.value)
    assert torch.equal(norm(store, held), kept)
    put(good, tmp_path / "delta")
    again = store.request("one").result(SOON)
    assert again == held
    for one in (held, again):
        store.release(one.slot)


def test_what_kernels_cannot_read_together_is_refused(pair, tmp_path, open_store):
    base, expert = pair("qwen2", change=0.3)
    meswitch.compress(base, expert, tmp_path / "delta", group_size=64)
    store = open_store({"one": tmp_path / "delta"}, kernel=True)
    meswitch.compress(base, expert, tmp_path / "delta", group_size=32, overwrite=True)
    with pytest.raises(LoadError, match=r"weight: group_size: 32, the slots take (64|None)"):
        store.request("one").result(SOON)
    meswitch.compress(base, expert, tmp_path / "delta", group_size=64, salient=0, overwrite=True)
    held = store.request("one").result(SOON)
    from tests.slots.test_layout import check

    check(store, held.slot, meswitch.Artifact.open(tmp_path / "delta"))


def test_who_made_the_store_has_the_last_word(own, deltas, open_store):
    store = open_store(own, watch=False)
    asked = []

    def accept(before, artifact):
        asked.append((before.made, artifact.manifest.expert.name))
        if len(asked) > 1:
            raise IncompatibleError(f"{artifact.directory}: another base")
        return "second"

    store.watch(accept, dict.fromkeys(own, "first"))
    assert store.request("math").result(SOON).version.made == "first"
    put(deltas["sql"], own["math"])
    assert store.request("math").result(SOON).version.made == "second"
    put(deltas["code"], own["math"])
    with pytest.raises(LoadError, match=r"\(it does not fit this base and these slots\)"):
        store.request("math").result(SOON)
    assert [made for made, _ in asked] == ["first", "second"]


def test_a_damaged_replacement_is_an_error_until_it_is_whole(own, deltas, norms, open_store):
    store = open_store(own)
    store.release(store.acquire("math"))
    new = shutil.copytree(deltas["sql"], own["math"].with_name("half"))
    (new / "delta.safetensors").rename(new / "later")
    put(new, own["math"])
    with pytest.raises(LoadError, match="'math' cannot be loaded: its files are missing, damaged, or were changed"):
        store.request("math").result(SOON)
    with pytest.raises(ArtifactError, match=r"delta\.safetensors: missing"):
        store.acquire("math", timeout=SOON)
    (own["math"] / "later").rename(own["math"] / "delta.safetensors")
    assert torch.equal(norm(store, store.request("math").result(SOON)), norms["sql"])


def test_storage_that_does_not_answer_holds_up_nobody(own, open_store, monkeypatch):
    store = open_store(own)
    for name in ("math", "code"):
        store.release(store.acquire(name))
    gate, signature = threading.Event(), versions._signature

    def hang(artifact):
        if artifact.directory == own["math"]:
            assert gate.wait(60)
        return signature(artifact)

    monkeypatch.setattr(versions, "_signature", hang)
    try:
        begun = time.monotonic()
        for _ in range(50):
            for name in ("math", "code"):
                held = store.request(name)
                assert held.done()  # the version that was known last
                store.release(held.result().slot)
        assert time.monotonic() - begun < 5
    finally:
        gate.set()


def test_no_slot_ever_holds_anything_but_the_version_it_was_given_for(own, deltas, open_store):
    """Random requests, cancelled or not, fetching ahead, and two experts that are replaced all the time."""
    size = max(row.bytes for row in open_store(own).residency())
    store = open_store(own, slots=2, host_bytes=3 * size)
    bytes_of = {}
    for path in deltas.values():
        artifact = meswitch.Artifact.open(path)
        layout = Layout.of(artifact)
        bytes_of[versions.manifest_digest(artifact.manifest)] = buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
        layout.fill(artifact, buffer)
    wrong, answered, stop = [], Counter(), threading.Event()

    def holds(held):
        wanted = bytes_of[held.version.digest]
        found = store._device.slots[held.slot].buffer[: len(wanted)]
        # between tensors nothing is written
        return all(
            torch.equal(found[p.offset : p.offset + p.nbytes], wanted[p.offset : p.offset + p.nbytes])
            for parts in held.version.layout.places.values()
            for p in parts.values()
        )

    def client(seed):
        draw = random.Random(seed)
        while not stop.is_set():
            name = draw.choice(list(own))
            if draw.random() < 0.2:
                store.prefetch(name)
                continue
            future = store.request(name)
            if draw.random() < 0.2 and future.cancel():
                continue
            held = future.result(SOON)
            for _ in range(2):
                if not holds(held):
                    wrong.append(name)
                time.sleep(draw.random() * 0.01)
            answered[name, held.version.digest] += 1
            store.release(held.slot)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for step in range(24):
        time.sleep(0.1)
        name = ("math", "sql")[step % 2]
        put(deltas[("code", "instruct", "math", "sql")[step % 4]], own[name])
    stop.set()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    assert not wrong
    assert len({digest for name, digest in answered if name == "math"}) > 1
    assert eventually(lambda: not store._loads)
    assert all(row.pins == 0 for row in store.residency())
    assert not any(store._device.slots[i].promised for i in range(2))
    assert not any(kept.pins for kept in store.host._kept.values())


def eventually(condition):
    deadline = time.monotonic() + SOON
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()
