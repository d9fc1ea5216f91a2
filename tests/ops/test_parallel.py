"""Threads by cost: what a with block sees, and that it leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from loraplex_kernels import parallel

CHEAP, DEAR = parallel.MIN_US / 2, parallel.MIN_US * 2


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = torch.get_num_threads(), parallel._all
    yield
    torch.set_num_threads(before[0])
    parallel._all = before[1]


def test_cheap_ops_run_on_one_thread_and_dear_ones_on_all() -> None:
    parallel.set_threads(3)
    with parallel.threads_for(CHEAP):
        assert torch.get_num_threads() == 1
        with parallel.threads_for(DEAR):
            assert torch.get_num_threads() == 3
            with parallel.threads_for(CHEAP):
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_an_exception_leaves_the_threads_as_they_were() -> None:
    parallel.set_threads(2)
    with pytest.raises(ZeroDivisionError), parallel.threads_for(CHEAP):
        _ = 1 // 0
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("threads", [None, 1])
def test_nothing_is_touched_where_there_is_no_choice(threads: int | None) -> None:
    parallel._all = None
    torch.set_num_threads(2)
    if threads is not None:
        parallel.set_threads(threads)
    before = torch.get_num_threads()
    for cost in (CHEAP, DEAR):
        with parallel.threads_for(cost):
            assert torch.get_num_threads() == before
