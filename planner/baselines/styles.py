"""The heuristic plans by name. Each rule is a ladder of steps; `fit` takes the first that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from cost_models.model import CostModel
from planner.baselines.degrees import all_gpus, divisors, model_parallel, split, zero
from planner.baselines.fit import Cannot, MakeStep, Step, first_fit, variants
from planner.baselines.groups import role_groups
from realloc.augmented import Placement
from realloc.cluster import Cluster
from realloc.dataflow import Call, CallKind
from realloc.experiment import Experiment
from realloc.mesh import DeviceMesh
from realloc.strategy import Recompute, Strategy

Place = Callable[[Experiment, Cluster, CostModel], Mapping[str, Placement]]
"""Placements of every call. Raises InfeasibleError with the numbers when no step of the rule fits."""


@dataclass(frozen=True)
class Baseline:
    """A rule of thumb: `place` makes an ordinary plan's placements of it."""

    name: str
    description: str
    place: Place


class _Steps:
    """Makes steps of ladders for one experiment on one cluster."""

    def __init__(self, experiment: Experiment, cluster: Cluster, costs: CostModel) -> None:
        self.experiment, self.cluster, self.costs = experiment, cluster, costs
        self.whole = all_gpus(cluster)

    def step(
        self,
        strategy: Callable[[Call, DeviceMesh], Strategy],
        offload: int = 0,
        meshes: Mapping[str, DeviceMesh] | None = None,
        recompute: tuple[Recompute, ...] = tuple(Recompute),
        waves: bool = True,
    ) -> Step:
        """One step. `offload` 1: frozen roles; 2: what trains too. `meshes`: all GPUs where None.

        `waves`: generation may take the batch in waves, where its cache has no room for all at once.
        """
        graph = self.costs.graph
        found = {}
        for call in graph.calls:
            mesh = self.whole if meshes is None else meshes[call.name]
            chosen = strategy(call, mesh)
            frozen = call.role is not None and graph.trainer(call.role) is None
            if (frozen and offload) or (call.kind is CallKind.TRAIN_STEP and offload > 1):
                chosen = replace(chosen, offload=True)
            found[call.name] = variants(self.experiment, self.costs, call, mesh, chosen, recompute)
            if call.kind is CallKind.GENERATE and not waves:
                found[call.name] = [p for p in found[call.name] if p.strategy.micro_batches <= chosen.pp]
        return found

    def split(self, call: Call, mesh: DeviceMesh, tp: int, pp: int = 1) -> Strategy:
        return split(None if call.role is None else self.costs.shape(call.role), mesh, tp, pp)

    def megatron(self, call: Call, mesh: DeviceMesh, tp: int, pp: int) -> Strategy:
        """3D parallelism; training with sequence parallelism and optimizer states split over replicas."""
        strategy = self.split(call, mesh, tp, pp)
        if call.kind is not CallKind.TRAIN_STEP:
            return strategy
        return replace(zero(strategy, 1), sequence_parallel=strategy.tp > 1)

    def data_parallel(self, call: Call, mesh: DeviceMesh, tp: int) -> Strategy:
        """ZeRO-3 over all replicas to train; otherwise tp to hold the model."""
        if call.kind is CallKind.TRAIN_STEP:
            return zero(self.split(call, mesh, 1), 3)
        return self.split(call, mesh, tp)


def _megatron(experiment: Experiment, cluster: Cluster, costs: CostModel) -> Mapping[str, Placement]:
    steps = _Steps(experiment, cluster, costs)

    def ladder() -> Iterator[MakeStep]:
        for offload in (0, 1, 2):
            for pp in divisors(cluster.num_nodes):
                yield partial(steps.step, partial(steps.megatron, tp=cluster.gpus_per_node, pp=pp), offload)

    return first_fit("megatron", cluster, costs, ladder())


def _deepspeed_chat(experiment: Experiment, cluster: Cluster, costs: CostModel) -> Mapping[str, Placement]:
    steps = _Steps(experiment, cluster, costs)

    def ladder() -> Iterator[MakeStep]:
        for offload in (0, 1, 2):
            for waves, tp in product((False, True), divisors(cluster.gpus_per_node)):
                yield partial(steps.step, partial(steps.data_parallel, tp=tp), offload, waves=waves)

    return first_fit("deepspeed-chat", cluster, costs, ladder())


def _openrlhf(experiment: Experiment, cluster: Cluster, costs: CostModel) -> Mapping[str, Placement]:
    steps = _Steps(experiment, cluster, costs)
    found = [role_groups(costs, shared) for shared in (False, True)]

    def too_few() -> Step:
        raise Cannot(f"{cluster.num_gpus} GPUs are fewer than the groups of generation and roles")

    def ladder() -> Iterator[MakeStep]:
        if not any(found):
            yield too_few
        for meshes in found:
            for offload in (0, 2) if meshes is not None else ():
                for waves, tp in product((False, True), divisors(cluster.gpus_per_node)):
                    rule = partial(steps.data_parallel, tp=tp)
                    yield partial(steps.step, rule, offload, meshes, waves=waves)

    return first_fit("openrlhf", cluster, costs, ladder())


def _verl(experiment: Experiment, cluster: Cluster, costs: CostModel) -> Mapping[str, Placement]:
    steps = _Steps(experiment, cluster, costs)

    def strategy(call: Call, mesh: DeviceMesh, tp: int, pp: int, generate_tp: int) -> Strategy:
        if call.kind is CallKind.GENERATE:
            return steps.split(call, mesh, generate_tp)
        return steps.megatron(call, mesh, tp, pp)

    def ladder() -> Iterator[MakeStep]:
        for offload in (0, 1, 2):
            for waves, (tp, pp) in product((False, True), model_parallel(steps.whole)):
                for small in divisors(cluster.gpus_per_node):
                    rule = partial(strategy, tp=tp, pp=pp, generate_tp=small)
                    yield partial(steps.step, rule, offload, waves=waves)

    return first_fit("verl", cluster, costs, ladder())


def _realhf(experiment: Experiment, cluster: Cluster, costs: CostModel) -> Mapping[str, Placement]:
    steps = _Steps(experiment, cluster, costs)
    rule = partial(steps.megatron, tp=cluster.gpus_per_node, pp=cluster.num_nodes)

    def ladder() -> Iterator[MakeStep]:
        for offload in (1, 2):
            yield partial(steps.step, rule, offload, recompute=(Recompute.FULL,))

    return first_fit("realhf-heuristic", cluster, costs, ladder())


def savings(placements: Mapping[str, Placement]) -> tuple[str, ...]:
    """What a plan does to fit in memory and to fill pipelines, beside its degrees, call by call.

    Such as `actor_train: 8 micro-batches, recompute full`.
    """
    found = []
    for name, placement in placements.items():
        strategy = placement.strategy
        words = []
        if strategy.micro_batches > strategy.pp:
            words.append(f"{strategy.micro_batches} micro-batches")
        if strategy.recompute is not Recompute.NONE:
            words.append(f"recompute {strategy.recompute}")
        if strategy.offload:
            words.append("offload")
        if words:
            found.append(f"{name}: {', '.join(words)}")
    return tuple(found)


_ALL = (
    Baseline(
        "megatron",
        "every call on all GPUs: tp within a node, as many nodes in a pipeline as memory needs, replicas "
        "over the rest; ZeRO-1 and sequence parallelism in training",
        _megatron,
    ),
    Baseline(
        "deepspeed-chat",
        "every call on all GPUs: ZeRO-3 data parallelism in training, resharded to the smallest tp that fits "
        "for generation and inference",
        _deepspeed_chat,
    ),
    Baseline(
        "openrlhf",
        "a group of GPUs for each role and one for generation: ZeRO-3 in training, the smallest tp that fits "
        "elsewhere; frozen roles join trained ones where GPUs are few",
        _openrlhf,
    ),
    Baseline(
        "verl",
        "every call on all GPUs: the least model parallelism that fits (tp, then pp) in training and "
        "inference, resharded to the smallest tp that fits for generation",
        _verl,
    ),
    Baseline(
        "realhf-heuristic",
        "every call on all GPUs: tp within a node, one pipeline stage for each node, training with full "
        "recomputation and sequence parallelism, frozen roles in host memory between their calls",
        _realhf,
    ),
)
BASELINES: Mapping[str, Baseline] = {baseline.name: baseline for baseline in _ALL}
