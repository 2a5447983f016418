"""What to say when a call fits nowhere: how near it comes, and changes that were tried and help."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from planner.costs import Costs
from planner.memory import causes_of
from planner.options import Option, gib, smallest_variants
from realloc.augmented import Placement
from realloc.dataflow import Call
from realloc.errors import InfeasibleError
from realloc.experiment import Experiment
from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape
from realloc.strategy import Strategy, forbidden

MOST_TIMES = 64
"""Up to how many times the GPUs, or the mini-batches, are tried."""

Degrees = Sequence[tuple[Strategy, Sequence[int]]]


def infeasible_call(
    experiment: Experiment,
    call: Call,
    shape: ModelShape | None,
    degrees: Mapping[DeviceMesh, Degrees],
    costs: Costs,
    capacity_bytes: int,
) -> InfeasibleError:
    """Names the call, the numbers of its least hungry strategy, and what would make it fit.

    `degrees[mesh]`: the degrees and micro-batches that are possible on one mesh of each size.
    """
    tried = [(mesh, _least(call, mesh, found, costs)) for mesh, found in degrees.items()]
    possible = [(mesh, least) for mesh, least in tried if least is not None]
    if not possible:
        return InfeasibleError(
            f"{call.name}: no strategy is possible on any mesh: its model's heads and layers, the "
            f"{call.num_sequences(experiment.workload.sequences)} sequences of an iteration and its "
            f"{call.mini_batches} mini-batches allow none; use more sequences or fewer mini-batches."
        )
    mesh, (plain, best) = min(possible, key=lambda found: found[1][1].total_bytes)
    causes = causes_of(best.memory)
    without = ""
    if plain.strategy != best.strategy:
        without = f"{gib(plain.total_bytes)} as {plain.strategy}, and still "
    help_ = list(_helps(experiment, call, shape, max(degrees, key=lambda m: m.size), costs, capacity_bytes))
    return InfeasibleError(
        f"{call.name} fits nowhere: even {mesh} {best.strategy} needs {without}"
        f"{gib(best.total_bytes)} on each GPU ({describe_bytes(causes)}), but only "
        f"{gib(capacity_bytes)} may be used; {' or '.join(help_) or remedy(causes)}."
    )


def _least(call: Call, mesh: DeviceMesh, degrees: Degrees, costs: Costs) -> tuple[Option, Option] | None:
    """The strategy that needs least memory: of the degrees alone, and of everything."""
    plain: Option | None = None
    best: Option | None = None
    for strategy, micro_batches in degrees:
        for m in micro_batches:
            for index, variant in enumerate(smallest_variants(call, replace(strategy, micro_batches=m))):
                option = Option(variant, 0.0, costs.call_memory(call, Placement(mesh, variant)))
                if index == 0 and (plain is None or option.total_bytes < plain.total_bytes):
                    plain = option
                if best is None or option.total_bytes < best.total_bytes:
                    best = option
    return None if plain is None or best is None else (plain, best)


def _helps(
    experiment: Experiment,
    call: Call,
    shape: ModelShape | None,
    mesh: DeviceMesh,
    costs: Costs,
    capacity_bytes: int,
) -> Iterator[str]:
    """The least change of each kind that makes the call fit; none where that takes too much."""
    sequences = call.num_sequences(experiment.workload.sequences)
    for times in _doublings():
        larger = DeviceMesh(0, mesh.size * times, mesh.gpus_per_node)
        if mesh.size * times > mesh.gpus_per_node and (mesh.size * times) % mesh.gpus_per_node:
            break
        least = _fits(call, shape, larger, sequences // call.mini_batches, costs, capacity_bytes)
        if least is not None:
            need = gib(least.total_bytes)
            yield f"use {times} times the GPUs (with {least.strategy} it would need {need} there)"
            break
    for times in _doublings():
        number = call.mini_batches * times
        if (call.mini_batches == 1 and call.loss is None) or sequences // number < 1:
            break
        # under a name of its own, because costs are kept by name
        other = replace(call, name=f"{call.name} in {number}", mini_batches=number)
        least = _fits(other, shape, mesh, sequences // number, costs, capacity_bytes)
        if least is not None:
            need = gib(least.total_bytes)
            yield f"use {number} mini-batches (with {least.strategy} it would need {need})"
            break


def _doublings() -> Iterator[int]:
    times = 2
    while times <= MOST_TIMES:
        yield times
        times *= 2


def _fits(
    call: Call, shape: ModelShape | None, mesh: DeviceMesh, share: int, costs: Costs, capacity_bytes: int
) -> Option | None:
    """The least hungry strategy on the mesh, if it fits."""
    least = _least(call, mesh, list(_possible(mesh, shape, share)), costs)
    return least[1] if least is not None and least[1].total_bytes <= capacity_bytes else None


def _possible(
    mesh: DeviceMesh, shape: ModelShape | None, share: int
) -> Iterable[tuple[Strategy, Sequence[int]]]:
    """Degrees in powers of two, each with as many micro-batches as there are sequences."""
    sizes = [1 << k for k in range(mesh.size.bit_length())]
    for tp in sizes:
        for pp in sizes:
            dp = mesh.size // (tp * pp)
            strategy = Strategy(dp, tp, pp)
            fits = strategy.size == mesh.size and mesh.gpus_per_node % tp == 0 and dp <= share
            if fits and (shape is None or forbidden(strategy, shape) is None):
                yield strategy, (share // dp,)


def remedy(causes: Mapping[str, int]) -> str:
    """What to change, given the bytes by cause that do not fit."""
    resident = sum(causes.get(name, 0) for name in ("parameters", "gradients", "optimizer"))
    if 2 * resident > sum(causes.values()):
        return "use more or larger GPUs (`realloc fit` says how many), or a smaller model"
    return (
        "use more GPUs (`realloc fit` says how many), fewer sequences per iteration, shorter sequences, or "
        "more mini-batches"
    )


def describe_bytes(causes: Mapping[str, int]) -> str:
    """`optimizer 10.0 GiB, parameters 2.5 GiB`, largest first, zeros left out."""
    ordered = sorted(causes.items(), key=lambda item: -item[1])
    return ", ".join(f"{name.replace('_', ' ')} {gib(size)}" for name, size in ordered if size)
