"""What 1,024 ranks cost before and between their instructions, without having them.

A hand-written plan of six-call PPO (70B actor and reference, 7B critic and reward), the same on 8, 64 and
1,024 H100s. Measured on one core, in seconds of computing:

- `compile_s`: reading the plan, its augmented graph, the program of all ranks; `check_s`: the proof
  that all ranks get to the end; `moves_check_s`: of every reallocation, copy by copy, for all ranks.
- `rank_start_s`: what one rank computes of the plan as it starts: program, layouts, its copies of every
  reallocation, and the process groups of all placements (torch's fake backend stands for the network).
- `dispatch_us`: an iteration of the engine with executors that do nothing, over its instructions: looking up,
  timing, recording, the heartbeat. Executors and data are left out, nothing else.
- `transfer_plan_ms`: who sends what to whom in the largest transfer, which every rank works out anew each
  iteration, as lengths differ.

    python benchmarks/scale.py [--quick] [--json]

The last line is one JSON object; `by_ranks` has the numbers of each size, the rest is of the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import yaml  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from benchmarks.provenance import provenance  # noqa: E402
from realloc.augmented import Node, NodeKind  # noqa: E402
from realloc.layout import Layout, layout  # noqa: E402
from realloc.plan import ExecutionPlan, read_plan  # noqa: E402
from realloc.reallocation import schedule  # noqa: E402
from runtime.data_store import IterationData  # noqa: E402
from runtime.dataset import DataBatch  # noqa: E402
from runtime.engine import Engine, Observer  # noqa: E402
from runtime.heartbeat import Board  # noqa: E402
from runtime.parallel import ParallelContext, single_rank  # noqa: E402
from runtime.program import Program, compile_program  # noqa: E402
from runtime.tracing import Recorder  # noqa: E402
from runtime.transfer import assignment_of, messages  # noqa: E402
from runtime.worker import make_plan_groups  # noqa: E402

GOALS = {"compile_s": 10.0, "dispatch_us": 100.0}
SEQUENCES = 4096
GPUS_PER_NODE = 8


def write_plan(path: Path, nodes: int) -> None:
    """Training, scoring and generation in different layouts, so that everything has to move."""
    gpus = nodes * GPUS_PER_NODE
    whole = f"node[0-{nodes - 1}]"
    first, second = (
        ("node0:gpu[0-3]", "node0:gpu[4-7]")
        if nodes == 1
        else (f"node[0-{nodes // 2 - 1}]", f"node[{nodes // 2}-{nodes - 1}]")
    )
    placements = {
        "actor_gen": (whole, {"dp": gpus // 4, "tp": 4}),
        "rew_inf": (first, {"dp": gpus // 8, "tp": 4}),
        "ref_inf": (second, {"dp": gpus // 8, "tp": 4}),
        "critic_inf": (second, {"dp": gpus // 4, "tp": 2}),
        "actor_train": (whole, {"dp": gpus // 8, "tp": 4, "pp": 2, "micro_batches": 4}),
        "critic_train": (whole, {"dp": gpus // 8, "tp": 8, "micro_batches": 2}),
    }
    content = {
        "realloc": "plan/1",
        "experiment": {
            "algorithm": "ppo",
            "models": {
                "actor": "llama-70b",
                "ref": "llama-70b",
                "critic": "llama-7b",
                "reward": "llama-7b",
            },
            "workload": {"sequences": SEQUENCES, "prompt_tokens": 128, "response_tokens": 128},
            "hyperparameters": {"mini_batches": 4},
            "dtype": "bfloat16",
        },
        "cluster": {"nodes": nodes, "gpus_per_node": GPUS_PER_NODE, "device": "h100-sxm"},
        "placements": {name: {"mesh": mesh, "strategy": s} for name, (mesh, s) in placements.items()},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def ends(plan: ExecutionPlan, node: Node) -> tuple[Layout, Layout]:
    """The layouts that a reallocation goes between."""
    shape = plan.experiment.role_shape(plan.graph, str(node.role))
    src, dst = (plan.placements[str(name)] for name in (node.src, node.dst))
    return layout(shape, src.mesh, src.strategy), layout(shape, dst.mesh, dst.strategy)


def moves(plan: ExecutionPlan) -> list[Node]:
    return [node for node in plan.augmented.nodes if node.kind is NodeKind.REALLOCATE]


def compile_seconds(path: Path) -> tuple[ExecutionPlan, Program, dict[str, float]]:
    """Reads, compiles and proves."""
    began = time.process_time()
    plan = read_plan(path)
    program = compile_program(plan)
    compiled = time.process_time()
    program.check()
    checked = time.process_time()
    for node in moves(plan):
        src, dst = ends(plan, node)
        schedule(src, dst, GPUS_PER_NODE).check(src, dst, GPUS_PER_NODE)
    done = time.process_time()
    return (
        plan,
        program,
        {
            "compile_s": compiled - began,
            "check_s": checked - compiled,
            "moves_check_s": done - checked,
        },
    )


def rank_start_seconds(path: Path, rank: int) -> float:
    """What a rank works out of its plan, with a world that has the others in name only."""
    began = time.process_time()
    plan = read_plan(path)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.cluster.num_gpus)
    compile_program(plan).of(rank)
    for node in moves(plan):
        if rank in node.ranks:
            schedule(*ends(plan, node), GPUS_PER_NODE, rank)
    make_plan_groups(plan, rank, timedelta(seconds=60))
    spent = time.process_time() - began
    dist.destroy_process_group()
    return spent


class _Idle:
    """Stands for every executor and role: does nothing."""

    reports = True
    memory = SimpleNamespace(wait=lambda: None, load=lambda name: None, offload=lambda name: None)

    def __init__(self, context: ParallelContext) -> None:
        self.context = context

    def run(self, *_: Any) -> Any:
        return self


class _IdleCall(_Idle):
    sums: Mapping[str, tuple[float, float]] = {"tokens": (1.0, 1.0), "loss": (1.0, 1.0)}


class _IdleEngine(Engine):
    """The engine itself, with nothing to execute and no data."""

    def _build(self, node: Node) -> None:
        if node.kind is NodeKind.CALL:
            mesh = self._plan.placements[node.name].mesh  # several ranks: its collectives are timed
            idle: Any = _IdleCall(replace(single_rank(), mesh=mesh))
            self._calls[node.name] = idle
            return
        moves: Any = SimpleNamespace(run=lambda *_: 0)
        (self._transfers if node.kind is NodeKind.TRANSFER else self._reallocators)[node.name] = moves

    def _source(self, batch: DataBatch, *, evaluates: bool = False) -> IterationData:
        nothing: Any = None
        idle: IterationData = nothing
        return idle


def dispatch_us(plan: ExecutionPlan, program: Program, rank: int, iterations: int) -> float:
    """Microseconds of computing between instructions, over an instruction."""
    unused: Any = None
    roles: Any = {role: _Idle(single_rank()) for role in plan.graph.roles}
    dataset: Any = SimpleNamespace(batch=lambda iteration: None)
    engine = _IdleEngine(plan, program, rank, unused, roles, dataset, torch.device("cpu"))
    board = Board(1)
    observer = Observer(lambda iteration, index: board.put(0, iteration, index), lambda *_: None)
    best = float("inf")
    for _ in range(5):
        recorder = Recorder(rank, time.time())
        began = time.process_time()
        engine.run(range(iterations), recorder, observer)
        best = min(best, time.process_time() - began)
    return 1e6 * best / (iterations * len(program.of(rank)))


def transfer_plan_ms(plan: ExecutionPlan, rank: int) -> float:
    """Milliseconds in which a rank works out the transfer with most ranks."""
    node = max(
        (node for node in plan.augmented.nodes if node.kind is NodeKind.TRANSFER), key=lambda n: len(n.ranks)
    )
    src, dst = plan.placements[str(node.src)], plan.placements[str(node.dst)]
    data = IterationData(plan.graph.key, [128] * SEQUENCES)
    for key in plan.graph.keys:
        data.lengths[key.name] = [256] * SEQUENCES
    producer, consumer = plan.graph.by_name[str(node.src)], plan.graph.by_name[str(node.dst)]
    began = time.process_time()
    sources, sinks = assignment_of(producer, src, data), assignment_of(consumer, dst, data)
    messages(plan.graph, node, src, dst, sources, sinks, rank)
    return 1e3 * (time.process_time() - began)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="realloc-scale-") as name:
        yield Path(name)


def measure(sizes: tuple[int, ...], iterations: int) -> dict[str, Any]:
    by_ranks = {}
    with folder() as place:
        for nodes in sizes:
            path = place / f"{nodes}.yaml"
            write_plan(path, nodes)
            plan, program, seconds = compile_seconds(path)
            ranks = plan.cluster.num_gpus
            middle = ranks // 2 + 1
            numbers = {
                **seconds,
                "rank_start_s": rank_start_seconds(path, middle),
                "dispatch_us": dispatch_us(plan, program, middle, iterations),
                "transfer_plan_ms": transfer_plan_ms(plan, middle),
                "instructions_of_a_rank": len(program.of(middle)),
            }
            by_ranks[ranks] = {name: round(value, 4) for name, value in numbers.items()}
    largest = by_ranks[max(by_ranks)]
    return {**largest, "goals": GOALS, "by_ranks": by_ranks, "provenance": provenance()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer iterations")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure((1, 8, 128), 200 if arguments.quick else 2000)
    names = list(next(iter(result["by_ranks"].values())))
    print(f"{'ranks':24}" + "".join(f"{ranks:>12}" for ranks in result["by_ranks"]))
    for name in names:
        print(f"{name:24}" + "".join(f"{row[name]:>12}" for row in result["by_ranks"].values()))
    print(json.dumps(result) if arguments.json else "")


if __name__ == "__main__":
    main()
