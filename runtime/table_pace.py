"""The pace of the machine while tables were measured: of their points, and what a profile tells of it.

A machine that is slow for minutes leaves points without a calm moment (`runtime.calm`); rows of one table
would then be of different machines. Decides what that does to samples; takes none itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from realloc.pace import ALIKE
from runtime.shared_cores import SharedCores
from runtime.table_rows import Entry, Found

_ALIKE = 0.05
"""Points no further from the usual pace, as a share, are at that pace: it is not known better."""


def evened(found: Sequence[Found], shared: SharedCores | None = None) -> Sequence[Sequence[Entry]]:
    """The entries of points as they would have been at the usual pace of all.

    Cores that slow each other down do so at every point, and that stays. But virtual ones may be at one
    physical core for minutes, and apart again: where a tenth of the points, or `shared`, had a faster pace
    with all ranks at it, the slower points say nothing of that.
    """
    alone_s = usual_s(each.pace_s for each in found)
    beside = sorted(each.beside_pace_s for each in found if each.beside_pace_s)
    fastest = [beside[len(beside) // 10]] if beside else []
    if shared is not None:
        fastest.append(alone_s * shared.probe)
    most_s = ALIKE * min(fastest, default=0.0)
    return [
        [
            replace(
                entry,
                samples=_at_pace(entry.samples, each.pace_s, alone_s),
                together=entry.together if each.beside_pace_s <= most_s else [],
            )
            for entry in each.entries
        ]
        for each in found
    ]


def usual_s(paces: Iterable[float]) -> float:
    """Of points whose pace is known: that in the middle, which few slow ones do not move."""
    known = [pace_s for pace_s in paces if pace_s]
    return median(known) if known else 0.0


def _at_pace(samples: Sequence[float], pace_s: float, usual_pace_s: float) -> list[float]:
    ratio = pace_s / usual_pace_s if pace_s else 1.0
    alike = max(ratio, 1 / ratio) - 1 <= _ALIKE
    return [seconds if alike else seconds / ratio for seconds in samples]


def pace_content(found: Iterable[Found], ranks: int, shared: SharedCores | None) -> Mapping[str, Any]:
    """What a profile holds of the pace: what more ranks do to it counts where that was measured."""
    paces = sorted(each.pace_s for each in found if each.pace_s)
    if not paces:
        return {}
    alone_s, quarter = usual_s(paces), len(paces) // 4
    return {
        "alone_s": alone_s,
        "together_s": alone_s * (1.0 if shared is None else shared.probe),
        "ranks": 1 if shared is None else ranks,
        "spread": (paces[-1 - quarter] - paces[quarter]) / alone_s,
    }
