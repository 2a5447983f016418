"""The stopwatch: terms are exclusive of each other, and torch.distributed is as it was afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from realloc.mesh import DeviceMesh
from realloc.strategy import Strategy
from runtime import stopwatch
from runtime.parallel import ParallelContext, single_rank
from runtime.stopwatch import Stopwatch
from runtime.zero import UnitExchange

DATA: Any = "data"
TENSOR: Any = "tensor"


def context() -> ParallelContext:
    """One rank of d2t2p2, with names in place of groups."""
    return replace(
        single_rank(),
        mesh=DeviceMesh(0, 8, 8),
        strategy=Strategy(2, 2, 2),
        tp_group=TENSOR,
        dp_group=DATA,
    )


class Clock:
    """Time that goes on when it is told to."""

    now_s = 0.0

    def work(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Communication takes 2 s of it, whatever it is."""
    made = Clock()
    monkeypatch.setattr(stopwatch, "perf_counter", lambda: made.now_s)
    for name in ("all_reduce", "recv"):
        monkeypatch.setattr(dist, name, lambda *_, **__: made.work(2.0))
    return made


def test_collectives_are_told_apart_by_their_group(clock: Clock):
    watch, nothing = Stopwatch(), torch.empty(0)
    before = dist.all_reduce, dist.recv
    with watch.during(context()) as terms:
        dist.all_reduce(nothing, group=DATA)
        dist.all_reduce(nothing, group=TENSOR)
        dist.all_reduce(nothing, group=TENSOR)
        dist.all_reduce(nothing)  # of the whole world: no term of a call
        dist.recv(nothing, src=1)
        clock.work(5.0)
        with watch.timed("optimizer"):
            clock.work(1.0)
            dist.all_reduce(nothing, group=DATA)  # not the optimizer's, although within its step
    assert (dist.all_reduce, dist.recv) == before
    assert terms == {"dp_communication": 4.0, "tp_communication": 4.0, "pipeline": 2.0, "optimizer": 1.0}


def test_an_exchange_is_communication_with_what_is_copied_for_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(*_: object) -> None:
        clock.work(0.5)
        dist.all_reduce(torch.empty(0), group=DATA)
        clock.work(0.25)

    monkeypatch.setattr(UnitExchange, "gather", gather)
    exchange: Any = UnitExchange.__new__(UnitExchange)
    zero = replace(context(), strategy=Strategy(2, 2, 2, zero=1))
    watch = Stopwatch()
    with watch.during(zero) as terms, watch.timed("optimizer"):
        clock.work(1.0)
        exchange.gather({}, {})
    assert terms == {"dp_communication": 2.75, "optimizer": 1.0}
    assert UnitExchange.gather is gather
    with watch.during(context()) as terms:
        exchange.gather({}, {})  # none of ZeRO's: what it sends is timed alone
    assert terms == {"dp_communication": 2.0}


def test_an_error_leaves_torch_as_it_was():
    before = dist.all_reduce, dist.recv
    with pytest.raises(RuntimeError, match="a peer died"), Stopwatch().during(context()):
        raise RuntimeError("a peer died")
    assert (dist.all_reduce, dist.recv) == before


def test_every_call_starts_from_nothing():
    watch = Stopwatch()
    with watch.during(context()) as first:
        dist.all_reduce(torch.empty(0), group=DATA)
    with watch.during(context()) as second:
        pass
    assert first
    assert not second
