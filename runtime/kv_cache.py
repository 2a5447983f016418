"""The key/value cache of generation, and attention of one new token per sequence over it.

Decides how keys and values lie in memory and which operators read them. Knows nothing of
parallelism: it sees the heads of one shard, and slots whose sequences it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, eq=False)
class Places:
    """Where new keys and values go: flat indices, the same in all layers.

    `keys` int64 [T, kv heads * dim]: elements of a layer's keys. `values` int64 [T, kv heads]: rows
    of a layer's values.
    """

    keys: torch.Tensor
    values: torch.Tensor


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
        self._flat_keys = self.keys.view(num_layers, -1).unbind()
        self._value_rows = self.values.view(num_layers, -1, head_dim).unbind()
        # what precedes a slot's first token: elements of keys, rows of values
        heads = torch.arange(slots * kv_heads, device=device).view(slots, kv_heads)
        self._values_before = heads * max_tokens
        elements = torch.arange(slots * kv_heads * head_dim, device=device)
        self._keys_before = (elements * max_tokens).view(slots, -1)
        # every row of the mask is a piece of one line of zeros and -inf: row r has a token at j < M - r
        line = torch.zeros(2 * max_tokens, device=device)
        line[max_tokens:] = float("-inf")
        self._masks = line.as_strided((max_tokens, max_tokens), (1, 1))

    def places(self, positions: torch.Tensor, slots: torch.Tensor | None = None) -> Places:
        """Of tokens at `positions` int64 [T] in `slots` int64 [T]; without them of slots 0..T-1."""
        keys, values, column = self._keys_before, self._values_before, positions[:, None]
        if slots is None:
            num = positions.shape[0]
            return Places(keys[:num] + column, values[:num] + column)
        return Places(keys[slots] + column, values[slots] + column)

    def write(self, layer: int, places: Places, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores k and v [T, kv heads, dim]."""
        self._flat_keys[layer].index_put_((places.keys,), k.flatten(1))
        self._value_rows[layer].index_put_((places.values,), v)

    def read(self, layer: int, slots: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first tokens of the first slots: keys [n * kv heads, dim, tokens], values [.., tokens, dim].

        Views, made in one step each: this runs once per layer and token.
        """
        _, _, heads, dim, longest = self.keys.shape
        size, stride = slots * heads, dim * longest
        keys, values = self._flat_keys[layer], self._value_rows[layer]
        return (
            keys.as_strided((size, dim, num_tokens), (stride, longest, 1)),
            values.as_strided((size, num_tokens, dim), (stride, dim, 1)),
        )

    def bias(self, positions: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """float32 [T * kv heads, 1, num_tokens]: 0 up to each of `positions` [T], beyond it -inf."""
        heads, longest = self.keys.shape[2], self.keys.shape[-1]
        rows = (longest - 1 - positions)[:, None].expand(-1, heads).reshape(-1)
        return self._masks[:, :num_tokens].index_select(0, rows)[:, None]

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

    `context` is how many cached tokens the longest sequence has after this step; `is_even` says
    that all have as many.
    """

    cache: KVCache
    positions: torch.Tensor
    context: int
    is_even: bool = False

    @cached_property
    def places(self) -> Places:
        return self.cache.places(self.positions)

    @cached_property
    def bias(self) -> torch.Tensor | None:
        """What is added to the scores (see `KVCache.bias`); None where nothing is masked."""
        return None if self.is_even else self.cache.bias(self.positions, self.context)


def decode_attention(q: torch.Tensor, layer: int, step: DecodeStep) -> torch.Tensor:
    """Attention of one query per live slot over its cached tokens: q [n, heads, dim] -> [n, heads * dim].

    The heads that share a kv head become the rows of one product, so nothing is repeated. On a
    CPU two batched products and a softmax take two thirds of the time of a fused kernel, which
    is made for long queries.
    """
    num, _, dim = q.shape
    keys, values = step.cache.read(layer, num, step.context)
    grouped, bias = q.reshape(keys.shape[0], -1, dim), step.bias
    if q.dtype == torch.float32:
        # without a bias its factor is 0, and any tensor will do
        added, beta = (grouped[:, :, :1], 0.0) if bias is None else (bias, 1.0)
        scores = torch.baddbmm(added, grouped, keys, beta=beta, alpha=dim**-0.5)
    else:
        scores = torch.bmm(grouped * dim**-0.5, keys).to(torch.float32)
        scores = scores if bias is None else scores.add_(bias)
    weights = torch.softmax(scores, dim=-1).to(values.dtype)
    return torch.bmm(weights, values).view(num, -1)
