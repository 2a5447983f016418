"""Causal attention over short sequences as batched products, many sequences at a time.

CPUs have no kernel for ragged sequences, and the fused one takes about as long to call as a short
sequence takes to compute. So sequences of similar length are padded to one and attended to in batched
products. Decides which lengths go together (`buckets`) and what is kept: queries, keys and values, as
fused kernels do; the attention weights are computed again in the backward pass. Padding stands at the
end, where causality hides it from every real query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

LONGEST = 512
"""Up to this many tokens: beyond, products over the masked half cost more than fused kernels."""
PADDING = 0.25
"""What a bucket may hold of padded positions, as a share of its sequences' pairs of tokens."""
FREE = 1 << 12
"""Attention weights that take about as long as one more bucket's calls."""
MAX_WEIGHTS = 1 << 19
"""Attention weights of one bucket (sequences x heads x length^2), so that they stay in the cache."""


@dataclass(frozen=True)
class Bucket:
    """Sequences, by their places in the pack, that are padded to `length`."""

    members: tuple[int, ...]
    length: int


def buckets(lengths: Sequence[int], heads: int) -> tuple[Bucket, ...]:
    """Sequences in groups of similar length, each for one batched product.

    This is the rule by which lengths decide what attention costs: a bucket costs its members times
    the square of its longest. Longest first, a sequence joins the last bucket as long as the pairs
    that padding adds stay below `PADDING` of the members' own, or cost less than another bucket
    (`FREE`), and `MAX_WEIGHTS` is kept.
    """
    result: list[Bucket] = []
    members: list[int] = []
    length = pairs = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        own = lengths[index] ** 2
        padded = (len(members) + 1) * length**2
        full = padded * heads > MAX_WEIGHTS
        wasted = padded - (pairs + own)
        if members and (full or wasted > PADDING * (pairs + own) + FREE / heads):
            result.append(Bucket(tuple(members), length))
            members, pairs = [], 0
        if not members:
            length = lengths[index]
        members.append(index)
        pairs += own
    if members:
        result.append(Bucket(tuple(members), length))
    return tuple(result)


@dataclass(frozen=True, eq=False)
class Padding:
    """How the rows of packed sequences and those of padded ones become each other.

    Padded, tensors are rows of `dim` numbers: bucket after bucket, in each by sequence, head, position.
    """

    lengths: tuple[int, ...]
    buckets: tuple[Bucket, ...]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(self.lengths)]

    @cached_property
    def _slots(self) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Of each bucket, [sequences, 1, length]: the packed row of each position, and which are real.

        Padding repeats the sequence's last row: it must be finite, and nothing depends on it.
        """
        result = []
        for bucket in self.buckets:
            starts = torch.tensor([self._starts[i] for i in bucket.members])[:, None, None]
            sizes = torch.tensor([self.lengths[i] for i in bucket.members])[:, None, None]
            position = torch.arange(bucket.length)[None, None, :]
            result.append((starts + torch.minimum(position, sizes - 1), position < sizes))
        return result

    @cached_property
    def _indices(self) -> dict[tuple[str, int, int], torch.Tensor]:
        return {}

    def num_rows(self, heads: int) -> int:
        return heads * sum(len(bucket.members) * bucket.length for bucket in self.buckets)

    def gather_index(self, heads: int, step: int) -> torch.Tensor:
        """The row of each padded one among packed rows of `dim`, of which tokens are `step` apart."""
        key = ("gather", heads, step)
        if key not in self._indices:
            head = torch.arange(heads)[None, :, None]
            parts = [(rows * step + head).flatten() for rows, _ in self._slots]
            self._indices[key] = torch.cat(parts)
        return self._indices[key]

    def padding_index(self, heads: int) -> torch.Tensor:
        """The padded rows that stand for no token."""
        key = ("padding", heads, 0)
        if key not in self._indices:
            real = [inside.expand(-1, heads, -1).flatten() for _, inside in self._slots]
            self._indices[key] = (~torch.cat(real)).nonzero()[:, 0]
        return self._indices[key]

    def scatter_index(self, heads: int) -> torch.Tensor:
        """[T, heads]: the padded row of each packed one."""
        key = ("scatter", heads, 0)
        if key not in self._indices:
            result = torch.empty(sum(self.lengths), heads, dtype=torch.int64)
            first = 0
            for rows, inside in self._slots:
                shape = (rows.shape[0], heads, rows.shape[2])
                real = inside.expand(shape)
                places = torch.arange(first, first + real.numel()).view(shape)
                head = torch.arange(heads)[None, :, None].expand(shape)
                result[rows.expand(shape)[real], head[real]] = places[real]
                first += real.numel()
            self._indices[key] = result
        return self._indices[key]

    def joint_index(self, heads: int, kv_heads: int) -> torch.Tensor:
        """[T, heads + 2 kv heads]: the rows of q, k and v, padded, one after the other."""
        key = ("joint", heads, kv_heads)
        if key not in self._indices:
            first = self.num_rows(heads)
            kv = self.scatter_index(kv_heads) + first
            parts = [self.scatter_index(heads), kv, kv + self.num_rows(kv_heads)]
            self._indices[key] = torch.cat(parts, dim=1)
        return self._indices[key]

    def mask(self, length: int, groups: int) -> torch.Tensor:
        """[groups * length, length]: 0 up to the query's position, -inf after it."""
        key = (length, groups)
        if key not in self._masks:
            square = torch.full((length, length), float("-inf")).triu_(1)
            self._masks[key] = square.repeat(groups, 1)
        return self._masks[key]

    @cached_property
    def _masks(self) -> dict[tuple[int, int], torch.Tensor]:
        return {}

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[T, heads, dim] -> padded rows [num_rows(heads), dim]."""
        num_tokens, heads, dim = x.shape
        if x.stride(2) != 1 or x.stride(1) != dim or x.stride(0) % dim:
            x = x.contiguous()
        step = x.stride(0) // dim
        rows = x.as_strided(((num_tokens - 1) * step + heads, dim), (dim, 1))
        return rows.index_select(0, self.gather_index(heads, step))

    def split(self, rows: torch.Tensor, heads: int, groups: int = 1) -> Sequence[torch.Tensor]:
        """Of each bucket [sequences * heads / groups, groups * length, dim]."""
        sizes = [len(bucket.members) * heads * bucket.length for bucket in self.buckets]
        parts = torch.split_with_sizes(rows, sizes)
        return [
            part.view(-1, groups * bucket.length, rows.shape[1])
            for part, bucket in zip(parts, self.buckets, strict=True)
        ]


class _Attention(torch.autograd.Function):
    """softmax(q k^T / sqrt(dim) + causal mask) v; the queries of a group stand under each other."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: Padding
    ) -> torch.Tensor:
        heads, dim = q.shape[1:]
        padded = [padding.pad(x) for x in (q, k, v)]
        out = q.new_empty(padding.num_rows(heads), dim)
        groups = heads // k.shape[1]
        qs, ks, vs, outs = _split(padding, [*padded, out], heads, groups)
        for query, key, value, part in zip(qs, ks, vs, outs, strict=True):
            torch.bmm(_weights(query, key, padding), value, out=part)
        ctx.save_for_backward(*padded)
        ctx.padding, ctx.heads, ctx.groups = padding, heads, groups
        return out.index_select(0, padding.scatter_index(heads).view(-1)).view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        padding, heads, groups = ctx.padding, ctx.heads, ctx.groups
        dim, scale = q.shape[1], q.shape[1] ** -0.5
        grad = padding.pad(grads[0])
        if padding.padding_index(heads).numel():
            grad.index_fill_(0, padding.padding_index(heads), 0.0)
        # one buffer, so that one gather brings all three back beside each other
        sizes = [x.shape[0] for x in (q, k, v)]
        joint = q.new_empty(sum(sizes), dim)
        views = _split(padding, [q, k, v, grad], heads, groups)
        results = _split(padding, torch.split_with_sizes(joint, sizes), heads, groups)
        for (query, key, value, out_grad), (dq, dk, dv) in zip(
            zip(*views, strict=True), zip(*results, strict=True), strict=True
        ):
            weights = _weights(query, key, padding)
            torch.bmm(weights.transpose(1, 2), out_grad, out=dv)
            products = torch.bmm(out_grad, value.transpose(1, 2))
            scores = torch._softmax_backward_data(products, weights, -1, weights.dtype)
            torch.baddbmm(dq, scores, key, beta=0.0, alpha=scale, out=dq)
            torch.baddbmm(dk, scores.transpose(1, 2), query, beta=0.0, alpha=scale, out=dk)
        kv_heads = heads // groups
        index = padding.joint_index(heads, kv_heads)
        flat = joint.index_select(0, index.view(-1)).view(*index.shape, dim)
        return (*torch.split_with_sizes(flat, [heads, kv_heads, kv_heads], dim=1), None)


def _split(
    padding: Padding, parts: Sequence[torch.Tensor], heads: int, groups: int
) -> Sequence[Sequence[torch.Tensor]]:
    """Buckets of q, k, v, and of what has q's shape."""
    kv_heads = heads // groups
    kinds = [(heads, groups), (kv_heads, 1), (kv_heads, 1), (heads, groups)]
    return [padding.split(part, *kind) for part, kind in zip(parts, kinds, strict=False)]


def _weights(query: torch.Tensor, key: torch.Tensor, padding: Padding) -> torch.Tensor:
    """softmax of the masked scores: [n, groups * length, dim] and [n, length, dim] -> [n, ., length]."""
    length, scale = key.shape[1], query.shape[2] ** -0.5
    mask = padding.mask(length, query.shape[1] // length)
    return torch.softmax(torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale), dim=-1)


def padded_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: Padding) -> torch.Tensor:
    """q [T, heads, dim], k and v [T, kv heads, dim] -> [T, heads, dim], causal in each sequence."""
    result: torch.Tensor = _Attention.apply(q, k, v, padding)  # type: ignore[no-untyped-call]
    return result
