"""Causal attention over packed sequences.

Decides which kernel runs. Knows nothing of parallelism: it sees the heads of one shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch
import torch.nn.functional as F

from runtime.padded_attention import LONGEST, Padding, buckets, padded_attention
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

    def padding(self, heads: int) -> Padding:
        """How they are padded for batched products over this many heads; made once for all layers."""
        if heads not in self._paddings:
            self._paddings[heads] = Padding(self.lengths, buckets(self.lengths, heads))
        return self._paddings[heads]

    @cached_property
    def _paddings(self) -> dict[int, Padding]:
        return {}


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
    i // (heads / kv heads). Where there is a kernel for ragged sequences, one call serves all; on
    a CPU short sequences of several lengths go by `padded_attention.buckets`; else one call per run
    of equal lengths.
    """
    longest = max(packed.lengths)
    ragged = varlen_kernel(q)
    if ragged is not None:
        return ragged(q, k, v, packed.cu_seqlens, longest)
    if q.device.type == "cpu" and q.dtype == torch.float32 and longest <= LONGEST and len(packed.runs) > 1:
        return padded_attention(q, k, v, packed.padding(q.shape[1]))
    gqa = q.shape[1] != k.shape[1]
    parts = []
    for start, count, length in packed.runs:
        rows = slice(start, start + count * length)
        q_run, k_run, v_run = (x[rows].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        part = F.scaled_dot_product_attention(q_run, k_run, v_run, is_causal=True, enable_gqa=gqa)
        parts.append(part.transpose(1, 2).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
