"""The benchmark of unexplained waiting, on traces made by hand."""

from __future__ import annotations

import pytest

from benchmarks.overhead import overlap, unexplained
from realloc.trace import Trace, TraceRecord

ORDER = ("a", "b", "meet")


def _trace(gap_s: float) -> Trace:
    """Two ranks, three iterations: `a` takes rank 0 2 s, `b` rank 1 1 s, then both meet for 1 s.

    Before `a`, rank 0 does nothing for `gap_s`.
    """
    records = []
    start = 0.0
    for iteration in range(3):
        done = start + gap_s + 2.0
        records += [
            TraceRecord(iteration, 0, "a", "call", start + gap_s, done),
            TraceRecord(iteration, 1, "b", "call", start, start + 1.0),
            TraceRecord(iteration, 0, "meet", "transfer", done, done + 1.0),
            TraceRecord(iteration, 1, "meet", "transfer", start + 1.0, done + 1.0, wait_s=done - start - 1.0),
        ]
        start = done + 1.0
    return Trace(2, tuple(records))


def test_waiting_that_follows_from_the_order_is_explained():
    found = unexplained(_trace(0.0), ORDER)
    assert found["unexplained_share"] == pytest.approx(0.0, abs=1e-9)
    assert found["ranks"][0]["busy_share"] == pytest.approx(1.0)
    assert found["ranks"][1]["planned_wait_share"] == pytest.approx(1 / 3)


def test_time_between_nodes_is_not_and_neither_is_the_waiting_it_causes():
    found = unexplained(_trace(1.0), ORDER)
    # in each of two iterations of 4 s, rank 1 waits 2 s for rank 0, 1 s of it because of the gap
    assert found["ranks"][0]["unexplained_share"] == pytest.approx(2 / 8)
    assert found["ranks"][1]["unexplained_share"] == pytest.approx(2 / 8)
    assert found["ranks"][0]["between_nodes_share"] == pytest.approx(2 / 8)
    assert found["ranks"][1]["between_nodes_share"] == pytest.approx(0.0)


def test_a_rank_that_leaves_before_the_last_one_comes_does_not_wait():
    records = (
        TraceRecord(0, 0, "meet", "transfer", 0.0, 0.5),
        TraceRecord(0, 1, "meet", "transfer", 0.0, 0.5),
        TraceRecord(1, 0, "meet", "transfer", 0.5, 1.0),
        TraceRecord(1, 0, "a", "call", 1.0, 4.0),
        TraceRecord(1, 1, "b", "call", 0.5, 2.0),
        TraceRecord(1, 1, "meet", "transfer", 2.0, 2.5),
    )
    found = unexplained(Trace(2, records), ("b", "meet", "a"))
    assert found["unexplained_share"] == pytest.approx(0.0, abs=1e-9)


def test_overlap():
    assert overlap(_trace(0.0), "a", "b") == pytest.approx(1.0)
    assert overlap(_trace(0.75), "a", "b") == pytest.approx(0.25)
