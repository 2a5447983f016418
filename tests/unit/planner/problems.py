"""Small problems with made-up costs, so that search can be checked against every plan."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.candidates import build_candidates
from planner.keeping import Limits
from planner.problem import Problem
from realloc.augmented import Placement
from realloc.cluster import Cluster
from realloc.dataflow import Call, CallKind, DataflowGraph, DataKey, Output, Per
from realloc.experiment import Experiment, ModelSpec, OptimizerSpec, Workload
from realloc.lengths import Lengths
from realloc.model_shape import ModelShape

SHAPE = ModelShape(
    family="llama", hidden=64, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=8, ffn_dim=128,
    vocab=100, max_positions=512, rotary_dim=8,
)  # fmt: skip
CAPACITY = 1000


@dataclass(frozen=True)
class TableMemory:
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    working: Mapping[str, int] = field(default_factory=dict)


def draw(*key: object) -> float:
    """A number in 0..1 that depends on the key alone."""
    return zlib.crc32(repr(key).encode()) / 2**32


@dataclass(frozen=True)
class TableCosts:
    """Costs drawn from a seed: roughly `1 / GPUs`, with noise, so that no plan is obvious.

    `moves` scales transfers and reallocations, `bytes_scale` memory (CAPACITY is 1000).
    """

    seed: int
    moves: float = 0.2
    bytes_scale: float = 400.0
    provenance: str = "made up"
    overlaps_host_copies: bool = False

    def host_copy_s(self, call: Call, placement: Placement, causes: tuple[str, ...]) -> float:
        memory = self.call_memory(call, placement)
        return sum(int(getattr(memory, cause)) for cause in causes) / 1000

    def call_s(self, call: Call, placement: Placement) -> float:
        noise = draw(self.seed, call.name, str(placement.strategy))
        weight = 4.0 if call.kind is CallKind.GENERATE else 1.0 + 2.0 * draw(self.seed, call.name)
        speedup: float = placement.mesh.size**0.8
        return weight * (0.3 + noise) / speedup

    def transfer_s(self, keys: tuple[str, ...], src: Placement, dst: Placement) -> float:
        return self.moves * draw(self.seed, keys, *_where(src, dst))

    def reallocate_s(self, role: str, src: Placement, dst: Placement) -> float:
        return 3 * self.moves * draw(self.seed, role, *_where(src, dst))

    def least_reallocate_s(self, role: str, src: Placement, dst: Placement, *, anywhere: bool) -> float:
        return 0.0 if anywhere else 0.8 * self.reallocate_s(role, src, dst)

    def call_memory(self, call: Call, placement: Placement) -> TableMemory:
        strategy = placement.strategy
        shards = strategy.tp * strategy.pp
        scale = self.bytes_scale * (0.5 + draw(self.seed, call.role))
        trains = call.kind is CallKind.TRAIN_STEP
        return TableMemory(
            parameters=int(scale / shards),
            gradients=int(scale / shards) if trains else 0,
            optimizer=int(scale * 0.5 / shards) if trains else 0,
            working={"activations": int(300 * draw(self.seed, call.name, "work") / strategy.dp)},
        )


def _where(src: Placement, dst: Placement) -> tuple[object, ...]:
    shift = min(src.mesh.first, dst.mesh.first) // src.mesh.gpus_per_node * src.mesh.gpus_per_node
    return tuple(
        (p.mesh.first - shift, p.mesh.size, p.strategy.dp, p.strategy.tp, p.strategy.pp) for p in (src, dst)
    )


def keys(*names: str) -> tuple[DataKey, ...]:
    return tuple(DataKey(name, Per.TOKEN) for name in names)


def ppo_graph() -> DataflowGraph:
    """The six calls of PPO."""

    def infer(name: str, role: str, output: Output, writes: str) -> Call:
        return Call(name, CallKind.INFERENCE, ("tokens",), (writes,), role, "tokens", output)

    train_reads = ("tokens", "scores", "ref", "values")
    return DataflowGraph(
        calls=(
            Call("actor_gen", CallKind.GENERATE, ("prompts",), ("tokens",), "actor", "prompts"),
            infer("rew_inf", "reward", Output.SCORES, "scores"),
            infer("ref_inf", "ref", Output.LOGPROBS, "ref"),
            infer("critic_inf", "critic", Output.VALUES, "values"),
            Call("actor_train", CallKind.TRAIN_STEP, train_reads, (), "actor", "tokens",
                 Output.LOGPROBS, loss="actor_loss"),
            Call("critic_train", CallKind.TRAIN_STEP, train_reads, (), "critic", "tokens",
                 Output.VALUES, loss="critic_loss"),
        ),
        keys=keys("prompts", "tokens", "scores", "ref", "values"),
        source_keys=("prompts",),
    )  # fmt: skip


def short_graph(*, verify: bool = False) -> DataflowGraph:
    """Generate, score (by a frozen model, or a compute call), train: three calls."""
    score = Call("score", CallKind.INFERENCE, ("tokens",), ("scores",), "reward", "tokens", Output.SCORES)
    if verify:
        score = Call("score", CallKind.COMPUTE, ("tokens",), ("scores",), function="score")
    return DataflowGraph(
        calls=(
            Call("gen", CallKind.GENERATE, ("prompts",), ("tokens",), "actor", "prompts"),
            score,
            Call("train", CallKind.TRAIN_STEP, ("tokens", "scores"), (), "actor", "tokens",
                 Output.LOGPROBS, loss="loss"),
        ),
        keys=keys("prompts", "tokens", "scores"),
        source_keys=("prompts",),
    )  # fmt: skip


def make_experiment(graph: DataflowGraph, sequences: int = 64) -> Experiment:
    return Experiment(
        algorithm="ppo",
        models={role: ModelSpec(role, "tiny", SHAPE, OptimizerSpec()) for role in graph.roles},
        workload=Workload(sequences, Lengths(8.0, 8), Lengths(8.0, 8)),
    )


def make_problem(
    graph: DataflowGraph,
    cluster: Cluster,
    seed: int,
    *,
    moves: float = 0.2,
    bytes_scale: float = 200.0,
    limits: Limits | None = None,
    capacity: int = CAPACITY,
) -> Problem:
    experiment = make_experiment(graph)
    costs = TableCosts(seed, moves, bytes_scale)
    limits = limits or Limits(most_micro_batches=1, offload_from=math.inf, degrees_only=True)
    candidates = build_candidates(experiment, graph, cluster, costs, capacity, limits)
    return Problem(experiment, graph, cluster, costs, candidates, capacity)


def random_graph(seed: int, num_calls: int) -> DataflowGraph:
    """Calls of any kinds in any order: a trained role has users before its train_step, others are frozen.

    Every call writes one key and reads some of those before it.
    """
    generator = random.Random(seed)
    calls: list[Call] = []
    written = ["k0"]
    trained: list[str] = []
    while len(calls) < num_calls:
        at = len(calls) + 1
        reads = tuple(generator.sample(written, generator.randint(1, min(3, len(written)))))
        writes = (f"k{at}",)
        kind = generator.choice(["generate", "inference", "inference", "compute", "train"])
        users = [call.role for call in calls if call.role is not None and call.role not in trained]
        if kind == "train" and users:
            role = generator.choice(users)
            trained.append(role)
            reads = tuple(dict.fromkeys((*reads, calls[-1].writes[0] if calls[-1].writes else "k0")))
            calls.append(Call(f"c{at}", CallKind.TRAIN_STEP, reads, (), role, reads[0],
                              Output.LOGPROBS, loss="loss"))  # fmt: skip
            continue
        if kind == "compute":
            calls.append(Call(f"c{at}", CallKind.COMPUTE, reads, writes, None, reads[0], function="f"))
        else:
            role = generator.choice([*users, f"role{at}", f"role{at}"])
            is_generate = kind == "generate"
            calls.append(
                Call(f"c{at}", CallKind.GENERATE if is_generate else CallKind.INFERENCE, reads, writes, role,
                     reads[0], None if is_generate else Output.LOGPROBS)
            )  # fmt: skip
        written += writes
    graph = DataflowGraph(tuple(calls), keys(*dict.fromkeys(["k0", *written])), ("k0",))
    graph.check()
    return graph
