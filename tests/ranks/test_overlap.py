"""Calls on disjoint meshes run at the same time, also under an order that is derived from the plan."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch

from realloc.plan import plan_text, read_plan
from realloc.trace import Trace, TraceRecord
from runtime.dataset import open_dataset
from runtime.engine import Engine, Observer
from runtime.program import compile_program
from runtime.roles import load_roles
from runtime.tracing import Recorder, with_waits
from runtime.worker import make_plan_groups
from tests.ranks.engine import make_plan, ppo_content, write_models
from tests.ranks.launch import run_ranks

SPLIT = {
    "*": ("node0", "d2t1p1"),
    "critic_inf": ("node0:gpu[1]", "d1t1p1"),
    "actor_train": ("node0:gpu[0]", "d1t1p1"),
    "critic_train": ("node0:gpu[1]", "d1t1p1"),
}


def test_training_on_disjoint_meshes_overlaps(tmp_path: Path):
    models = write_models(tmp_path, hidden=96, layers=3, heads=4, kv_heads=2, ffn=256)
    content = ppo_content(tmp_path, models, hyperparameters={"mini_batches": 4, "epochs": 3})
    plan = make_plan(tmp_path, content, 2, SPLIT)
    path = tmp_path / "split.yaml"
    path.write_text(plan_text(plan))
    records = [r for rank in run_ranks(_traced, 2, str(path), timeout_s=120.0) for r in rank]
    trace = Trace(2, tuple(with_waits(records)))
    last = {r.node: r for r in trace.records if r.iteration == 2}
    actor, critic = last["actor_train"], last["critic_train"]
    together = min(actor.end_s, critic.end_s) - max(actor.start_s, critic.start_s)
    assert together > 0.5 * min(actor.end_s - actor.start_s, critic.end_s - critic.start_s)
    node_s = trace.node_seconds()
    assert trace.iteration_seconds() < sum(node_s.values()) - 0.5 * min(
        node_s["actor_train"], node_s["critic_train"]
    )


def _traced(rank: int, world_size: int, plan_path: str) -> list[TraceRecord]:
    plan = read_plan(plan_path)
    device = torch.device("cpu")
    groups = make_plan_groups(plan, rank, timedelta(seconds=60))
    roles = load_roles(plan, groups, device)
    engine = Engine(plan, compile_program(plan), rank, groups, roles, open_dataset(plan.experiment), device)
    recorder = Recorder(rank, 0.0)
    ignore = Observer(lambda iteration, index: None, lambda iteration, sums, data: None)
    engine.run(range(plan.experiment.iterations), recorder, ignore)
    return recorder.records
