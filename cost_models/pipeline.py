"""How long a pipeline takes for its micro-batches, and how many of them a stage holds, by schedule.

Closed forms of what `realloc.pipeline_schedule.makespan` and `max_in_flight` count out action by
action, because search asks thousands of times; tests hold the two together. With M micro-batches,
p stages, v chunks a stage:

1F1B and GPipe: the slowest stage works on all M, and the first one also goes through all other
stages (Narayanan et al., arXiv 2104.04473, section 2.1). Interleaved: that part is v times shorter
(section 2.2 there). Zero bubble (ZB-H1): of what the other stages add, weight gradients fill twice
their own time, if there are micro-batches enough (Qi et al., arXiv 2401.10241, table 1).
"""

from __future__ import annotations

from collections.abc import Sequence

from realloc.strategy import Schedule, Strategy


def bubble_s(strategy: Strategy, micro_batches: int, others: Sequence[tuple[int, float, float]]) -> float:
    """Seconds that a stage waits for others while the pipeline fills and drains.

    `others` are the stages but the slowest, as (how many, seconds of one micro-batch forward and
    backward, seconds of its weight gradients in them).
    """
    if strategy.schedule is Schedule.ZERO_BUBBLE:
        filled = 1.0 + min(1.0, (micro_batches - 1) / (strategy.pp - 1))
        return sum(count * max(0.0, total - filled * weight) for count, total, weight in others)
    return sum(count * total for count, total, _ in others) / strategy.virtual_stages


def messages_on_path(strategy: Strategy, micro_batches: int) -> float:
    """Messages that a forward and backward pass of all micro-batches waits for, one after the other.

    Those of filling and draining; under 1F1B, which has no slack, also those of every round trip
    between neighbours in the steady state.
    """
    pp, m = strategy.pp, micro_batches
    if pp == 1:
        return 0.0
    if strategy.schedule is Schedule.GPIPE:
        return 2.0 * (pp - 1)
    if strategy.schedule is Schedule.INTERLEAVED:
        return 2.0 * (pp * strategy.virtual_stages - 1)
    rounds = 2.0 * (pp - 1) * m / pp + 2 * (pp - 2) if m >= pp else 2.0 * (m + pp - 3) + 2 * (m == 1)
    return min(rounds, 4.0 * (pp - 1)) if strategy.schedule is Schedule.ZERO_BUBBLE else rounds


def most_in_flight(strategy: Strategy, stage: int, micro_batches: int) -> float:
    """Most micro-batches whose activations a stage holds at once; chunks count as their part of one."""
    pp, virtual, m = strategy.pp, strategy.virtual_stages, micro_batches
    if strategy.schedule is Schedule.GPIPE:
        return m
    if strategy.schedule is Schedule.ZERO_BUBBLE:
        return min(m, pp)
    if strategy.schedule is Schedule.INTERLEAVED:
        # micro-batches go through a chunk in groups of at least pp
        group = -(-m // max(1, m // pp))
        return min(m * virtual, 2 * (pp - 1 - stage) + (virtual - 1) * group + 1) / virtual
    return min(m, pp - stage)
