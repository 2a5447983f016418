from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from runtime.stand_ins import StandIns


def test_the_clock_stands_still_in_collectives_which_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object, group: str) -> str:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
        return group

    monkeypatch.setattr(dist, "all_reduce", busy)
    clock = StandIns()
    with clock.waiting():
        start, cpu_start, wall_start = clock.now(), time.process_time(), time.perf_counter()
        assert dist.all_reduce(None, group="tp") == "tp"
        inside, cpu, wall = clock.now() - start, time.process_time() - cpu_start, time.perf_counter()
    assert cpu >= 0.05
    assert inside < 0.01
    assert wall - wall_start >= cpu
    assert vars(dist)["all_reduce"] is busy
    start = clock.now()
    busy(group="")
    assert clock.now() - start >= 0.05  # it goes on
