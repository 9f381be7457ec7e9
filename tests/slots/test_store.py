"""Residency: pins, eviction order, budgets in bytes."""

import os
import threading

import pytest
import torch

from meswitch import Artifact
from meswitch.codec import PackedDelta
from meswitch.errors import ArtifactError, CapacityError, UnknownExpertError
from meswitch.slots import ExpertStore
from meswitch.slots.layout import Layout


@pytest.fixture
def artifacts(deltas):
    return {name: Artifact.open(path) for name, path in deltas.items()}


def store(artifacts, **options):
    return ExpertStore(artifacts, device=torch.device("cpu"), **{"slots": 2} | options)


def place(store, name):
    return next(row.place for row in store.residency() if row.expert == name)


def test_a_slot_holds_exactly_the_artifacts_tensors(artifacts):
    experts = store(artifacts)
    tensors = experts.tensors(experts.acquire("math"))
    entries = artifacts["math"].manifest.tensors
    assert set(tensors) == {name for name, entry in entries.items() if entry.kind != "same"}
    for name, held in tensors.items():
        stored = artifacts["math"].read(name)
        if isinstance(stored, PackedDelta):
            assert torch.equal(held.dequantize(), stored.dequantize()), name
        else:
            assert torch.equal(held, stored), name


def test_the_least_recently_used_expert_makes_room(artifacts):
    experts = store(artifacts)
    for name in ("math", "code", "math", "sql"):
        experts.release(experts.acquire(name))
    assert place(experts, "code") == "host"
    assert place(experts, "math") == place(experts, "sql") == "device"
    assert experts.evictions == 1


def test_an_expert_in_use_is_never_evicted(artifacts):
    experts = store(artifacts)
    math, code = experts.acquire("math"), experts.acquire("code")
    before = experts.tensors(math)["lm_head.weight"].dequantize()
    with pytest.raises(CapacityError, match="'sql': all 2 slots are in use"):
        experts.acquire("sql", timeout=0.05)
    experts.release(code)
    assert experts.acquire("sql") == code
    assert torch.equal(experts.tensors(math)["lm_head.weight"].dequantize(), before)


def test_an_expert_needed_twice_shares_one_slot_until_both_are_done(artifacts):
    experts = store(artifacts, slots=1)
    first, second = experts.acquire("math"), experts.acquire("math")
    assert first == second
    experts.release(first)
    waiting = experts.request("code")
    assert not waiting.done()
    experts.release(second)
    assert waiting.result(60).slot == first


def test_addresses_of_a_slot_never_change(artifacts):
    experts = store(artifacts, slots=1)
    addresses = set()
    for name in ("math", "code", "math"):
        slot = experts.acquire(name)
        addresses.add(experts.tensors(slot)["lm_head.weight"].packed.data_ptr())
        experts.release(slot)
    assert len(addresses) == 1


def test_the_host_tier_is_limited_in_bytes(artifacts):
    size = Layout.of(artifacts["math"]).nbytes
    experts = store(artifacts, slots=1, host_bytes=2 * size)
    for name in ("math", "code", "instruct"):
        experts.release(experts.acquire(name))
    assert place(experts, "math") == "disk"
    assert experts.host.nbytes <= 2 * size
    experts.release(experts.acquire("math"))
    assert place(experts, "math") == "device"


def test_memory_of_an_expert_that_left_is_anothers(artifacts):
    size = Layout.of(artifacts["math"]).nbytes
    experts = store(artifacts, slots=1, host_bytes=2 * size)
    buffers = []
    for name in ("math", "code", "instruct", "sql", "math"):
        slot = experts.acquire(name)
        held, stored = experts.tensors(slot)["lm_head.weight"], artifacts[name].read("lm_head.weight")
        assert torch.equal(held.dequantize(), stored.dequantize()), name
        experts.release(slot)
        buffers += [experts.host.load(one, size, pytest.fail).result() for one in experts.host.resident()]
    assert len({buffer.data_ptr() for buffer in buffers}) == 2


def test_what_is_not_asked_by_users_counts_as_no_request(artifacts):
    experts = store(artifacts)
    experts.keep("math")
    experts.release(experts.acquire("math"))
    assert (experts.counts()["math"].requests, experts.counts()["math"].hits) == (0, 0)
    experts.release(experts.request("math").result(60).slot)
    assert (experts.counts()["math"].requests, experts.counts()["math"].hits) == (1, 1)
    assert experts.counts()["math"].loads == 1


def test_files_that_two_experts_share_are_read_for_each(deltas, tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        for file in deltas["math"].iterdir():
            os.link(file, tmp_path / name / file.name)
    experts = store({name: Artifact.open(tmp_path / name) for name in ("one", "other")})
    slots = [experts.acquire(name) for name in ("one", "other")]
    assert sorted(slots) == [0, 1]
    assert experts.loads == 2
    assert len(experts.host.resident()) == 2
    assert experts.version("one") != experts.version("other")


def test_a_budget_too_small_for_one_expert_says_so(artifacts):
    experts = store(artifacts, host_bytes=1000)
    with pytest.raises(CapacityError, match=r"'math': .* are needed, the budget is 1 KB; raise engine\.host_bytes"):
        experts.acquire("math")


def test_an_unknown_expert_is_named(artifacts):
    with pytest.raises(UnknownExpertError, match="no expert 'poetry'; there are math, code"):
        store(artifacts).acquire("poetry")


def test_a_damaged_expert_frees_its_slot(artifacts, tmp_path):
    import shutil

    shutil.copytree(artifacts["math"].directory, tmp_path / "math")
    broken = Artifact.open(tmp_path / "math")
    file = tmp_path / "math/delta.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    experts = store({"math": broken, "code": artifacts["code"]}, slots=1)
    with pytest.raises(ArtifactError, match="checksum differs"):
        experts.acquire("math")
    experts.release(experts.acquire("code"))


def test_many_threads_never_share_a_slot_between_experts(artifacts):
    experts = store(artifacts)
    wanted = {name: artifacts[name].read("model.norm.weight") for name in artifacts}
    failures = []

    def work(seed):
        names = list(artifacts)
        for step in range(25):
            name = names[(seed * 7 + step * 3) % len(names)]
            slot = experts.acquire(name, timeout=60)
            if not torch.equal(experts.tensors(slot)["model.norm.weight"], wanted[name]):
                failures.append(name)
            experts.release(slot)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(row.pins == 0 for row in experts.residency())
