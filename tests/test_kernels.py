"""Products that are checked before they are chosen: inputs in bytes, and the memory between
two steps."""
import itertools
import os
import threading
import time

import pytest
import torch

from paligemma_nb import kernels
from paligemma_nb.kernels import Kernels, _scratch, float32_pays, in_bytes


def test_inputs_in_bytes():
    torch.manual_seed(0)
    x = torch.randn(300, 2048)
    x[::3, 0] = 100  # a peak of more than 20 in every third row
    x[1] = 0
    for limit, expected in ((1e9, [1]), (20, [1, *range(0, 300, 3)]), (0, range(300))):
        numbers, step, twice = in_bytes(x, limit)
        assert sorted(twice.tolist()) == sorted(expected)
        assert (numbers.dtype, len(numbers)) == (torch.int8, 300 + len(twice))
        assert torch.equal(numbers[:300].abs().amax(dim=1) == 127, (x != 0).any(dim=1))
        back = numbers[:300].float().index_add_(0, twice, numbers[300:].float(),
                                                alpha=1 / 254) * step
        # half a step
        worst = torch.full((300,), .5001).index_fill_(0, twice, .5001 / 254 + 1e-5) * step[:,
                                                                                           0]
        assert ((back - x).abs().amax(dim=1) <= worst).all()


def test_scratch_memory_is_a_threads_own():
    "A product that reads what another thread has written there would be wrong without a word."
    places, both = [], threading.Barrier(2)
    def take():
        places.append(_scratch("product", torch.float32, 8, 8).data_ptr())
        # both are alive, so that memory that was given back is not given out again
        both.wait()
    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(set(places)) == 2


def test_names_do_not_share_scratch_memory():
    a, b = (_scratch(name, torch.float32, 4) for name in ("weight", "product"))
    a.fill_(1), b.fill_(2)
    assert a.sum() == 4


@pytest.mark.parametrize("fast, numbers, pays", [
    (False, 10, True), (True, 10, False), (False, 51, False)])
def test_weights_are_widened_where_it_pays_and_fits(fast, numbers, pays, monkeypatch):
    monkeypatch.setattr(kernels, "kernels", lambda: Kernels(fast, False, False))
    sizes = dict(SC_PHYS_PAGES=4, SC_PAGE_SIZE=100)  # 50 numbers of four bytes fit into half
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert float32_pays(torch.nn.Linear(numbers, 1, bias=False)) == pays
    assert not float32_pays(torch.nn.Linear(numbers, 1, bias=False, device="meta"))


def test_one_call_is_always_timed(monkeypatch): # even if a hundredth of a second is over
    ticks = itertools.count()
    monkeypatch.setattr(time, "thread_time", lambda: next(ticks))
    assert kernels._seconds(lambda: torch.ones(1)) == 1
