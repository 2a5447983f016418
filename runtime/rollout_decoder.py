"""The decoder as generation uses it: a key/value cache, steps that mix prompts and new tokens.

The mathematics is `Decoder`'s. This module decides how weights are laid out while tokens are being
generated and what a step reads and writes in the cache; it does not know which sequence is where.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from realloc.params import EMBED, FINAL_NORM
from runtime import tensor_parallel as tp
from runtime.attention import PackedSequences, packed_attention
from runtime.decoder import Attend, Decoder
from runtime.kv_cache import DecodeStep, KVCache, decode_attention
from runtime.packed_weights import FEW_PRODUCTS, ReadyWeight, can_pack
from runtime.rollout_layer import RolloutLayer, norm_of
from runtime.rotary_table import RotaryTable


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

    def __init__(self, decoder: Decoder, steps: int, longest: int) -> None:
        """`steps` is about how many steps will be taken, `longest` how many tokens a sequence caches."""
        super().__init__(decoder.shape, decoder.context, decoder.dtype, decoder.params)
        self._longest, self._rotary = longest, RotaryTable(self._freqs, longest, self.dtype)
        pack = steps > FEW_PRODUCTS and self.context.device.type == "cpu"
        self._rollout_layers = [RolloutLayer(self, i, pack=pack) for i in range(len(self.layers))]
        self._final_norm = norm_of(self, FINAL_NORM) if self.context.is_last else None
        self._head: ReadyWeight | None = None
        if self.context.is_last and can_pack(self.head_weight()):
            self._head = ReadyWeight([self.head_weight()], [None], pack=pack)

    def new_cache(self, slots: int) -> KVCache:
        """A cache for `slots` sequences on this shard and stage."""
        return KVCache(
            len(self.layers),
            slots,
            self.num_kv_heads,
            self._longest,
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
            return self.decode(x, decode)
        packed = prefill.packed
        num, positions = packed.num_tokens, packed.positions
        places = cache.places(positions, prefill.slots[packed.sequence_index])
        if decode is not None:
            positions = torch.cat([positions, decode.positions])

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            cache.write(layer, places, k[:num], v[:num])
            out = packed_attention(q[:num], k[:num], v[:num], packed).flatten(1)
            if decode is None:
                return out
            cache.write(layer, decode.places, k[num:], v[num:])
            return torch.cat([out, decode_attention(q[num:], layer, decode)])

        return self._pass(x, positions, attend, exact=True)

    def decode(self, x: torch.Tensor, step: DecodeStep) -> torch.Tensor:
        """One token for each of the first n slots, appended to the cache: [n] or [n, hidden] as above."""

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            step.cache.write(layer, step.places, k, v)
            return decode_attention(q, layer, step)

        return self._pass(x, step.positions, attend, exact=False)

    def local_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().local_logits(hidden) if self._head is None else self._head(hidden)

    def _pass(self, x: torch.Tensor, positions: torch.Tensor, attend: Attend, *, exact: bool) -> torch.Tensor:
        """Through this stage. Hidden states `x` are overwritten."""
        if self.context.is_first:
            region = tp.Region(self.context.tp_group)
            x = tp.embedding(x, self.params[EMBED], self.boxes[EMBED].start[0], region)
        rotate = self._rotary.at(positions)
        for layer in self._rollout_layers:
            x = layer(x, rotate, attend, exact=exact)
        if self._final_norm is None:
            return x
        return (self._final_norm.exact if exact else self._final_norm.quick)(x)
