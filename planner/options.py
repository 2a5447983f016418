"""The strategies of one call on meshes of one size that are worth looking at, with their costs.

Decides which fields beyond the degrees are tried, and keeps of each layout a small Pareto front:
micro-batches, recomputation, ZeRO 1 and 2, sequence parallelism and the order of a pipeline do not
change where parameters lie, so that between two strategies of one layout seconds and bytes are all
that differs. GPipe is left out: 1F1B takes as long and holds no more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from planner.costs import Costs, Memory
from planner.memory import causes_of
from realloc.augmented import Placement
from realloc.cluster import GIB
from realloc.dataflow import Call, CallKind
from realloc.mesh import DeviceMesh
from realloc.model_shape import ModelShape
from realloc.strategy import Recompute, Schedule, Strategy, forbidden

NO_WORSE = "another strategy of the same layout is no worse"
TOO_LARGE = "does not fit in memory"
NO_GAIN = "a layout that saves neither time nor memory"
VIRTUAL_STAGES = (2, 4)
ZERO_3_GAIN = 0.95
"""ZeRO 3 lays parameters out by themselves; it must need at most this much of what ZeRO 1 and 2 need."""


@dataclass(frozen=True)
class Option:
    """A strategy with its cost on every mesh of `strategy.size` GPUs."""

    strategy: Strategy
    seconds: float
    memory: Memory

    @property
    def working_bytes(self) -> int:
        return sum(self.memory.working.values())

    @property
    def total_bytes(self) -> int:
        """Bytes on each GPU of the call alone."""
        return sum(causes_of(self.memory).values())


Reject = Callable[[str, Callable[[], str]], None]
"""(reason, what makes an example) of a strategy that was left out."""


class Front:
    """Options of one layout: each is faster than all that need less memory. Fastest first."""

    def __init__(self) -> None:
        self.options: list[Option] = []
        self._seconds: list[float] = []
        self._bytes: list[int] = []

    def better(self, seconds: float, total_bytes: int) -> Option | None:
        """An option that takes no longer and needs no more."""
        at = bisect_right(self._seconds, seconds) - 1
        return self.options[at] if at >= 0 and self._bytes[at] <= total_bytes else None

    def add(self, option: Option) -> list[Option]:
        """Adds an option that none is better than; returns those that it beats."""
        at = bisect_right(self._seconds, option.seconds)
        size = option.total_bytes
        start = at
        while start > 0 and self._seconds[start - 1] == option.seconds:
            start -= 1
        stop = at
        while stop < len(self.options) and self._bytes[stop] >= size:
            stop += 1
        beaten = self.options[start:stop]
        self.options[start:stop] = [option]
        self._seconds[start:stop] = [option.seconds]
        self._bytes[start:stop] = [size]
        return beaten


def thinned(options: Sequence[Option], most: int) -> list[Option]:
    """At most `most` of a front, the fastest and the smallest among them."""
    count = len(options)
    if count <= most:
        return list(options)
    return [options[round(i * (count - 1) / max(1, most - 1))] for i in range(most)]


class Options:
    """Prices one call on meshes like `mesh`."""

    def __init__(
        self, call: Call, mesh: DeviceMesh, costs: Costs, capacity_bytes: int, front: int, reject: Reject
    ) -> None:
        self._call, self._mesh, self._costs = call, mesh, costs
        self._capacity, self._front, self._reject = capacity_bytes, front, reject
        self._zero: tuple[int, ...] = (0,)

    def of(self, degrees: Strategy, micro_batches: Sequence[int], shape: ModelShape | None) -> list[Option]:
        """The options with these degrees, of all layouts that they allow."""
        plain = [replace(degrees, micro_batches=m) for m in micro_batches]
        if self._call.kind is not CallKind.TRAIN_STEP:
            both = [s for p in plain for s in self._split(p)]
            return self._kept(self._explore(both))
        self._zero = self._stages(plain[0])
        base = self._explore(self._passes(plain))
        kept = self._kept(base)
        if degrees.dp > 1 and degrees.pp == 1:
            kept += self._if_smaller(self._explore(self._passes(plain, [3])), base)
        if degrees.pp > 1 and shape is not None:
            kept += self._interleaved(plain, base, shape)
        return kept

    def plain(self, degrees: Strategy, micro_batches: Sequence[int]) -> list[Option]:
        """The options with these degrees and nothing else."""
        return self._kept(self._explore([replace(degrees, micro_batches=m) for m in micro_batches]))

    def _interleaved(self, plain: Sequence[Strategy], base: Front, shape: ModelShape) -> list[Option]:
        """The fastest interleaving, if it is faster than the base layout's fastest.

        Chunks take their turns in groups of pp micro-batches, so other numbers gain nothing.
        """
        found: list[Front] = []
        for virtual in VIRTUAL_STAGES:
            strategies = [
                replace(p, schedule=Schedule.INTERLEAVED, virtual_stages=virtual)
                for p in plain
                if p.micro_batches % p.pp == 0
            ]
            if strategies and forbidden(strategies[0], shape) is None:
                found.append(self._explore(self._passes(strategies)))
        found = [front for front in found if front.options]
        if not found:
            return []
        best = min(found, key=lambda front: front.options[0].seconds)
        if base.options and best.options[0].seconds >= base.options[0].seconds:
            self._drop(best.options)
            return []
        return self._kept(best)

    def _if_smaller(self, front: Front, base: Front) -> list[Option]:
        if not front.options or not base.options:
            return self._kept(front)
        if front.options[-1].total_bytes > ZERO_3_GAIN * base.options[-1].total_bytes:
            self._drop(front.options)
            return []
        return self._kept(front)

    def _split(self, strategy: Strategy) -> Iterator[Strategy]:
        """Without and with sequence parallelism."""
        yield strategy
        if strategy.tp > 1 and self._call.kind in (CallKind.INFERENCE, CallKind.TRAIN_STEP):
            yield replace(strategy, sequence_parallel=True)

    def _stages(self, strategy: Strategy) -> tuple[int, ...]:
        """Which of ZeRO's stages 0 to 2 to try.

        What stage 1 adds and saves does not depend on micro-batches or on how a pass runs, so one
        comparison shows whether 0 is of any use beside it. Stage 2 sends at every micro-batch.
        """
        if strategy.dp == 1:
            return (0,)
        none, first = (self._priced(replace(strategy, zero=zero)) for zero in (0, 1))
        stages = (1,) if first.seconds <= none.seconds and first.total_bytes <= none.total_bytes else (0, 1)
        return (*stages, 2) if strategy.pp == 1 else stages

    def _passes(self, plain: Sequence[Strategy], zero: Sequence[int] | None = None) -> list[Strategy]:
        """Every way of a train_step in one layout, those that recompute after those that do not."""
        found = []
        for recompute in Recompute:
            for strategy in plain:
                for stage in self._zero if zero is None else zero:
                    for split in self._split(replace(strategy, zero=stage, recompute=recompute)):
                        found.append(split)
                        if strategy.pp > 1 and recompute is Recompute.NONE and strategy.virtual_stages == 1:
                            found.append(replace(split, schedule=Schedule.ZERO_BUBBLE))
        return found

    def _explore(self, strategies: Iterable[Strategy]) -> Front:
        """The Pareto front. What cannot be on it is not priced: recomputation and ZeRO 2 never take
        less time than the same strategy without."""
        front = Front()
        seconds: dict[tuple[object, ...], float] = {}
        for s in strategies:
            memory = self._costs.call_memory(self._call, Placement(self._mesh, s))
            option = Option(s, 0.0, memory)
            size = option.total_bytes
            if size > self._capacity:
                self._too_large(s, size)
                continue
            key = (s.micro_batches, s.sequence_parallel, s.schedule)
            floor = max(
                seconds.get((*key, s.zero, Recompute.NONE), 0.0),
                seconds.get((*key, 1, s.recompute), 0.0) if s.zero > 1 else 0.0,
            )
            if floor and (better := front.better(floor, size)):
                self._no_worse(replace(option, seconds=floor), better, "at least ")
                continue
            option = self._priced(s)
            seconds[*key, s.zero, s.recompute] = option.seconds
            if better := front.better(option.seconds, size):
                self._no_worse(option, better)
                continue
            for beaten in front.add(option):
                self._no_worse(beaten, option)
        return front

    def _too_large(self, strategy: Strategy, size: int) -> None:
        self._reject(TOO_LARGE, lambda: f"{strategy}: {gib(size)} of {gib(self._capacity)} a GPU")

    def _priced(self, strategy: Strategy) -> Option:
        placement = Placement(self._mesh, strategy)
        seconds = self._costs.call_s(self._call, placement)
        return Option(strategy, seconds, self._costs.call_memory(self._call, placement))

    def _kept(self, front: Front) -> list[Option]:
        kept = thinned(front.options, self._front)
        if len(kept) < len(front.options):
            self._drop([option for option in front.options if option not in kept], NO_WORSE + " (nearly)")
        return kept

    def _drop(self, options: Sequence[Option], reason: str = NO_GAIN) -> None:
        for option in options:
            self._reject(reason, lambda option=option: f"{option.strategy}: {_costs(option)}")  # type: ignore[misc]

    def _no_worse(self, option: Option, better: Option, least: str = "") -> None:
        self._reject(
            NO_WORSE,
            lambda: f"{option.strategy}: {least}{_costs(option)}; {better.strategy}: {_costs(better)}",
        )


def _costs(option: Option) -> str:
    return f"{option.seconds:.4g} s, {gib(option.total_bytes)}"


def smallest_variants(call: Call, strategy: Strategy) -> Iterator[Strategy]:
    """The strategy itself, then what may need least memory with its degrees and micro-batches."""
    yield strategy
    split = replace(strategy, sequence_parallel=strategy.tp > 1)
    if call.kind is CallKind.INFERENCE:
        yield split
    if call.kind is not CallKind.TRAIN_STEP:
        return
    stages = [0] if strategy.dp == 1 else [1] if strategy.pp > 1 else [1, 2, 3]
    for recompute in Recompute:
        for zero in stages:
            yield replace(split, recompute=recompute, zero=zero)


def gib(size: float) -> str:
    """Bytes for people: `12.3 GiB`, or MiB and bytes below a tenth of one."""
    if size >= GIB / 10:
        return f"{size / GIB:.1f} GiB"
    if size >= 1 << 20:
        return f"{size / (1 << 20):.1f} MiB"
    return f"{int(size)} bytes"
