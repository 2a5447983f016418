"""Sequences that a call works on where it selects some of a batch.

Decides how those are dealt to replicas anew, and brings to each rank what it lacks of them. Which they are
is the algorithm's affair (`Call.select`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from realloc.dataflow import Call, CallKind
from realloc.errors import RunError
from runtime.batching import Assignment, assign
from runtime.data_store import IterationData
from runtime.parallel import ParallelContext
from runtime.transfer import Message, move, sequence_key, stages_reading


def settle(
    call: Call, context: ParallelContext, data: IterationData, before: Assignment, chosen: Sequence[int]
) -> Assignment:
    """Where the call works on what it selects; `chosen` are positions that this rank has chosen.

    An inference works where it has the sequences, so that those who read its results find them there. A
    train_step deals them anew: whichever they are, replicas have equally much. Every rank of the mesh takes
    part. Raises RunError.
    """
    positions = tell_mesh(chosen, data.num_sequences, context)
    if not 0 < len(positions) <= call.selected:
        raise RunError(
            f"{call.name}: {call.select} selects {len(positions)} of this iteration's {data.num_sequences} "
            f"samples, where 1 to {call.selected} are expected: too few of them have a score, or it "
            f"does not do what its graph says."
        )
    if call.kind is not CallKind.TRAIN_STEP:
        return before.among(positions)
    after = deal(positions, data.key_lengths(sequence_key(call)), call, context.strategy.dp)
    exchange(call, context, data, before, after)
    return after


def tell_mesh(chosen: Sequence[int], num_sequences: int, context: ParallelContext) -> tuple[int, ...]:
    """All positions that some rank of the mesh has chosen, ascending; one byte a sequence goes round."""
    flags = torch.zeros(num_sequences, dtype=torch.uint8)
    flags[list(chosen)] = 1
    if context.mesh_group is not None:
        flags = flags.to(context.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=context.mesh_group)
    return tuple(flags.nonzero()[:, 0].tolist())


def deal(positions: Sequence[int], lengths: Sequence[int], call: Call, dp: int) -> Assignment:
    """Mini-batches of these positions, in their order, each split over replicas by length."""
    among = assign([lengths[p] for p in positions], call.mini_batches, dp, call.together, always=True)
    return Assignment(
        tuple(tuple(tuple(positions[i] for i in share) for share in shares) for shares in among.shares)
    )


def exchange(
    call: Call, context: ParallelContext, data: IterationData, before: Assignment, after: Assignment
) -> None:
    """Brings what the call reads of this rank's sequences from the ranks that had them.

    Those are the ranks at the same place of other replicas. Every replica takes part.
    """
    keys = tuple(key for key in call.reads if context.at.pp in stages_reading(call, key, context.strategy.pp))
    if context.strategy.dp == 1 or not keys:
        return
    had, gets = (
        [frozenset(assignment.of(dp)) for dp in range(context.strategy.dp)] for assignment in (before, after)
    )
    own, plan = context.at.dp, []
    for dp in range(context.strategy.dp):
        peer = context.rank_at(replace(context.at, dp=dp))
        if dp != own and (positions := had[own] & gets[dp]):
            plan.append(Message(context.rank, peer, keys, tuple(sorted(positions))))
        if dp != own and (positions := had[dp] & gets[own]):
            plan.append(Message(peer, context.rank, keys, tuple(sorted(positions))))
    move(plan, context.rank, data)
