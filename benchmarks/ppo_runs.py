"""PPO experiments of a few sizes, run through realloc's command line as a user runs them.

What the benchmarks of whole iterations share: models, workloads, plans, and the times of a run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from experiments import toy
from realloc.augmented import Placement
from realloc.files import dump_yaml
from realloc.mesh import parse_mesh
from realloc.plan import ExecutionPlan, read_plan, write_plan
from realloc.strategy import parse_strategy
from realloc.trace import read_trace
from tests.tiny import write_tiny_llama

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "experiments" / "demo"
ROLES = ("actor", "ref", "critic", "reward")
MAX_PROMPT = 16
REWARD = """
GLAD = frozenset("happy cheerful proud delighted joyful grateful kind brave gentle friendly lovely".split())

def share(text):
    words = text.split()
    return sum(word in GLAD for word in words) / max(1, len(words))

def score(samples):
    return [share(sample.response) for sample in samples]
"""
"""The module `bench_reward`, which both sides import."""


@dataclass(frozen=True)
class Shape:
    """One comparison. `random` are the arguments of a random Llama; None takes the demo's trained model.

    With `ignore_eos` every response has `max_response` tokens, else it ends where the model ends it.
    `curves`: the models are trained ones, and iterations are cheap enough to compare how both sides learn.
    `samples`: of each prompt.
    """

    name: str
    random: Mapping[str, int] | None
    sequences: int
    max_response: int
    learning_rate: float
    ignore_eos: bool
    mini_batches: int = 4
    epochs: int = 2
    kl_coef: float = 0.05
    beta2: float = 0.95
    eps: float = 1e-5
    curves: bool = False
    algorithm: str = "ppo"
    samples: int = 1

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles with models of their own; GRPO takes its scores from REWARD."""
        return ROLES if self.algorithm == "ppo" else ("actor", "ref")


SHAPES = (
    Shape("demo-0.3M", None, 64, 48, 5e-4, ignore_eos=False, curves=True),
    Shape(
        "llama-4M",
        {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 1024, "vocab": 192, "context": 128},
        32,
        64,
        2e-4,
        ignore_eos=True,
    ),
    Shape(
        "llama-4M-1step",
        {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 1024, "vocab": 192, "context": 128},
        16,
        32,
        2e-4,
        ignore_eos=True,
        mini_batches=1,
        epochs=1,
    ),
    Shape(
        "demo-0.3M-grpo",
        None,
        64,
        48,
        5e-4,
        ignore_eos=False,
        mini_batches=1,
        epochs=1,
        kl_coef=0.04,
        curves=True,
        algorithm="grpo",
        samples=8,
    ),
    Shape(
        "llama-15M",
        {"hidden": 288, "layers": 6, "heads": 6, "kv_heads": 6, "ffn": 768, "vocab": 32000, "context": 128},
        16,
        64,
        1e-4,
        ignore_eos=True,
    ),
)


@dataclass(frozen=True)
class Turn:
    """What one run of one side measured: seconds and mean scores of its iterations."""

    seconds: tuple[float, ...]
    scores: tuple[float, ...]
    kls: tuple[float, ...]
    """From the reference model: of PPO nats a response, of GRPO nats a token."""
    lengths: tuple[float, ...] = ()
    """Mean tokens of a response."""

    @property
    def steady(self) -> tuple[float, ...]:
        return self.seconds[1:]


def prepare_models(shape: Shape, folder: Path) -> Mapping[str, Path]:
    """Writes the folders of the four models; the reference is the actor, the others have scalar heads."""
    paths = {role: folder / ("actor" if role == "ref" else role) for role in ROLES}
    for seed, role in enumerate(("actor", "critic", "reward")):
        head = "lm" if role == "actor" else "scalar"
        if shape.random is not None:
            tied = shape.random["vocab"] > 1000 and role == "actor"
            write_tiny_llama(paths[role], seed=seed, head=head, tied=tied, **shape.random)
            toy.write_tokenizer(paths[role])
        else:
            shutil.copytree(DEMO / "model", paths[role])
            if head == "scalar":
                _to_classifier(paths[role], seed)
    shutil.copy(DEMO / "prompts.jsonl", folder / "prompts.jsonl")
    return paths


def _to_classifier(folder: Path, seed: int) -> None:
    """Gives a causal model a random scalar head in place of its own."""
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight", None)
    hidden = weights["model.norm.weight"].shape[0]
    scale = 1.0 / hidden**0.5
    weights["score.weight"] = scale * np.random.default_rng(seed).standard_normal((1, hidden), np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "tie_word_embeddings": False,
    }
    path.write_text(json.dumps(config), encoding="utf-8")


class Ours:
    """realloc, through its command line."""

    def __init__(
        self, shape: Shape, folder: Path, profile: Path, iterations: int, ranks: int | None = None
    ) -> None:
        """Searches a plan; `ranks`: as many as there are cores where None."""
        self._shape, self._folder, self._iterations = shape, folder, iterations
        self._ranks = ranks or len(os.sched_getaffinity(0))
        self._experiment()
        realloc_command(folder, "search", "experiment.yaml", "--device", str(profile), "-o", "plan.yaml")

    def place(self, placements: Mapping[str, tuple[str, str]]) -> None:
        """Puts a hand-written plan (call -> mesh, strategy) in place of the searched one."""
        searched = read_plan(self._folder / "plan.yaml")
        cluster = replace(searched.cluster, device="cpu")  # the profile's file is no part of this plan
        chosen = {
            name: Placement(parse_mesh(mesh, cluster, name), parse_strategy(strategy, name))
            for name, (mesh, strategy) in placements.items()
        }
        plan = ExecutionPlan(searched.experiment, cluster, chosen)
        plan.check()
        write_plan(plan, self._folder / "plan.yaml")

    @property
    def order(self) -> Sequence[str]:
        return read_plan(self._folder / "plan.yaml").node_order

    @property
    def trace(self) -> Path:
        """The last run's trace."""
        return self._folder / "out" / "trace.jsonl"

    @property
    def plan(self) -> Mapping[str, str]:
        return {name: str(p) for name, p in read_plan(self._folder / "plan.yaml").placements.items()}

    @property
    def predicted_s(self) -> float | None:
        predictions = read_plan(self._folder / "plan.yaml").predictions
        return None if predictions is None else predictions.iteration_s

    def run(self, seed: int, *, saves: bool = False) -> Turn:
        """Runs the plan. `saves`: with checkpoints as they are by default, else with the last one alone."""
        plan = self._folder / "plan.yaml"
        text = plan.read_text(encoding="utf-8")
        if seed:
            plan = self._folder / f"plan-{seed}.yaml"
            plan.write_text(text.replace("\n  seed: 0\n", f"\n  seed: {seed}\n"), encoding="utf-8")
            if read_plan(plan).experiment.seed != seed:
                raise AssertionError("the plan's seed was not replaced")
        out = self._folder / "out"
        options = ("--out", str(out), "--overwrite", *(() if saves else ("--save-every", "0")))
        realloc_command(self._folder, "run", str(plan), "--trust", *options)
        return read_turn(out)

    def _experiment(self) -> None:
        shape = self._shape
        optimizer = {
            "learning_rate": shape.learning_rate,
            "beta1": 0.9,
            "beta2": shape.beta2,
            "eps": shape.eps,
            "clip_norm": 0.0,  # TRL's PPO does not clip gradients
        }
        models: dict[str, Any] = {}
        for role in shape.roles:
            path = str(self._folder / ("actor" if role == "ref" else role))
            models[role] = {"path": path, "optimizer": optimizer} if role in ("actor", "critic") else path
        content = {
            "algorithm": shape.algorithm,
            "models": models,
            "data": {"path": str(self._folder / "prompts.jsonl"), "prompt": "prompt"},
            "workload": {
                "sequences": shape.sequences,
                "prompt_tokens": {"mean": 12, "max": MAX_PROMPT},
                "response_tokens": shape.max_response,
                "samples_per_prompt": shape.samples,
            },
            "hyperparameters": {
                "kl_coef": shape.kl_coef,
                "mini_batches": shape.mini_batches,
                "epochs": shape.epochs,
            },
            "sampling": {"ignore_eos": shape.ignore_eos},
            "iterations": self._iterations,
            "seed": 0,
            "cluster": {"gpus_per_node": self._ranks, "device": "cpu"},
        }
        if shape.algorithm == "grpo":
            content["reward"] = "bench_reward:score"
            (self._folder / "bench_reward.py").write_text(REWARD, encoding="utf-8")
        text = dump_yaml("experiment", content)
        (self._folder / "experiment.yaml").write_text(text, encoding="utf-8")


def read_turn(out: Path) -> Turn:
    """What the trace and the metrics of a run's folder say."""
    ends: dict[int, float] = {}
    for record in read_trace(out / "trace.jsonl").records:
        ends[record.iteration] = max(ends.get(record.iteration, 0.0), record.end_s)
    seconds = [b - a for a, b in pairwise([0.0, *(ends[i] for i in sorted(ends))])]
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    lengths = tuple(float(m["actor_gen/response_tokens"]) for m in metrics)
    return Turn(tuple(seconds), tuple(map(_score, metrics)), tuple(map(_kl, metrics)), lengths)


def _score(metrics: Mapping[str, Any]) -> float:
    """The mean score in a line of metrics.jsonl."""
    return float(next(value for name, value in metrics.items() if name == "rew_inf/scores"))


def _kl(metrics: Mapping[str, Any]) -> float:
    """The mean over responses of the summed log ratio to the reference model; of GRPO over tokens."""
    if "critic_train/loss" not in metrics:
        return float(metrics["actor_train/ref_kl"])
    return float(metrics["actor_train/ref_kl"] * metrics["actor_gen/response_tokens"])


def realloc_command(folder: Path, *arguments: str) -> None:
    """Runs `realloc ARGUMENTS` in a folder, to its end."""
    checked([sys.executable, "-m", "realloc", *arguments], folder)


def checked(command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> None:
    """Runs a command to its end. Exits with the tail of its output when it fails."""
    merged = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    if environment is not None:
        del merged["PYTHONPATH"]  # the peer's own environment
    result = subprocess.run(command, cwd=folder, env=merged, capture_output=True, text=True, check=False)
    if result.returncode:
        tail = "\n".join((result.stdout + result.stderr).splitlines()[-25:])
        raise SystemExit(f"{' '.join(command)} ended with {result.returncode}:\n{tail}")
