"""Tensor parallelism on plain local tensors: what crosses the tensor-parallel group, and when.

Two autograd functions surround a pair of column-split and row-split matrices (Megatron-LM,
arXiv 1909.08053, section 3); embedding and head are split over the vocabulary. Shards may be
uneven. Everything works without a group (one shard) and then communicates nothing. This module
knows no model: which matrix is split how is the decoder's affair.

With sequence parallelism (Korthikanti et al., arXiv 2205.05198, section 4.2.2) hidden states between
those pairs are split over the group by rows: an all-gather before the column-split matrices and a
reduce-scatter after the row-split ones take the place of the two all-reduces. Each shard has
`ceil(rows / shards)` rows; what the last ones have too many are padding that no result depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from runtime.collectives import all_gather, reduce_scatter
from runtime.linear import linear

Group = dist.ProcessGroup | None

CHUNK_ELEMENTS = 1 << 23
"""Logits computed at a time by `target_logprobs` (tokens x local vocabulary)."""
KEEP_ELEMENTS = 1 << 25
"""Up to this many logits are kept for the backward pass; beyond, they are computed twice."""


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        # a clone, because autograd may hand the same gradient tensor to another branch
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def _apply(function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
    result: torch.Tensor = function.apply(*args)
    return result


def copy_to_region(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Identity; its backward sums the gradient over the group.

    Put before column-split matrices: each rank computes only its columns' part of dL/dx.
    """
    return x if group is None else _apply(_CopyToRegion, x, group)


def reduce_from_region(x: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum of `x` over the group; its backward is the identity.

    Put after row-split matrices. Reduces in place: `x` must be fresh, contiguous and no view.
    """
    return x if group is None else _apply(_ReduceFromRegion, x, group)


def rows_per_shard(num_rows: int, shards: int) -> int:
    """Rows that each shard of a split has, padding included."""
    return -(-num_rows // shards)


def _gather(local: torch.Tensor, num_rows: int, group: dist.ProcessGroup) -> torch.Tensor:
    """[n, width] of each rank -> their first `num_rows` rows, in rank order."""
    size = dist.get_world_size(group)
    whole = local.new_empty(size * local.shape[0], *local.shape[1:])
    all_gather(whole, local.contiguous(), group)
    return whole[:num_rows]


def _scatter_sum(whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[T, width] -> this rank's rows of the sum over the group, padding rows 0."""
    shards = dist.get_world_size(group)
    rows = rows_per_shard(whole.shape[0], shards)
    missing = rows * shards - whole.shape[0]
    padded = F.pad(whole, (0, 0, 0, missing)) if missing else whole.contiguous()
    local = whole.new_empty(rows, *whole.shape[1:])
    reduce_scatter(local, padded, group)
    return local


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, num_rows: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _gather(x, num_rows, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _scatter_sum(grads[0], ctx.group), None, None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.num_rows = group, x.shape[0]
        return _scatter_sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _gather(grads[0], ctx.num_rows, ctx.group), None


class _JoinRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, num_rows: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.rows, ctx.rank = x.shape[0], dist.get_rank(group)
        return _gather(x, num_rows, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        start = ctx.rank * ctx.rows
        own = grads[0][start : start + ctx.rows]
        return F.pad(own, (0, 0, 0, ctx.rows - own.shape[0])), None, None


@dataclass(frozen=True)
class Region:
    """The part of a layer where matrices are split over the group, and how hidden states enter it.

    `num_rows` is how many rows the whole pack has when hidden states outside the region are split by
    rows (sequence parallelism), None when every rank has all of them.
    """

    group: Group
    num_rows: int | None = None

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states for column-split matrices: all rows [T, width]."""
        if self.group is None or self.num_rows is None:
            return copy_to_region(x, self.group)
        return _apply(_GatherRows, x, self.num_rows, self.group)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the group of what row-split matrices gave; `x` [T, width] must be fresh."""
        if self.group is None or self.num_rows is None:
            return reduce_from_region(x, self.group)
        return _apply(_ScatterRows, x, self.group)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """All rows, for what every rank computes alike: its gradient must be the same on all ranks."""
        if self.group is None or self.num_rows is None:
            return x
        return _apply(_JoinRows, x, self.num_rows, self.group)


AddRows = Callable[[torch.Tensor, torch.Tensor], None]
"""Takes row numbers [T] and what to add to the gradients of these rows [T, hidden]."""


class _Rows(torch.autograd.Function):
    """Rows of a table, whose gradient goes to `add` alone: no table of zeros is made for it."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor, add: AddRows) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.add = add
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:
        ctx.add(*ctx.saved_tensors, grads[0])
        return None, None, None


def add_rows(into: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Adds values [T, hidden] to rows of `into`, in its precision."""
    into.index_add_(0, rows, values.to(into.dtype))


def embedding(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    vocab_start: int,
    region: Region,
    add: AddRows | None = None,
) -> torch.Tensor:
    """Rows of a vocabulary-split embedding: tokens [T] int64 -> [T, hidden], or this rank's rows.

    `weight` holds the rows from `vocab_start` on. `add`, if given, takes its gradient on CPUs.
    """

    def rows(tokens: torch.Tensor) -> torch.Tensor:
        # on GPUs rows are added in any order, so that a run would not repeat itself bit for bit
        if add is None or weight.device.type != "cpu" or not torch.is_grad_enabled():
            return F.embedding(tokens, weight)
        return _apply(_Rows, tokens, weight, add)

    if region.group is None:
        return rows(tokens)
    local, inside = _local_tokens(tokens, vocab_start, weight.shape[0])
    return region.leave(rows(local).masked_fill(~inside[:, None], 0.0))


def _local_tokens(
    tokens: torch.Tensor, vocab_start: int, vocab_local: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers in this shard (0 for tokens of other shards) and which tokens are inside."""
    local = tokens - vocab_start
    inside = (local >= 0) & (local < vocab_local)
    return local.where(inside, torch.zeros_like(local)), inside


class _TargetLogprobs(torch.autograd.Function):
    """log softmax(inv_temperature * hidden @ weight^T) at the targets, over all vocabulary shards.

    Works through the tokens in chunks, so that at most CHUNK_ELEMENTS logits exist at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        vocab_start: int,
        inv_temperature: float,
        group: Group,
        into: torch.Tensor | None,
    ) -> torch.Tensor:
        vocab = weight.shape[0]
        local, inside = _local_tokens(targets, vocab_start, vocab)
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        keep = wants_grad and hidden.shape[0] * vocab <= KEEP_ELEMENTS
        kept: list[torch.Tensor] = []
        # one row each: largest logit of the shard, sum of exp(logit - largest), target's logit
        stats = torch.empty(3, hidden.shape[0], device=hidden.device)
        for part in _chunks(hidden.shape[0], vocab):
            logits = _logits(hidden[part], weight, inv_temperature)
            torch.amax(logits, 1, out=stats[0, part])
            torch.gather(logits, 1, local[part, None], out=stats[2, part].unsqueeze(1))
            logits.sub_(stats[0, part, None]).exp_()
            torch.sum(logits, 1, out=stats[1, part])
            if keep:
                kept.append(logits)
            del logits  # before the next chunk's come
        largest = stats[0].clone()
        if group is not None:
            dist.all_reduce(stats[0], op=dist.ReduceOp.MAX, group=group)
            stats[1] *= torch.exp(largest - stats[0])
            stats[2].masked_fill_(~inside, 0.0)
            dist.all_reduce(stats[1:], group=group)
        log_total = stats[0] + stats[1].log()
        ctx.save_for_backward(hidden, weight, local, inside, log_total, largest, *kept)
        ctx.inv_temperature, ctx.into = inv_temperature, into
        return stats[2] - log_total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """d logprob / d logit = [target] - softmax; `dL/dhidden` is this shard's part of it."""
        hidden, weight, local, inside, log_total, largest, *kept = ctx.saved_tensors
        grad = grads[0].float() * ctx.inv_temperature
        grad_hidden = torch.empty_like(hidden)
        grad_weight = ctx.into
        for i, part in enumerate(_chunks(hidden.shape[0], weight.shape[0])):
            if kept:
                scale = -grad[part] * torch.exp(largest[part] - log_total[part])
                # in place: autograd lets nobody come here twice
                grad_logits = kept[i].mul_(scale[:, None])
            else:
                grad_logits = _logits(hidden[part], weight, ctx.inv_temperature)
                grad_logits.sub_(log_total[part, None]).exp_().mul_(-grad[part, None])
            target_grad = (grad[part] * inside[part])[:, None]
            grad_logits.scatter_add_(1, local[part, None], target_grad)
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[part] = linear(grad_logits, weight.t())
            made = linear(grad_logits.t(), hidden[part].t())
            grad_weight = made.float() if grad_weight is None else grad_weight.add_(made)
            del grad_logits, made  # before the next chunk's come
        if ctx.into is not None:
            return grad_hidden, *[None] * 6
        result = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, result, *[None] * 5


def _logits(hidden: torch.Tensor, weight: torch.Tensor, inv_temperature: float) -> torch.Tensor:
    """Scaled fp32 logits [T, local vocabulary], a fresh tensor."""
    logits = linear(hidden, weight).float()
    return logits if inv_temperature == 1.0 else logits.mul_(inv_temperature)


def _chunks(num_tokens: int, vocab: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // vocab)
    return [slice(i, min(i + step, num_tokens)) for i in range(0, num_tokens, step)]


def target_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocab_start: int,
    group: Group,
    temperature: float = 1.0,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probability of each target under softmax(hidden @ weight^T / temperature).

    hidden [T, hidden], weight [local vocabulary, hidden] from row `vocab_start` on, targets [T]
    int64 (global ids) -> [T] float32, the same on all ranks of the group. Differentiable in
    hidden and weight, whose gradient is added to `into` where that is given. Communicates 3
    numbers per token in two all-reduces.
    """
    hidden = copy_to_region(hidden, group)
    return _apply(_TargetLogprobs, hidden, weight, targets, vocab_start, 1.0 / temperature, group, into)


def gather_columns(x: torch.Tensor, widths: list[int], group: Group) -> torch.Tensor:
    """[T, width of this rank] -> [T, sum(widths)], columns in rank order. Not differentiable."""
    if group is None:
        return x
    # padded to the widest shard: all_gather wants equal sizes
    padded = x.new_zeros(x.shape[0], max(widths))
    padded[:, : x.shape[1]] = x
    parts = [torch.empty_like(padded) for _ in widths]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)
