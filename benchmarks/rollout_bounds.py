"""What bounds generation on one core of a CPU: steps to take, bytes to read, products to compute.

Measures this machine's rates of reading and multiplying; knows nobody's implementation.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

from realloc.model_shape import ModelShape


def steps_in_batches(lengths: Sequence[int], slots: int) -> int:
    """Steps when sequences run in batches, each until its longest has ended."""
    return sum(max(lengths[i : i + slots]) for i in range(0, len(lengths), slots))


def steps_continuous(lengths: Sequence[int], slots: int) -> int:
    """Steps when a waiting sequence takes a slot as soon as one falls free."""
    ends: list[int] = []
    for length in lengths:
        start = 0 if len(ends) < slots else heapq.heappop(ends)
        heapq.heappush(ends, start + length)
    return max(ends)


def read_rate(size_bytes: int) -> float:
    """Bytes per second of reading a buffer of this size from front to back, again and again.

    The fastest of the ways that torch offers: a matrix-vector product, a sum, a copy.
    """
    rows = max(1, size_bytes // 4 // 1024)
    buffer, vector = torch.ones(rows, 1024), torch.ones(1024)
    target = torch.empty_like(buffer)
    ways: Sequence[tuple[Callable[[], object], int]] = (
        (lambda: torch.mv(buffer, vector), 1),
        (buffer.sum, 1),
        (lambda: target.copy_(buffer), 2),
    )
    return max(passes * 4 * buffer.numel() / _fastest(way) for way, passes in ways)


def multiply_rate() -> float:
    """float32 multiply-adds per second of a product of large matrices, by the faster of torch's libraries."""
    size = 1024
    a, b = torch.ones(size, size), torch.ones(size, size)
    ways: list[Callable[[], object]] = [lambda: torch.mm(a, b)]
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operator is not None:
        ways.append(lambda: operator.default(a, b, None, "none", [], ""))
    return size**3 / min(_fastest(way) for way in ways)


def _fastest(way: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        way()
        times.append(time.perf_counter() - start)
    return min(times)


def shares(
    shape: ModelShape, num_weights: int, prompt: int, lengths: Sequence[int], seconds: Sequence[float]
) -> Mapping[str, float]:
    """Which share of the time that decoding took (each of `seconds`) its bounds account for.

    All sequences start at once. Each step after the first reads all weights and the live sequences'
    cached keys and values once (`bandwidth_share`), and multiplies each live row with all weights
    (`compute_share`; attention adds little and is left out). The two may overlap: the larger one is
    the bound.
    """
    read_bytes = 0.0
    rows = 0
    token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4
    for step in range(1, max(lengths)):
        live = sum(length > step for length in lengths)
        read_bytes += 4 * num_weights + live * (prompt + step) * token
        rows += live
    # a tied embedding serves as the head; one of its own is only looked up in
    multiplied = num_weights if shape.tied_embeddings else num_weights - shape.vocab * shape.hidden
    rates = [read_rate(4 * num_weights) for _ in seconds]
    taken, rate = median(seconds), median(rates)
    return {
        "bandwidth_share": round(read_bytes / rate / taken, 3),
        "compute_share": round(rows * multiplied / multiply_rate() / taken, 3),
        "read_bytes_per_s": round(rate),
    }
