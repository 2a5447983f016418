from __future__ import annotations

from collections.abc import Callable

import pytest

from runtime.lane_benchmarks import lane_s


@pytest.mark.parametrize("alone_s, expected", [(1e-3, 2e-3), (5e-3, 0.0)])
def test_a_step_beside_its_model_by_hand(alone_s: float, expected: float) -> None:
    """16 more tokens of both lanes take 6 ms each through two stages: 3 ms a lane, less a stage alone."""
    asked: list[Callable[[], object]] = []
    times = iter([0.1, 0.1 + 16 * 6e-3, 0.2, 0.2 + 16 * alone_s])

    def seconds(action: Callable[[], object]) -> float:
        asked.append(action)
        return next(times)

    # a rank without a stage
    assert lane_s(seconds, 2) == pytest.approx(expected)
    assert [action() for action in asked] == [None] * 4
