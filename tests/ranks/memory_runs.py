"""Runs of a 15M-class model whose memory is watched and predicted, on CPU ranks and on a GPU.

On a CPU every allocation and release of torch is recorded by its profiler, those within operators too;
on a GPU the caching allocator counts. Parameters in shared memory are added. Prompts and responses all
have one length, so that what is predicted for mean lengths is what runs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

from cost_models.model import CostModel
from cost_models.profile import load_profile
from experiments import toy
from planner.assess import Assessment
from planner.memory import gpu_memory
from realloc.plan import ExecutionPlan, read_plan
from runtime.dataset import open_dataset
from runtime.engine import Engine, Observer
from runtime.program import compile_program
from runtime.roles import RankRole, load_roles
from runtime.tracing import Recorder
from runtime.worker import make_plan_groups
from tests.ranks.engine import make_plan, ppo_content
from tests.ranks.launch import run_ranks
from tests.tiny import write_tiny_llama

SHAPE: Mapping[str, Any] = {
    "hidden": 288, "layers": 6, "heads": 6, "kv_heads": 6, "ffn": 768, "vocab": 32000, "tied": True,
}  # fmt: skip
"""15.2M parameters."""
LENGTH, SEQUENCES = 32, 8


def memory_plan(
    folder: Path, gpus: int, training: str, *, dtype: str = "float32", text: int = 0
) -> ExecutionPlan:
    """PPO in which both train_steps have the strategy, and all other calls its degrees alone.

    `text`: as many texts of so many tokens as there are sequences are mixed in.
    """
    models: dict[str, str] = {}
    for head, roles in (("lm", ("actor", "ref")), ("scalar", ("critic", "reward"))):
        write_tiny_llama(folder / head, head=head, **SHAPE)
        toy.write_tokenizer(folder / head)
        models |= {role: str(folder / head) for role in roles}
    words = [word for word in toy.vocabulary() if not word.startswith("<")]
    rng = random.Random(1)
    # a token a word, and one that begins the text
    prompts = [" ".join(rng.choices(words, k=LENGTH - 1)) for _ in range(4 * SEQUENCES)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    mixed: dict[str, Any] = {}
    if text:
        rows = [{"text": " ".join(rng.choices(words, k=text))} for _ in range(SEQUENCES)]
        (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        mixed = {"path": str(folder / "texts.jsonl"), "sequences": SEQUENCES, "tokens": text}
    content = ppo_content(
        folder,
        models,
        workload={"sequences": SEQUENCES, "prompt_tokens": LENGTH, "response_tokens": LENGTH},
        sampling={"ignore_eos": True},
        hyperparameters={"mini_batches": 1, "epochs": 1, "ptx_coef": 0.5 if text else 0.0},
        pretrain_data=mixed or None,
        iterations=2,
        dtype=dtype,
    )
    degrees = training.partition("+")[0].partition("z")[0]
    placements = {"*": ("node0", degrees)}
    placements |= dict.fromkeys(("actor_train", "critic_train"), ("node0", training))
    return make_plan(folder, content, gpus, placements)


@dataclass(frozen=True)
class Watched:
    """Bytes of one rank: what it holds before the first iteration, and most that a call needs besides."""

    resident: int
    working: Mapping[str, int]


@dataclass
class _Ledger:
    """When memory was taken and given back on a CPU."""

    events: list[tuple[int, int]] = field(default_factory=list)

    def between(self, start_s: float, end_s: float) -> tuple[int, int]:
        """What is held at the start, and most that is held until the end besides.

        A call leaves nothing behind: what seems to be left was given back by gloo's own thread, which the
        profiler does not watch, and is taken off.
        """
        held = start = peak = 0
        for time_ns, size in self.events:
            if time_ns > end_s * 1e9:
                break
            held += size
            if time_ns <= start_s * 1e9:
                start = peak = held
            peak = max(peak, held)
        return start, peak - start - max(0, held - start)


def watch(plan: ExecutionPlan, folder: Path) -> list[Watched]:
    """What each rank held in a run of two iterations, the second counted."""
    return run_ranks(_rank, plan.cluster.num_gpus, str(folder / "plan.yaml"), timeout_s=240)


def _rank(rank: int, _: int, path: str) -> Watched:
    plan = read_plan(path)
    torch.zeros(1).add_(1)  # what torch makes once is not the run's
    with profile(use_kineto=True, profile_memory=True, use_cpu=True) as watching:
        groups = make_plan_groups(plan, rank, timedelta(seconds=60))
        roles = load_roles(plan, groups, torch.device("cpu"))
        engine = Engine(
            plan,
            compile_program(plan),
            rank,
            groups,
            roles,
            open_dataset(plan.experiment),
            torch.device("cpu"),
        )
        recorder = Recorder(rank, 0.0)
        began_s = recorder.now()
        engine.run(range(2), recorder, Observer(lambda *_: None, lambda *_: None))
    kineto = watching.kineto_results
    assert kineto is not None
    ledger = _Ledger(sorted((e.start_ns(), e.nbytes()) for e in kineto.events() if e.name() == "[memory]"))
    working = {}
    for record in recorder.records:
        if record.iteration == 1 and record.node in plan.graph.by_name:
            _, working[record.node] = ledger.between(record.start_s, record.end_s)
    resident, _ = ledger.between(began_s, began_s)
    return Watched(resident + _shared_bytes(roles.values()), working)


def _shared_bytes(roles: Any) -> int:
    """Parameters in memory that other processes may read: not torch's to allocate."""
    shared: dict[int, int] = {}
    for role in roles:
        assert isinstance(role, RankRole)
        for model in role.by_call.values():
            flat = model.params.flat
            if role.shared is not None and role.shared.find(flat) is not None:
                shared[flat.data_ptr()] = flat.nbytes
    return sum(shared.values())


def predict(plan: ExecutionPlan, device: str) -> list[Watched]:
    """What each rank is predicted to hold, by the stages that are on it."""
    assessment = Assessment(plan, CostModel(plan.experiment, plan.graph, plan.cluster, load_profile(device)))
    found = []
    for rank in range(plan.cluster.num_gpus):
        memory = assessment.memory_on(rank)
        held = gpu_memory(plan.graph, plan.placements, memory, rank, assessment.order).by_cause
        resident = sum(held[cause] for cause in ("parameters", "gradients", "optimizer"))
        found.append(Watched(resident, {name: sum(m.working.values()) for name, m in memory.items()}))
    assert max(map(_peak, found)) == assessment.memory.total_bytes
    return found


def differences(watched: Sequence[Watched], predicted: Sequence[Watched]) -> Mapping[str, float]:
    """Predicted over measured bytes, less one: of what stays, of each call's peak, of the plan's, each of
    the rank that needs most."""

    def over(of: Callable[[Watched], int]) -> float:
        return max(map(of, predicted)) / max(map(of, watched)) - 1

    found = {"resident": over(lambda rank: rank.resident), "plan": over(_peak)}
    for name in predicted[0].working:
        found[name] = over(lambda rank, name=name: rank.resident + rank.working[name])  # type: ignore[misc]
        found[f"{name} alone"] = over(lambda rank, name=name: rank.working[name])  # type: ignore[misc]
    return found


def _peak(rank: Watched) -> int:
    return rank.resident + max(rank.working.values())
