"""What ZeRO costs a rank: seconds on the data-parallel group, and what stays of its elements.

Unit by unit, as `runtime.zero` does it: a reduce-scatter of fp32 gradients for each mini-batch (stage 1)
or micro-batch (2, 3); an all-gather of parameters after the step (1, 2) or before a unit's forward
and backward pass of every micro-batch (3). Rajbhandari et al., arXiv 1910.02054, sections 5 and 7.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cost_models.communication import Communication, GroupShape
from cost_models.compute import GRADIENT_BYTES, ComputeCosts
from realloc.strategy import Strategy


@dataclass(frozen=True)
class Resident:
    """Elements that one rank keeps between calls, of those it computes with."""

    parameters: int
    gradients: int
    optimizer: int


def resident_elements(elements: int, strategy: Strategy) -> Resident:
    """What each stage leaves whole: gradients and parameters (1), parameters (2), nothing (3)."""
    own = -(-elements // strategy.dp)
    return Resident(
        parameters=own if strategy.zero == 3 else elements,
        gradients=own if strategy.zero >= 2 else elements,
        optimizer=own if strategy.zero >= 1 else elements,
    )


def gradients_s(
    costs: ComputeCosts,
    communication: Communication,
    group: GroupShape,
    strategy: Strategy,
    units: Sequence[int],
    params: int,
    micro_batches: int,
) -> float:
    """Seconds of one mini-batch that bring replicas' gradients together and parameters apart.

    `units`: elements of each, which have so many `params`, tensors, together.
    """
    if strategy.dp == 1:
        return 0.0
    if not strategy.zero:
        return communication.all_reduce_s(group, GRADIENT_BYTES * sum(units))

    def each(one: Callable[[int], float]) -> float:
        return sum(count * one(size) for size, count in Counter(units).items())

    def reduced(size: int) -> float:
        sent = communication.collective_s("reduce_scatter", group, GRADIENT_BYTES * size)
        made = GRADIENT_BYTES if strategy.zero == 1 else costs.element_bytes
        copied = (made + GRADIENT_BYTES) * size + 2 * GRADIENT_BYTES * size / strategy.dp
        return sent + communication.copy_s(copied)

    def gathered(size: int) -> float:
        received = communication.collective_s("all_gather", group, costs.element_bytes * size)
        return received + communication.copy_s(2 * costs.element_bytes * size * (1 + 1 / strategy.dp))

    reductions = 1 if strategy.zero == 1 else micro_batches
    gathers = 2 * micro_batches if strategy.zero == 3 else 1
    operators = (reductions + gathers) * costs.exchange_s(params)
    return reductions * each(reduced) + gathers * each(gathered) + operators
