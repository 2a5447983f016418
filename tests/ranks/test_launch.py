"""The multi-process test helper itself: results, blame, time limits, and that nobody is left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from tests.ranks.launch import RankFailure, RankTimeout, run_ranks


def _sum(rank: int, world_size: int, offset: float) -> np.ndarray:
    value = torch.tensor([rank + offset])
    dist.all_reduce(value)
    return value.numpy()


def test_results_come_in_rank_order() -> None:
    results = run_ranks(_sum, 3, 0.5)
    assert [r.tolist() for r in results] == [[4.5]] * 3
    assert run_ranks(lambda rank, size: (rank, size), 2) == [(0, 2), (1, 2)]


def test_large_results_do_not_block() -> None:
    results = run_ranks(lambda rank, size: np.full(1_000_000, rank), 2)
    assert [int(r.sum()) for r in results] == [0, 1_000_000]


def test_a_rank_may_finish_long_before_its_peers() -> None:
    def work(rank: int, size: int) -> float:
        value = torch.full((100_000,), float(rank))
        if rank == 0:
            dist.send(value, 1)
            return 0.0
        time.sleep(0.5)
        dist.recv(value, 0)
        return float(value.sum())

    assert run_ranks(work, 2) == [0.0, 0.0]


def _raise(rank: int, world_size: int, guilty: int) -> None:
    if rank == guilty:
        time.sleep(0.2)
        raise ValueError(f"the flaw of rank {rank}")
    dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize("guilty", [0, 2, 3])
def test_names_the_rank_that_raised_first(guilty: int) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match=f"rank {guilty} of 4 failed first") as caught:
        run_ranks(_raise, 4, guilty)
    assert caught.value.rank == guilty
    assert caught.value.error == "ValueError"
    assert f"the flaw of rank {guilty}" in str(caught.value)
    assert "test_launch.py" in str(caught.value)
    assert time.monotonic() - start < 15


def _killed(rank: int, world_size: int, guilty: int) -> None:
    if rank == guilty:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize("guilty", [0, 2])
def test_names_the_rank_and_the_signal_that_killed_it(guilty: int) -> None:
    with pytest.raises(RankFailure, match="SIGKILL") as caught:
        run_ranks(_killed, 3, guilty)
    assert caught.value.rank == guilty
    assert caught.value.error == "SIGKILL"


def test_a_silent_exit_is_a_failure() -> None:
    with pytest.raises(RankFailure, match="exit code 7") as caught:
        run_ranks(lambda rank, size: os._exit(7) if rank == 1 else None, 2)
    assert caught.value.rank == 1


def test_a_result_that_cannot_be_sent_is_a_failure() -> None:
    with pytest.raises(RankFailure, match="cannot be sent"):
        run_ranks(lambda rank, size: lambda: None, 1)


def _hang(rank: int, world_size: int) -> None:
    if rank == 1:
        _sleep_here()


def _sleep_here() -> None:
    time.sleep(1000)


def test_a_hang_ends_in_time_and_shows_where() -> None:
    start = time.monotonic()
    with pytest.raises(RankTimeout, match=r"ranks \[1\] of 2 .*2 s") as caught:
        run_ranks(_hang, 2, timeout_s=2)
    assert "_sleep_here" in str(caught.value)
    assert time.monotonic() - start < 10


def test_nobody_is_left() -> None:
    for work in (_hang, _killed, _raise):
        with pytest.raises(AssertionError):
            run_ranks(work, 2, *([] if work is _hang else [0]), timeout_s=2)
    run_ranks(_sum, 2, 0.0)
    assert multiprocessing.active_children() == []
    assert psutil.Process().children(recursive=True) == []
