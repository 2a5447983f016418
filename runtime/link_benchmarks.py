"""Times messages and collectives between ranks: typical seconds by size and group, no judgement.

On hosts a rank computes a little before each of them, as ranks do: what is asked while the other side is
asleep takes longer than what follows closely. Samples count in which all ranks were at their usual pace.
Every rank calls every function here, at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist

from runtime.calm import CalmMoments, most_times
from runtime.collectives import all_gather, reduce_scatter
from runtime.gloo_threads import let_ranks_go_first
from runtime.microbenchmarks import Clock, group_sizes

Action = Callable[[], object]
SMALL_BYTES = 256
_GAP_OPERATORS, _STREAM = 60, 1 << 20
"""Before each message of ranks on a host: as many small operators, some 60 microseconds, and a stream over as
many numbers, after which what a message needs is in no cache, as between the calls of a run."""
_SAMPLES, _FEW, _FEWEST = 100, 16, 3
_BEYOND_CACHES = 8
_TURNS = 3
_ROUND = 20
"""Samples between two barriers."""


class Timing(NamedTuple):
    """Typical seconds, and the distance of the samples' quartiles as a share of them."""

    seconds: float
    spread: float


@dataclass(frozen=True)
class LinkClock:
    """Times what ranks do together. `large`: bytes of a large message; `most_s`: for how long one is sent.

    `moments`: what this rank knows of its pace so far.
    """

    clock: Clock
    device: torch.device
    large: int
    most_s: float = 2.0
    moments: CalmMoments = field(default_factory=CalmMoments)

    def sizes(self) -> Sequence[int]:
        return SMALL_BYTES, max(SMALL_BYTES * 2, self.large // 64), self.large

    def seconds(self, action: Action, num_bytes: int) -> float:
        """Typical seconds of one action, without what a rank computes before it."""
        return self.timing(action, num_bytes).seconds

    def timing(self, action: Action, num_bytes: int) -> Timing:
        """The same, with its spread."""
        samples = _SAMPLES if num_bytes < self.large else _FEW
        if self.device.type != "cpu":
            return self._typical(lambda: self.clock.run(action, 10) / 10, samples)
        small, stream = torch.zeros(4, 16), torch.zeros(_STREAM)

        def gap() -> None:
            stream.add_(1.0)
            for _ in range(_GAP_OPERATORS):
                torch.add(small, small)

        def timed(work: Action) -> float:
            gap()
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        return self._typical(lambda: timed(action), samples)

    def _typical(self, sample: Callable[[], float], count: int) -> Timing:
        """Of so many samples, or of the few that slow links have time for."""
        dist.barrier()
        sample()
        slowest = torch.tensor([sample()], dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # all ranks take as many
        count = max(_FEWEST, min(count, int(self.most_s / slowest.item())))
        found = sorted(self._samples(sample, count))
        quarter, middle = len(found) // 4, median(found)
        # slow ones belong to messages: ranks are never quite in step
        return Timing(middle, (found[-1 - quarter] - found[quarter]) / middle)

    def _samples(self, sample: Callable[[], float], count: int) -> Sequence[float]:
        """So many; on hosts those in which all ranks were at their usual pace (`CalmMoments.chosen`)."""
        if self.device.type != "cpu":
            return [self._in_step(sample, i) for i in range(count)]
        number = iter(range(count))
        taken = list(islice(self.moments.taken(lambda: self._in_step(sample, next(number))), count))
        times = torch.tensor(self.moments.times_usual(taken), dtype=torch.float64)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        most = most_times(times.tolist(), _FEWEST)
        return [each.value for each, found in zip(taken, times.tolist(), strict=True) if found <= most]

    def _in_step(self, sample: Callable[[], float], number: int) -> float:
        if number % _ROUND == 0:
            dist.barrier()
        return sample()


def message_costs(clock: LinkClock, rank: int, pairs: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Latency and bytes/s of messages between pairs of ranks, all at once, and the larger one's spread."""
    sends_first = dict(pairs)
    answers = {b: a for a, b in pairs}
    timings = []
    for size in (SMALL_BYTES, clock.large):
        buffer = torch.zeros(size, dtype=torch.uint8, device=clock.device)

        def there_and_back(buffer: torch.Tensor = buffer) -> None:
            if rank in sends_first:
                dist.send(buffer, sends_first[rank])
                dist.recv(buffer, sends_first[rank])
            elif rank in answers:
                dist.recv(buffer, answers[rank])
                dist.send(buffer, answers[rank])

        timings.append(clock.timing(there_and_back, size))
    small_s, large_s = (timing.seconds / 2 for timing in timings)
    return {
        "latency_s": small_s,
        "bytes_per_s": clock.large / max(large_s - small_s, 0.05 * large_s),
        "spread": max(timing.spread for timing in timings),
    }


def collective_rows(
    clock: LinkClock, rank: int, groups: Sequence[Sequence[int]], *, in_memory: bool = False
) -> dict[str, list[Mapping[str, object]]]:
    """Seconds of collectives by group size: latency, tensor bytes/s, what each size took, largest spread.

    `groups` are disjoint, of equal size, and work at once: for each group size, their first ranks.
    `in_memory`: messages go through memory, whose caches the largest of them must not fit into.
    """
    sizes = [*clock.sizes(), *([_BEYOND_CACHES * clock.large] if in_memory else [])]
    names = ("all_reduce", "all_gather", "reduce_scatter")
    tables: dict[str, list[Mapping[str, object]]] = {name: [] for name in names}
    for size in group_sizes(len(groups[0]), first=2):
        mine = None
        for members in groups:  # every rank makes every group
            group = dist.new_group(list(members[:size]))
            mine = group if rank in members[:size] else mine
        let_ranks_go_first()
        turns = [_timings(clock, names, sizes, size, mine) for _ in range(_TURNS)]
        for name, rows in tables.items():
            # the machine's slow moments last for seconds, and others' work only ever adds
            found = [min(turn[name, num_bytes] for turn in turns) for num_bytes in sizes]
            spread = max(timing.spread for timing in found)
            # never faster for more bytes
            took = accumulate((timing.seconds for timing in found), max)
            (_, small_s), *knees, (large, large_s) = zip(sizes, took, strict=True)
            at, knee_s = knees[-1]
            rate = (large - at) / max(large_s - knee_s, 0.05 * large_s)
            row = {"ranks": size, "latency_s": small_s, "bytes_per_s": rate, "spread": spread}
            rows.append({**row, "knees": [list(knee) for knee in knees]})
    return tables


def _timings(
    clock: LinkClock, names: Sequence[str], sizes: Sequence[int], ranks: int, group: dist.ProcessGroup | None
) -> Mapping[tuple[str, int], Timing]:
    """Of every collective in every size, one after the other."""
    return {
        (name, num_bytes): clock.timing(
            _collective(name, clock.device, num_bytes // 4, ranks, group), num_bytes
        )
        for name in names
        for num_bytes in sizes
    }


def _collective(
    name: str, device: torch.device, elements: int, size: int, group: dist.ProcessGroup | None
) -> Action:
    if group is None:
        return lambda: None
    if name == "all_reduce":
        tensor = torch.zeros(elements, device=device)
        return lambda: dist.all_reduce(tensor, group=group)
    part = torch.zeros(max(1, elements // size), device=device)
    whole = torch.zeros(size * part.numel(), device=device)
    if name == "reduce_scatter":
        return lambda: reduce_scatter(part, whole, group)
    return lambda: all_gather(whole, part, group)
