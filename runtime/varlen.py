"""Attention kernels that take sequences of any lengths at once, where they exist: on GPUs.

Decides which one: FlashAttention's own package when it is installed, else torch's. Both want
16-bit numbers; there is none for CPUs, nor for float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(q [T, heads, dim], k and v [T, kv heads, dim], cu_seqlens int32, longest) -> [T, heads, dim], causal"""

MAX_HEAD_DIM = 256


def varlen_kernel(q: torch.Tensor) -> Kernel | None:
    """A kernel for queries like these; None where there is none."""
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return None
    if q.shape[-1] > MAX_HEAD_DIM or q.shape[-1] % 8:
        return None
    return _flash_attention() or _torch_varlen()


@lru_cache(maxsize=1)
def _flash_attention() -> Kernel | None:
    try:
        attend: Any = import_module("flash_attn").flash_attn_varlen_func
    except ImportError:
        return None

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int
    ) -> torch.Tensor:
        result: torch.Tensor = attend(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)
        return result

    return kernel


@lru_cache(maxsize=1)
def _torch_varlen() -> Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    attend: Any = varlen_attn

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int
    ) -> torch.Tensor:
        result: torch.Tensor = attend(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            window_size=(-1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return result

    return kernel
