"""How the copies of a reallocation become messages, and messages rounds.

Rounds are numbered by what all ranks know of a schedule, so that each finds its own alone. Knows no
tensors and sends nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from realloc.layout import Box
from realloc.reallocation import Copy, Schedule


def split(copy: Copy, max_elements: int) -> Iterable[Copy]:
    """The copy in parts of at most `max_elements`, cut along its outermost dims."""
    if copy.box.num_elements <= max_elements:
        yield copy
        return
    start, stop = copy.box.start, copy.box.stop
    dim = next(d for d, n in enumerate(copy.box.shape) if n > 1)
    row = copy.box.num_elements // copy.box.shape[dim]
    step = max(1, max_elements // row)
    for low in range(start[dim], stop[dim], step):
        high = min(low + step, stop[dim])
        box = Box((*start[:dim], low, *start[dim + 1 :]), (*stop[:dim], high, *stop[dim + 1 :]))
        yield from split(replace(copy, box=box), max_elements)


Rounds = Mapping[tuple[bool, int, int], Sequence[Copy]]
"""Copies by round: direct ones before relays, parameters in order, parts of large ones in order."""


def rounds(copies: Iterable[Copy], peaks: Mapping[str, int], max_elements: int) -> Rounds:
    """The copies in rounds in which no rank stages more than `max_elements`.

    `peaks` says how much any rank stages for each parameter. A parameter that exceeds the bound is
    cut into parts, each in a round of its own.
    """
    groups: dict[str, tuple[int, int]] = {}
    group, under_way = 0, 0
    for param, peak in peaks.items():
        if under_way + peak > max_elements and under_way:
            group, under_way = group + 1, 0
        under_way += peak
        groups[param] = group, -(-peak // max_elements) if max_elements else 1
    result: dict[tuple[bool, int, int], list[Copy]] = {}
    for copy in copies:
        group, parts = groups[copy.param]
        limit = max(1, copy.box.num_elements // max(1, parts))
        for i, part in enumerate(split(copy, limit)):
            result.setdefault((copy.relay, group, i), []).append(part)
    return dict(sorted(result.items()))


def messages(copies: Iterable[Copy], coalesce_elements: int) -> list[tuple[Copy, ...]]:
    """The copies of a round as messages: large ones alone, small ones together per pair of ranks."""
    large: list[tuple[Copy, ...]] = []
    small: dict[tuple[int, int], list[Copy]] = {}
    for copy in copies:
        if copy.box.num_elements >= coalesce_elements:
            large.append((copy,))
        else:
            small.setdefault((copy.src, copy.dst), []).append(copy)
    return large + [tuple(together) for together in small.values()]


def peaks(schedule: Schedule, casts: bool) -> Mapping[str, int]:
    """How much any rank stages for each parameter: all of it when it is cast."""
    if schedule.peaks:
        return {param: peak.elements if casts else peak.staged for param, peak in schedule.peaks.items()}
    load: dict[str, dict[int, int]] = {}
    for copy in schedule.cross:
        by_rank = load.setdefault(copy.param, {})
        for rank in (copy.src, copy.dst):
            by_rank[rank] = by_rank.get(rank, 0) + copy.box.num_elements
    return {param: max(by_rank.values()) for param, by_rank in load.items()}
