"""Who sends what to whom: what a rank works out for itself is its part of what holds for all."""

from __future__ import annotations

from pathlib import Path
from random import Random

from benchmarks.scale import SEQUENCES, write_plan
from realloc.augmented import NodeKind
from realloc.plan import read_plan
from runtime.data_store import IterationData
from runtime.program import compile_program
from runtime.transfer import assignment_of, messages


def test_the_messages_of_a_rank(tmp_path: Path) -> None:
    write_plan(tmp_path / "p.yaml", 2)
    plan = read_plan(tmp_path / "p.yaml")
    data = IterationData(plan.graph.key, [128] * SEQUENCES)
    for key in plan.graph.keys:
        random = Random(7)  # the same lengths for every key
        data.lengths[key.name] = [random.randint(130, 256) for _ in range(SEQUENCES)]
    transfers = [node for node in plan.augmented.nodes if node.kind is NodeKind.TRANSFER]
    assert len(transfers) > 5
    sent = 0
    for node in transfers:
        src, dst = plan.placements[str(node.src)], plan.placements[str(node.dst)]
        sources = assignment_of(plan.graph.by_name[str(node.src)], src, data)
        sinks = assignment_of(plan.graph.by_name[str(node.dst)], dst, data)
        everything = messages(plan.graph, node, src, dst, sources, sinks)
        for rank in range(plan.cluster.num_gpus):
            own = messages(plan.graph, node, src, dst, sources, sinks, rank)
            assert own == [m for m in everything if rank in (m.src, m.dst)]
        sent += len(everything)
    assert sent > 100


def test_programs_of_1024_ranks(tmp_path: Path) -> None:
    write_plan(tmp_path / "p.yaml", 128)
    program = compile_program(read_plan(tmp_path / "p.yaml"))  # proves that all get to the end
    assert len(program.by_rank) == 1024
    small = tmp_path / "small.yaml"
    write_plan(small, 1)
    assert len(program.of(1000)) <= len(compile_program(read_plan(small)).of(7)) + 2
