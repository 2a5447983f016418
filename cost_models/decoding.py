"""How many decode steps a batch takes, and how many sequences are under way in them.

Pure statistics of lengths: knows no models and no seconds. Sequences take slots; one that is done
makes room for the next while any wait (the busy phase), then slots empty and the batch runs to its
longest sequence (the tail).
"""

from __future__ import annotations

from dataclasses import dataclass

from realloc.lengths import Lengths

PARTS = 8
"""The tail is looked at in so many equal parts."""


@dataclass(frozen=True)
class Steps:
    """`count` decode steps with `rows` sequences under way, `tokens` of response behind each."""

    count: float
    rows: float
    tokens: float


def decode_steps(response: Lengths, slots: float, waves: float, peers: float) -> tuple[Steps, ...]:
    """The decode steps of one lane with so many slots, each of which is filled `waves` times.

    The first token of a sequence comes from its prompt's pass, so a response of n tokens takes n - 1
    steps. `peers`: sequences in the last slots of all replicas; the call ends with the longest of
    them, so steps go on while any of them is alive: 1 - (1 - p)^peers, where p is the chance of one
    (the distribution of the largest order statistic). Expectations throughout.

    Where slots are refilled, the tail begins when nobody waits any more: sequences are then at any
    point of their lives, and what is left of one follows the law of residual lives, whose survival
    function is the integral of the lengths' over their mean (Feller, vol. II, ch. XI.4). With fixed
    lengths all sequences of a wave end together.
    """
    last = response.maximum - 1
    if response.is_fixed or last < 1:
        steps = Steps(max(0.0, waves * last), slots, response.mean / 2)
        return (steps,) if steps.count > 0 else ()
    if waves <= 1:
        return tuple(_tail(response, slots, peers, refilled=False))
    behind = response.mean_square / (2 * response.mean)
    tail = tuple(_tail(response, slots, peers, refilled=True))
    # all steps of all slots: those of the tail are not the busy phase's
    left = sum(steps.count * steps.rows for steps in tail) / slots
    busy = max(0.0, waves * (response.mean - 1) - left)
    return (Steps(busy, slots, behind), *tail)


def _tail(response: Lengths, slots: float, peers: float, *, refilled: bool) -> list[Steps]:
    last = response.maximum - 1
    width = last / PARTS
    behind = response.mean_square / (2 * response.mean) if refilled else 0.0
    found = []
    for part in range(PARTS):
        middle = (part + 0.5) * width
        one = _residual(response, middle) if refilled else response.alive(middle + 0.5)
        running = 1 - (1 - one) ** peers
        if running > 1e-9:
            # rows while the batch runs at all: a batch that is done computes nothing
            rows = max(1.0, slots * one / running) if slots >= 1 else slots
            found.append(Steps(width * running, rows, min(last, behind + middle)))
    return found


def _residual(response: Lengths, tokens: float) -> float:
    """Chance that more than so many tokens are left of a sequence that is looked at in its midst."""
    width = (response.maximum - tokens) / PARTS
    beyond = sum(response.alive(tokens + (part + 0.5) * width) for part in range(PARTS)) * width
    return min(1.0, beyond / response.mean)
