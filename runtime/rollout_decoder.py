"""The decoder as generation uses it: a key/value cache, steps that mix prompts and new tokens.

The mathematics is `Decoder`'s. This module decides how weights are laid out while tokens are being
generated and what a step reads and writes in the cache; it does not know which sequence is where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.attention import DecodeStep, KVCache, PackedSequences, decode_attention, packed_attention
from runtime.decoder import Decoder
from runtime.packed_weights import FEW_PRODUCTS, ReadyWeight, can_pack


@dataclass(frozen=True, eq=False)
class Prefill:
    """Prompts that enter the cache: prompt i of `packed` goes to slot `slots[i]`."""

    packed: PackedSequences
    slots: torch.Tensor


class RolloutDecoder(Decoder):
    """A decoder over the same parameters, which must not change while it lives.

    Where that is faster (float32 on CPUs, more than a few steps), it holds a second copy of its
    matrices in the order that products with few rows read best: see `packed_weights`.
    """

    def __init__(self, decoder: Decoder, steps: int) -> None:
        """`steps` is about how many steps will be taken."""
        super().__init__(decoder.shape, decoder.context, decoder.dtype, decoder.params)
        self._pack = steps > FEW_PRODUCTS and self.context.device.type == "cpu"
        self._ready: dict[Sequence[str], ReadyWeight] = {}
        self._head: ReadyWeight | None = None
        if self.context.is_last and can_pack(self.head_weight()):
            self._head = ReadyWeight([self.head_weight()], [None], pack=self._pack)

    def new_cache(self, slots: int, max_tokens: int) -> KVCache:
        """A cache for `slots` sequences of up to `max_tokens` tokens on this shard and stage."""
        return KVCache(
            len(self.layers),
            slots,
            self.num_kv_heads,
            max_tokens,
            self.shape.head_dim,
            self.dtype,
            self.context.device,
        )

    def step(
        self, x: torch.Tensor, prefill: Prefill | None, decode: DecodeStep | None, cache: KVCache
    ) -> torch.Tensor:
        """Prompts, then one new token for each of the first slots, through this stage in one pass.

        x: token ids [T + n] int64 on the first stage, hidden states [T + n, hidden] on the others,
        the prompts' T rows first; returns hidden states [T + n, hidden], normed for the head on
        the last stage. Keys and values go into the cache.
        """
        if prefill is None:
            assert decode is not None
            return self.decode(x, decode, cache)
        packed = prefill.packed
        num, positions = packed.num_tokens, packed.positions
        slots = prefill.slots[packed.sequence_index]
        if decode is not None:
            positions = torch.cat([positions, decode.positions])

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            cache.write(layer, slots, packed.positions, k[:num], v[:num])
            out = packed_attention(q[:num], k[:num], v[:num], packed)
            if decode is None:
                return out
            cache.write(layer, decode.slots, decode.positions, k[num:], v[num:])
            return torch.cat([out, decode_attention(q[num:], cache, layer, decode)])

        return self._run(x, positions, attend)

    def decode(self, x: torch.Tensor, step: DecodeStep, cache: KVCache) -> torch.Tensor:
        """One token for each of the first n slots, appended to the cache: [n] or [n, hidden] as above."""

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            cache.write(layer, step.slots, step.positions, k, v)
            return decode_attention(q, cache, layer, step)

        return self._run(x, step.positions, attend)

    def local_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().local_logits(hidden) if self._head is None else self._head(hidden)[0]

    def _products(self, x: torch.Tensor, names: Sequence[str]) -> Sequence[torch.Tensor]:
        ready = self._ready.get(names)
        if ready is None:
            weights = [self.params[f"{name}.weight"] for name in names]
            biases = [self.params.get(f"{name}.bias") for name in names]
            ready = self._ready[names] = ReadyWeight(weights, biases, pack=self._pack)
        return ready(x)

    def _product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        ready = self._ready.get(name)
        if ready is None:
            ready = self._ready[name] = ReadyWeight([self.params[f"{name}.weight"]], [None], pack=self._pack)
        return ready(x)[0]
