"""Micro-benchmarks of one device: medians of seconds and bytes, no judgement.

Decides what is run and how it is timed. Does not know what a profile is for, and starts no
processes (`runtime.profiler` does).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from runtime.linear import linear
from runtime.pace import Probe

Action = Callable[[], object]
_ROUNDS = 5
"""Of ranks that compute at once."""
_PAIRS, _COLD_BYTES, _PIECE_BYTES = 6, 1 << 28, 1 << 19
"""Of copies: pairs of tensors at most, what they reach to together, and how much is copied at once."""
_FEWEST_COPIES = 3


@dataclass(frozen=True)
class Effort:
    """How long and how large: `repeats` samples of at least `sample_s` each."""

    repeats: int
    sample_s: float
    sides: tuple[int, ...]
    """Square products have these sides."""
    working_sets: tuple[int, ...]
    """Bytes that a loop of matrix-vector products goes through."""
    message_bytes: int
    """A large message; small ones have 256 bytes."""
    optimizer_elements: int


def effort(device: torch.device, quick: bool) -> Effort:
    """CPU sizes stay where a laptop answers in seconds; a GPU needs large ones to fill up."""
    mib = 1 << 20
    if device.type == "cuda":
        sides = (128, 512, 2048, 8192) if quick else (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
        return Effort(5 if quick else 15, 0.01, sides, (1024 * mib,), 256 * mib, 1 << 28)
    sides = (16, 64, 256, 640) if quick else (8, 16, 32, 64, 128, 256, 512, 1024, 1536)
    sets = (mib, 16 * mib, 128 * mib) if quick else (mib // 4, mib, 4 * mib, 16 * mib, 64 * mib, 256 * mib)
    return Effort(5 if quick else 15, 0.005 if quick else 0.02, sides, sets, 8 * mib, 1 << 22)


class Clock:
    """Times actions on one device."""

    def __init__(self, device: torch.device, budget: Effort, *, alone: bool = False) -> None:
        """`alone`: on CPUs the time counts in which this process has a core; it must wait for nobody."""
        self._device, self._budget = device, budget
        self._now = time.process_time if alone else time.perf_counter

    def seconds(self, action: Action) -> float:
        """Median seconds of one action, over samples that repeat it often enough to be timed."""
        action()
        count = 1
        while (spent := self.run(action, count)) < self._budget.sample_s and count < 1 << 20:
            count = max(
                count + 1, min(count * 10, int(count * 1.2 * self._budget.sample_s / max(spent, 1e-9)))
            )
        return median(self.run(action, count) / count for _ in range(self._budget.repeats))

    def run(self, action: Action, count: int) -> float:
        """Seconds of `count` actions in a row."""
        if self._device.type != "cuda":
            start = self._now()
            for _ in range(count):
                action()
            return self._now() - start
        event: Any = torch.cuda.Event  # untyped in torch
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        for _ in range(count):
            action()
        end.record()
        end.synchronize()
        elapsed: float = begin.elapsed_time(end) / 1e3
        return elapsed


def launch_s(clock: Clock, device: torch.device) -> float:
    """Mean overhead of the small operators a decoder layer consists of."""
    x = torch.randn(4, 8, device=device)
    weight = torch.ones(8, device=device)
    rows = torch.arange(4, device=device)
    actions: Sequence[Action] = (
        lambda: x + x,
        lambda: x * weight,
        lambda: F.silu(x),
        lambda: F.rms_norm(x, (8,), weight),
        lambda: torch.cat([x, x], dim=-1),
        lambda: x[rows],
    )
    with torch.no_grad():
        return sum(clock.seconds(action) for action in actions) / len(actions)


def matmul_points(
    clock: Clock, device: torch.device, dtype: torch.dtype, sides: Sequence[int], overhead_s: float
) -> list[list[float]]:
    """[flops of a product, flops/s] of square products as linear layers run them, overhead subtracted."""
    points = []
    for side in sides:
        x = torch.randn(side, side, device=device).to(dtype)
        w = torch.randn(side, side, device=device).to(dtype)
        with torch.no_grad():
            spent = clock.seconds(lambda x=x, w=w: linear(x, w))  # type: ignore[misc]
        flops = 2.0 * side**3
        points.append([flops, flops / max(spent - overhead_s, 0.5 * spent)])
    return points


def memory_points(
    clock: Clock, device: torch.device, sets: Sequence[int], overhead_s: float
) -> list[list[float]]:
    """[working set in bytes, bytes/s] of fp32 matrix-vector products over as many weights."""
    points = []
    for size in sets:
        width = 256 if size < 1 << 21 else 1024
        width = 8192 if device.type == "cuda" else width
        weights = [torch.randn(width, width, device=device) for _ in range(max(1, size // (4 * width**2)))]
        x = torch.randn(1, width, device=device)

        def sweep(weights: list[torch.Tensor] = weights, x: torch.Tensor = x) -> None:
            for weight in weights:
                F.linear(x, weight)

        with torch.no_grad():
            spent = clock.seconds(sweep)
        moved = sum(weight.numel() * 4.0 for weight in weights)
        points.append([float(size), moved / max(spent - overhead_s * len(weights), 0.5 * spent)])
    return points


def copy_points(sets: Sequence[int], seconds: float, ready: Action) -> list[list[float]]:
    """[bytes touched, bytes/s read and written] of a host that copies tensors, of all that these hold.

    In pieces, as parameters are, and of several such pairs in turn: between two copies of the same tensors a
    run touches about as much other memory as they have, several times over. Every size is copied for so many
    `seconds`, from the moment on when `ready` returns: ranks that meet there copy at once, all the while.
    """
    points = []
    for size in sets:
        pairs = max(1, min(_PAIRS, _COLD_BYTES // size))
        memory = torch.zeros(pairs, 2, size // 8)
        pieces = [pair.split(_PIECE_BYTES // 4, dim=1) for pair in memory]

        def copy(pieces: list[tuple[torch.Tensor, ...]] = pieces) -> None:
            for pair in pieces:
                for source, target in pair:
                    target.copy_(source)

        copy()
        ready()
        samples: list[float] = []
        until = time.perf_counter() + seconds
        while len(samples) < _FEWEST_COPIES or time.perf_counter() < until:
            start = time.process_time()
            copy()
            samples.append(time.process_time() - start)
        points.append([float(size), pairs * size / median(samples)])
    return points


def attention_costs(clock: Clock, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Flops/s of causal attention over one long sequence, and seconds of one tiny kernel."""
    length = 4096 if device.type == "cuda" else 512
    heads, dim = 8, 64

    def attend(tokens: int) -> Action:
        q = torch.randn(1, heads, tokens, dim, device=device).to(dtype)
        return lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)

    with torch.no_grad():
        tiny, long = clock.seconds(attend(4)), clock.seconds(attend(length))
    return 2.0 * length**2 * heads * dim / max(long - tiny, 0.2 * long), tiny


def optimizer_bytes_per_s(clock: Clock, device: torch.device, elements: int) -> float:
    """28 bytes per element of a fused fp32 AdamW step over its seconds."""
    weight = torch.zeros(elements, device=device)
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW([weight], lr=1e-6, fused=True)
    return 28.0 * elements / clock.seconds(optimizer.step)


def host_bytes_per_s(clock: Clock, device: torch.device) -> float:
    """Copies from host to device (from memory to memory on a CPU)."""
    size = 1 << 26
    source = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.zeros(size, dtype=torch.uint8, device=device)
    return size / clock.seconds(lambda: target.copy_(source, non_blocking=True))


@dataclass(frozen=True)
class Concurrency:
    """[ranks that compute at once, slowdown against one alone], and what a profile holds of the pace."""

    points: list[list[float]]
    pace: Mapping[str, float]


def concurrency(clock: Clock, device: torch.device, rank: int, ranks: int) -> Concurrency:
    """How much slower the first `ranks` are together; every rank calls it.

    The load is half products, half streaming, as training and decoding are. What counts is for how long
    a rank had a core, and that ranks beyond the cores take turns: a busy host changes nothing.
    """
    x = torch.randn(256, 256, device=device)
    stream = torch.zeros(1 << 20, device=device)
    probe = Probe()

    def load() -> None:
        for _ in range(4):
            F.linear(x, x)
        stream.add_(1.0)

    count = max(10, int(0.1 / max(clock.run(load, 5) / 5, 1e-6)))
    count = _agreed(device, count)
    points: list[list[float]] = []
    alone, probes = 0.0, (0.0, 0.0)
    for active in group_sizes(ranks, first=1):
        samples, probed = [], []
        for _ in range(_ROUNDS):
            dist.barrier()
            if rank < active:
                probed += [probe.seconds() for _ in range(3)]
                samples.append(_own_seconds(load, count))
            dist.barrier()
        seconds = median(samples) if samples else 0.0
        own = median(probed) if probed else 0.0
        shared = turns(active)
        alone, probes = alone or seconds, (probes[0] or own, own * shared)
        points.append([float(active), max(1.0, seconds / max(alone, 1e-9) * shared)])
    pace = {"alone_s": probes[0], "together_s": max(probes), "ranks": ranks}
    return Concurrency(points, pace)


def _own_seconds(action: Action, count: int) -> float:
    """Seconds of the actions for which this process had a core."""
    start = time.process_time()
    for _ in range(count):
        action()
    return time.process_time() - start


def turns(ranks: int) -> float:
    """How many ranks take turns on each core of this host, where there are fewer cores than ranks."""
    return max(1.0, ranks / len(os.sched_getaffinity(0)))


def group_sizes(ranks: int, *, first: int) -> list[int]:
    """Powers of two from `first` up to all ranks, and all ranks."""
    sizes = [first << i for i in range(32) if first << i < ranks]
    return [*sizes, ranks] if ranks >= first else sizes


def _agreed(device: torch.device, value: int) -> int:
    """Rank 0's value on every rank."""
    tensor = torch.tensor([value if dist.get_rank() == 0 else 0], dtype=torch.int64, device=device)
    dist.all_reduce(tensor)
    return int(tensor.item())
