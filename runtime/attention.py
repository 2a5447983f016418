"""Causal attention over packed sequences, and over a key/value cache.

Decides which kernel runs. Knows nothing of parallelism: it sees the heads of one shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch
import torch.nn.functional as F

from runtime.varlen import varlen_kernel

ONE_BY_ONE = 1 << 14
"""Sequences longer than this many tokens do not share a kernel call with their neighbours."""


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """How sequences lie one after the other in a packed tensor of `num_tokens` rows.

    `lengths` are in tokens, none is 0. `device` is where the index tensors are made.
    """

    lengths: tuple[int, ...]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def lengths_tensor(self) -> torch.Tensor:
        """int64 [num_sequences]."""
        return torch.tensor(self.lengths, dtype=torch.int64, device=self.device)

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """int32 [num_sequences + 1]: where each sequence starts, and the end."""
        return F.pad(self.lengths_tensor.cumsum(0), (1, 0)).to(torch.int32)

    @cached_property
    def sequence_index(self) -> torch.Tensor:
        """int64 [num_tokens]: the sequence each token belongs to."""
        index = torch.arange(len(self.lengths), device=self.device)
        return torch.repeat_interleave(index, self.lengths_tensor, output_size=self.num_tokens)

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 [num_tokens]: each token's place in its sequence, from 0."""
        starts = self.cu_seqlens[:-1].to(torch.int64)
        return torch.arange(self.num_tokens, device=self.device) - starts[self.sequence_index]

    @cached_property
    def last_index(self) -> torch.Tensor:
        """int64 [num_sequences]: the row of each sequence's last token."""
        return self.cu_seqlens[1:].to(torch.int64) - 1

    @cached_property
    def runs(self) -> Sequence[tuple[int, int, int]]:
        """(first row, how many, length) of each run of neighbours of equal length."""
        result, start = [], 0
        for length, run in groupby(self.lengths):
            count = len(list(run))
            step = max(1, ONE_BY_ONE // length)
            for first in range(0, count, step):
                number = min(step, count - first)
                result.append((start, number, length))
                start += number * length
        return result


def pack(lengths: torch.Tensor | Sequence[int], device: torch.device | None = None) -> PackedSequences:
    """PackedSequences of these lengths; on the lengths' own device where it is a tensor."""
    if isinstance(lengths, torch.Tensor):
        return PackedSequences(tuple(lengths.tolist()), device or lengths.device)
    return PackedSequences(tuple(lengths), device or torch.device("cpu"))


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSequences
) -> torch.Tensor:
    """Causal attention within each packed sequence.

    q [T, heads, dim], k and v [T, kv heads, dim] -> [T, heads, dim]. Query head i uses kv head
    i // (heads / kv heads). Where there is a kernel for ragged sequences, one call serves all;
    else one per run of equal lengths.
    """
    ragged = varlen_kernel(q)
    if ragged is not None:
        return ragged(q, k, v, packed.cu_seqlens, max(packed.lengths))
    gqa = q.shape[1] != k.shape[1]
    parts = []
    for start, count, length in packed.runs:
        rows = slice(start, start + count * length)
        q_run, k_run, v_run = (x[rows].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        part = F.scaled_dot_product_attention(q_run, k_run, v_run, is_causal=True, enable_gqa=gqa)
        parts.append(part.transpose(1, 2).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class KVCache:
    """Keys and values of up to `slots` sequences for the layers of one stage, kv heads of one shard.

    Live sequences fill the first slots without gaps, so that decoding works on plain slices.
    Allocated once; nothing grows.
    """

    def __init__(
        self,
        num_layers: int,
        slots: int,
        kv_heads: int,
        max_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # zeros, not empty: masked positions still enter the products, and 0 * NaN is NaN
        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(num_layers, slots, kv_heads, *size, dtype=dtype, device=device)

        # keys lie as the product with a query reads them, tokens innermost
        self.keys = zeros(head_dim, max_tokens)
        self.values = zeros(max_tokens, head_dim)

    def write(
        self, layer: int, slots: torch.Tensor, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Stores k and v [T, kv heads, dim] at (slots[t], positions[t])."""
        self.keys[layer][slots, :, :, positions] = k
        self.values[layer][slots, :, positions] = v

    def move(self, src: torch.Tensor, dst: torch.Tensor, num_tokens: int) -> None:
        """Copies the first `num_tokens` of slots `src` over slots `dst`, in all layers.

        One `src` for all, or one for each of `dst`.
        """
        self.put(dst, *self.take(src, num_tokens))

    def take(self, slots: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the first keys and values of these slots."""
        return self.keys[:, slots, ..., :num_tokens], self.values[:, slots, :, :num_tokens]

    def put(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes what `take` gave, of one slot or of as many, to the beginning of these slots."""
        num_tokens = keys.shape[-1]
        self.keys[:, slots, ..., :num_tokens] = keys
        self.values[:, slots, :, :num_tokens] = values


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """One decoding step: live slots 0..n-1 each take one token at `positions` [n].

    `context` is how many cached tokens the longest sequence has after this step.
    """

    positions: torch.Tensor
    context: int

    @cached_property
    def slots(self) -> torch.Tensor:
        return torch.arange(self.positions.shape[0], device=self.positions.device)

    @cached_property
    def bias(self) -> torch.Tensor | None:
        """float32 [n, context]: 0 where a sequence has a token, else -inf. None where all have all."""
        if self.positions.device.type == "cpu" and bool((self.positions == self.context - 1).all()):
            return None
        index = torch.arange(self.context, device=self.positions.device)
        outside = index > self.positions[:, None]
        return torch.zeros(outside.shape, device=outside.device).masked_fill_(outside, float("-inf"))

    def expanded_bias(self, kv_heads: int) -> torch.Tensor | None:
        """`bias` for each kv head, [n * kv heads, 1, context]; made once for all layers."""
        if self.bias is None:
            return None
        if kv_heads not in self._expanded:
            wide = self.bias[:, None].expand(-1, kv_heads, -1)
            self._expanded[kv_heads] = wide.reshape(-1, 1, self.context)
        return self._expanded[kv_heads]

    @cached_property
    def _expanded(self) -> dict[int, torch.Tensor]:
        return {}


def decode_attention(q: torch.Tensor, cache: KVCache, layer: int, step: DecodeStep) -> torch.Tensor:
    """Attention of one query per live slot over its cached tokens: q [n, heads, dim] -> the same.

    The heads that share a kv head become the rows of one product, so nothing is repeated. On a
    CPU two batched products and a softmax take two thirds of the time of a fused kernel, which
    is made for long queries.
    """
    num, kv_heads, dim = q.shape[0], cache.keys.shape[2], q.shape[2]
    keys = cache.keys[layer, :num, ..., : step.context].flatten(0, 1)
    values = cache.values[layer, :num, :, : step.context].flatten(0, 1)
    grouped = q.reshape(num * kv_heads, -1, dim)
    bias = step.expanded_bias(kv_heads)
    if q.dtype == torch.float32 and bias is not None:
        scores = torch.baddbmm(bias, grouped, keys, alpha=dim**-0.5)
    else:
        scores = torch.bmm(grouped * dim**-0.5, keys).to(torch.float32)
        scores = scores if bias is None else scores.add_(bias)
    weights = torch.softmax(scores, dim=-1).to(values.dtype)
    return torch.bmm(weights, values).view(q.shape)
