"""Programs: what every rank does in one iteration, compiled from the augmented graph.

A pure function of the plan; the rank enters last, as a filter. All ranks share one global order
of nodes, so sends and receives meet in the same order everywhere and nothing can deadlock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from realloc.augmented import Node, NodeKind
from realloc.dataflow import DataflowGraph
from realloc.errors import PlanError
from realloc.plan import ExecutionPlan
from runtime.transfer import header_keys


@dataclass(frozen=True)
class Instruction:
    """One node as one rank executes it; `index` is its place in the global order."""

    index: int
    node: Node
    predicted_s: float | None


@dataclass(frozen=True)
class Program:
    """The instructions of one iteration in their global order; every iteration repeats them."""

    world_size: int
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_rank(self) -> Mapping[int, tuple[Instruction, ...]]:
        lists: dict[int, list[Instruction]] = {rank: [] for rank in range(self.world_size)}
        for instruction in self.instructions:
            for rank in instruction.node.ranks:
                lists[rank].append(instruction)
        return {rank: tuple(instructions) for rank, instructions in lists.items()}

    def of(self, rank: int) -> tuple[Instruction, ...]:
        return self.by_rank[rank]

    def check(self) -> None:
        """Proves that all ranks get to the end of an iteration, executing their own lists.

        Each instruction is a meeting of its ranks: it runs when it is next on all of them.
        Raises PlanError when some ranks wait for each other forever.
        """
        position = dict.fromkeys(self.by_rank, 0)
        arrived: dict[int, int] = {}
        ready = list(self.by_rank)
        done = 0
        while ready:
            rank = ready.pop()
            if position[rank] == len(self.by_rank[rank]):
                continue
            instruction = self.by_rank[rank][position[rank]]
            arrived[instruction.index] = arrived.get(instruction.index, 0) + 1
            if arrived[instruction.index] == len(instruction.node.ranks):
                done += 1
                for peer in instruction.node.ranks:
                    position[peer] += 1
                ready.extend(instruction.node.ranks)
        if done != len(self.instructions):
            stuck = next(
                self.by_rank[rank][at] for rank, at in position.items() if at < len(self.by_rank[rank])
            )
            raise PlanError(f"program: ranks wait for each other forever at {stuck.node.name}.")


def compile_program(plan: ExecutionPlan) -> Program:
    """The checked program of a plan. Raises PlanError."""
    augmented = plan.augmented
    order = plan.node_order
    augmented.check_order(order, "plan")
    predicted = {} if plan.predictions is None else plan.predictions.node_s
    _check_lengths_known(plan.graph, [augmented.by_name[name] for name in order])
    instructions = tuple(
        Instruction(index, augmented.by_name[name], predicted.get(name)) for index, name in enumerate(order)
    )
    program = Program(plan.cluster.num_gpus, instructions)
    program.check()
    return program


def _check_lengths_known(graph: DataflowGraph, nodes: list[Node]) -> None:
    """A producer must know the lengths by which its consumers split their batch."""
    for node in nodes:
        if node.kind is not NodeKind.TRANSFER or node.src is None:
            continue
        producer = graph.by_name[node.src]
        known = {*producer.reads, *producer.writes}
        for key in header_keys(graph, node):
            if key not in known:
                raise PlanError(
                    f"dataflow graph: {node.dst} splits its batch by '{key}', so {node.src}, "
                    f"which sends it data, must read '{key}' too."
                )
