"""Curves: measured points, interpolated in log-log space and never extrapolated."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, isfinite, log
from typing import Any

from realloc.errors import InputError
from realloc.files import Reader


@dataclass(frozen=True)
class Curve:
    """Points (x, y) with x strictly rising, all positive."""

    points: tuple[tuple[float, float], ...]

    @cached_property
    def _logs(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return tuple(log(x) for x, _ in self.points), tuple(log(y) for _, y in self.points)

    @property
    def highest(self) -> float:
        return max(y for _, y in self.points)

    def at(self, x: float) -> float:
        """y at x: a power law between neighbouring points, the end values beyond the ends."""
        if x <= self.points[0][0]:
            return self.points[0][1]
        if x >= self.points[-1][0]:
            return self.points[-1][1]
        xs, ys = self._logs
        log_x = log(x)
        # log(x) may round onto the last knot although x lies before it
        i = min(bisect_right(xs, log_x), len(xs) - 1)
        share = (log_x - xs[i - 1]) / (xs[i] - xs[i - 1])
        return exp(ys[i - 1] + share * (ys[i] - ys[i - 1]))


def read_curve(reader: Reader, key: str) -> Curve:
    """Reads `[[x, y], ...]`. Raises InputError naming the point."""
    rows = reader.get(key, list)
    points: list[tuple[float, float]] = []
    for number, row in enumerate(rows, 1):
        where = f"{reader.at(key)}, point {number}"
        if not isinstance(row, list) or len(row) != 2:
            raise InputError(f"{where}: expected a pair [x, y], found {row!r}.")
        x, y = positive(row[0], where), positive(row[1], where)
        if points and x <= points[-1][0]:
            raise InputError(f"{where}: {x:g} must be above {points[-1][0]:g}, the point before it.")
        points.append((x, y))
    if not points:
        raise InputError(f"{reader.at(key)}: needs at least one point [x, y].")
    return Curve(tuple(points))


def positive(value: Any, where: str) -> float:
    """A finite number above 0; YAML gives numbers such as 1e9 as text. Raises InputError."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) else float("nan")
    except (ValueError, OverflowError):
        number = float("nan")
    if isinstance(value, bool) or not isfinite(number) or number <= 0:
        raise InputError(f"{where}: expected a number above 0, found {value!r}.")
    return number


def curve_content(curve: Curve) -> Sequence[Sequence[float]]:
    return [[x, y] for x, y in curve.points]
