"""Comparison of learning curves, on curves made by hand."""

from __future__ import annotations

import math

from benchmarks.curves import compare_curves


def curves(shift: float, seeds: int = 3, slope: float = 0.1) -> list[list[float]]:
    """Rising curves whose seeds lie 0.1 apart around the same line."""
    return [[slope * i + shift + 0.1 * (seed - 1) for i in range(20)] for seed in range(seeds)]


def test_the_same_process_is_the_same() -> None:
    result = compare_curves(curves(0.0), curves(0.05))
    assert result["same"] is True
    assert result["share_within"] == 1.0
    assert math.isclose(result["final_difference"], -0.05)
    assert math.isclose(result["final"]["ours"], 0.1 * 17)
    assert math.isclose(result["spread"]["trl"][3], 0.1)


def test_another_level_and_another_slope_are_not() -> None:
    far = compare_curves(curves(0.0), curves(0.3))
    assert far["same"] is False
    assert far["share_within"] == 0.0
    steeper = compare_curves(curves(0.0), curves(0.0, slope=0.12))
    assert 0.5 < steeper["share_within"] < 0.9
    assert steeper["same"] is False


def test_one_seed_tells_nothing() -> None:
    assert compare_curves(curves(0.0, seeds=1), curves(5.0))["same"] is None
