"""Where and how each call may run: every legal (mesh, strategy) that is worth looking at.

Decides which placements search sees, and counts what it leaves out and why. All nodes of a cluster
are alike, so seconds and bytes are asked once for each (mesh size, strategy) and hold for every
mesh of that size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from planner.cores import on_all_cores
from planner.costs import Costs
from planner.infeasible import infeasible_call
from planner.keeping import Limits, kept_of, taken_bytes, with_offload
from planner.options import FORBIDDEN, TOO_LARGE, Option, Options
from planner.permits import Permitted
from planner.rejections import Rejection, Rejections
from realloc.augmented import Placement
from realloc.backend import OWN, untrainable
from realloc.cluster import Cluster
from realloc.dataflow import Call, CallKind, DataflowGraph
from realloc.errors import InfeasibleError
from realloc.experiment import Experiment
from realloc.mesh import DeviceMesh, all_meshes
from realloc.model_shape import ModelShape
from realloc.strategy import Strategy, forbidden

FORK_FROM_GPUS = 12
"""Fewer GPUs have so few strategies that a second process takes longer to start than it saves."""


@dataclass(frozen=True)
class Candidate:
    placement: Placement
    option: Option


@dataclass(frozen=True)
class CandidateSet:
    """`candidates[call name]`, fastest first.

    `others[call name]`: what else would fit but is not looked at, because the cluster is large. Each
    stands for the same strategy on every mesh of that size.
    """

    candidates: Mapping[str, Sequence[Candidate]]
    rejections: tuple[Rejection, ...] = ()
    others: Mapping[str, Sequence[Candidate]] = field(default_factory=dict)

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
    return _Builder(experiment, graph, cluster, costs, capacity_bytes, limits or Limits()).built()


Places = Mapping[str, Mapping[int, Sequence[DeviceMesh]]]
"""Call -> size -> the meshes on which constraints let it run."""


class _Builder:
    """Candidates of one experiment, once."""

    def __init__(
        self,
        experiment: Experiment,
        graph: DataflowGraph,
        cluster: Cluster,
        costs: Costs,
        capacity_bytes: int,
        limits: Limits,
    ) -> None:
        self._experiment, self._graph, self._cluster = experiment, graph, cluster
        self._costs, self._capacity, self._limits = costs, capacity_bytes, limits
        self._rejections = Rejections()
        self._permitted = Permitted(experiment, graph, cluster)
        meshes = [*_meshes(graph, cluster, limits, self._rejections)]
        meshes += [mesh for mesh in self._permitted.pinned(graph) if mesh not in meshes]
        self._is_large = len(meshes) > limits.keep_all_up_to
        self._by_size: dict[int, list[DeviceMesh]] = {}
        for mesh in meshes:
            self._by_size.setdefault(mesh.size, []).append(mesh)

    def built(self) -> CandidateSet:
        graph = self._graph
        places = _places(graph, self._permitted, self._by_size, self._rejections)
        every = self._every_option(places)
        kept = every
        if self._is_large:
            kept = kept_of(graph, every, self._by_size, self._limits, self._rejections)
        forced = {call.name for call in graph.calls if self._permitted.needs_offload(call)}
        if forced or taken_bytes(graph, kept) > self._limits.offload_from * self._capacity:
            kept, every = with_offload(graph, kept, forced), with_offload(graph, every, forced)
        candidates = self._placed(places, kept)
        others: Mapping[str, Sequence[Candidate]] = {}
        if self._is_large:
            left_out = {
                name: {
                    size: [o for o in options if o.strategy not in {k.strategy for k in kept[name][size]}]
                    for size, options in sizes.items()
                }
                for name, sizes in every.items()
            }
            firsts = {
                name: {size: meshes[:1] for size, meshes in sizes.items()} for name, sizes in places.items()
            }
            others = self._placed(firsts, left_out)
        return CandidateSet(candidates, self._rejections.result(), others)

    def _every_option(self, places: Places) -> dict[str, dict[int, list[Option]]]:
        """Of every call and size what fits, calls on all cores where there is much to do."""
        calls = self._graph.calls
        pieces = [partial(self._of_call, call, places[call.name]) for call in calls]
        on_cores = self._cluster.num_gpus >= FORK_FROM_GPUS and not self._limits.degrees_only
        every_call = on_all_cores(pieces) if on_cores else [piece() for piece in pieces]
        found = {}
        for call, (options, rejected) in zip(calls, every_call, strict=True):
            self._rejections.join(rejected)
            if not any(options.values()):
                raise self._nothing_fits(call)
            found[call.name] = options
        return found

    def _of_call(
        self, call: Call, places: Mapping[int, Sequence[DeviceMesh]]
    ) -> tuple[dict[int, list[Option]], Rejections]:
        rejected = Rejections()
        found = {
            size: self._options(call, meshes, rejected, self._permitted) for size, meshes in places.items()
        }
        return found, rejected

    def _shape(self, call: Call) -> ModelShape | None:
        return None if call.role is None else self._experiment.role_shape(self._graph, call.role)

    def _options(
        self, call: Call, meshes: Sequence[DeviceMesh], rejections: Rejections, permitted: Permitted | None
    ) -> list[Option]:
        """What fits on its own, a few of each layout. `permitted` None: whatever constraints say."""
        if not meshes:
            return []
        limits = self._limits

        def reject(reason: str, example: Callable[[], str]) -> None:
            rejections.count(call, reason, len(meshes), example)

        permits = None if permitted is None else permitted.strategies(call, meshes[0])
        wanted = () if permitted is None else permitted.micro_batches(call)
        most_degrees = limits.most_degrees if self._is_large else None
        options = Options(
            call, meshes[0], self._costs, self._capacity, limits.front, reject, permits, most_degrees
        )
        degrees = self._degrees(call, meshes, rejections, wanted)
        if limits.degrees_only or call.role is None:
            return [option for strategy, number in degrees for option in options.plain(strategy, number)]
        return options.of(degrees, self._shape(call))

    def _degrees(
        self, call: Call, meshes: Sequence[DeviceMesh], rejections: Rejections, wanted: Sequence[int] = ()
    ) -> list[tuple[Strategy, list[int]]]:
        return _degrees(
            self._experiment,
            call,
            self._shape(call),
            meshes,
            self._limits.most_micro_batches,
            rejections,
            self._cluster.num_gpus,
            wanted,
        )

    def _nothing_fits(self, call: Call) -> InfeasibleError:
        """Constraints are to blame, or memory."""
        every: dict[DeviceMesh, Sequence[Option]] = {}
        for same in self._by_size.values():
            every |= dict.fromkeys(same, self._options(call, same, Rejections(), None))
        blamed = self._permitted.nothing_left(call, every, self._rejections.of(call, TOO_LARGE))
        if blamed is not None:
            return blamed
        degrees = {same[0]: self._degrees(call, same, Rejections()) for same in self._by_size.values()}
        return infeasible_call(
            self._experiment, call, self._shape(call), degrees, self._costs, self._capacity
        )

    def _placed(
        self, places: Places, options: Mapping[str, Mapping[int, Sequence[Option]]]
    ) -> dict[str, list[Candidate]]:
        """The options that constraints permit as they are, on all these meshes, fastest first."""
        found = {}
        for call in self._graph.calls:
            listed = [
                Candidate(Placement(mesh, option.strategy), option)
                for size, same in places[call.name].items()
                for option in self._permitted.final(call, options[call.name][size], self._by_size[size][0])
                for mesh in same
            ]
            found[call.name] = sorted(listed, key=lambda candidate: candidate.option.seconds)
        return found


def _places(
    graph: DataflowGraph,
    permitted: Permitted,
    by_size: Mapping[int, Sequence[DeviceMesh]],
    rejections: Rejections,
) -> Places:
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
    worked = call.num_sequences(experiment.workload.sequences)
    share = worked // call.together // call.mini_batches
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
