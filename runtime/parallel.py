"""Where this rank stands in one placement, and the process groups that the placement needs.

Decides nothing about what is computed. Groups are made once, in the same order on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from realloc.augmented import Placement
from realloc.mesh import DeviceMesh
from realloc.strategy import Coordinates, Strategy
from runtime.channels import Channels, make_channels
from runtime.gloo_threads import let_ranks_go_first


@dataclass(frozen=True)
class ParallelContext:
    """One rank's place in one placement. Groups are None where the degree is 1."""

    mesh: DeviceMesh
    strategy: Strategy
    rank: int
    at: Coordinates
    device: torch.device
    tp_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None
    mesh_group: dist.ProcessGroup | None = None
    ends_group: dist.ProcessGroup | None = None
    """First and last pipeline stage, for a tied embedding's gradient."""
    channels: Channels = field(default_factory=Channels)
    """For messages between stages."""

    @property
    def is_first(self) -> bool:
        return self.at.pp == 0

    @property
    def is_last(self) -> bool:
        return self.at.pp == self.strategy.pp - 1

    def rank_at(self, at: Coordinates) -> int:
        return self.mesh.first + self.strategy.index(at)

    def stage_rank(self, stage: int) -> int:
        """Global rank that has this rank's dp and tp coordinates on pipeline stage `stage`."""
        return self.rank_at(replace(self.at, pp=stage))


def single_rank(device: torch.device | None = None, rank: int = 0) -> ParallelContext:
    """The context of a call that runs on one rank alone."""
    return ParallelContext(
        mesh=DeviceMesh(rank, 1, 1),
        strategy=Strategy(),
        rank=rank,
        at=Coordinates(0, 0, 0),
        device=device or torch.device("cpu"),
    )


def group_ranks(placement: Placement) -> Iterable[tuple[int, ...]]:
    """The rank sets, of more than one rank, that a placement communicates in."""
    mesh, strategy = placement.mesh, placement.strategy
    for stage in range(strategy.pp):
        for dp in range(strategy.dp):
            yield _ranks(mesh, strategy, [Coordinates(stage, dp, t) for t in range(strategy.tp)])
        for tp in range(strategy.tp):
            yield _ranks(mesh, strategy, [Coordinates(stage, d, tp) for d in range(strategy.dp)])
    yield tuple(mesh.ranks)
    if strategy.pp > 1:
        for dp in range(strategy.dp):
            for tp in range(strategy.tp):
                ends = [Coordinates(stage, dp, tp) for stage in (0, strategy.pp - 1)]
                yield _ranks(mesh, strategy, ends)


def _ranks(mesh: DeviceMesh, strategy: Strategy, places: Sequence[Coordinates]) -> tuple[int, ...]:
    return tuple(mesh.first + strategy.index(at) for at in places)


@dataclass(frozen=True)
class Groups:
    """The process groups of a plan that this rank belongs to, by their ranks."""

    rank: int
    by_ranks: Mapping[tuple[int, ...], dist.ProcessGroup]
    channels: Channels = field(default_factory=Channels)

    def context(self, placement: Placement, device: torch.device) -> ParallelContext | None:
        """This rank's context in the placement; None when the rank is not in its mesh."""
        if self.rank not in placement.mesh:
            return None
        mesh, strategy = placement.mesh, placement.strategy
        at = strategy.coordinates(self.rank - mesh.first)

        def group(places: Sequence[Coordinates]) -> dist.ProcessGroup | None:
            return self.by_ranks.get(_ranks(mesh, strategy, places))

        last = strategy.pp - 1
        ends = [replace(at, pp=0), replace(at, pp=last)] if last and at.pp in (0, last) else []
        return ParallelContext(
            mesh=mesh,
            strategy=strategy,
            rank=self.rank,
            at=at,
            device=device,
            tp_group=group([replace(at, tp=t) for t in range(strategy.tp)]),
            dp_group=group([replace(at, dp=d) for d in range(strategy.dp)]),
            mesh_group=self.by_ranks.get(tuple(mesh.ranks)),
            ends_group=group(ends) if ends else None,
            channels=self.channels,
        )


def make_groups(placements: Iterable[Placement], rank: int, timeout: timedelta) -> Groups:
    """Makes every group that these placements need and keeps those that `rank` belongs to.

    All ranks of the world must pass the placements in the same order, and all take part in making
    every group: torch names a group that only its members make (`use_local_synchronization`) by
    how many groups a rank has, which differs between ranks here. It costs others no message: the 1,405
    groups of six layouts of 1,024 ranks took a rank 0.18 s.
    """
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    channels = Channels()
    for placement in placements:
        if placement.strategy.pp > 1 and not channels.groups:
            channels = make_channels(timeout)
        for ranks in group_ranks(placement):
            if len(ranks) > 1 and ranks not in made:
                made[ranks] = dist.new_group(list(ranks), timeout=timeout)
    own = {ranks: group for ranks, group in made.items() if rank in ranks}
    let_ranks_go_first()
    return Groups(rank, own, channels)
