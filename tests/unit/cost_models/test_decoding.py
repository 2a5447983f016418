"""Decode steps against batches drawn at random and stepped through slot by slot."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

import pytest

from cost_models.decoding import decode_steps
from realloc.lengths import Lengths, lengths_of


def stepped(lengths: Sequence[int], slots: int) -> tuple[int, int]:
    """(decode steps with anybody alive, rows over all of them) of one lane with refilled slots."""
    waiting = deque(lengths)
    live: list[int] = []
    steps = rows = 0
    while waiting or live:
        live = [n - 1 for n in live if n > 1]
        rows, steps = rows + len(live), steps + bool(live)
        while waiting and len(live) < slots:
            first = waiting.popleft()  # its first token comes from the prompt's pass
            if first > 1:
                live.append(first)
        live = [n for n in live if n > 1]
    return steps, rows


@pytest.mark.parametrize("waves", [1, 4])
@pytest.mark.parametrize("law", ["assumed", "two lengths"])
def test_steps_and_rows_of_drawn_batches(law: str, waves: int):
    draw = random.Random(1)
    if law == "assumed":
        pool = [min(100, 1 + int(draw.expovariate(1 / 40))) for _ in range(4000)]
        response = Lengths(sum(pool) / len(pool), 100)
    else:
        pool = [draw.choice((10, 10, 10, 80)) for _ in range(4000)]
        response = lengths_of({10: pool.count(10), 80: pool.count(80)})
    slots = 16
    outcomes = [stepped(draw.sample(pool, slots * waves), slots) for _ in range(300)]
    steps = sum(o[0] for o in outcomes) / len(outcomes)
    rows = sum(o[1] for o in outcomes) / len(outcomes)
    found = decode_steps(response, slots, waves, slots)
    assert sum(s.count for s in found) == pytest.approx(steps, rel=0.08)
    assert sum(s.count * s.rows for s in found) == pytest.approx(rows, rel=0.08)


def test_the_longest_of_more_sequences_is_longer():
    response = Lengths(20.0, 100)
    few, many = (sum(s.count for s in decode_steps(response, 4, 1, peers)) for peers in (4, 400))
    assert few < many <= 99


def test_fixed_lengths_need_no_statistics():
    (steps,) = decode_steps(Lengths(50.0, 50), 8, 3, 8)
    assert (steps.count, steps.rows) == (3 * 49, 8)
    assert decode_steps(Lengths(1.0, 1), 8, 1, 8) == ()
