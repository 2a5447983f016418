"""Which of a call's strategies search looks at on every mesh: all, or few where a cluster has many meshes.

What is left out here is not forgotten: `SearchResult.bound_of_all_s` counts it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from planner.options import Option, thinned
from planner.rejections import Rejections
from realloc.dataflow import CallKind, DataflowGraph
from realloc.mesh import DeviceMesh

BySize = Mapping[int, Sequence[Option]]


@dataclass(frozen=True)
class Limits:
    """How much of a large cluster's candidates to keep.

    At most `most_meshes` meshes; `most_micro_batches` per data-parallel rank. Where the cluster
    has more than `keep_all_up_to` meshes, a call keeps on each mesh its `fastest` strategies and
    its `smallest` ones (by memory), and those that other calls of its role keep there; of each layout
    it keeps `far_front` strategies instead of `front`, and of `most_degrees` degrees more than the
    simplest strategies are looked at. `degrees_only` leaves ZeRO, sequence parallelism, recomputation
    and other schedules than 1F1B out.
    """

    most_meshes: int = 1200
    most_micro_batches: int = 64
    keep_all_up_to: int = 40
    fastest: int = 3
    smallest: int = 1
    offload_from: float = 0.5
    front: int = 4
    far_front: int = 2
    most_degrees: int = 8
    degrees_only: bool = False


def kept_of(
    graph: DataflowGraph,
    options: Mapping[str, BySize],
    by_size: Mapping[int, Sequence[DeviceMesh]],
    limits: Limits,
    rejections: Rejections,
) -> dict[str, dict[int, list[Option]]]:
    """Few strategies for each mesh: see `Limits`."""
    result: dict[str, dict[int, list[Option]]] = {call.name: {} for call in graph.calls}
    for size, meshes in by_size.items():
        chosen: dict[str, set[tuple[int, int, int]]] = {}
        for call in graph.calls:
            chosen.setdefault(call.role or call.name, set()).update(_best(options[call.name][size], limits))
        for call in graph.calls:
            every = options[call.name][size]
            kept = _front(every, chosen[call.role or call.name], limits)
            result[call.name][size] = kept
            if len(kept) < len(every):
                rejections.add(
                    call,
                    "slower than others on the same mesh (large cluster; the second bound counts it)",
                    (len(every) - len(kept)) * len(meshes),
                    f"{len(kept)} of {len(every)} strategies kept on meshes of {size}",
                )
    return result


def _degrees(option: Option) -> tuple[int, int, int]:
    return option.strategy.dp, option.strategy.tp, option.strategy.pp


def _best(every: Sequence[Option], limits: Limits) -> set[tuple[int, int, int]]:
    """The degrees of the fastest and of the smallest options."""
    fast = list(dict.fromkeys(_degrees(option) for option in sorted(every, key=lambda o: o.seconds)))
    small = sorted(every, key=lambda o: (o.total_bytes, o.seconds))[: limits.smallest]
    return {*fast[: limits.fastest], *map(_degrees, small)}


def _front(every: Sequence[Option], wanted: set[tuple[int, int, int]], limits: Limits) -> list[Option]:
    """Of each layout with the wanted degrees, a few options."""
    kept: list[Option] = []
    for key in sorted(wanted):
        layouts: dict[tuple[int, bool], list[Option]] = {}
        for option in every:
            if _degrees(option) == key:
                strategy = option.strategy
                layouts.setdefault((strategy.virtual_stages, strategy.zero == 3), []).append(option)
        for same in layouts.values():
            kept += thinned(same, limits.far_front)
    return kept


def taken_bytes(graph: DataflowGraph, options: Mapping[str, BySize]) -> int:
    """Bytes on a GPU that runs all calls, each at the option that keeps least there.

    What stays, and the least that any call works with. Where that is little, there is room for the
    copies that plans want, and offloading, which only costs time, is not worth a search among
    twice as many candidates.
    """
    resident: dict[str, int] = {}
    working = 0
    for call in graph.calls:
        every = [option for same in options[call.name].values() for option in same]
        working = max(working, min(option.working_bytes for option in every))
        if call.role is not None:
            # a role's calls may share one copy
            kept = min(option.total_bytes - option.working_bytes for option in every)
            resident[call.role] = max(resident.get(call.role, 0), kept)
    return sum(resident.values()) + working


def with_offload(
    graph: DataflowGraph, options: Mapping[str, BySize], forced: Container[str] = ()
) -> dict[str, dict[int, list[Option]]]:
    """Every option of frozen, trained and generating roles' calls also with offload, after those without.

    The variants need as much memory while their call runs, and less while others do. Their copies
    have a price of their own, as nodes.
    """
    result: dict[str, dict[int, list[Option]]] = {}
    for call in graph.calls:
        if call.role is not None and graph.average(call.role) is not None:
            result[call.name] = {size: list(same) for size, same in options[call.name].items()}
            continue
        frozen = call.role is not None and graph.trainer(call.role) is None
        useful = frozen or call.kind in (CallKind.TRAIN_STEP, CallKind.GENERATE) or call.name in forced
        result[call.name] = {
            size: [*same, *(replace(o, strategy=replace(o.strategy, offload=True)) for o in same if useful)]
            for size, same in options[call.name].items()
        }
    return result
