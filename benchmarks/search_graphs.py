"""Graphs of many calls to plan for, and random experiments."""

from __future__ import annotations

import random
from dataclasses import replace

from cost_models.model import CostModel
from cost_models.profile import load_profile
from planner.candidates import build_candidates
from planner.problem import Problem
from realloc.cluster import Cluster
from realloc.dataflow import Call, CallKind, DataflowGraph, DataKey, Output, Per
from realloc.experiment import Experiment, ModelSpec, OptimizerSpec, Workload
from realloc.lengths import Lengths
from realloc.model_zoo import named_shapes

SIZES = ("llama-7b", "llama-13b", "llama-34b")


def chains(num_calls: int) -> DataflowGraph:
    """Groups of six calls like PPO's, each reading what the group before wrote: generate, three
    inferences, two train_steps; the last group is cut off where the number asks for it."""
    calls: list[Call] = []
    keys = ["prompts"]
    source = "prompts"
    group = 0
    while len(calls) < num_calls:
        names = {n: f"{n}{group}" for n in ("tokens", "scores", "ref", "values")}
        tokens, actor, critic = names["tokens"], f"actor{group}", f"critic{group}"
        reads = tuple(names.values())

        def infer(what: str, role: str, writes: str, output: Output, tokens: str = tokens) -> Call:
            return Call(what, CallKind.INFERENCE, (tokens,), (writes,), role, tokens, output)

        def train(role: str, output: Output, reads: tuple[str, ...] = reads, tokens: str = tokens) -> Call:
            return Call(
                f"{role}_train",
                CallKind.TRAIN_STEP,
                reads,
                (),
                role,
                tokens,
                output,
                loss="loss",
                mini_batches=4,
            )

        calls += [
            Call(f"{actor}_gen", CallKind.GENERATE, (source,), (tokens,), actor, source),
            infer(f"rew{group}_inf", f"reward{group}", names["scores"], Output.SCORES),
            infer(f"ref{group}_inf", f"ref{group}", names["ref"], Output.LOGPROBS),
            infer(f"{critic}_inf", critic, names["values"], Output.VALUES),
            train(actor, Output.LOGPROBS),
            train(critic, Output.VALUES),
        ]
        keys += names.values()
        source, group = tokens, group + 1
    kept = tuple(calls[:num_calls])
    graph = DataflowGraph(kept, tuple(DataKey(key, Per.TOKEN) for key in keys), ("prompts",))
    graph.check()
    return graph


def problem_of(experiment: Experiment, graph: DataflowGraph, cluster: Cluster) -> Problem:
    """Planning of any graph: every role a Llama-7B."""
    shape = named_shapes()[SIZES[0]]
    models = {role: ModelSpec(role, SIZES[0], shape, OptimizerSpec()) for role in graph.roles}
    given = replace(experiment, models=models)
    profile = load_profile(cluster.device)
    costs = CostModel(given, graph, cluster, profile)
    candidates = build_candidates(given, graph, cluster, costs, profile.memory_bytes)
    return Problem(given, graph, cluster, costs, candidates, profile.memory_bytes)


def random_experiment(seed: int, base: Experiment) -> tuple[Experiment, Cluster]:
    """PPO with models, lengths, batch and cluster drawn at random, where it is likely to fit."""
    generator = random.Random(seed)
    device = generator.choice(["h100-sxm", "a100-80gb"])
    nodes = generator.choice([1, 1, 2, 2, 4])
    per_node = 8
    biggest = 1 if nodes == 1 else 2 if nodes == 2 else 3
    large, small = generator.choice(SIZES[:biggest]), SIZES[0]
    named = {"actor": large, "ref": large, "critic": small, "reward": small}
    models = {
        role: replace(base.models[role], model=name, shape=named_shapes()[name])
        for role, name in named.items()
    }
    response = generator.choice([128, 256, 512, 1024])
    prompt = generator.choice([64, 128, 512])
    sequences = generator.choice([128, 256, 512, 1024])
    workload = Workload(sequences, Lengths(float(prompt), prompt), Lengths(float(response), response))
    return replace(base, models=models, workload=workload), Cluster(nodes, per_node, device)
