import gc
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meswitch import pagelock
from meswitch.errors import CapacityError
from meswitch.pagelock import copy, page_locked

MB = 1 << 20


@given(st.integers(0, 3 * pagelock._PIECE), st.integers(0, 3 * pagelock._PIECE))
def test_a_copy_is_cut_where_pieces_begin_and_leaves_nothing_out(first, count):
    host = torch.empty(6 * pagelock._PIECE, dtype=torch.uint8)[first : first + count]
    at = 0
    for part in pagelock._parts(host, pagelock._AT_ONCE):
        assert part.start == at < part.stop
        assert part.stop - part.start <= pagelock._AT_ONCE
        first_piece, last_piece = ((host.data_ptr() + i) // pagelock._PIECE for i in (part.start, part.stop - 1))
        assert first_piece == last_piece
        at = part.stop
    assert at == count


def test_without_a_gpu_it_is_plain_memory():
    source = torch.randint(256, (1000,), dtype=torch.uint8)
    target = page_locked(1000, torch.device("cpu"))
    copy(target, source)
    assert target.equal(source)


@pytest.mark.gpu
def test_parts_of_locked_memory_go_to_a_gpu_and_back():
    device = torch.device("cuda")
    source = torch.randint(256, (40 * MB + 123,), dtype=torch.uint8, device=device)
    host = page_locked(len(source), device)
    assert host.is_pinned()
    assert host[-1:].is_pinned()
    for first, last in ((0, len(source)), (5, 33 * MB + 7), (len(source) - 1, len(source))):
        host.zero_()
        copy(host[first:last], source[first:last])
        back = torch.zeros_like(source[first:last])
        copy(back, host[first:last], non_blocking=True)
        assert back.equal(source[first:last])
        assert host[first:last].equal(source[first:last].cpu())


@pytest.mark.gpu
def test_memory_that_cannot_be_locked_is_an_error_and_the_gpu_goes_on():
    device = torch.device("cuda")
    piece = page_locked(MB, device)
    with pytest.raises(CapacityError, match="page-locked"):
        pagelock._lock(piece, device)  # it is
    assert torch.ones(3, device=device).sum().item() == 3


@pytest.mark.gpu
def test_memory_that_nobody_holds_is_unlocked_and_given_back():
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    device = torch.device("cuda")
    before = resident()
    host = page_locked(300 * MB, device)
    view = host[5:10]
    del host
    gc.collect()
    assert view.is_pinned()  # a part keeps the whole
    assert resident() - before > 250 * MB
    del view
    deadline = time.monotonic() + 20
    while resident() - before > 100 * MB and time.monotonic() < deadline:
        time.sleep(0.05)
    assert resident() - before < 100 * MB
    assert page_locked(10, device).is_pinned()  # the driver still answers
