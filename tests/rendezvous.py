"""Whether ranks that send to and receive from each other all get to their end.

Decides from the order of each rank's operations alone, in the strictest reading of a backend: a message
passes only when both its ends are at it, and what a rank and a peer do through one channel, sends and
receives, they do one after the other in the order of issue. Knows no tensors, no backend and no plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from realloc.errors import PlanError


@dataclass(frozen=True)
class Operation:
    """One end of a message. `size` must agree at both ends.

    A send is left behind once issued, and its rank goes on; a receive holds its rank.
    """

    peer: int
    sends: bool
    channel: int = 0
    size: int = 0


Batch = tuple[Operation, ...]
"""Operations that begin together and hold their rank until all are done; those of one direction in order."""
Step = Operation | Batch
_Line = tuple[int, int, bool | None]
"""(peer, channel, None), or within batches (peer, channel, whether these are sends)."""


@dataclass
class _Rank:
    """Where a rank is: what it has still to issue, and what is issued and has not met its other end."""

    todo: deque[Step]
    lines: dict[_Line, deque[tuple[Operation, bool]]]
    held: int = 0

    def issue(self) -> list[_Line]:
        """Begins the next step; the lines that have grown."""
        step = self.todo.popleft()
        batch = isinstance(step, tuple)
        grown = []
        for operation in step if isinstance(step, tuple) else (step,):
            line = (operation.peer, operation.channel, operation.sends if batch else None)
            holds = batch or not operation.sends
            self.lines.setdefault(line, deque()).append((operation, holds))
            self.held += holds
            grown.append(line)
        return grown


def check_rendezvous(steps: Mapping[int, Sequence[Step]]) -> None:
    """Proves that every rank gets through its steps, and that no message is left.

    `steps`: rank -> what it does, in order. Raises PlanError that names who waits for whom.
    """
    ranks = {rank: _Rank(deque(own), {}) for rank, own in steps.items()}
    ready = deque(ranks)
    while ready:
        number = ready.popleft()
        rank = ranks[number]
        while not rank.held and rank.todo:
            for line in rank.issue():
                if _meet(ranks, number, line):
                    ready.append(line[0])
    for number, rank in ranks.items():
        waiting = [operation for line in rank.lines.values() for operation, _ in line]
        if rank.held or rank.todo or waiting:
            what = ", ".join(
                f"{'to' if o.sends else 'from'} rank {o.peer} (channel {o.channel}, {o.size})"
                for o in waiting[:4]
            )
            raise PlanError(f"messages: rank {number} waits forever for those {what}.")


def _meet(ranks: Mapping[int, _Rank], number: int, line: _Line) -> bool:
    """Lets messages of the line pass as long as both ends are at the same one; whether any did."""
    peer, channel, sends = line
    other = ranks[peer]
    mine = ranks[number].lines[line]
    theirs = other.lines.get((number, channel, None if sends is None else not sends), deque())
    passed = False
    while mine and theirs and mine[0][0].sends != theirs[0][0].sends:
        (own, holds), (its, its_holds) = mine.popleft(), theirs.popleft()
        if own.size != its.size:
            raise PlanError(
                f"messages: ranks {number} and {peer} meet on channel {channel} with {own.size} and "
                f"{its.size} elements."
            )
        ranks[number].held -= holds
        other.held -= its_holds
        passed = True
    return passed
