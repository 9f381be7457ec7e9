"""Reading ahead and writing behind: the same results and errors as one after the other."""

import threading

import pytest
import torch
from safetensors.torch import save_file

from meswitch.checkpoint import Checkpoint
from meswitch.compression.convert import PairReader, WriterThread
from meswitch.errors import MeswitchError


@pytest.fixture
def checkpoints(tmp_path):
    """A base and an expert with the tensors a, b, c (equal in both) and, in the expert only, d."""
    tensors = {name: torch.full((4, 2), float(i)) for i, name in enumerate("abcd")}
    for side, names in (("base", "abc"), ("expert", "abcd")):
        (tmp_path / side).mkdir()
        changed = {name: tensors[name] + (side == "expert" and name != "c") for name in names}
        (tmp_path / side / "config.json").write_text('{"model_type": "llama"}')
        save_file(changed, tmp_path / side / "model.safetensors")
    return Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "expert")


@pytest.mark.parametrize("expected", ["abcd", "", "dcba", "ac", "b"])
@pytest.mark.parametrize("taken", ["abcd", "badc"])
def test_pairs_are_the_same_whatever_was_expected(checkpoints, expected, taken):
    base, expert = checkpoints
    with PairReader(base, expert, pinned=False) as reader:
        reader.expect(expected)
        for name in taken:
            pair = reader.take(name)
            assert torch.equal(pair.ours, expert.read(name))
            assert (pair.base is None) == (pair.base_sha256 is None) == (name == "d")
            assert pair.same == (name == "c")


def test_the_next_pair_is_read_before_it_is_asked_for(checkpoints):
    base, expert = checkpoints
    with PairReader(base, expert, pinned=False) as reader:
        reader.expect("abcd")
        reader.take("a")
        assert reader._ahead is not None
        name, future = reader._ahead
        assert name == "b"
        assert torch.equal(future.result(timeout=10).ours, expert.read("b"))


def test_a_truncated_file_is_reported_when_its_tensor_is_taken(checkpoints):
    base, expert = checkpoints
    file = expert.tensors["b"].file
    file.write_bytes(file.read_bytes()[: expert.tensors["b"].offset + 3])
    with PairReader(base, expert, pinned=False) as reader:
        reader.expect("abcd")
        reader.take("a")
        with pytest.raises(MeswitchError, match="ends inside tensor b"):
            reader.take("b")


def test_calls_run_in_order_and_one_at_a_time():
    seen, running = [], threading.Lock()

    def note(number):
        assert running.acquire(blocking=False)
        seen.append((number, threading.current_thread() is threading.main_thread()))
        running.release()

    with WriterThread() as behind:
        for number in range(20):
            behind.call(note, number)
    assert seen == [(number, False) for number in range(20)]


@pytest.mark.parametrize("further", [0, 1])
def test_an_error_is_raised_by_the_next_call_or_at_the_end(further):
    def fail():
        raise MeswitchError("no space left")

    def run():
        with WriterThread() as behind:
            behind.call(fail)
            for _ in range(further):
                behind.call(pytest.fail, "runs after an error")

    with pytest.raises(MeswitchError, match="no space left"):
        run()
