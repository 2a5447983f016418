"""The one door to costs: seconds and bytes of everything that happens in an iteration.

It prices the nodes of augmented graphs and nothing else. Results are kept by what they depend on,
so that a search may ask again and again; meshes of equal form share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from cost_models.calls import CallPricer
from cost_models.communication import Communication
from cost_models.compute import ComputeCosts
from cost_models.measured import compute_costs
from cost_models.memory import CallMemory, call_memory
from cost_models.move_bounds import least_reallocate_s
from cost_models.moves import reallocate_s, selection_s, transfer_s
from cost_models.profile import HardwareProfile
from cost_models.sources import Found, describe, message_sources, move_sources, neighbour_sources
from realloc.augmented import Node, NodeKind, Placement, copied_causes
from realloc.cluster import Cluster
from realloc.dataflow import Call, CallKind, DataflowGraph
from realloc.experiment import Experiment
from realloc.mesh import DeviceMesh
from realloc.model_shape import DTYPE_BYTES, ModelShape
from realloc.strategy import Strategy


@dataclass(frozen=True)
class _Priced:
    terms: Mapping[str, float]
    seconds: float


class CostModel:
    """Costs of an experiment's calls, reallocations and transfers on a cluster.

    Raises InputError when the profile lacks the experiment's dtype.
    """

    def __init__(
        self,
        experiment: Experiment,
        graph: DataflowGraph,
        cluster: Cluster,
        profile: HardwareProfile,
    ) -> None:
        profile.matmul_curve(experiment.dtype)
        self.experiment = experiment
        self.graph = graph
        self.cluster = cluster
        self.profile = profile
        self._element_bytes = DTYPE_BYTES[experiment.dtype]
        self._shapes = {role: experiment.role_shape(graph, role) for role in graph.roles}
        self._compute: dict[tuple[str | None, int, int], ComputeCosts] = {}
        self._calls: dict[tuple[str, Strategy, int, int], _Priced] = {}
        self._communications: dict[tuple[int, int], Communication] = {}
        self._memory: dict[tuple[str, Strategy, int | None], CallMemory] = {}
        self._moves: dict[tuple[object, ...], float] = {}

    @property
    def provenance(self) -> str:
        """Where the costs come from, such as `analytic (h100-sxm)`."""
        return str(self.profile)

    @property
    def memory_bytes(self) -> int:
        """Memory of one device that may be used: the cluster's figure, else what the profile leaves."""
        return self.cluster.memory_bytes or self.profile.memory_bytes - self.profile.reserved_bytes

    def shape(self, role: str) -> ModelShape:
        """The shape of a role with the head that its calls need."""
        return self._shapes[role]

    def call_s(self, call: Call, placement: Placement) -> float:
        """Seconds of one call."""
        return self._priced(call, placement).seconds

    def call_terms(self, call: Call, placement: Placement) -> Mapping[str, float]:
        """Seconds of one call by cause (`cost_models.calls.TERMS`); they sum to `call_s`."""
        return self._priced(call, placement).terms

    def call_sources(self, call: Call, placement: Placement) -> str:
        """What stands behind the seconds of a call: measured, extrapolated or analytic, and of what."""
        if call.role is None:
            return "analytic: Python functions"
        strategy, mesh = placement.strategy, placement.mesh
        # fresh, so that they have been asked for this call alone
        shape, busy = self._shapes[call.role], self._busy(mesh)
        costs = compute_costs(self.profile, shape, self.experiment.dtype, strategy.tp, busy)
        links, work = Communication(self.profile, mesh), self.experiment.workload
        CallPricer(self.profile, costs, mesh, strategy, work, links, self.experiment.mixed).terms(call)
        beside: list[Found] = []
        if self.profile.provenance.source == "measured":
            beside += message_sources(self.profile, links, mesh, stages=strategy.pp > 1)
            beside += neighbour_sources(self.profile, self.cluster.gpus_per_node)
        return describe([*costs.found, *beside])

    def move_sources(self, nodes: Iterable[Node]) -> Mapping[str, str]:
        """The same for what lies between calls, by kind of node; empty where the profile is analytic."""
        if self.profile.provenance.source != "measured":
            return {}
        across: dict[NodeKind, bool] = {}
        for node in (node for node in nodes if node.call is None):
            hosts = {rank // self.cluster.gpus_per_node for rank in node.ranks}
            across[node.kind] = across.get(node.kind, False) or len(hosts) > 1
        return {str(kind): describe(move_sources(self.profile, kind, far)) for kind, far in across.items()}

    def transfer_s(self, keys: tuple[str, ...], src: Placement, dst: Placement) -> float:
        """Seconds to bring data keys from where `src` wrote them to where `dst` reads them, each time."""
        cache_key = (keys, src, dst)
        if cache_key not in self._moves:
            sequences, size = self.experiment.workload.sequences, self._sequence_bytes(keys)
            seconds = transfer_s(self.profile, sequences, size, len(keys), src, dst)
            self._moves[cache_key] = seconds * self._factor(NodeKind.TRANSFER)
        return self._moves[cache_key]

    def _sequence_bytes(self, keys: tuple[str, ...]) -> float:
        """Bytes that a sequence of mean length has of these keys."""
        found = [self.graph.key[key] for key in keys]
        return sum(self.experiment.mean_elements(key.per) * key.bytes_per_element for key in found)

    def reallocate_s(self, role: str, src: Placement, dst: Placement) -> float:
        """Seconds to bring a role's parameters from the layout of `src` to that of `dst`."""
        key = (role, src.layout_key, dst.layout_key)
        if key not in self._moves:
            near_src, near_dst = _moved_to_front(src, dst)
            alike = (self._shapes[role], near_src.layout_key, near_dst.layout_key)
            if alike not in self._moves:
                seconds = reallocate_s(
                    self.profile, self._shapes[role], self._element_bytes, near_src, near_dst
                )
                self._moves[alike] = seconds * self._factor(NodeKind.REALLOCATE)
            self._moves[key] = self._moves[alike] + self._mixing_s(role, dst)
        return self._moves[key]

    def _mixing_s(self, role: str, dst: Placement) -> float:
        """Seconds to put a moving average's news beside it and to mix them in: five passes over memory."""
        if self.graph.average(role) is None:
            return 0.0
        held = self.call_memory(self.graph.calls_of(role)[0], dst).parameters / 2
        ranks = min(dst.mesh.size, dst.mesh.gpus_per_node)
        return self.profile.copy_s(5 * held, ranks)

    def least_reallocate_s(self, role: str, src: Placement, dst: Placement, *, anywhere: bool) -> float:
        """At most `reallocate_s`; `anywhere`: wherever meshes of these sizes lie."""
        shape, size = self._shapes[role], self._element_bytes
        seconds = least_reallocate_s(self.profile, shape, size, src, dst, anywhere=anywhere)
        return seconds * self._factor(NodeKind.REALLOCATE)

    @property
    def shares_cores(self) -> bool:
        """Whether ranks of one host slow each other down."""
        return self.profile.slowdown(self.cluster.gpus_per_node) > 1.0

    def slowdown_beside(self, own: int, busy: float) -> float:
        """How much longer a call with `own` ranks on a host takes while `busy` ranks compute there."""
        return max(1.0, self.profile.slowdown(busy) / self.profile.slowdown(own))

    @property
    def overlaps_host_copies(self) -> bool:
        """Whether loads from host memory run beside calls."""
        return self.profile.overlaps_host_copies

    def host_copy_s(self, call: Call, placement: Placement, causes: tuple[str, ...]) -> float:
        """Seconds to copy what a call keeps (`causes` of its memory) between device and host memory."""
        memory, mesh = self.call_memory(call, placement), placement.mesh
        size = sum(int(getattr(memory, cause)) for cause in causes)
        shared = self.profile.slowdown(min(mesh.size, mesh.gpus_per_node))
        return size / self.profile.host_bytes_per_s * shared * self._factor(NodeKind.LOAD)

    def _factor(self, kind: NodeKind) -> float:
        """What a calibrated profile has found of what lies between calls."""
        return 1.0 if self.profile.calibration is None else self.profile.calibration.of_node(kind)

    def node_s(self, node: Node, placements: Mapping[str, Placement]) -> float:
        """Seconds of one node of an augmented graph under the placements that imply it."""
        if node.kind is NodeKind.CALL:
            assert node.call is not None
            return self.call_s(self.graph.by_name[node.call], placements[node.call])
        if node.kind in (NodeKind.LOAD, NodeKind.OFFLOAD):
            name = str(node.dst or node.src)
            return self.host_copy_s(
                self.graph.by_name[name], placements[name], copied_causes(self.graph, node)
            )
        assert node.src is not None
        assert node.dst is not None
        src, dst = placements[node.src], placements[node.dst]
        if node.kind is NodeKind.TRANSFER:
            seconds = self.transfer_s(self.graph.values_read(node.dst, node.keys), src, dst)
            return self.graph.by_name[node.dst].share_of(seconds)
        assert node.role is not None
        return self.reallocate_s(node.role, src, dst)

    def call_memory(self, call: Call, placement: Placement, stage: int | None = None) -> CallMemory:
        """Bytes of a rank of a pipeline stage; None: of the rank that needs most for the call."""
        key = (call.name, placement.strategy, stage)
        if key not in self._memory:
            self._memory[key] = (
                CallMemory()
                if call.kind is CallKind.COMPUTE
                else call_memory(
                    self._costs(call.role, placement.strategy.tp),
                    placement.strategy,
                    self.experiment.workload,
                    call,
                    self.experiment.mixed,
                    reallocates=self._reallocates(call.role),
                    stage=stage,
                )
            )
            if call.role is not None and self.graph.average(call.role) is not None:
                # what is mixed in lies beside it
                memory = self._memory[key]
                self._memory[key] = replace(memory, parameters=2 * memory.parameters)
        return self._memory[key]

    def _reallocates(self, role: str | None) -> bool:
        """Whether parameters of the role may have to change their layout within an iteration."""
        return (
            role is not None
            and self.graph.maker(role) is not None
            and (len(self.graph.calls_of(role)) > 1 or self.graph.average(role) is not None)
        )

    def _priced(self, call: Call, placement: Placement) -> _Priced:
        mesh, strategy = placement.mesh, placement.strategy
        # only the form of the mesh matters: its size and where on a node it starts
        key = (call.name, strategy, mesh.size, mesh.first % mesh.gpus_per_node)
        if key not in self._calls:
            costs = self._costs(call.role, strategy.tp, self._busy(mesh))
            form = (mesh.size, mesh.first % mesh.gpus_per_node)
            if form not in self._communications:
                self._communications[form] = Communication(self.profile, mesh)
            workload = self.experiment.workload
            links, mixed = self._communications[form], self.experiment.mixed
            pricer = CallPricer(self.profile, costs, mesh, strategy, workload, links, mixed)
            terms = dict(pricer.terms(call))
            if call.select is not None:
                size = self._sequence_bytes(call.reads)
                terms["dp_communication"] += selection_s(
                    links, self.profile, call, workload.sequences, size, placement
                )
            if self.profile.calibration is not None:
                terms = dict(self.profile.calibration.terms(call.kind, terms))
            terms = {term: call.share_of(seconds) for term, seconds in terms.items()}
            self._calls[key] = _Priced(terms, sum(terms.values()))
        return self._calls[key]

    def _busy(self, mesh: DeviceMesh) -> int:
        """Ranks of a host that compute at once, where that makes a difference."""
        return min(mesh.size, mesh.gpus_per_node) if self.profile.concurrency is not None else 1

    def _costs(self, role: str | None, tp: int, busy: int = 1) -> ComputeCosts:
        key = (role, tp, busy)
        if key not in self._compute:
            # a compute call has no model: any shape will do, none of its numbers are used
            shape = self._shapes[role] if role is not None else next(iter(self._shapes.values()))
            self._compute[key] = compute_costs(self.profile, shape, self.experiment.dtype, tp, busy)
        return self._compute[key]


def _moved_to_front(src: Placement, dst: Placement) -> tuple[Placement, Placement]:
    """Both placements as near to GPU 0 as leaves their nodes the same: they cost as much there."""
    per_node = src.mesh.gpus_per_node
    first = min(src.mesh.first, dst.mesh.first)
    last = max(src.mesh.ranks[-1], dst.mesh.ranks[-1])
    shift = first if first // per_node == last // per_node else first - first % per_node

    def moved(p: Placement) -> Placement:
        return Placement(DeviceMesh(p.mesh.first - shift, p.mesh.size, per_node), p.strategy)

    return moved(src), moved(dst)
