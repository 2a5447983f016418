"""Execution plans: the placement of every call, and `plan.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from realloc.augmented import AugmentedGraph, Placement, augment
from realloc.backend import untrainable
from realloc.clauses import Clauses
from realloc.cluster import Cluster, cluster_content, parse_cluster
from realloc.dataflow import CallKind, DataflowGraph
from realloc.errors import InputError, PlanError
from realloc.experiment import Experiment, experiment_content, parse_experiment
from realloc.files import Reader, dump_yaml, nearest, read_file, write_text
from realloc.mesh import parse_mesh
from realloc.pace import Pace, pace_content, read_pace
from realloc.strategy import parse_strategy, strategy_content


@dataclass(frozen=True)
class Predictions:
    """What the planner expects of a plan.

    `node_s`: seconds of every node of the augmented graph; `terms`: of every call by cause, which
    sum to the call's. `peak_bytes`: of the GPU that needs most, by cause. `costs`: where the costs
    came from ('measured' or 'analytic', with the profile's name); `sources`: what stands behind the
    seconds of each call, and of each kind of node between calls. `pace`: how fast the profiled machine was.
    """

    iteration_s: float
    tokens_per_s: float
    node_s: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    costs: str = ""
    lower_bound_s: float | None = None
    terms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    pace: Pace | None = None


@dataclass(frozen=True)
class ExecutionPlan:
    """Placements of all calls of an experiment on a cluster.

    `order` is the order in which one iteration's nodes start; None derives it from the graph.
    """

    experiment: Experiment
    cluster: Cluster
    placements: Mapping[str, Placement]
    order: tuple[str, ...] | None = None
    predictions: Predictions | None = None

    @cached_property
    def graph(self) -> DataflowGraph:
        return self.experiment.graph()

    @cached_property
    def augmented(self) -> AugmentedGraph:
        return augment(self.graph, self.placements)

    @cached_property
    def node_order(self) -> tuple[str, ...]:
        return self.order if self.order is not None else self.augmented.default_order()

    def check(self, where: str = "plan") -> None:
        """Proves that the plan can run on its cluster and as its experiment wants it, memory aside.

        Raises PlanError, and InfeasibleError for constraints that contradict each other.
        """
        clauses = Clauses(self.experiment.constraints, self.graph, self.cluster, f"{where}: constraints")
        for call in self.graph.calls:
            if call.name not in self.placements:
                raise PlanError(f"{where}: placements: the call '{call.name}' has no placement.")
            placement = self.placements[call.name]
            at = f"{where}: placements.{call.name}"
            placement.mesh.check(self.cluster, at)
            shape = None if call.role is None else self.experiment.role_shape(self.graph, call.role)
            placement.strategy.check(placement.mesh, shape, at)
            placement.strategy.check_kind(call.kind, at)
            if placement.strategy.offload and self.graph.average(str(call.role)) is not None:
                raise PlanError(
                    f"{at}: {call.role} is a moving average, which stays on its device: no offload."
                )
            if call.kind is CallKind.TRAIN_STEP:
                backend = self.experiment.training_backend
                reason = untrainable(backend, self.cluster.num_gpus, placement.mesh, placement.strategy)
                if reason is not None:
                    raise PlanError(f"{at}: {reason}.")
            if call.kind is CallKind.COMPUTE and placement.strategy.dp != placement.mesh.size:
                raise PlanError(f"{at}: a compute call has no model to split: use dp alone.")
            if placement.strategy.dp > self.experiment.workload.sequences:
                raise PlanError(
                    f"{at}: dp {placement.strategy.dp} exceeds the "
                    f"{self.experiment.workload.sequences} sequences of an iteration."
                )
            if (clause := clauses.refuses(call.name, placement)) is not None:
                raise PlanError(
                    f"{at}: {placement} is against the experiment's constraint {clause}; change the "
                    f"placement or the constraint."
                )
        for name in self.placements:
            if name not in self.graph.by_name:
                raise PlanError(
                    f"{where}: placements: unknown call '{name}'.{nearest(name, self.graph.by_name)}"
                )
        if self.order is not None:
            self.augmented.check_order(self.order, where)


def read_plan(path: str | Path, *, trust: bool = False) -> ExecutionPlan:
    """Reads and checks a `plan/1` file. Raises InputError or PlanError.

    An algorithm that does not come with realloc is code, and imported only with `trust`.
    """
    reader = read_file(path, "plan")
    folder = Path(path).resolve().parent
    experiment = parse_experiment(reader.child("experiment"), folder, trust=trust)
    cluster = parse_cluster(reader.child("cluster"), folder)
    placements_reader = reader.child("placements")
    placements = {}
    for name in placements_reader.keys():
        entry = placements_reader.child(name)
        placements[name] = Placement(
            mesh=parse_mesh(entry.get("mesh", str), cluster, entry.at("mesh")),
            strategy=parse_strategy(entry.raw("strategy"), entry.at("strategy")),
        )
        entry.done()
    order = reader.get("order", list, None)
    if order is not None and not all(isinstance(name, str) for name in order):
        raise InputError(f"{path}: order: expected a list of node names.")
    predictions = reader.optional_child("predictions")
    plan = ExecutionPlan(
        experiment=experiment,
        cluster=cluster,
        placements=placements,
        order=None if order is None else tuple(order),
        predictions=None if predictions is None else _parse_predictions(predictions),
    )
    reader.done()
    plan.check(str(path))
    return plan


def _parse_predictions(reader: Reader) -> Predictions:
    node_s = reader.child("node_s")
    peak = reader.child("peak_bytes")
    sources = reader.optional_child("sources")
    predictions = Predictions(
        iteration_s=reader.number("iteration_s", minimum=0.0),
        tokens_per_s=reader.number("tokens_per_s", minimum=0.0),
        node_s={name: node_s.number(name, minimum=0.0) for name in node_s.keys()},
        peak_bytes={name: peak.integer(name) for name in peak.keys()},
        costs=reader.get("costs", str, ""),
        lower_bound_s=reader.number("lower_bound_s", None, minimum=0.0),
        terms=_parse_terms(reader.optional_child("terms")),
        sources={} if sources is None else {name: sources.get(name, str) for name in sources.keys()},
        pace=read_pace(reader.optional_child("pace")),
    )
    reader.done()
    return predictions


def _parse_terms(reader: Reader | None) -> Mapping[str, Mapping[str, float]]:
    if reader is None:
        return {}
    calls = {name: reader.child(name) for name in reader.keys()}
    return {
        name: {term: call.number(term, minimum=0.0) for term in call.keys()} for name, call in calls.items()
    }


def plan_text(plan: ExecutionPlan) -> str:
    """The plan as the text of a `plan/1` file."""
    content: dict[str, Any] = {
        "placements": {
            name: {"mesh": str(p.mesh), "strategy": strategy_content(p.strategy)}
            for name, p in plan.placements.items()
        },
        "cluster": cluster_content(plan.cluster),
        "experiment": experiment_content(plan.experiment),
    }
    if plan.order is not None:
        content["order"] = list(plan.order)
    if plan.predictions is not None:
        p = plan.predictions
        predictions: dict[str, Any] = {
            "iteration_s": _rounded(p.iteration_s),
            "tokens_per_s": _rounded(p.tokens_per_s),
            "costs": p.costs,
            "node_s": {name: _rounded(seconds) for name, seconds in p.node_s.items()},
            "peak_bytes": dict(p.peak_bytes),
        }
        if p.lower_bound_s is not None:
            predictions["lower_bound_s"] = _rounded(p.lower_bound_s)
        if p.terms:
            predictions["terms"] = {
                name: {term: _rounded(seconds) for term, seconds in terms.items() if seconds}
                for name, terms in p.terms.items()
            }
        if p.sources:
            predictions["sources"] = dict(p.sources)
        if p.pace is not None:
            predictions["pace"] = dict(pace_content(p.pace))
        content["predictions"] = predictions
    return dump_yaml("plan", content)


def write_plan(plan: ExecutionPlan, path: str | Path) -> None:
    write_text(path, plan_text(plan))


def _rounded(value: float) -> float:
    """Six significant digits: what a prediction is worth at most."""
    return float(f"{value:.6g}")
