"""Collectives on single tensors, under the names that this version of torch has for them."""

from __future__ import annotations

import torch
import torch.distributed as dist


def all_gather(whole: torch.Tensor, local: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Fills `whole` [ranks * n, ...] with every rank's contiguous `local` [n, ...], in rank order."""
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    function(whole, local, group=group)


def reduce_scatter(local: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Fills `local` [n, ...] with this rank's part of the sum of every rank's `whole` [ranks * n, ...]."""
    function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    function(local, whole, group=group)
