"""Augmented graphs: the calls of one iteration plus what a plan implies between them.

The planner prices these nodes, the runtime executes them, the trace reports them. Nothing else
happens in an iteration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

import networkx as nx

from realloc.dataflow import Call, CallKind, DataflowGraph
from realloc.errors import PlanError
from realloc.mesh import DeviceMesh
from realloc.strategy import Strategy


@dataclass(frozen=True)
class Placement:
    """Where and how one call runs."""

    mesh: DeviceMesh
    strategy: Strategy

    @property
    def layout_key(self) -> tuple[DeviceMesh, int, int, int, int, bool]:
        """Placements with equal keys hold a role's parameters in the same places."""
        s = self.strategy
        return (self.mesh, s.dp, s.tp, s.pp, s.virtual_stages, s.zero == 3)

    def __str__(self) -> str:
        return f"{self.mesh} {self.strategy}"


class NodeKind(StrEnum):
    CALL = "call"
    TRANSFER = "transfer"
    REALLOCATE = "reallocate"
    LOAD = "load"
    OFFLOAD = "offload"


_COPIES = (NodeKind.LOAD, NodeKind.OFFLOAD)
PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer"
"""What of a role can be absent from the device between its uses."""


@dataclass(frozen=True)
class Node:
    """One node. It occupies all of its `ranks` while it runs.

    call: `call` runs. transfer: `keys` go from where `src` wrote them to where `dst` reads them.
    reallocate: the parameters of `role` go from the layout of call `src` (which trained them) to
    that of call `dst`; of a moving average, those of the role that `src` trained, and are mixed in.
    load: `keys` (PARAMETERS, ...) of `role` come to the device, for call `dst`.
    offload: they leave it again; `src` is the call that used them.
    `every`: it is of evaluation and runs in each so many-th iteration only; 0: in all of them.
    """

    name: str
    kind: NodeKind
    ranks: tuple[int, ...]
    call: str | None = None
    src: str | None = None
    dst: str | None = None
    role: str | None = None
    keys: tuple[str, ...] = ()
    every: int = 0

    def runs_in(self, iteration: int) -> bool:
        return iteration % max(1, self.every) == 0


@dataclass(frozen=True)
class Edge:
    """`dst` of iteration t + lag starts after `src` of iteration t has ended."""

    src: str
    dst: str
    lag: int = 0


@dataclass(frozen=True)
class AugmentedGraph:
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        return {node.name: node for node in self.nodes}

    def predecessors(self, name: str) -> tuple[Edge, ...]:
        return self._incoming.get(name, ())

    @cached_property
    def _incoming(self) -> Mapping[str, tuple[Edge, ...]]:
        incoming: dict[str, tuple[Edge, ...]] = {}
        for edge in self.edges:
            incoming[edge.dst] = (*incoming.get(edge.dst, ()), edge)
        return incoming

    def default_order(self) -> tuple[str, ...]:
        """A topological order of one iteration, as close to `nodes` as the edges allow.

        Transfers come as soon as their data are there: one that came after a call on other ranks would
        make its own ranks wait for that call.
        """
        return self._default_order

    @cached_property
    def _default_order(self) -> tuple[str, ...]:
        # without loads and offloads first: where things wait does not change what runs when
        fixed = {node.name: i for i, node in enumerate(self.nodes) if node.kind not in _COPIES}
        within: nx.DiGraph[str] = nx.DiGraph()
        within.add_nodes_from(fixed)
        within.add_edges_from(
            (edge.src, edge.dst)
            for edge in self.edges
            if edge.lag == 0 and edge.src in fixed and edge.dst in fixed
        )
        transfers = {node.name for node in self.nodes if node.kind is NodeKind.TRANSFER}
        place = {name: (-1 if name in transfers else i, i) for name, i in fixed.items()}
        # a copy that leaves once it is read is read at once, unless that brings another one
        for edge in self.edges:
            node = self.by_name[edge.src]
            if node.kind is NodeKind.REALLOCATE and self.by_name[edge.dst].kind is NodeKind.OFFLOAD:
                before = (self.by_name[e.src].kind for e in self.predecessors(node.name))
                if NodeKind.OFFLOAD not in before:
                    place[node.name] = (fixed[str(node.src)], len(fixed))
        return self.place_copies(nx.lexicographical_topological_sort(within, key=place.__getitem__))

    def place_copies(self, order: Iterable[str], ahead: bool = False) -> tuple[str, ...]:
        """The order with every load right before the first node that waits for it, and every offload
        right after the last node that it waits for: nothing is on the device for longer than needed.

        `ahead`: loads come one call earlier on their ranks, so that they overlap with that call.
        """
        fixed = [name for name in order if self.by_name[name].kind not in _COPIES]
        if len(fixed) == len(self.nodes):
            return tuple(fixed)
        position = {name: i for i, name in enumerate(fixed)}
        before: dict[int, list[str]] = {}
        after: dict[int, list[str]] = {}
        for node in self.nodes:
            if node.kind is NodeKind.LOAD:
                at = min(position[edge.dst] for edge in self.edges if edge.src == node.name)
                at = self._call_before(fixed, at, node.ranks) if ahead else at
                before.setdefault(at, []).append(node.name)
            elif node.kind is NodeKind.OFFLOAD:
                edges = self.predecessors(node.name)
                after.setdefault(max(position[edge.src] for edge in edges), []).append(node.name)
        placed: list[str] = []
        for i, name in enumerate(fixed):
            placed += [*before.get(i, ()), name, *after.get(i, ())]
        return tuple(placed)

    def _call_before(self, order: Sequence[str], at: int, ranks: Sequence[int]) -> int:
        """Where the last call before `at` stands that runs on some of the ranks; `at` without one."""
        for i in range(at - 1, -1, -1):
            node = self.by_name[order[i]]
            if node.kind is NodeKind.CALL and not set(ranks).isdisjoint(node.ranks):
                return i
        return at

    def check_order(self, order: Sequence[str], where: str) -> None:
        """Raises PlanError unless `order` holds every node once, each after what it waits for."""
        position = {name: i for i, name in enumerate(order)}
        problems = [f"lacks '{node.name}'" for node in self.nodes if node.name not in position]
        problems += [f"has the unknown node '{name}'" for name in order if name not in self.by_name]
        problems += ["has a node twice"] if len(position) != len(order) else []
        if problems:
            raise PlanError(
                f"{where}: the order {problems[0]}; delete the key to have it derived from the plan."
            )
        for edge in self.edges:
            if edge.lag == 0 and position[edge.src] > position[edge.dst]:
                raise PlanError(
                    f"{where}: the order runs {edge.dst} before {edge.src}, which it waits for; "
                    f"delete the key to have it derived from the plan."
                )


def home_call(graph: DataflowGraph, role: str) -> Call:
    """The call whose layout is the role's home: its train_step, else its first call.

    The home layout of a trainable role holds the optimizer state and is where checkpoints are
    written from.
    """
    return graph.trainer(role) or graph.calls_of(role)[0]


def reallocation_name(role: str, dst: str) -> str:
    return f"reallocate:{role}:{dst}"


def transfer_name(src: str, dst: str) -> str:
    return f"transfer:{src}:{dst}"


def load_name(role: str, call: str) -> str:
    return f"load:{role}:{call}"


def offload_name(role: str, call: str, part: str = "") -> str:
    return f"offload:{role}:{call}" + (f":{part}" if part else "")


@dataclass(frozen=True)
class Residence:
    """`causes` of `role` are on the device of `call`'s ranks from node `first` to node `last` only.

    `first` is a load, or the reallocation that fills the copy; `last` is an offload. Where `last`
    comes before `first` in an iteration's order, they are there around its end. `calls` use them.
    `is_kept`: what they hold is needed again, so that `last` copies it to the host; a frozen role's
    parameters have a copy there for good, and a reallocation fills its destination anew.
    """

    role: str
    call: str
    calls: tuple[str, ...]
    causes: tuple[str, ...]
    first: str
    last: str
    is_kept: bool = False


def residences(graph: DataflowGraph, placements: Mapping[str, Placement]) -> tuple[Residence, ...]:
    """What is not on its device all the time: see `Strategy.offload`. In the graph's order of roles."""
    if not any(placement.strategy.offload for placement in placements.values()):
        return ()
    found: list[Residence] = []
    for role in graph.roles:
        trainer = graph.trainer(role)
        copies: dict[object, list[Call]] = {}
        for call in graph.calls_of(role):
            copies.setdefault(placements[call.name].layout_key, []).append(call)
        for calls in copies.values():
            names = tuple(call.name for call in calls)
            if trainer in calls:
                found += _train_residences(role, str(trainer and trainer.name), names, placements)
            elif all(placements[name].strategy.offload for name in names):
                first = reallocation_name(role, names[0]) if trainer else load_name(role, names[0])
                last = offload_name(role, names[0])
                found.append(Residence(role, names[0], names, (PARAMETERS,), first, last))
    return tuple(found)


def _train_residences(
    role: str, trainer: str, names: tuple[str, ...], placements: Mapping[str, Placement]
) -> list[Residence]:
    """Of the copy that is trained: optimizer and gradients, and parameters that nobody else uses."""
    if not placements[trainer].strategy.offload:
        return []
    load, own = load_name(role, trainer), (trainer,)
    state, last = (OPTIMIZER, GRADIENTS), offload_name(role, trainer)
    found = [Residence(role, trainer, own, state, load, last, is_kept=True)]
    if names == own:
        last = offload_name(role, trainer, PARAMETERS)
        found.append(Residence(role, trainer, own, (PARAMETERS,), load, last, is_kept=True))
    return found


def copied_causes(graph: DataflowGraph, node: Node) -> tuple[str, ...]:
    """What a load or offload node really copies: gradients never, and out only what has changed."""
    trainer = graph.trainer(str(node.role))
    if node.kind is NodeKind.OFFLOAD and (trainer is None or trainer.name != node.src):
        return ()
    return tuple(cause for cause in node.keys if cause != GRADIENTS)


def needs_transfer(src: Placement, dst: Placement) -> bool:
    """Whether data may have to move between two calls.

    Not when every rank of both is one and the same, nor when one mesh holds one replica on one
    stage for both: then each rank of the mesh has all the data already.
    """
    single = src.strategy.dp == src.strategy.pp == dst.strategy.dp == dst.strategy.pp == 1
    return not (src.mesh == dst.mesh and single)


def reallocations(graph: DataflowGraph, placements: Mapping[str, Placement]) -> Mapping[str, tuple[str, str]]:
    """Call -> (role, node name) for every call whose parameters come by reallocation.

    Calls of a role that share a layout share the node, which is named after the first of them.
    Frozen roles are loaded into each of their layouts once and need none. A moving average has one for
    each of its layouts, also for that of the role that it follows.
    """
    result: dict[str, tuple[str, str]] = {}
    for role in graph.roles:
        trainer = graph.maker(role)
        if trainer is None:
            continue
        home = placements[trainer.name].layout_key if trainer.role == role else None
        first: dict[object, str] = {}
        for call in graph.calls_of(role):
            key = placements[call.name].layout_key
            if key != home:
                name = first.setdefault(key, reallocation_name(role, call.name))
                result[call.name] = (role, name)
    return result


def augment(graph: DataflowGraph, placements: Mapping[str, Placement]) -> AugmentedGraph:
    """The augmented graph that the placements imply."""
    nodes: list[Node] = []
    edges: list[Edge] = []
    moved = reallocations(graph, placements)
    incoming: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for (src, dst), keys in graph.data_edges().items():
        incoming.setdefault(dst, []).append((src, keys))
    for call in graph.calls:
        placement = placements[call.name]
        for src, keys in incoming.get(call.name, []):
            if not needs_transfer(placements[src], placement):
                edges.append(Edge(src, call.name))
                continue
            name, ranks = transfer_name(src, call.name), _union(placements[src].mesh, placement.mesh)
            transfer = Node(name, NodeKind.TRANSFER, ranks, None, src, call.name, keys=keys)
            nodes.append(replace(transfer, every=call.every))
            edges += [Edge(src, name), Edge(name, call.name)]
        ranks = tuple(placement.mesh.ranks)
        nodes.append(Node(call.name, NodeKind.CALL, ranks, call=call.name, role=call.role, every=call.every))
    for role in graph.roles:
        _add_versions(graph, placements, role, moved, nodes, edges)
    _add_copies(graph, placements, moved, nodes, edges)
    return AugmentedGraph(tuple(nodes), tuple(edges))


def _add_versions(
    graph: DataflowGraph,
    placements: Mapping[str, Placement],
    role: str,
    moved: Mapping[str, tuple[str, str]],
    nodes: list[Node],
    edges: list[Edge],
) -> None:
    """Edges from a role's train_step to its calls of the next iteration, by reallocation or not."""
    trainer = graph.maker(role)
    if trainer is None:
        return
    if trainer.role == role:
        edges.append(Edge(trainer.name, trainer.name, lag=1))
    for call in graph.calls_of(role):
        if call.kind is CallKind.TRAIN_STEP:
            continue
        if call.name not in moved:
            edges += [Edge(call.name, trainer.name), Edge(trainer.name, call.name, lag=1)]
            continue
        name = moved[call.name][1]
        if name == reallocation_name(role, call.name):
            ranks = _union(placements[trainer.name].mesh, placements[call.name].mesh)
            nodes.append(Node(name, NodeKind.REALLOCATE, ranks, src=trainer.name, dst=call.name, role=role))
            edges.append(Edge(trainer.name, name))
        edges += [Edge(call.name, name), Edge(name, call.name, lag=1)]


def _add_copies(
    graph: DataflowGraph,
    placements: Mapping[str, Placement],
    moved: Mapping[str, tuple[str, str]],
    nodes: list[Node],
    edges: list[Edge],
) -> None:
    """Loads and offloads. A load waits for the offload before it and is waited for by its calls.

    Loads of calls do not wait for the calls' data: they may run ahead.
    """
    made: dict[str, Node] = {}
    for item in residences(graph, placements):
        ranks = tuple(placements[item.call].mesh.ranks)
        out = Node(item.last, NodeKind.OFFLOAD, ranks, src=item.call, role=item.role, keys=item.causes)
        nodes.append(out)
        edges += [Edge(name, item.last) for name in item.calls]
        if item.first.startswith(f"{NodeKind.REALLOCATE}:"):
            edges.append(Edge(item.last, item.first))
            continue
        if item.is_kept and PARAMETERS in item.causes:
            fed = {item.role, *(average.role for average in graph.averages if average.of == item.role)}
            readers = dict.fromkeys(name for role, name in moved.values() if role in fed)
            edges += [Edge(name, item.last) for name in readers]
        edges.append(Edge(item.last, item.first, lag=1))
        if item.first in made:
            made[item.first] = replace(made[item.first], keys=(*made[item.first].keys, *item.causes))
            continue
        made[item.first] = Node(
            item.first, NodeKind.LOAD, ranks, dst=item.call, role=item.role, keys=item.causes
        )
        edges += [Edge(item.first, name) for name in item.calls]
    nodes += made.values()


def _union(a: DeviceMesh, b: DeviceMesh) -> tuple[int, ...]:
    return tuple(sorted({*a.ranks, *b.ranks}))
