"""Experiments, clusters and plans that the tests of this folder share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from realloc.dataflow import Call, CallKind, DataflowGraph, DataKey, Output, Per

EXPERIMENT: Mapping[str, Any] = {
    "realloc": "experiment/1",
    "algorithm": "ppo",
    "models": {
        "actor": {"path": "llama-7b", "optimizer": {"learning_rate": 2e-6, "warmup_steps": 5}},
        "critic": "llama-7b",
        "ref": "llama-7b",
        "reward": "llama-7b",
    },
    "workload": {
        "sequences": 64,
        "prompt_tokens": {"mean": 100, "max": 128},
        "response_tokens": 256,
    },
    "iterations": 3,
    "data": {"path": "prompts.jsonl", "prompt": "question"},
    "hyperparameters": {"mini_batches": 4},
    "sampling": {"temperature": 0.7},
    "dtype": "bfloat16",
    "seed": 7,
    "cluster": {"nodes": 2, "gpus_per_node": 8, "device": "h100", "memory_gib": 79.5},
}

_CALLS = ("actor_gen", "rew_inf", "ref_inf", "critic_inf", "actor_train", "critic_train")


def experiment_mapping() -> dict[str, Any]:
    """A valid experiment as it stands in a file, free to be changed."""
    return copy.deepcopy(dict(EXPERIMENT))


def plan_mapping() -> dict[str, Any]:
    """A valid plan as it stands in a file, free to be changed."""
    experiment = experiment_mapping()
    cluster = experiment.pop("cluster")
    del experiment["realloc"]
    placements: dict[str, Any] = {
        name: {"mesh": "node[0-1]", "strategy": {"dp": 2, "tp": 8, "micro_batches": 2}} for name in _CALLS
    }
    placements["actor_gen"] = {"mesh": "node[0-1]", "strategy": "d4t4p1"}
    placements["rew_inf"] = {"mesh": "node1:gpu[0-3]", "strategy": "d2t2p1m4"}
    placements["critic_train"] = {"mesh": "node0", "strategy": "d1t4p2m8"}
    return {
        "realloc": "plan/1",
        "placements": placements,
        "cluster": cluster,
        "experiment": experiment,
        "predictions": {
            "iteration_s": 12.5,
            "tokens_per_s": 1800,
            "costs": "analytic",
            "node_s": {"actor_gen": 5.5},
            "peak_bytes": {"parameters": 10_000_000},
            "lower_bound_s": 11,
        },
    }


def write(path: Path, content: Any) -> Path:
    """Writes the content as YAML, or as it is when it is text."""
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


def small_graph() -> DataflowGraph:
    """Generate, score with a frozen model, train: the least graph with every kind of edge."""
    return DataflowGraph(
        calls=(
            Call("gen", CallKind.GENERATE, ("prompts",), ("tokens",), "actor", "prompts"),
            Call("score", CallKind.INFERENCE, ("tokens",), ("scores",), "reward", "tokens", Output.SCORES),
            Call(
                "train",
                CallKind.TRAIN_STEP,
                ("tokens", "scores"),
                (),
                "actor",
                "tokens",
                Output.LOGPROBS,
                loss="loss",
            ),
        ),
        keys=(
            DataKey("prompts", Per.PROMPT_TOKEN, "int64"),
            DataKey("tokens", Per.TOKEN, "int64"),
            DataKey("scores", Per.SEQUENCE),
        ),
        source_keys=("prompts",),
    )
