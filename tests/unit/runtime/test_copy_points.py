"""Ranks that meet before each size copy at once: for as long as was asked, from when they have met."""

from __future__ import annotations

import time

from runtime.microbenchmarks import copy_points


def test_every_size_is_copied_for_its_time_after_the_ranks_have_met() -> None:
    met: list[float] = []
    sizes = (1 << 16, 1 << 20)
    points = copy_points(sizes, 0.1, lambda: met.append(time.perf_counter()))
    over = time.perf_counter()
    assert [size for size, _ in points] == [float(size) for size in sizes]
    # any machine that runs torch: 10 MB/s to 10 TB/s
    assert all(1e7 < rate < 1e13 for _, rate in points)
    assert len(met) == 2
    assert met[1] - met[0] >= 0.1
    assert over - met[1] >= 0.1
