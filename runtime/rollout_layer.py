"""One layer as generation runs it: `Decoder`'s mathematics without gradients, in few operators.

A step of a small model on a CPU takes as long as it takes to call its operators. So parameters are
looked up once, queries and keys are rotated together, and, where the order of sums need not be
`Decoder`'s, a product adds to the residual in place. Knows nothing of sequences and caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from runtime.decoder import Attend, Decoder, activation
from runtime.packed_weights import ReadyWeight
from runtime.rotary_table import Rotate

Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Norm:
    """A norm, its parameters looked up: `exact` as `Decoder` computes it, `quick` to rounding."""

    exact: Function
    quick: Function


def norm_of(decoder: Decoder, name: str) -> Norm:
    """The norm of this name."""
    weight, bias = decoder.params[f"{name}.weight"], decoder.params.get(f"{name}.bias")
    size, eps = tuple(weight.shape), decoder.shape.norm_eps
    if decoder.shape.norm == "layer" and bias is not None:

        def layer_norm(x: torch.Tensor) -> torch.Tensor:
            return torch.layer_norm(x, size, weight, bias, eps)

        return Norm(layer_norm, layer_norm)

    def rms_norm(x: torch.Tensor) -> torch.Tensor:
        return torch.rms_norm(x, size, weight, eps)

    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return Norm(rms_norm, rms_norm)
    # torch takes eight operators to do it on CPUs; with sums for means, sqrt(sum + width * eps) is one
    scaled, side = weight * weight.shape[0] ** 0.5, torch.tensor((weight.shape[0] * eps) ** 0.5)

    def by_hypotenuse(x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, 2, 1, True)
        return torch.div(x, torch.hypot(length, side)).mul_(scaled)

    return Norm(rms_norm, by_hypotenuse)


class RolloutLayer:
    """Layer `index` (from 0) of the decoder's stage, over parameters that must not change meanwhile.

    `pack`: see `ReadyWeight`.
    """

    def __init__(self, decoder: Decoder, index: int, *, pack: bool) -> None:
        shape, params = decoder.shape, decoder.params
        self._name, self._index, self._group = (
            f"layers.{decoder.layers[index]}",
            index,
            decoder.context.tp_group,
        )
        self._head_dim, self._parallel = shape.head_dim, shape.parallel_residual
        self._num_heads, self._num_kv_heads = decoder.num_heads, decoder.num_kv_heads
        self._activation = activation(shape.activation)

        def ready(*parts: str) -> ReadyWeight:
            names = [f"{self._name}.{part}" for part in parts]
            biases = [params.get(f"{name}.bias") for name in names]
            return ReadyWeight([params[f"{name}.weight"] for name in names], biases, pack=pack)

        def row_split(part: str) -> ReadyWeight:
            # its bias is added once, after the sum over shards
            return ReadyWeight([params[f"{self._name}.{part}.weight"]], [None], pack=pack)

        def norm(part: str) -> Norm:
            return norm_of(decoder, f"{self._name}.{part}")

        self._qkv, self._o = ready("attn.q", "attn.k", "attn.v"), row_split("attn.o")
        self._up = ready("mlp.gate", "mlp.up") if shape.gated_mlp else ready("mlp.up")
        self._down, self._gated = row_split("mlp.down"), shape.gated_mlp
        self._o_bias, self._down_bias = (params.get(f"{self._name}.{p}.bias") for p in ("attn.o", "mlp.down"))
        self._attn_norm, self._mlp_norm = norm("attn_norm"), norm("mlp_norm")
        self._qk_norms = (norm("attn.q_norm"), norm("attn.k_norm")) if shape.qk_norm else None

    def __call__(self, x: torch.Tensor, rotate: Rotate, attend: Attend, *, exact: bool) -> torch.Tensor:
        """x [T, hidden] -> the layer's output, in the same memory.

        `exact` computes in `Decoder`'s order, so that results can be equal bit for bit.
        """
        attn_norm, mlp_norm = (
            norm.exact if exact else norm.quick for norm in (self._attn_norm, self._mlp_norm)
        )
        attn = self._attention(attn_norm(x), rotate, attend)
        if self._parallel:
            out = self._summed(self._o(attn).add_(self._down(self._inner(mlp_norm(x)))))
            return _add_bias(_add_bias(x.add_(out), self._o_bias), self._down_bias)
        self._add_product(x, self._o, attn, exact)
        _add_bias(x, self._o_bias)
        self._add_product(x, self._down, self._inner(mlp_norm(x)), exact)
        return _add_bias(x, self._down_bias)

    def _attention(self, x: torch.Tensor, rotate: Rotate, attend: Attend) -> torch.Tensor:
        """What attention gives on this shard's heads, [T, heads * dim]."""
        heads, both = self._num_heads, self._num_heads + self._num_kv_heads
        qkv = self._qkv(x).view(x.shape[0], -1, self._head_dim)
        v = qkv[:, both:]
        if self._qk_norms is None:
            qk = rotate(qkv[:, :both])
            return attend(self._index, qk[:, :heads], qk[:, heads:], v)
        q, k = self._qk_norms[0].exact(qkv[:, :heads]), self._qk_norms[1].exact(qkv[:, heads:both])
        return attend(self._index, rotate(q), rotate(k), v)

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        """What the MLP's last product takes."""
        up = self._up(x)
        if not self._gated:
            return self._activation(up)
        width = up.shape[1] // 2
        return self._activation(up.narrow(1, 0, width)).mul_(up.narrow(1, width, width))

    def _add_product(self, x: torch.Tensor, weight: ReadyWeight, value: torch.Tensor, exact: bool) -> None:
        if exact or self._group is not None or not weight.add_product(x, value):
            x.add_(self._summed(weight(value)))

    def _summed(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over shards, in place."""
        if self._group is not None:
            dist.all_reduce(x, group=self._group)
        return x


def _add_bias(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x.add_(bias)
