"""ReaL's settings: its heuristic plan, and the best plan among those that ReaL could run.

Everything about ReaL is from its repository (realhf/search_engine: enumerate.py, estimate.py, search.py).
Both plans train with recomputation, sequence parallelism where tp > 1 and ZeRO-1, in twice as many
micro-batches as stages, generate and infer in as many as stages, and keep ref and reward in host memory. Its
search takes degrees in powers of two, trains with dp x tp of at most a node and with 2 x dp x pp sequences in
a mini-batch at least, and counts memory as its estimator does: 24 bytes for each trained parameter (20 of
them split over dp), two copies of the parameters of any other call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.published_fit import Parameter, Target, Values
from benchmarks.published_rows import Row, Unsupported, experiment_of, number, rows_of, shape_of, with_share
from cost_models.link import IN_SWITCH
from cost_models.memory import CallMemory
from cost_models.model import CostModel
from cost_models.profile import HardwareProfile, load_profile
from planner.candidates import Candidate, CandidateSet
from planner.options import Option
from planner.problem import Problem
from planner.result import SearchResult
from planner.search import methods
from planner.simulator import list_order, period_s
from realloc.augmented import Placement, augment
from realloc.cluster import GIB, Cluster
from realloc.dataflow import Call, CallKind
from realloc.errors import InfeasibleError
from realloc.mesh import DeviceMesh, all_meshes
from realloc.strategy import Recompute, Strategy, forbidden, parse_strategy

DEVICE, PER_NODE, CAPACITY = "h100-sxm@200gb", 8, 80 * GIB
TOKENS = 1 << 17
MINI_BATCHES = 4
PARAMETERS = (
    Parameter(
        "share", "achieved share of the profile's rate of matrix products (and attention)", 0.4, 0.7, 0.287
    ),
    Parameter(
        "launch_s", "seconds of one operator in eager PyTorch without CUDA graphs", 15e-6, 0.7, 16.6e-6
    ),
    Parameter(
        "latency_factor",
        "collectives' latency over the profile's: eager ranks launch them one by one and wait for each other",
        10.0,
        0.7,
        12.3,
    ),
    Parameter(
        "call_s", "fixed seconds of a call: requests of the master, data through its workers", 0.5, 0.7, 0.549
    ),
)
_PLAN = re.compile(r"(\w+) GPUs (\d+)-(\d+) ([dtp\d]+)|(\w+) (\d+)-(\d+) ([dtp\d]+)")


def real_profile(values: Values, estimator: Mapping[str, Any]) -> HardwareProfile:
    """The authors' own constants for links, the profile's for everything else, and the parameters."""
    profile = with_share(load_profile(DEVICE), values["share"])
    intra, inter = profile.intra_node, profile.inter_node
    within = number(estimator.get("p2p_intra_node_bytes_per_s")) or intra.bytes_per_s
    across = number(estimator.get("p2p_inter_node_bytes_per_s")) or inter.bytes_per_s
    # rings at the authors' constant; ReaL's NCCL was not told to add up in the switch
    bus = max(
        row.bytes_per_s * (row.ranks - 1) / row.ranks * 2 for row in dict(intra.collectives)["all_reduce"]
    )
    collectives = tuple(
        (
            name,
            tuple(
                replace(
                    row,
                    latency_s=row.latency_s * values["latency_factor"],
                    bytes_per_s=row.bytes_per_s * within / bus,
                )
                for row in rows
            ),
        )
        for name, rows in intra.collectives
        if name != IN_SWITCH
    )
    return replace(
        profile,
        launch_s=values["launch_s"],
        call_s=values["call_s"],
        intra_node=replace(intra, bytes_per_s=within, collectives=collectives),
        inter_node=replace(inter, bytes_per_s=across),
    )


class Real:
    """The section's rows: heuristic seconds, and gains of searched plans over them."""

    parameters: Sequence[Parameter] = PARAMETERS

    def __init__(self, section: str, content: Mapping[str, Any], search_s: float) -> None:
        self.rows = rows_of(section, content, "heuristic_s")
        given = content.get("estimator_constants_of_the_authors")
        self._estimator = given if isinstance(given, dict) else {}
        self._plans = {
            match[1]: str(text)
            for key, text in content.items()
            if (match := re.fullmatch(r"example_plan_(\w+)", key))
        }
        self._splits = {
            match[1]: split["heuristic"]
            for key, split in content.items()
            if (match := re.fullmatch(r"split_at_gen_(\w+)", key))
            and isinstance(split, dict)
            and isinstance(split.get("heuristic"), dict)
        }
        self._search_s = search_s

    def predict(self, row: Row, values: Values) -> float:
        costs = self.costs(row, values)
        return iteration_s(costs, self.heuristic(costs))

    def targets(self, row: Row, index: int) -> list[Target]:
        """The heuristic; of a setting whose searched plan is known, that plan too."""
        assert row.measured is not None, "rows to fit on have a number"
        found = [Target(index, row.measured, lambda values: self.predict(row, values))]
        searched = number(row.fields.get("searched_s"))
        if self._known_plan(row) is None or searched is None:
            return found
        try:
            self._known_s(row, {p.name: p.start for p in self.parameters})
        except Unsupported:
            return found  # the row's own report says why
        return [*found, Target(index, searched, lambda values: self._known_s(row, values))]

    def more(self, row: Row, values: Values) -> Mapping[str, Any]:
        costs = self.costs(row, values)
        heuristic_s = iteration_s(costs, self.heuristic(costs))
        best, sampled = self.searched(costs), self._sampled(costs)
        searched = number(row.fields.get("searched_s"))
        if sampled is not None and sampled.iteration_s < best.iteration_s:
            best = sampled
        found: dict[str, Any] = {
            "searched_predicted": best.iteration_s,
            "gain_measured": row.measured / searched if row.measured and searched else None,
            "gain_predicted": heuristic_s / best.iteration_s,
            "gain_predicted_mcmc": None if sampled is None else heuristic_s / sampled.iteration_s,
            "plan": {name: str(placement) for name, placement in best.plan.placements.items()},
        }
        if self._known_plan(row) is not None:
            found["gain_predicted_published_plan"] = heuristic_s / self._known_s(row, values)
        return found

    def splits(self, values: Values) -> list[Mapping[str, Any]]:
        """Shares of the heuristic's seconds at the settings where they were published."""
        found: list[Mapping[str, Any]] = []
        for name, measured in self._splits.items():
            match = re.fullmatch(r"(\d+)_(\w+?)_(\w+?)_(\d+)gpus", name)
            if match is None:
                found.append({"split": name, "reason": "its name does not give the setting"})
                continue
            fields = {"actor": match[2], "critic": match[3], "gpus": int(match[4]), "gen": int(match[1])}
            row = Row("split", fields, "check", None)
            try:
                found.append({**fields, "measured": measured, "predicted": self._shares(row, values)})
            except Unsupported as reason:
                found.append({**fields, "reason": str(reason)})
        return found

    def _shares(self, row: Row, values: Values) -> Mapping[str, float]:
        """Of the heuristic's seconds, whose calls follow each other.

        `launch`: what eager launches add to compute; while one rank launches, others wait for it in an
        all-reduce, which a trace of kernels shows as communication.
        """
        costs = self.costs(row, values)
        placements = self.heuristic(costs)
        total, terms = iteration_s(costs, placements), call_terms(costs, placements)
        prompt = self.costs(row, {**values, "launch_s": load_profile(DEVICE).launch_s})
        compute = sum(call_terms(prompt, placements)[name] for name in ("compute", "optimizer"))
        launch = terms["compute"] + terms["optimizer"] - compute
        communication = sum(seconds for name, seconds in terms.items() if name.endswith("communication"))
        parts = {"compute": compute, "communication": communication, "launch": launch}
        found = {name: seconds / total for name, seconds in parts.items()}
        return {**found, "idle": max(0.0, 1.0 - sum(found.values())), "iteration_s": total}

    def costs(self, row: Row, values: Values) -> CostModel:
        gen, prompt, gpus = row.count("gen"), row.count("prompt", 128), row.count("gpus")
        batch = row.count("batch", TOKENS // (prompt + gen))
        actor, critic = shape_of(row.fields.get("actor")), shape_of(row.fields.get("critic"))
        if gpus > PER_NODE and gpus % PER_NODE:
            raise Unsupported(f"{gpus} GPUs are not whole nodes of {PER_NODE}")
        shapes = {
            "actor": actor,
            "ref": shape_of(row.fields.get("ref", row.fields["actor"])),
            "critic": critic,
            "reward": shape_of(row.fields.get("reward", row.fields["critic"])),
        }
        given = {"mini_batches": row.count("mini_batches", MINI_BATCHES), "epochs": 1}
        experiment = experiment_of(shapes, batch, prompt, gen, hyperparameters=given)
        cluster = Cluster(-(-gpus // PER_NODE), min(gpus, PER_NODE), DEVICE, CAPACITY)
        profile = real_profile(values, self._estimator)
        return CostModel(experiment, experiment.graph(), cluster, profile)

    def heuristic(self, costs: CostModel) -> dict[str, Placement]:
        """Every call on all GPUs, tp within a node, a pipeline stage for each node."""
        cluster = costs.cluster
        mesh = DeviceMesh(0, cluster.num_gpus, cluster.gpus_per_node)
        placements = {}
        for call in costs.graph.calls:
            strategy = _as_real(costs, call, Strategy(1, cluster.gpus_per_node, cluster.num_nodes))
            if why := forbidden(strategy, costs.shape(str(call.role))):
                raise Unsupported(f"the heuristic plan is not possible: {why}")
            placements[call.name] = Placement(mesh, strategy)
        return placements

    def searched(self, costs: CostModel, method: str = "auto") -> SearchResult:
        """The best plan found among ReaL's candidates."""
        counted = _RealMemory(costs)
        problem = Problem(
            costs.experiment, costs.graph, costs.cluster, counted, real_candidates(counted), CAPACITY
        )
        return methods()[method](problem, self._search_s, 0)

    def _sampled(self, costs: CostModel) -> SearchResult | None:
        """What a Metropolis search, such as ReaL's, finds in the same time; None if nothing."""
        try:
            return self.searched(costs, "mcmc")
        except InfeasibleError:
            return None

    def _known_plan(self, row: Row) -> str | None:
        return self._plans.get(
            f"{row.fields.get('actor')}_{row.fields.get('critic')}_{row.fields.get('gpus')}gpus"
        )

    def _known_s(self, row: Row, values: Values) -> float:
        costs = self.costs(row, values)
        return iteration_s(costs, published_plan(str(self._known_plan(row)), costs))


class _RealMemory:
    """Our costs with ReaL's account of memory (estimate_rpc_memory_cost): what its search may choose."""

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.provenance = costs.provenance
        self.overlaps_host_copies = costs.overlaps_host_copies
        self.call_s, self.transfer_s = costs.call_s, costs.transfer_s
        self.reallocate_s, self.host_copy_s = costs.reallocate_s, costs.host_copy_s
        self.least_reallocate_s = costs.least_reallocate_s

    def call_memory(self, call: Call, placement: Placement) -> CallMemory:
        shape, s, work = self.costs.shape(str(call.role)), placement.strategy, self.costs.experiment.workload
        layer = 3 * shape.hidden * shape.ffn_dim + 4 * shape.hidden**2
        count = 3 * shape.vocab * shape.hidden + layer * shape.num_layers
        length, parts = work.prompt.maximum + work.response.maximum, s.pp * s.tp
        if call.kind is CallKind.TRAIN_STEP:
            kept = work.sequences // (2 * s.pp * s.dp) * length * shape.hidden * s.pp * 2 // parts
            return CallMemory(
                2 * count // parts, 2 * count // parts, 20 * count // s.size, {"activations": kept}
            )
        if call.kind is CallKind.INFERENCE:
            return CallMemory(4 * count // parts)
        cache = 4 * work.sequences * length * shape.hidden * shape.num_layers // s.size
        more = 1.25 if s.dp > 4 and s.size <= 16 else 1.0
        return CallMemory(int(more * 4 * count / parts), working={"kv_cache": cache})


def real_candidates(costs: _RealMemory) -> CandidateSet:
    """Every placement that ReaL's enumeration has."""
    cluster, found = costs.costs.cluster, {}
    sizes: dict[int, list[DeviceMesh]] = {}
    for mesh in all_meshes(cluster):
        sizes.setdefault(mesh.size, []).append(mesh)
    for call in costs.costs.graph.calls:
        here = []
        for size, meshes in sizes.items():
            for strategy in _degrees(costs.costs, call, size):
                placed = Placement(meshes[0], strategy)
                option = Option(strategy, costs.call_s(call, placed), costs.call_memory(call, placed))
                if option.total_bytes <= CAPACITY:
                    here += [Candidate(Placement(mesh, strategy), option) for mesh in meshes]
        if not here:
            raise Unsupported(f"{call.name} fits nowhere by ReaL's account of memory")
        found[call.name] = sorted(here, key=lambda candidate: candidate.option.seconds)
    return CandidateSet(found)


def _degrees(costs: CostModel, call: Call, size: int) -> list[Strategy]:
    cluster, found = costs.cluster, []
    train = call.kind is CallKind.TRAIN_STEP
    powers = [1 << k for k in range(size.bit_length())]
    for tp in (p for p in powers if p <= cluster.gpus_per_node):
        for pp in (p for p in powers if p <= max(cluster.num_nodes, 8)):
            dp = size // (tp * pp)
            if dp * tp * pp != size or dp not in powers or (train and tp * dp > cluster.gpus_per_node):
                continue
            least = 2 * dp * pp * call.mini_batches if train else dp * pp
            strategy = _as_real(costs, call, Strategy(dp, tp, pp))
            if least <= costs.experiment.workload.sequences and not forbidden(
                strategy, costs.shape(str(call.role))
            ):
                found.append(strategy)
    return found


def _as_real(costs: CostModel, call: Call, degrees: Strategy) -> Strategy:
    """What ReaL does besides the degrees."""
    train, pp = call.kind is CallKind.TRAIN_STEP, degrees.pp
    micro_batches = (2 * pp if train else pp) if pp > 1 else 1
    most = costs.experiment.workload.sequences // call.mini_batches // degrees.dp
    return replace(
        degrees,
        micro_batches=max(1, min(micro_batches, most)),
        zero=1 if train and degrees.dp > 1 else 0,
        sequence_parallel=train and degrees.tp > 1,
        recompute=Recompute.FULL if train else Recompute.NONE,
        offload=costs.graph.trainer(str(call.role)) is None,
    )


def published_plan(text: str, costs: CostModel) -> dict[str, Placement]:
    """`actor_gen GPUs 0-7 d4t1p2; rew_inf 4-7 d2t2; ...` with what ReaL does besides."""
    found = {}
    for part in text.split(";"):
        match = _PLAN.match(part.strip())
        if match is None:
            continue
        name, first, last, degrees = (group for group in match.groups() if group is not None)
        if name not in costs.graph.by_name:
            raise Unsupported(f"the published plan places '{name}', which PPO has not")
        given = {letter: int(number) for letter, number in re.findall(r"([dtp])(\d+)", degrees)}
        strategy = parse_strategy(f"d{given.get('d', 1)}t{given.get('t', 1)}p{given.get('p', 1)}", "plan")
        mesh = DeviceMesh(int(first), int(last) - int(first) + 1, costs.cluster.gpus_per_node)
        if strategy.size != mesh.size:
            raise Unsupported(f"the published plan's {degrees} does not fill GPUs {first}-{last}")
        found[name] = Placement(mesh, _as_real(costs, costs.graph.by_name[name], strategy))
    if set(found) != set(costs.graph.by_name):
        raise Unsupported(f"the published plan lacks {sorted(set(costs.graph.by_name) - set(found))}")
    return found


def iteration_s(costs: CostModel, placements: Mapping[str, Placement]) -> float:
    """Steady seconds per iteration, nodes in the order of a list schedule."""
    graph = augment(costs.graph, placements)
    seconds = {node.name: costs.node_s(node, placements) for node in graph.nodes}
    order = list_order(graph, seconds)
    return period_s(graph, seconds, order, overlaps_loads=costs.overlaps_host_copies)


def call_terms(costs: CostModel, placements: Mapping[str, Placement]) -> Mapping[str, float]:
    """Seconds of all calls by term."""
    terms: dict[str, float] = {}
    for call in costs.graph.calls:
        for name, seconds in costs.call_terms(call, placements[call.name]).items():
            terms[name] = terms.get(name, 0.0) + seconds
    return terms
