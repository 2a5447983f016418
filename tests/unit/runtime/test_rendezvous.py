"""Ranks that exchange messages get to their end: in the strictest reading, for all schedules and moves.

The strictest reading is NCCL's: between two ranks the operations of one communicator run in the order
in which each rank issues them, and a message passes when both are at it. Held to it are the messages of
every pipeline schedule, the rounds of reallocations, and (tests/ranks) those that a run has sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from realloc.augmented import Placement
from realloc.errors import PlanError
from realloc.layout import Layout, layout
from realloc.mesh import DeviceMesh
from realloc.model_zoo import named_shapes
from realloc.pipeline_schedule import Pipeline, Work, destination, pipeline_actions, source
from realloc.reallocation import schedule
from realloc.strategy import Schedule, parse_strategy
from runtime.reallocation import Holding, Reallocator
from tests.rendezvous import Operation, Step, check_rendezvous


def test_what_waits_forever_is_found() -> None:
    send, receive = Operation(1, True), Operation(1, False)
    back, forth = Operation(0, True), Operation(0, False)
    check_rendezvous({0: [send, receive], 1: [forth, back]})
    with pytest.raises(PlanError, match="rank 0 waits forever for those to rank 1"):
        check_rendezvous({0: [send, receive], 1: [back, forth]})
    check_rendezvous({0: [(send, receive)], 1: [(back, forth)]})
    check_rendezvous({0: [send, replace(receive, channel=1)], 1: [replace(back, channel=1), forth]})
    with pytest.raises(PlanError, match="rank 0 waits forever"):
        check_rendezvous({0: [receive, send], 1: [forth, back]})
    with pytest.raises(PlanError, match="waits forever"):
        check_rendezvous({0: [send], 1: []})
    with pytest.raises(PlanError, match="meet on channel 0 with"):
        check_rendezvous({0: [replace(send, size=3)], 1: [replace(forth, size=4)]})
    circle = {rank: [Operation((rank - 1) % 3, False), Operation((rank + 1) % 3, True)] for rank in range(3)}
    with pytest.raises(PlanError, match="waits forever"):
        check_rendezvous(circle)


def stage_steps(pipeline: Pipeline, stage: int, channels: bool) -> list[Step]:
    """The messages of one stage as `runtime.pipeline` sends and receives them; `size` tells them apart."""

    def operation(work: Work, peer: int, taken: tuple[int, object], *, sends: bool) -> Operation:
        upwards = (stage < peer) == sends
        return Operation(peer, sends, 2 * work + upwards if channels else 0, hash((work, taken)))

    steps: list[Step] = []
    for action in pipeline_actions(pipeline)[stage]:
        needed, target = source(pipeline, stage, action), destination(pipeline, stage, action)
        if needed is not None and needed[0] != stage:
            steps.append(operation(action.work, needed[0], (stage, action), sends=False))
        if target is not None and target[0] != stage:
            steps.append(operation(action.work, target[0], target, sends=True))
    return steps


PIPELINES = [
    Pipeline(how, pp, virtual, micro_batches)
    for how in Schedule
    for pp in (2, 3, 4, 8)
    for virtual in ((2, 3) if how is Schedule.INTERLEAVED else (1,))
    for micro_batches in (1, 2, 3, 5, 8, 16)
]


@pytest.mark.parametrize("how", Schedule)
def test_stages_of_every_schedule_meet(how: Schedule) -> None:
    for pipeline in PIPELINES:
        if pipeline.schedule is how:
            check_rendezvous({stage: stage_steps(pipeline, stage, True) for stage in range(pipeline.pp)})


def test_one_channel_would_not_do() -> None:
    """Why forwards and backwards have channels of their own."""
    pipeline = Pipeline(Schedule.ONE_F_ONE_B, 2, 1, 4)
    with pytest.raises(PlanError, match="waits forever"):
        check_rendezvous({stage: stage_steps(pipeline, stage, False) for stage in range(2)})


SHAPE = replace(
    named_shapes()["llama-7b"], hidden=64, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=16,
    rotary_dim=16, ffn_dim=96, vocab=50,
)  # fmt: skip


def rounds_of(rank: int, src: Layout, dst: Layout, max_staging_bytes: int) -> Sequence[Step]:
    """What a rank sends and receives in each round of a reallocation."""

    def holding(where: Layout) -> Holding | None:
        boxes = where.boxes.get(rank)
        if boxes is None:
            return None
        return Holding({name: torch.zeros(box.shape) for name, box in boxes.items()}, boxes)

    mover = Reallocator(
        schedule(src, dst, 4, rank),
        rank,
        holding(src),
        holding(dst),
        src_dtype=torch.float32,
        dst_dtype=torch.float32,
        coalesce_bytes=4096,
        max_staging_bytes=max_staging_bytes,
    )
    return [
        tuple(Operation(peer, sends, 0, size) for peer, sends, size in messages)
        for messages in mover.messages
    ]


@pytest.mark.parametrize("max_staging_bytes", [2000, 1 << 20])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("d1t4p1", "d2t1p2"),
        ("d1t2p2", "d4t1p1"),
        ("d4t1p1z3", "d1t2p2"),
        ("d1t1p4", "d2t2p1"),
        ("d8t1p1z3", "d1t4p2"),
    ],
)
def test_rounds_of_reallocations_meet(before: str, after: str, max_staging_bytes: int) -> None:
    ends = [parse_strategy(text, "test") for text in (before, after)]
    placements = [Placement(DeviceMesh(0, end.size, 4), end) for end in ends]
    src, dst = (layout(SHAPE, at.mesh, at.strategy) for at in placements)
    world = max(end.size for end in ends)
    check_rendezvous({rank: rounds_of(rank, src, dst, max_staging_bytes) for rank in range(world)})
