"""Rows of measured tables: samples kept as they come, and put together into what a profile holds.

Decides what is typical of samples, and evens out what noise has made fall. Which sizes are measured,
and how, is not known here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from realloc.files import write_text

STEP = "step"
"""Entries of whole decode steps, in which a model is gone through from its first layer to the token: no table
of its own, but what others do to its parts."""
LEAST_S = 1e-8
"""What a difference of two times counts as when noise has made it less."""


@dataclass(frozen=True)
class Entry:
    """Samples of one row of one table; `together`: those with all ranks of the host at the same."""

    of: str
    quantity: str
    ragged: float
    x: float
    y: float
    samples: list[float]
    together: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """What was measured of a point: seconds of its longest pass, entries, and the pace they are at.

    `pace_s`, `beside_pace_s`: seconds of `runtime.pace.Probe`, of the samples alone and of those with all
    ranks at it; 0 where they are not known.
    """

    pass_s: float
    entries: list[Entry]
    pace_s: float = 0.0
    beside_pace_s: float = 0.0


class Kept:
    """Results by point, in a JSON file that is written anew after every point."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Results of another `fingerprint` (machine, versions, effort) are not used."""
        self._path, self._fingerprint = path, fingerprint
        self._points: dict[str, dict[str, Any]] = {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["fingerprint"] == fingerprint:
                self._points = dict(content["points"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass  # nothing that could be used: measured anew

    def get(self, key: str) -> Found | None:
        """None when the point has not been measured."""
        found = self._points.get(key)
        if found is None:
            return None
        entries = [Entry(**entry) for entry in found["entries"]]
        return Found(float(found["pass_s"]), entries, float(found["pace_s"]), float(found["beside_pace_s"]))

    def put(self, key: str, found: Found) -> None:
        self._points[key] = asdict(found)
        content = {"fingerprint": self._fingerprint, "points": self._points}
        write_text(self._path, json.dumps(content))

    def found(self, key: str, measure: Callable[[], Found]) -> Found:
        """What is kept of a point, or what `measure` gives, kept from then on."""
        found = self.get(key)
        if found is None:
            found = measure()
            self.put(key, found)
        return found


def table_rows(dtype_entries: Iterable[tuple[str, Entry]]) -> list[Mapping[str, Any]]:
    """`tables` of a `profile/1` file: typical seconds, never falling as a variable grows."""
    samples: dict[tuple[str, str, str, float], dict[tuple[float, float], list[float]]] = {}
    ratios: dict[tuple[str, str, str, float], dict[tuple[float, float], list[float]]] = {}
    for dtype, entry in dtype_entries:
        key = (entry.of, dtype, entry.quantity, entry.ragged)
        samples.setdefault(key, defaultdict(list))[entry.x, entry.y] += entry.samples
        if entry.together:
            ratio = typical(entry.together) / max(LEAST_S, typical(entry.samples))
            ratios.setdefault(key, defaultdict(list))[entry.x, entry.y].append(ratio)
    tables: list[Mapping[str, Any]] = []
    for (of, dtype, quantity, ragged), points in samples.items():
        if quantity == STEP:
            continue
        seconds = rising({at: max(LEAST_S, typical(values)) for at, values in points.items()})
        two = not quantity.startswith(_ONE_VARIABLE)
        asked = (of, dtype, STEP, 0.0) if quantity in _OF_A_STEP else (of, dtype, quantity, ragged)
        beside = _beside(quantity, ratios.get(asked, {}), points)
        rows = [
            [
                *([_plain(x), _plain(y)] if two else [_plain(x)]),
                seconds[x, y],
                _spread(points[x, y]),
                *([beside[x, y]] if beside else []),
            ]
            for x, y in sorted(points)
        ]
        tables.append({"of": of, "dtype": dtype, "quantity": quantity, "ragged": ragged, "rows": rows})
    return tables


_OF_A_STEP = ("decode", "sample")
_Point = tuple[float, float]


def _beside(
    quantity: str, ratios: Mapping[_Point, Sequence[float]], points: Iterable[_Point]
) -> Mapping[_Point, float]:
    """How many times longer rows take beside others: the optimizer's by its size, as a cache holds it or not.

    Of all other tables the median of their rows: a row's two times are as far apart as the pace has changed
    between them.
    """
    if quantity == "optimizer" and ratios:
        # of a size without a ratio that of the nearest
        nearest = {at: min(ratios, key=lambda known: abs(known[0] - at[0])) for at in points}
        return {at: max(1.0, typical(ratios[known])) for at, known in nearest.items()}
    every = [ratio for found in ratios.values() for ratio in found]
    return dict.fromkeys(points, max(1.0, median(every))) if every else {}


# Tables of one variable: of the ends, the optimizer, and what a generate call does once.
_ONE_VARIABLE = ("enter", "head", "sample", "optimizer", "pack_weights")


def _plain(size: float) -> float:
    """Sizes are whole numbers, which are not rounded."""
    return int(size) if size == int(size) else size


def typical(values: Sequence[float]) -> float:
    """Their mean without a quarter of them at either end: a run adds up what it meets, not its best."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    kept = ordered[quarter : len(ordered) - quarter]
    return sum(kept) / len(kept)


def _spread(values: Sequence[float]) -> float:
    """Distance between the quartiles as a share of what is typical."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return min(100.0, (ordered[-1 - quarter] - ordered[quarter]) / max(LEAST_S, typical(ordered)))


def rising(values: Mapping[tuple[float, float], float]) -> dict[tuple[float, float], float]:
    """The values, evened out where one falls although neither x nor y does.

    Each becomes the mean of the largest at sizes up to its own and the smallest from there on: both
    rise, and values that rise stay.
    """
    found = {}
    for x, y in values:
        up = max(value for (a, b), value in values.items() if a <= x and b <= y)
        down = min(value for (a, b), value in values.items() if a >= x and b >= y)
        found[x, y] = (up + down) / 2
    return found
