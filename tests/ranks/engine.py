"""Runs plans on ranks of this process tree, as the worker does, and returns what they computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from experiments import toy
from realloc.files import Reader
from realloc.plan import ExecutionPlan, plan_text, read_plan
from runtime.checkpoint_files import checkpoints_folder, list_checkpoints
from runtime.data_store import IterationData
from runtime.dataset import open_dataset
from runtime.engine import Engine, Observer, Sums
from runtime.metrics import combine
from runtime.program import compile_program
from runtime.roles import load_roles
from runtime.tracing import Recorder
from runtime.worker import export_models, make_plan_groups, reporting_ranks
from tests.ranks.launch import run_ranks
from tests.tiny import write_tiny_llama

ITERATIONS = 3


@dataclass(frozen=True)
class Outcome:
    """What a run computed: metrics, tokens and their scores in each iteration, final weights by role."""

    metrics: tuple[Mapping[str, float], ...]
    tokens: tuple[Mapping[int, tuple[int, ...]], ...]
    weights: Mapping[str, Mapping[str, NDArray[Any]]]
    nodes: tuple[str, ...]
    scores: tuple[Mapping[int, float], ...] = ()


def write_models(folder: Path, **shape: Any) -> Mapping[str, str]:
    """Tiny models of the four roles, with the toy language's tokenizer; role -> folder."""
    paths = {}
    for seed, role in enumerate(("actor", "ref", "critic", "reward")):
        head = "scalar" if role in ("critic", "reward") else "lm"
        # the reference starts as the actor, as in practice
        write_tiny_llama(
            folder / role,
            vocab=len(toy.vocabulary()),
            seed=0 if role == "ref" else seed,
            head=head,
            **shape,
        )
        toy.write_tokenizer(folder / role)
        paths[role] = str(folder / role)
    toy.write_data(folder, seed=5, num_train=40, num_test=2)
    return paths


def ppo_content(folder: Path, models: Mapping[str, str], **changes: Any) -> dict[str, Any]:
    """A PPO experiment over the toy data with large learning rates, so that mistakes show."""
    optimizer = {"learning_rate": 2e-3, "eps": 1e-5}
    content: dict[str, Any] = {
        "algorithm": "ppo",
        "models": {
            role: {"path": path, **({"optimizer": optimizer} if role in ("actor", "critic") else {})}
            for role, path in models.items()
        },
        "workload": {
            "sequences": 12,
            "prompt_tokens": {"mean": 10, "max": 16},
            "response_tokens": {"mean": 8, "max": 12},
        },
        "data": {"path": str(folder / "train.jsonl"), "prompt": "prompt"},
        "hyperparameters": {"mini_batches": 2, "epochs": 1},
        "iterations": ITERATIONS,
        "seed": 3,
    }
    return content | changes


def make_plan(
    folder: Path, experiment: Mapping[str, Any], gpus: int, placements: Mapping[str, Sequence[str]]
) -> ExecutionPlan:
    """A plan on one node from call -> (mesh, strategy); `*` stands for all other calls."""
    from realloc.experiment import parse_experiment

    graph = parse_experiment(Reader(dict(experiment), "experiment"), folder).graph()
    chosen = {call.name: placements.get(call.name, placements.get("*")) for call in graph.calls}
    content: dict[str, Any] = {
        "experiment": dict(experiment),
        "cluster": {"nodes": 1, "gpus_per_node": gpus, "device": "cpu"},
        "placements": {},
    }
    for call in graph.calls:
        mesh, strategy = chosen[call.name] or ("node0", f"d{gpus}t1p1")
        if call.role is None:
            size = mesh_size(mesh, gpus)
            strategy = f"d{size}t1p1"
        content["placements"][call.name] = {"mesh": mesh, "strategy": strategy}
    import yaml

    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({"realloc": "plan/1", **content}))
    return read_plan(path)


def mesh_size(mesh: str, gpus: int) -> int:
    if ":" not in mesh:
        return gpus
    first, _, last = mesh.partition("gpu[")[2].rstrip("]").partition("-")
    return int(last or first) - int(first) + 1


def run(plan: ExecutionPlan, folder: Path, *, timeout_s: float = 120.0) -> Outcome:
    """Runs the plan for its iterations on forked ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.yaml"
    path.write_text(plan_text(plan))
    results = run_ranks(_rank, plan.cluster.num_gpus, str(path), str(folder), timeout_s=timeout_s)
    tokens: list[dict[int, tuple[int, ...]]] = [{} for _ in range(plan.experiment.iterations)]
    for result in results:
        for iteration, sequences in enumerate(result["tokens"]):
            for position, sequence in sequences.items():
                assert tokens[iteration].setdefault(position, sequence) == sequence
    scores = tuple(
        {position: score for result in results for position, score in result["scores"][iteration].items()}
        for iteration in range(len(tokens))
    )
    metrics = tuple(
        combine(result["sums"][iteration] for result in results if result["reports"])
        for iteration in range(len(results[0]["sums"]))
    )
    weights = {role.name: read_weights(role) for role in (folder / "models").iterdir()}
    return Outcome(metrics, tuple(tokens), weights, plan.node_order, scores)


def read_weights(folder: str | Path) -> Mapping[str, NDArray[Any]]:
    """A checkpoint's tensors in fp32, as numpy has no bf16."""
    tensors = load_file(Path(folder) / "model.safetensors")
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def _rank(rank: int, world_size: int, plan_path: str, folder: str) -> dict[str, Any]:
    plan = read_plan(plan_path)
    program = compile_program(plan)
    device = torch.device("cpu")
    groups = make_plan_groups(plan, rank, timedelta(seconds=60))
    roles = load_roles(plan, groups, device)
    dataset = open_dataset(plan.experiment)
    engine = Engine(plan, program, rank, groups, roles, dataset, device)
    sums_by_iteration: list[Sums] = []
    tokens: list[dict[int, tuple[int, ...]]] = []
    scores: list[dict[int, float]] = []

    def report(iteration: int, sums: Sums, data: IterationData) -> None:
        sums_by_iteration.append(sums)
        tokens.append({p: tuple(t.tolist()) for p, t in data.values.get("tokens", {}).items()})
        scores.append({p: float(t) for p, t in data.values.get("scores", {}).items()})

    observer = Observer(lambda iteration, index: None, report)
    engine.run(range(plan.experiment.iterations), Recorder(rank, 0.0), observer)
    if plan.experiment.evaluation is not None:
        sums_by_iteration.append(engine.evaluate(plan.experiment.iterations, observer.entering))
    export_models(plan, roles, Path(folder) / "models", rank)
    reports = rank in reporting_ranks(plan)
    return {"sums": sums_by_iteration, "tokens": tokens, "scores": scores, "reports": reports}


def assert_same(actual: Outcome, expected: Outcome, tolerance: float = 1e-4) -> None:
    """Sampled tokens equal; metrics and final weights within `tolerance`, relative.

    Weights are compared by the norm of the difference over the norm of the change that training
    could have made visible, the weights themselves.
    """
    for iteration, (mine, theirs) in enumerate(zip(actual.tokens, expected.tokens, strict=True)):
        assert mine == theirs, f"iteration {iteration}: sampled tokens differ"
    for iteration, (got, want) in enumerate(zip(actual.metrics, expected.metrics, strict=True)):
        assert got.keys() == want.keys()
        for name, value in want.items():
            # a fraction counts elements beyond a threshold: rounding may carry one or two across
            counts = name.endswith("clip_fraction")
            limit = 0.03 if counts else tolerance * max(abs(value), 1e-2)
            assert abs(got[name] - value) <= limit, (iteration, name, got[name], value)
    assert actual.weights.keys() == expected.weights.keys()
    for role, tensors in expected.weights.items():
        for name, want_tensor in tensors.items():
            difference = np.linalg.norm(actual.weights[role][name] - want_tensor)
            assert difference <= tolerance * np.linalg.norm(want_tensor), (role, name, difference)


def checkpoint_names(out: Path) -> list[str]:
    """Those of a run's folder, oldest first."""
    return [path.name for path in list_checkpoints(checkpoints_folder(out))]
