"""Samples of a machine that is slow at times: those of calm moments count, as long as there are such."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from realloc.pace import ALIKE
from runtime.calm import CalmMoments, Paced
from runtime.layer_benchmarks import Effort, ShardBenchmarks
from runtime.pace import Probe
from tests.unit.runtime.test_table_profiler import SHAPE


class Machine:
    """Its pace is slow or not, moment by moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slow = False
        monkeypatch.setattr(Probe, "seconds", lambda _: 1.6e-4 if self.slow else 1e-4)

    def work(self, moments: str) -> Iterator[float]:
        """Seconds of work that is slow (s) or not, and slow for its second half (h)."""
        for moment in moments:
            self.slow = moment == "s"
            seconds = 1.5 if self.slow else 1.2 if moment == "h" else 1.0
            self.slow = moment in "sh"
            time.sleep(0.02 if self.slow else 0.002)
            yield seconds


def take(moments: CalmMoments, machine: Machine, pattern: str) -> list[Paced[float]]:
    work = machine.work(pattern)
    return list(islice(moments.taken(lambda: next(work)), len(pattern)))


def test_slow_moments_do_not_count(monkeypatch: pytest.MonkeyPatch):
    machine, moments = Machine(monkeypatch), CalmMoments()
    taken = take(moments, machine, ".....hsss...")
    assert [each.value for each in taken] == [1, 1, 1, 1, 1, 1.2, 1.5, 1.5, 1.5, 1, 1, 1]
    # the first after a slow one may have begun in a slow moment
    assert moments.num_calm(taken) == 7
    assert [each.value for each in moments.chosen(taken, 4)] == [1] * 7


def test_of_slow_moments_alone_all_count(monkeypatch: pytest.MonkeyPatch):
    machine, moments = Machine(monkeypatch), CalmMoments()
    first = take(moments, machine, "ssss")
    assert len(moments.chosen(first, 2)) == 4  # nothing faster is known
    assert take(moments, machine, "......")
    later = take(moments, machine, "sssss")
    assert moments.num_calm(later) == 0
    assert [each.value for each in moments.chosen(later, 2)] == [1.5] * 5


def test_where_too_few_are_alike_the_faster_ones_count(monkeypatch: pytest.MonkeyPatch):
    moments = CalmMoments()
    monkeypatch.setattr(Probe, "seconds", lambda _: 1e-4)
    list(islice(moments.taken(lambda: None), 9))
    taken = [Paced(pace, pace * 1e-4) for pace in (3.0, 2.0, ALIKE * 2.0 - 0.01, 9.0)]
    assert [each.value for each in moments.chosen(taken, 2)] == [2.0, ALIKE * 2.0 - 0.01]
    assert [each.value for each in moments.chosen(taken, 3)] == [3.0, 2.0, ALIKE * 2.0 - 0.01]
    assert len(moments.chosen(taken, 9)) == 4


def test_a_benchmark_waits_for_calm_moments_a_while_and_tells_its_pace(monkeypatch: pytest.MonkeyPatch):
    machine = Machine(monkeypatch)
    bench = ShardBenchmarks(SHAPE, "float32", 1, None, torch.device("cpu"))
    work = machine.work("..ss" + "." * 100)
    assert bench.samples(lambda: next(work), Effort(4, 0.0)) == [1.0] * 4
    assert bench.pace_s() == pytest.approx(1e-4)
    assert bench.pace_s() == 0.0  # of samples since
    others = machine.work("." * 100)
    bench.samples(lambda: next(others), Effort(4, 0.0, beside=True))
    assert bench.pace_s() == 0.0
    assert bench.pace_s(beside=True) == pytest.approx(1e-4)
    # nobody waits for ever
    always = machine.work("s" * 100_000)
    found = bench.samples(lambda: next(always), Effort(4, 0.01))
    assert set(found) == {1.5}
    assert bench.pace_s() == pytest.approx(1.6e-4)
