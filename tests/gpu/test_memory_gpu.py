"""On a GPU: peaks of the caching allocator against the memory model, for a 15M-class model."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch

from realloc.plan import read_plan
from runtime.dataset import open_dataset
from runtime.engine import Engine, Observer
from runtime.program import compile_program
from runtime.roles import load_roles
from runtime.tracing import Recorder
from runtime.worker import make_plan_groups
from tests.ranks.launch import run_ranks
from tests.ranks.memory_runs import Watched, differences, memory_plan, predict

pytestmark = [
    pytest.mark.gpu,
    # without making a context here: the rank is forked
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a GPU"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", ["d1t1p1", "d1t1p1m2+selective", "d1t1p1m4+full"])
def test_peaks_are_as_predicted(tmp_path: Path, training: str, dtype: str) -> None:
    plan = memory_plan(tmp_path, 1, training, dtype=dtype)
    watched = run_ranks(_rank, 1, str(tmp_path / "plan.yaml"), timeout_s=240)
    found = differences(watched, predict(plan, "h100-sxm"))
    peaks = {name: found[name] for name in ("resident", *plan.placements, "plan")}
    assert max(map(abs, peaks.values())) < 0.05, peaks


def _rank(rank: int, _: int, path: str) -> Watched:
    plan = read_plan(path)
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    groups = make_plan_groups(plan, rank, timedelta(seconds=60))
    program = compile_program(plan)
    roles = load_roles(plan, groups, device)
    engine = Engine(plan, program, rank, groups, roles, open_dataset(plan.experiment), device)
    resident = torch.cuda.memory_allocated(device)
    names = [instruction.node.name for instruction in program.instructions]
    working: dict[str, int] = {}
    held = 0
    running: str | None = None

    def count(following: str | None) -> None:
        """Ends the node that ran, and begins the next one."""
        nonlocal held, running
        if running is not None and running in plan.graph.by_name:
            working[running] = torch.cuda.max_memory_allocated(device) - held
        torch.cuda.reset_peak_memory_stats(device)
        held, running = torch.cuda.memory_allocated(device), following

    observer = Observer(lambda _, index: count(names[index]), lambda *_: count(None))
    engine.run(range(2), Recorder(rank, 0.0), observer)
    return Watched(resident, working)
