"""What a given plan would do, searched or written by hand: seconds, memory, and where the time goes.

Prices and simulates one plan; searches nothing. `SharedRanks` groups GPUs that take part in the same
nodes, so that a thousand GPUs are described by a handful of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from cost_models.memory import CallMemory
from cost_models.model import CostModel
from cost_models.profile import load_profile
from planner.contention import call_terms, simulate_shared
from planner.memory import GpuMemory, gpu_memory
from planner.simulator import Simulation, masks_of, period_s, precedence_of
from planner.structure import Structure, steady_order
from planner.words import span
from realloc.augmented import NodeKind
from realloc.plan import ExecutionPlan

KINDS = ("compute", "communication", "bubble", "overhead")
"""What a call's seconds are spent on; waiting for others comes on top."""
_KIND_OF = {"compute": "compute", "optimizer": "compute", "bubble": "bubble", "overhead": "overhead"}


@dataclass(frozen=True)
class SharedRanks:
    """GPUs that take part in the same `nodes`, in the order in which these start."""

    ranks: tuple[int, ...]
    nodes: tuple[str, ...]

    @property
    def name(self) -> str:
        return span(self.ranks)


@dataclass(frozen=True)
class CallTime:
    """Seconds of one call. `terms` (of `cost_models.calls`) and `kinds` each sum to `seconds`.

    `waiting_s`: how long its GPUs are idle before it starts, on average. `slack_s`: how much longer it
    could take before an iteration would; 0 on the critical path.
    """

    seconds: float
    terms: Mapping[str, float]
    kinds: Mapping[str, float]
    waiting_s: float
    slack_s: float


class Assessment:
    """One priced plan, in the order in which it runs: its own, else the one derived from its graph.

    Raises InputError for an unknown device, PlanError for an illegal order.
    """

    def __init__(self, plan: ExecutionPlan, costs: CostModel | None = None) -> None:
        graph = plan.graph
        if costs is None:
            costs = CostModel(plan.experiment, graph, plan.cluster, load_profile(plan.cluster.device))
        self.costs = costs
        self.capacity_bytes = costs.memory_bytes
        self.node_s = {node.name: costs.node_s(node, plan.placements) for node in plan.augmented.nodes}
        self.order = plan.node_order
        self.plan = replace(plan, order=self.order)
        self.overlaps_loads = costs.overlaps_host_copies
        shared = simulate_shared(plan.augmented, self.node_s, self.order, costs, plan.cluster.gpus_per_node)
        self.simulation: Simulation = shared.simulation
        self.node_s = dict(shared.node_s)
        self.call_memory = {
            call.name: costs.call_memory(call, plan.placements[call.name]) for call in graph.calls
        }
        # where what runs on a GPU may be another stage or call than on the GPU before
        self._edges = {
            p.mesh.first + stage * p.strategy.dp * p.strategy.tp
            for p in plan.placements.values()
            for stage in range(p.strategy.pp + 1)
        }
        self.memory: GpuMemory = self.fullest(range(plan.cluster.num_gpus))

    def memory_on(self, gpu: int) -> Mapping[str, CallMemory]:
        """What each call needs on a GPU, by the stage that is there; elsewhere its stage that needs most."""
        found = dict(self.call_memory)
        for call in self.plan.graph.calls:
            placement = self.plan.placements[call.name]
            if gpu in placement.mesh:
                width = placement.strategy.dp * placement.strategy.tp
                stage = (gpu - placement.mesh.first) // width
                found[call.name] = self.costs.call_memory(call, placement, stage)
        return found

    def fullest(self, gpus: Sequence[int]) -> GpuMemory:
        """Of some GPUs the one that needs most."""
        plan = self.plan
        found = [
            gpu_memory(plan.graph, plan.placements, self.memory_on(gpu), gpu, self.order)
            for gpu in gpus
            if gpu in self._edges or gpu == gpus[0]
        ]
        return max(found, key=lambda item: (item.total_bytes, -item.gpu))

    @property
    def iteration_s(self) -> float:
        return self.simulation.iteration_s

    @property
    def tokens_per_s(self) -> float:
        """Prompt and response tokens."""
        work = self.plan.experiment.workload
        return work.sequences * (work.prompt.mean + work.response.mean) / max(self.iteration_s, 1e-12)

    @property
    def fits(self) -> bool:
        return self.memory.total_bytes <= self.capacity_bytes

    @property
    def idle_share(self) -> float:
        """The share of all GPUs' time in which they take part in nothing."""
        busy = sum(item.busy_s * len(item.ranks) for item in self.simulation.busy)
        return max(0.0, 1.0 - busy / (self.plan.cluster.num_gpus * max(self.iteration_s, 1e-12)))

    @property
    def unused_gpus(self) -> int:
        return self.plan.cluster.num_gpus - sum(len(shared.ranks) for shared in self.shared)

    @cached_property
    def shared(self) -> tuple[SharedRanks, ...]:
        """Every GPU that does anything, with those that do the same; by their first."""
        start = self.simulation.start_s
        position = {name: i for i, name in enumerate(self.order)}
        by_nodes: dict[tuple[str, ...], list[int]] = {}
        mine: dict[int, list[str]] = {}
        for node in self.plan.augmented.nodes:
            for rank in node.ranks:
                mine.setdefault(rank, []).append(node.name)
        for rank in sorted(mine):
            names = tuple(sorted(mine[rank], key=lambda name: (start[name], position[name])))
            by_nodes.setdefault(names, []).append(rank)
        return tuple(SharedRanks(tuple(ranks), nodes) for nodes, ranks in by_nodes.items())

    def occupies(self, name: str) -> bool:
        """Whether a node keeps its GPUs from doing anything else: all but loads on copy engines."""
        return not (self.overlaps_loads and self.plan.augmented.by_name[name].kind is NodeKind.LOAD)

    @cached_property
    def waiting_s(self) -> Mapping[str, float]:
        """Node -> seconds that its GPUs are idle before it starts, averaged over them.

        On every GPU, busy and waiting seconds of an iteration make `iteration_s`.
        """
        total: dict[str, float] = {}
        for shared in self.shared:
            nodes = [name for name in shared.nodes if self.occupies(name)]
            ends = [self.simulation.end_s[name] for name in nodes]
            for i, name in enumerate(nodes):
                # the first node of an iteration follows the last one of the iteration before
                before = ends[i - 1] - (self.iteration_s if i == 0 else 0.0)
                idle = max(0.0, self.simulation.start_s[name] - before)
                total[name] = total.get(name, 0.0) + idle * len(shared.ranks)
        ranks = {node.name: len(node.ranks) for node in self.plan.augmented.nodes}
        return {name: seconds / ranks[name] for name, seconds in total.items()}

    def call_terms(self, name: str) -> Mapping[str, float]:
        """Seconds of a call by term (of `cost_models.calls`); they sum to its `node_s`."""
        return call_terms(self.plan, self.costs, name, self.node_s[name])

    def call_time(self, name: str) -> CallTime:
        terms = self.call_terms(name)
        kinds = dict.fromkeys(KINDS, 0.0)
        for term, seconds in terms.items():
            kinds[kind_of(term)] += seconds
        return CallTime(
            seconds=self.node_s[name],
            terms={term: seconds for term, seconds in terms.items() if seconds > 0},
            kinds=kinds,
            waiting_s=self.waiting_s.get(name, 0.0),
            slack_s=self.slack_s(name),
        )

    def slack_s(self, name: str) -> float:
        """How much longer a node could take, in the same order, before an iteration would take longer."""

        def is_longer(extra_s: float) -> bool:
            node_s = {**self.node_s, name: self.node_s[name] + extra_s}
            spent = period_s(self.plan.augmented, node_s, self.order, overlaps_loads=self.overlaps_loads)
            return spent > self.iteration_s * (1 + 1e-7)

        low, high = 0.0, self.iteration_s  # beyond that the node alone takes longer
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (low, middle) if is_longer(middle) else (middle, high)
        return low if low > 1e-6 * self.iteration_s else 0.0


def ordered(plan: ExecutionPlan, costs: CostModel) -> ExecutionPlan:
    """The plan in an order such as search gives: loads ahead of time where that fits and helps."""
    graph, names = plan.augmented, plan.augmented.default_order()
    seconds = [costs.node_s(graph.by_name[name], plan.placements) for name in names]
    moves = tuple(i for i, name in enumerate(names) if graph.by_name[name].kind is NodeKind.REALLOCATE)
    structure = Structure(tuple(range(len(names))), precedence_of(graph, names), moves)
    orders = [tuple(names[i] for i in steady_order(structure, seconds, masks_of(graph, names))[1])]
    copies = any(node.kind in (NodeKind.LOAD, NodeKind.OFFLOAD) for node in graph.nodes)
    if copies:
        orders = [graph.place_copies(orders[0])]
    if copies and costs.overlaps_host_copies:
        orders.append(graph.place_copies(orders[0], ahead=True))
    found = [Assessment(replace(plan, order=order), costs) for order in orders]
    return min(found, key=lambda a: (not a.fits, a.iteration_s)).plan


def kind_of(term: str) -> str:
    """Which of KINDS a term of `cost_models.calls` belongs to."""
    return _KIND_OF.get(term, "communication")
