"""Where and how each call may run: every legal (mesh, strategy) that is worth looking at.

Decides which placements search sees, and counts what it leaves out and why. All nodes of a cluster
are alike, so seconds and bytes are asked once for each (mesh size, strategy) and hold for every
mesh of that size.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from planner.cores import on_all_cores
from planner.costs import Costs
from planner.infeasible import infeasible_call
from planner.options import FORBIDDEN, TOO_LARGE, Option, Options, thinned
from planner.permits import Permitted
from planner.rejections import Rejection, Rejections
from realloc.augmented import Placement
from realloc.backend import OWN, untrainable
from realloc.cluster import Cluster
from realloc.dataflow import Call, CallKind, DataflowGraph
from realloc.experiment import Experiment
from realloc.mesh import DeviceMesh, all_meshes
from realloc.model_shape import ModelShape
from realloc.strategy import Strategy, forbidden


@dataclass(frozen=True)
class Limits:
    """How much of a large cluster's candidates to keep.

    At most `most_meshes` meshes; `most_micro_batches` per data-parallel rank. Where the cluster
    has more than `keep_all_up_to` meshes, a call keeps on each mesh its `fastest` strategies and
    its `smallest` ones (by memory), and those that other calls of its role keep there. Of each layout
    it keeps `front` strategies, `far_front` there. `degrees_only` leaves ZeRO, sequence parallelism,
    recomputation and other schedules than 1F1B out.
    """

    most_meshes: int = 1200
    most_micro_batches: int = 64
    keep_all_up_to: int = 40
    fastest: int = 3
    smallest: int = 1
    offload_from: float = 0.5
    front: int = 4
    far_front: int = 2
    degrees_only: bool = False


@dataclass(frozen=True)
class Candidate:
    placement: Placement
    option: Option


@dataclass(frozen=True)
class CandidateSet:
    """`candidates[call name]`, fastest first."""

    candidates: Mapping[str, Sequence[Candidate]]
    rejections: tuple[Rejection, ...] = ()

    @property
    def num_plans(self) -> int:
        total = 1
        for candidates in self.candidates.values():
            total *= len(candidates)
        return total


def build_candidates(
    experiment: Experiment,
    graph: DataflowGraph,
    cluster: Cluster,
    costs: Costs,
    capacity_bytes: int,
    limits: Limits | None = None,
) -> CandidateSet:
    """The candidates of every call that fit into `capacity_bytes` on their own.

    Raises InfeasibleError when a call fits nowhere, or nowhere that the experiment's constraints allow.
    """
    limits = limits or Limits()
    rejections = Rejections()
    permitted = Permitted(experiment, graph, cluster)
    meshes = [*_meshes(graph, cluster, limits, rejections)]
    meshes += [mesh for mesh in permitted.pinned(graph) if mesh not in meshes]
    by_size: dict[int, list[DeviceMesh]] = {}
    for mesh in meshes:
        by_size.setdefault(mesh.size, []).append(mesh)
    places = _places(graph, permitted, by_size, rejections)
    options: dict[str, dict[int, list[Option]]] = {}

    def priced(call: Call) -> tuple[dict[int, list[Option]], Rejections]:
        rejected = Rejections()
        found = {
            size: _options(
                experiment, graph, call, same, costs, capacity_bytes, limits, rejected, cluster.num_gpus,
                permitted,
            )
            for size, same in places[call.name].items()
        }  # fmt: skip
        return found, rejected

    pieces = [partial(priced, call) for call in graph.calls]
    is_large = len(meshes) > limits.keep_all_up_to
    every_call = on_all_cores(pieces) if is_large else [piece() for piece in pieces]
    for call, (found, rejected) in zip(graph.calls, every_call, strict=True):
        options[call.name] = found
        rejections.join(rejected)
        if not any(options[call.name].values()):
            shape = None if call.role is None else experiment.role_shape(graph, call.role)
            every: dict[DeviceMesh, Sequence[Option]] = {}
            for same in by_size.values():
                fitting = _options(
                    experiment, graph, call, same, costs, capacity_bytes, limits, Rejections(),
                    cluster.num_gpus, None,
                )  # fmt: skip
                every |= dict.fromkeys(same, fitting)
            blamed = permitted.nothing_left(call, every, rejections.of(call, TOO_LARGE))
            if blamed is not None:
                raise blamed
            degrees = {
                same[0]: _degrees(
                    experiment, call, shape, same, limits.most_micro_batches, Rejections(), cluster.num_gpus
                )
                for same in by_size.values()
            }
            raise infeasible_call(experiment, call, shape, degrees, costs, capacity_bytes)
    if is_large:
        options = _bounded(graph, options, by_size, limits, rejections)
    forced = {call.name for call in graph.calls if permitted.needs_offload(call)}
    if forced or taken_bytes(graph, options) > limits.offload_from * capacity_bytes:
        options = _with_offload(graph, options, forced)
    candidates = {}
    for call in graph.calls:
        listed = [
            Candidate(Placement(mesh, option.strategy), option)
            for size, same in places[call.name].items()
            for option in permitted.final(call, options[call.name][size], by_size[size][0])
            for mesh in same
        ]
        candidates[call.name] = sorted(listed, key=lambda candidate: candidate.option.seconds)
    return CandidateSet(candidates, rejections.result())


def _places(
    graph: DataflowGraph,
    permitted: Permitted,
    by_size: Mapping[int, Sequence[DeviceMesh]],
    rejections: Rejections,
) -> Mapping[str, Mapping[int, Sequence[DeviceMesh]]]:
    """Call -> size -> the meshes on which constraints let it run."""
    found: dict[str, dict[int, Sequence[DeviceMesh]]] = {}
    for call in graph.calls:
        found[call.name] = {size: permitted.meshes(call, same) for size, same in by_size.items()}
        for size, same in by_size.items():
            if len(found[call.name][size]) < len(same):
                lost = [mesh for mesh in same if mesh not in found[call.name][size]]
                rejections.add(call, FORBIDDEN, len(lost), f"{lost[0]}")
    return found


def _meshes(
    graph: DataflowGraph, cluster: Cluster, limits: Limits, rejections: Rejections
) -> Sequence[DeviceMesh]:
    """All meshes; on a very large cluster, runs of nodes only where they are aligned."""
    every = all_meshes(cluster)
    if len(every) <= limits.most_meshes:
        return every
    per_node = cluster.gpus_per_node

    coarse = max(1, cluster.num_nodes // 16)

    def aligned(mesh: DeviceMesh) -> bool:
        nodes = max(1, mesh.size // per_node)
        if nodes == cluster.num_nodes:
            return True
        starts = mesh.first // per_node % coarse == 0
        return starts and (nodes % coarse == 0 or (nodes < coarse and nodes & (nodes - 1) == 0))

    kept = [mesh for mesh in every if aligned(mesh)]
    for call in graph.calls:
        rejections.add(
            call,
            "mesh not aligned to a sixteenth of the cluster (large cluster)",
            len(every) - len(kept),
            f"{len(kept)} of {len(every)} meshes kept",
        )
    return kept


def _degrees(
    experiment: Experiment,
    call: Call,
    shape: ModelShape | None,
    meshes: Sequence[DeviceMesh],
    most_micro_batches: int,
    rejections: Rejections,
    num_gpus: int,
    wanted: Sequence[int] = (),
) -> list[tuple[Strategy, list[int]]]:
    """Every legal (dp, tp, pp) of the call on meshes of one size, with the micro-batches to try.

    `wanted`: numbers of micro-batches to try besides.
    """
    mesh, count = meshes[0], len(meshes)
    backend = experiment.training_backend if call.kind is CallKind.TRAIN_STEP else OWN
    share = experiment.workload.sequences // call.together // call.mini_batches
    found: list[tuple[Strategy, list[int]]] = []
    for tp in _divisors(mesh.size):
        for pp in _divisors(mesh.size // tp):
            strategy = Strategy(dp=mesh.size // (tp * pp), tp=tp, pp=pp)
            if call.kind is CallKind.COMPUTE and strategy.dp != mesh.size:
                continue
            if mesh.gpus_per_node % tp:
                reason = "tp leaves its node"
                example = f"{strategy}: tp {tp} does not divide the {mesh.gpus_per_node} GPUs of a node"
            elif strategy.dp > share:
                reason = "dp exceeds the sequences of a mini-batch"
                example = f"{strategy}: dp {strategy.dp}, {share} sequences"
            elif shape is not None and (why := forbidden(strategy, shape)):
                reason, example = "the model cannot be split so", f"{strategy}: {why}"
            elif why := untrainable(backend, num_gpus, mesh, strategy):
                reason, example = "the training backend cannot run it", f"{strategy}: {why}"
            else:
                most = min(most_micro_batches, share // strategy.dp)
                if call.kind is CallKind.COMPUTE:
                    most = 1
                more = {m for m in wanted if m <= most}
                found.append((strategy, sorted({*_micro_batches(most, pp), *more})))
                continue
            rejections.add(call, reason, count, example)
    return found


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _micro_batches(most: int, pp: int) -> list[int]:
    """Powers of two, and whole multiples of the pipeline's depth, up to `most`."""
    powers = {1 << k for k in range(most.bit_length()) if 1 << k <= most}
    return sorted(powers | {n for n in (pp, 2 * pp, 4 * pp) if n <= most})


def _options(
    experiment: Experiment,
    graph: DataflowGraph,
    call: Call,
    meshes: Sequence[DeviceMesh],
    costs: Costs,
    capacity_bytes: int,
    limits: Limits,
    rejections: Rejections,
    num_gpus: int,
    permitted: Permitted | None,
) -> list[Option]:
    """Strategies that fit on their own, a few of each layout. `permitted` None: whatever constraints say."""
    if not meshes:
        return []
    shape = None if call.role is None else experiment.role_shape(graph, call.role)

    def reject(reason: str, example: Callable[[], str]) -> None:
        rejections.count(call, reason, len(meshes), example)

    permits = None if permitted is None else permitted.strategies(call, meshes[0])
    wanted = () if permitted is None else permitted.micro_batches(call)
    options = Options(call, meshes[0], costs, capacity_bytes, limits.front, reject, permits)
    degrees = _degrees(
        experiment, call, shape, meshes, limits.most_micro_batches, rejections, num_gpus, wanted
    )
    if limits.degrees_only or call.role is None:
        return [option for strategy, number in degrees for option in options.plain(strategy, number)]
    return options.of(degrees, shape)


def _bounded(
    graph: DataflowGraph,
    options: Mapping[str, Mapping[int, Sequence[Option]]],
    by_size: Mapping[int, Sequence[DeviceMesh]],
    limits: Limits,
    rejections: Rejections,
) -> dict[str, dict[int, list[Option]]]:
    """Keeps few strategies for each mesh: see `Limits`."""

    def degrees(option: Option) -> tuple[int, int, int]:
        return option.strategy.dp, option.strategy.tp, option.strategy.pp

    def layout(option: Option) -> tuple[int, bool]:
        return option.strategy.virtual_stages, option.strategy.zero == 3

    result: dict[str, dict[int, list[Option]]] = {call.name: {} for call in graph.calls}
    for size, meshes in by_size.items():
        chosen: dict[str, set[tuple[int, int, int]]] = {}
        for call in graph.calls:
            every = options[call.name][size]
            fast: dict[tuple[int, int, int], None] = {}
            for option in sorted(every, key=lambda o: o.seconds):
                if len(fast) < limits.fastest:
                    fast[degrees(option)] = None
            small = sorted(every, key=lambda o: (o.total_bytes, o.seconds))[: limits.smallest]
            group = call.role or call.name
            chosen.setdefault(group, set()).update(fast, map(degrees, small))
        for call in graph.calls:
            every = options[call.name][size]
            wanted = chosen[call.role or call.name]
            kept: list[Option] = []
            for key in sorted(wanted):
                here = [option for option in every if degrees(option) == key]
                for other in dict.fromkeys(map(layout, here)):
                    same = [option for option in here if layout(option) == other]
                    kept += thinned(same, limits.far_front)
            result[call.name][size] = kept
            if len(kept) < len(every):
                rejections.add(
                    call,
                    "slower than others on the same mesh (large cluster)",
                    (len(every) - len(kept)) * len(meshes),
                    f"{len(kept)} of {len(every)} strategies kept on meshes of {size}",
                )
    return result


def taken_bytes(graph: DataflowGraph, options: Mapping[str, Mapping[int, Sequence[Option]]]) -> int:
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


def _with_offload(
    graph: DataflowGraph, options: Mapping[str, Mapping[int, Sequence[Option]]], forced: Container[str] = ()
) -> dict[str, dict[int, list[Option]]]:
    """Every option of frozen, trained and generating roles' calls also with offload, after those without.

    The variants need as much memory while their call runs, and less while others do. Their copies
    have a price of their own, as nodes.
    """
    result: dict[str, dict[int, list[Option]]] = {}
    for call in graph.calls:
        frozen = call.role is not None and graph.trainer(call.role) is None
        if call.role is not None and graph.average(call.role) is not None:
            result[call.name] = {size: list(same) for size, same in options[call.name].items()}
            continue
        useful = frozen or call.kind in (CallKind.TRAIN_STEP, CallKind.GENERATE) or call.name in forced
        result[call.name] = {
            size: [*same, *(replace(o, strategy=replace(o.strategy, offload=True)) for o in same if useful)]
            for size, same in options[call.name].items()
        }
    return result
