"""Tables of a machine that is slow for minutes: rows at the pace of all, and what a profile tells of it."""

from __future__ import annotations

import pytest

from runtime.shared_cores import SharedCores
from runtime.table_pace import evened, pace_content
from runtime.table_rows import Entry, Found


def found(seconds: float, pace_s: float, beside_s: float = 0.0, beside_pace_s: float = 0.0) -> Found:
    entry = Entry("layer", "forward", False, 8.0, 4.0, [seconds], [beside_s] if beside_s else [])
    return Found(seconds, [entry], pace_s, beside_pace_s)


def test_rows_of_a_slow_minute_are_those_of_a_fast_one():
    calm, slow = found(0.1, 1e-4, 0.12, 1e-4), found(0.15, 1.5e-4, 0.16, 1.6e-4)
    entries = evened([calm] * 5 + [slow, slow, found(0.1, 1e-4, 0.16, 1.6e-4)])
    for (entry,) in entries:
        assert entry.samples == [pytest.approx(0.1)]
    # what a slow minute did to ranks that are at it together is nothing that they do to each other
    assert [entry.together for (entry,) in entries] == [[0.12]] * 5 + [[]] * 3


def test_what_ranks_do_to_each_other_at_every_point_stays():
    points = [found(0.1, 1e-4, 0.15, 1.6e-4)] * 3
    for (entry,) in evened(points, SharedCores([[2.0, 1.5]], 1.6)):
        assert (entry.samples, entry.together) == ([0.1], [0.15])
    # unless the same was seen without it
    for (entry,) in evened(points, SharedCores([[2.0, 1.0]], 1.0)):
        assert (entry.samples, entry.together) == ([0.1], [])


def test_points_at_about_the_usual_pace_and_those_of_gpus_stay_as_they_are():
    points = [found(0.1, 1e-4), found(0.1, 1.04e-4), found(0.1, 0.98e-4), found(0.1, 0.0)]
    assert evened(points) == [point.entries for point in points]
    assert evened([found(0.1, 0.0)])[0][0].samples == [0.1]
    assert pace_content([found(0.1, 0.0)], 2, None) == {}


def test_what_others_do_to_the_pace_is_told_where_it_was_measured():
    points = [found(0.1, pace_s) for pace_s in (1e-4, 1e-4, 1.2e-4, 1.3e-4)]
    assert pace_content(points, 4, SharedCores([[1.0, 1.0], [4.0, 2.0]], 2.0)) == {
        "alone_s": pytest.approx(1.1e-4),
        "together_s": pytest.approx(2.2e-4),
        "ranks": 4,
        "spread": pytest.approx(0.2 / 1.1),
    }
