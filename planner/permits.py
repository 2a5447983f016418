"""Constraints at work among candidates: what they permit of a call, and what to say when that is nothing.

Clauses are about meshes or about strategies, never both, so that each is asked once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from planner.options import Option
from realloc.augmented import Placement
from realloc.clauses import Clause, Clauses
from realloc.cluster import Cluster
from realloc.constraints import NO_CONSTRAINTS
from realloc.dataflow import Call, DataflowGraph
from realloc.errors import InfeasibleError
from realloc.experiment import Experiment
from realloc.mesh import DeviceMesh
from realloc.strategy import Strategy

Permits = Callable[[Strategy], bool]
"""Whether constraints permit a strategy, on whatever mesh."""


class Permitted:
    """What the constraints of an experiment permit; everything where there are none.

    Raises InfeasibleError for constraints that contradict each other.
    """

    def __init__(self, experiment: Experiment, graph: DataflowGraph, cluster: Cluster) -> None:
        self._clauses: Clauses | None = None
        if experiment.constraints != NO_CONSTRAINTS:
            self._clauses = Clauses(experiment.constraints, graph, cluster, "experiment: constraints")

    def _of(self, call: Call, *, meshes: bool) -> Sequence[Clause]:
        if self._clauses is None:
            return ()
        return [clause for clause in self._clauses.of(call.name) if clause.is_about_meshes is meshes]

    def pinned(self, graph: DataflowGraph) -> Sequence[DeviceMesh]:
        """Meshes that constraints name, which must be among the candidates."""
        found = [m for call in graph.calls for clause in self._of(call, meshes=True) for m in clause.pinned]
        return tuple(dict.fromkeys(found))

    def meshes(self, call: Call, meshes: Sequence[DeviceMesh]) -> Sequence[DeviceMesh]:
        clauses = self._of(call, meshes=True)
        if not clauses:
            return meshes
        strategy = Strategy()
        return [m for m in meshes if all(clause.allows(Placement(m, strategy)) for clause in clauses)]

    def strategies(self, call: Call, mesh: DeviceMesh) -> Permits | None:
        """What is permitted of strategies, None where all are. Where offload must be, as if it were."""
        clauses = self._of(call, meshes=False)
        if not clauses:
            return None
        offload = self.needs_offload(call)

        def permits(strategy: Strategy) -> bool:
            placement = Placement(mesh, replace(strategy, offload=True) if offload else strategy)
            return all(clause.allows(placement) for clause in clauses)

        return permits

    def needs_offload(self, call: Call) -> bool:
        return any(clause.requires("offload", True) for clause in self._of(call, meshes=False))

    def micro_batches(self, call: Call) -> Sequence[int]:
        """Numbers of micro-batches that constraints ask for by name."""
        named = [clause.values("micro_batches") for clause in self._of(call, meshes=False)]
        return [value for values in named for value in values if isinstance(value, int)]

    def final(self, call: Call, options: Iterable[Option], mesh: DeviceMesh) -> list[Option]:
        """The options that are permitted as they are, offload included."""
        clauses = self._of(call, meshes=False)
        return [o for o in options if all(clause.allows(Placement(mesh, o.strategy)) for clause in clauses)]

    def nothing_left(
        self, call: Call, every: Mapping[DeviceMesh, Sequence[Option]], too_large: Mapping[str, int]
    ) -> InfeasibleError | None:
        """Why nothing is left of a call: which clause refuses how many placements; None if none is to blame.

        `every`: what would fit on each mesh without constraints. `too_large`: example -> how many of the
        permitted placements did not fit.
        """
        clauses = () if self._clauses is None else self._clauses.of(call.name)
        placements = [Placement(mesh, o.strategy) for mesh, options in every.items() for o in options]
        refused = {c.text: sum(not c.allows(placement) for placement in placements) for c in clauses}
        blamed = {text: count for text, count in refused.items() if count}
        if not blamed:
            return None
        words = ", ".join(f"{text} refuses {count:,}" for text, count in blamed.items())
        more = ""
        if too_large:
            example = next(iter(too_large))
            count = sum(too_large.values())
            more = f"; {count:,} that they allow do not fit in memory (such as {example})"
        return InfeasibleError(
            f"{call.name}: the experiment's constraints leave no placement: of {len(placements):,} that "
            f"search would look at, {words}{more}; loosen one of them."
        )
