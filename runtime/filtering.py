"""Which tokens may be sampled at all: top-k, top-p, and tokens that are banned for now.

Works on logits that are split over the vocabulary; every rank of the group keeps the same set.
Tokens are kept by their logits alone, so that equal logits are kept or dropped together and the
set depends on neither the order of a sort nor the split.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

CANDIDATES = (64, 1024)
"""How many of the largest logits of a shard top-p looks at before it sorts them all."""


@dataclass(frozen=True, eq=False)
class Filter:
    """`top_k` 0 and `top_p` 1 keep all. `banned_ids` int64: tokens that rows with a ban must not get."""

    top_k: int
    top_p: float
    banned_ids: torch.Tensor

    def apply(
        self,
        logits: torch.Tensor,
        banned: torch.Tensor | None,
        vocab_start: int,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor | None:
        """A copy of `logits` float32 [n, local vocabulary] with -inf for what is not to be sampled.

        `banned` bool [n] says which rows have the ban; None: no row. Returns None when every token
        may be sampled. The most likely token that is not banned is always kept.
        """
        cut = self.top_k > 0 or self.top_p < 1.0
        if banned is None and not cut:
            return None
        kept = logits.clone()
        if banned is not None:
            local = self.banned_ids - vocab_start
            local = local[(local >= 0) & (local < logits.shape[1])]
            rows = banned.nonzero()
            if rows.numel() and local.numel():
                kept[rows, local] = float("-inf")
        if cut:
            least = least_kept(kept, self.top_k, self.top_p, group)
            kept.masked_fill_(kept < least[:, None], float("-inf"))
        return kept


def least_kept(
    logits: torch.Tensor, top_k: int, top_p: float, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """The smallest logit that is kept in each row [n], the same on all ranks of the group.

    First the `top_k` largest logits stay (0: all), then as few of the largest as have a share of
    `top_p` of what is left (Holtzman et al., arXiv 1904.09751).
    """
    if top_k > 0:
        largest, _ = _largest(logits, top_k, group)
        largest = largest[:, :top_k]
        if top_p >= 1.0:
            return largest[:, -1]
        ends = (largest - largest[:, :1]).to(torch.float64).exp().cumsum(-1)
        return _at_share(largest, ends, top_p * ends[:, -1])[0]
    total: torch.Tensor | None = None
    for count in (*CANDIDATES, sys.maxsize):
        largest, floor = _largest(logits, count, group)
        if total is None:
            total = _sum((logits - largest[:, :1]).exp_().sum(-1, dtype=torch.float64), group)
        ends = (largest - largest[:, :1]).to(torch.float64).exp().cumsum(-1)
        least, reached = _at_share(largest, ends, top_p * total)
        # below its floor, a shard may have logits that are not in the list
        if bool((reached & (least >= floor)).all()):
            break
    return least


def _at_share(
    largest: torch.Tensor, ends: torch.Tensor, aim: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of the descending logits whose cumulative weight reaches `aim`; whether any does."""
    index = (ends < aim[:, None]).sum(-1)
    last = largest.shape[1] - 1
    return largest.gather(1, index.clamp(max=last)[:, None])[:, 0], index <= last


def _largest(
    logits: torch.Tensor, count: int, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each shard's `count` largest logits in one descending list [n, ranks * count], and its floor.

    All logits at or above the floor [n] are in the list.
    """
    if group is not None and count > max(CANDIDATES):
        widest = torch.tensor([logits.shape[1]], device=logits.device)
        dist.all_reduce(widest, op=dist.ReduceOp.MAX, group=group)
        count = min(count, int(widest))
    some = logits.topk(min(count, logits.shape[1]), dim=1).values
    if group is None:
        whole = some.shape[1] == logits.shape[1]
        return some, torch.full_like(some[:, 0], float("-inf")) if whole else some[:, -1]
    mine = logits.new_full((logits.shape[0], count + 1), float("-inf"))
    mine[:, : some.shape[1]] = some
    if some.shape[1] < logits.shape[1]:
        mine[:, -1] = some[:, -1]
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    shards = torch.stack(parts)
    merged = shards[:, :, :-1].transpose(0, 1).flatten(1)
    return merged.sort(dim=1, descending=True).values, shards[:, :, -1].amax(dim=0)


def _sum(value: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is not None:
        dist.all_reduce(value, group=group)
    return value
