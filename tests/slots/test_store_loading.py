"""Nobody waits for a load but those who need it; what goes wrong with one ends it alone, by name."""

import errno
import resource
import threading
import time

import pytest
import torch

from meswitch.errors import ArtifactError, CapacityError, LoadError, MeswitchError
from meswitch.slots import layout as layouts
from meswitch.slots import store as stores
from meswitch.slots import tiers

SOON = 30  # seconds, of a machine that does other things too


def place(store, name):
    return next(row.place for row in store.residency() if row.expert == name)


def eventually(condition):
    deadline = time.monotonic() + SOON
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def each_has_its_turn(store, futures, holds=lambda: True):
    """Every slot is given back as soon as it is had."""
    left, held = list(futures), []
    for future in left:
        future.add_done_callback(lambda done: (held.append(holds()), store.release(done.result().slot)))
    assert eventually(lambda: len(held) == len(left))
    assert all(held)


def test_resident_experts_pass_those_whose_disk_hangs(own, disk, open_store):
    store = open_store(own, slots=3)
    store.release(store.acquire("math"))
    with disk.stopped(own["code"], own["sql"]):
        cold = [store.request(name) for name in ("code", "sql", "code")]
        begun = time.monotonic()
        for _ in range(200):
            held = store.request("math")
            assert held.done()
            store.release(held.result().slot)
        assert time.monotonic() - begun < 5
        assert not any(future.done() for future in cold)
        assert place(store, "math") == "device"
    slots = [future.result(SOON).slot for future in cold]
    assert slots[0] == slots[2] != slots[1]


def test_who_waits_for_a_disk_that_never_answers_is_told_so_in_the_end(own, disk, open_store):
    store = open_store(own, slots=2)
    with disk.stopped(own["code"]):
        waiting = store.request("code")
        assert eventually(lambda: disk.reading)
        now = time.monotonic()
        store.end_overdue(now + stores.LOAD_SECONDS - 1)
        assert not waiting.done()
        store.end_overdue(now + stores.LOAD_SECONDS + 1)
        with pytest.raises(LoadError, match="'code' cannot be loaded: its files are not read within 5 minutes"):
            waiting.result(0)
        store.release(store.request("math").result(SOON).slot)
        again = store.request("code")
        assert len(disk.reading) == 1
        store.end_overdue(now + stores.LOAD_SECONDS + 2)
        assert isinstance(again.exception(0), LoadError)
    store.release(store.request("code").result(SOON).slot)
    assert store.counts()["code"].failures == 2


def test_an_expert_in_host_memory_passes_those_whose_disk_hangs(own, disk, open_store):
    store = open_store(own, slots=1)
    for name in ("math", "code"):
        store.release(store.acquire(name))
    with disk.stopped(own["instruct"], own["sql"]):
        hanging = [store.request(name) for name in ("instruct", "sql")]  # all the readers there are
        store.release(store.acquire("math", timeout=SOON))
        assert not any(future.done() for future in hanging)
    each_has_its_turn(store, hanging)


def test_all_who_want_an_expert_share_one_load(own, disk, open_store):
    store = open_store(own)
    with disk.stopped(own["math"]):
        futures = [store.request("math") for _ in range(20)]
        store.prefetch("math")
    assert len({future.result(SOON).slot for future in futures}) == 1
    assert store.loads == 1
    tensors = sum(len(entry.stored) for entry in store.artifacts["math"].manifest.tensors.values())
    assert len(disk.reads) <= tensors
    assert next(row for row in store.residency() if row.expert == "math").pins == 20


def test_so_many_are_read_at_a_time_and_no_more(own, disk, open_store):
    store = open_store(own, slots=4)
    with disk.stopped(*own.values()):
        futures = [store.request(name) for name in own]
        assert eventually(lambda: len(disk.reading) == stores.READERS)
        time.sleep(0.1)
    for future in futures:
        future.result(SOON)
    assert disk.most_at_once == stores.READERS


def test_host_memory_is_bounded_while_experts_are_read_and_wait_for_a_slot(own, open_store):
    size = max(row.bytes for row in open_store(own).residency())
    store = open_store(own, slots=1, host_bytes=2 * size)
    first = store.acquire("math")
    waiting = {name: store.request(name) for name in ("code", "sql", "instruct")}
    assert eventually(lambda: place(store, "code") == "host")
    assert store.host.nbytes <= 2 * size
    store.release(first)
    each_has_its_turn(store, waiting.values(), lambda: store.host.nbytes <= 2 * size)


def test_fetched_ahead_an_expert_is_in_a_free_slot_and_else_in_host_memory(own, open_store):
    store = open_store(own, slots=2)
    store.prefetch("math")
    assert eventually(lambda: place(store, "math") == "device")
    held = [store.acquire("math"), store.acquire("code")]
    store.prefetch("sql")
    assert eventually(lambda: place(store, "sql") == "host")
    assert not store._loads
    assert (place(store, "math"), place(store, "code")) == ("device", "device")
    for slot in held:
        store.release(slot)


def test_a_waiting_expert_gets_a_slot_however_many_requests_go_past(own, open_store):
    """One slot for ever in use by resident traffic: after so many passes it is promised."""
    store = open_store(own, slots=1)
    held = [store.acquire("math")]
    waiting = store.request("code")
    assert eventually(lambda: place(store, "code") == "host")
    assert eventually(lambda: any(load.since for load in store._loads))
    passed = 0
    while (future := store.request("math")).done():
        held.append(future.result().slot)
        store.release(held.pop(0))
        passed += 1
        assert passed <= stores.MAX_PASSES
    assert passed == stores.MAX_PASSES
    assert not waiting.done()
    store.release(held.pop())
    assert waiting.result(SOON).version.expert == "code"
    assert not future.done()
    store.release(waiting.result().slot)
    assert future.result(SOON).version.expert == "math"


def test_the_promised_slot_is_one_and_the_others_go_on(own, open_store):
    store = open_store(own, slots=2)
    held = {name: [store.acquire(name)] for name in ("math", "code")}
    held["math"].append(store.acquire("math"))
    waiting = store.request("sql")
    assert eventually(lambda: any(load.since for load in store._loads))
    for _ in range(2 * stores.MAX_PASSES):  # math has more requests, so code's slot is promised
        held["math"].append(store.acquire("math", timeout=SOON))
        store.release(held["math"].pop(0))
    store.release(held["code"].pop())
    assert waiting.result(SOON).slot not in held["math"]


def test_a_request_that_waited_long_goes_next_whatever_passed(own, open_store, monkeypatch):
    monkeypatch.setattr(stores, "MAX_WAIT", 0.05)
    store = open_store(own, slots=1)
    slot = store.acquire("math")
    waiting = store.request("code")
    assert eventually(lambda: any(load.since for load in store._loads))
    time.sleep(0.1)
    late = store.request("math")
    assert not late.done()
    store.release(slot)
    store.release(waiting.result(SOON).slot)
    store.release(late.result(SOON).slot)


def test_who_stops_waiting_leaves_nothing_behind(own, disk, open_store):
    store = open_store(own, slots=1)
    slot = store.acquire("math")
    waiting = store.request("code")
    assert eventually(lambda: any(load.since for load in store._loads))
    assert waiting.cancel()
    assert not store._loads
    for _ in range(2 * stores.MAX_PASSES):
        store.release(store.acquire("math", timeout=SOON))
    store.release(slot)
    assert all(row.pins == 0 for row in store.residency())
    with disk.stopped(own["sql"]):
        assert store.request("sql").cancel()
    store.release(store.acquire("sql", timeout=SOON))


def damage(directory, kind):
    """Make a read of this artifact fail; gives what mends it."""
    file = next(directory.glob("*.safetensors"))
    content = file.read_bytes()
    if kind == "gone":
        file.unlink()
    elif kind == "directory gone":
        away = directory.with_name("away")
        directory.rename(away)
        return lambda: away.rename(directory)
    elif kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "changed":
        file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif kind == "a directory":
        file.unlink()
        file.mkdir()
        return lambda: (file.rmdir(), file.write_bytes(content))
    return lambda: file.write_bytes(content)


KINDS = {
    "gone": "its files are not there",
    "directory gone": "its files are not there",
    "truncated": "its files are damaged, cut off",
    "changed": "its files are missing, damaged, or were changed",
    "a directory": r"its files cannot be read \(Is a directory\)",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_that_fails_ends_its_own_requests_and_is_tried_again(own, open_store, tmp_path, kind):
    store = open_store(own)
    store.release(store.acquire("code"))
    mend = damage(own["math"], kind)
    failing, beside = [store.request("math") for _ in range(3)], store.request("sql")
    for future in failing:
        with pytest.raises(LoadError, match=f"^expert 'math' cannot be loaded: {KINDS[kind]}.*log says more$") as found:
            future.result(SOON)
        assert str(tmp_path) not in str(found.value)
        assert str(tmp_path) in str(found.value.__cause__)
    store.release(beside.result(SOON).slot)
    store.release(store.acquire("code", timeout=SOON))
    mend()
    store.release(store.acquire("math", timeout=SOON))
    assert all(row.pins == 0 for row in store.residency())
    assert not store._loads


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EMFILE, "Too many open files", "/secret/place"), "too many files are open"),
        (OSError(errno.EIO, "Input/output error", "/secret/place"), r"cannot be read \(Input/output error\)"),
        (PermissionError(errno.EACCES, "Permission denied", "/secret/place"), "its files may not be read"),
        (OSError("/secret/place"), r"its files cannot be read \(OSError\)"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("/secret/place"), r"an unexpected error \(RuntimeError\)"),
        (SystemExit("/secret/place"), r"an unexpected error \(SystemExit\)"),
    ],
)
def test_whatever_a_read_raises_is_told_without_a_path(own, disk, open_store, error, told):
    store = open_store(own)
    with disk.failing(error, own["math"]):
        future = store.request("math")
        with pytest.raises(LoadError, match=told) as found:
            future.result(SOON)
    assert "/secret" not in str(found.value)
    store.release(store.acquire("math", timeout=SOON))


def test_without_file_handles_a_request_fails_and_later_ones_do_not(own, open_store):
    store = open_store(own)
    store.release(store.acquire("code"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    future = None
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        future = store.request("math")
        error = future.exception(SOON)
        store.release(store.acquire("code", timeout=SOON))  # in its slot: needs no file
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert isinstance(error, LoadError)
    assert "too many files are open" in str(error)
    store.release(store.acquire("math", timeout=SOON))


def test_a_copy_that_fails_leaves_an_empty_slot_and_no_trace(own, open_store, monkeypatch):
    store = open_store(own, slots=1)
    store.release(store.acquire("code"))
    copy = tiers.copy

    def half(target, source, **options):
        copy(target[: len(target) // 2], source[: len(target) // 2])
        raise RuntimeError("the device has gone")

    with monkeypatch.context() as patch:
        patch.setattr(tiers, "copy", half)
        with pytest.raises(LoadError, match="unexpected error"):
            store.request("math").result(SOON)
    assert place(store, "code") == "host"  # its slot was given to the other
    assert store.tensors(0) == {}
    slot = store.acquire("code", timeout=SOON)
    wanted = store.artifacts["code"].read("model.norm.weight")
    assert torch.equal(store.tensors(slot)["model.norm.weight"], wanted)


def test_a_slot_is_not_found_while_it_is_copied_to(own, open_store, monkeypatch):
    store = open_store(own, slots=1)
    store.release(store.acquire("code"))
    gate, copy = threading.Event(), tiers.copy

    def slow(target, source, **options):
        assert gate.wait(SOON)
        copy(target, source)

    monkeypatch.setattr(tiers, "copy", slow)
    loading, evicted = store.request("math"), None
    assert eventually(lambda: any(load.stage == "copying" for load in store._loads))
    evicted = store.request("code")
    assert not loading.done()
    assert not evicted.done()
    assert store.tensors(0) == {}
    assert {row.place for row in store.residency() if row.expert in ("math", "code")} == {"host"}
    gate.set()
    store.release(loading.result(SOON).slot)
    store.release(evicted.result(SOON).slot)


def test_who_waits_in_the_process_itself_gets_the_whole_reason(own, open_store):
    store = open_store(own)
    damage(own["math"], "changed")
    with pytest.raises(ArtifactError, match=r"delta\.safetensors: .*checksum differs"):
        store.acquire("math", timeout=SOON)
    damage(own["sql"], "gone")
    with pytest.raises(FileNotFoundError):
        store.acquire("sql", timeout=SOON)


def test_a_budget_that_is_too_small_is_told_as_it_is(own, open_store):
    store = open_store(own, host_bytes=1000)
    with pytest.raises(LoadError, match=r"^expert 'math': .* the budget is 1 KB; raise engine\.host_bytes$"):
        store.request("math").result(SOON)
    store.prefetch("math")
    with pytest.raises(CapacityError, match="'math'"):
        store.acquire("math", timeout=SOON)


def test_a_closed_store_fails_who_waits(own, disk, open_store):
    store = open_store(own)
    with disk.stopped(own["math"]):
        waiting = store.request("math")
        store.close()
        with pytest.raises(MeswitchError, match="closed"):
            waiting.result(SOON)
    with pytest.raises(MeswitchError, match="closed"):
        store.request("math")
    store.prefetch("math")


def test_no_fault_in_reads_and_copies_harms_another_expert(own, disk, open_store, monkeypatch):
    """Threads that ask for five experts' worth of slots while reads and copies fail at random."""
    store = open_store(own, slots=2, host_bytes=2 * max(row.bytes for row in open_store(own).residency()))
    wanted = {name: store.artifacts[name].read("model.norm.weight") for name in own}
    copy, fill, turn = tiers.copy, layouts.Layout.fill, iter(range(10**6))

    def flaky(work, every):
        def call(*arguments, **options):
            if next(turn) % every == 0:
                raise OSError(errno.EIO, "Input/output error")
            return work(*arguments, **options)

        return call

    monkeypatch.setattr(tiers, "copy", flaky(copy, 5))
    monkeypatch.setattr(layouts.Layout, "fill", flaky(fill, 4))
    wrong, failed = [], []

    def work(seed):
        for step in range(40):
            name = list(own)[(seed * 7 + step * 3) % len(own)]
            try:
                held = store.request(name).result(SOON)
            except LoadError as error:
                failed.append(str(error))
                continue
            if not torch.equal(store.tensors(held.slot)["model.norm.weight"], wanted[name]):
                wrong.append(name)
            store.release(held.slot)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not wrong
    assert failed
    assert all("Input/output error" in text for text in failed)
    assert all(row.pins == 0 for row in store.residency())
    assert not store._loads
