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
from math import inf

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
FORBIDDEN = "the experiment's constraints forbid it"
NO_GAIN = "a layout that saves neither time nor memory"
VIRTUAL_STAGES = (2, 4)
WORTH = 1.4
"""Degrees this many times slower than others on the same GPUs stay as simple as they are."""
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

    @property
    def seconds(self) -> float:
        """Of the fastest option; inf without any."""
        return self._seconds[0] if self._seconds else inf

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


class _Explored:
    """What is known of one layout: `plain` has its degrees, one strategy for each micro-batch count."""

    def __init__(self, plain: Sequence[Strategy]) -> None:
        self.plain = plain
        self.front = Front()
        self.known: dict[tuple[object, ...], float] = {}
        self.zero: tuple[int, ...] = (0,)


class Options:
    """Prices one call on meshes like `mesh`."""

    def __init__(
        self,
        call: Call,
        mesh: DeviceMesh,
        costs: Costs,
        capacity_bytes: int,
        front: int,
        reject: Reject,
        permits: Callable[[Strategy], bool] | None = None,
        most_degrees: int | None = None,
    ) -> None:
        """`permits`: which strategies constraints permit; None: all. With it no shortcut is taken.

        `most_degrees`: of so many degrees more than the simplest strategies are looked at.
        """
        self._call, self._mesh, self._costs = call, mesh, costs
        self._capacity, self._front, self._reject = capacity_bytes, front, reject
        self._permits = permits
        self._most_degrees = None if permits is not None else most_degrees

    def of(self, degrees: Iterable[tuple[Strategy, Sequence[int]]], shape: ModelShape | None) -> list[Option]:
        """The options with these degrees and micro-batches, of all layouts that they allow.

        Degrees whose simplest strategies fit and are WORTH times slower than the fastest of other
        degrees, or not among the `most_degrees` fastest, are not looked into further.
        """
        first = [self._begin([replace(s, micro_batches=m) for m in number]) for s, number in degrees]
        every = sorted(one.front.seconds for one in first)
        fastest = min(every, default=inf)
        slowest = inf if self._most_degrees is None else max(every[: self._most_degrees], default=inf)
        kept: list[Option] = []
        for one in first:
            spent = one.front.seconds
            is_worth = spent <= slowest and not WORTH * fastest < spent < inf
            if self._call.kind is CallKind.TRAIN_STEP and is_worth:
                kept += self._finish(one, shape)
            else:
                kept += self._kept(one.front)
        return kept

    def _begin(self, plain: Sequence[Strategy]) -> _Explored:
        """One layout's strategies without recomputation, 1F1B, and ZeRO 1 where it is no worse."""
        one = _Explored(plain)
        if self._call.kind is not CallKind.TRAIN_STEP:
            self._explore(one, [s for p in plain for s in self._split(p)])
            return one
        one.zero = self._stages(plain[0])
        base = [s for p in plain for zero in one.zero for s in self._split(replace(p, zero=zero))]
        self._explore(one, base)
        return one

    def _finish(self, one: _Explored, shape: ModelShape | None) -> list[Option]:
        """Everything else, and the layouts of ZeRO 3 and of interleaved stages."""
        dp, pp = one.plain[0].dp, one.plain[0].pp
        zero = (*one.zero, 2) if dp > 1 and pp == 1 else one.zero
        self._explore(one, self._passes(one.plain, zero))
        kept = self._kept(one.front)
        if dp > 1 and pp == 1:
            third = self._explore(_Explored(one.plain), self._passes(one.plain, (3,)))
            kept += self._if_smaller(third, one.front)
        if pp > 1 and shape is not None:
            kept += self._interleaved(one, shape)
        return kept

    def plain(self, degrees: Strategy, micro_batches: Sequence[int]) -> list[Option]:
        """The options with these degrees and nothing else."""
        plain = [replace(degrees, micro_batches=m) for m in micro_batches]
        return self._kept(self._explore(_Explored(plain), plain))

    def _interleaved(self, one: _Explored, shape: ModelShape) -> list[Option]:
        """The fastest interleaving, if it is faster than the base layout's fastest.

        Chunks take their turns in groups of pp micro-batches, so other numbers gain nothing.
        """
        found = []
        for virtual in VIRTUAL_STAGES:
            strategies = [
                replace(p, schedule=Schedule.INTERLEAVED, virtual_stages=virtual)
                for p in one.plain
                if p.micro_batches % p.pp == 0
            ]
            if strategies and forbidden(strategies[0], shape) is None:
                found.append(_Explored(strategies))
                passes = self._passes(strategies, one.zero)
                self._explore(found[-1], [s for s in passes if s.recompute is Recompute.NONE])
        if not found:
            return []
        if self._permits is not None:
            fronts = [self._explore(other, self._passes(other.plain, one.zero)) for other in found]
            return [option for front in fronts for option in self._kept(front)]
        best = min(found, key=lambda other: other.front.seconds)
        if best.front.seconds >= one.front.seconds:
            self._drop(best.front.options)
            return []
        return self._kept(self._explore(best, self._passes(best.plain, one.zero)))

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
        """Which of ZeRO's stages 0 and 1 to try.

        What stage 1 adds and saves does not depend on micro-batches or on how a pass runs, so one
        comparison shows whether 0 is of any use beside it.
        """
        if strategy.dp == 1:
            return (0,)
        if self._permits is not None:
            return (0, 1)
        none, first = (self._priced(replace(strategy, zero=zero)) for zero in (0, 1))
        is_no_worse = first.seconds <= none.seconds and first.total_bytes <= none.total_bytes
        return (1,) if is_no_worse else (0, 1)

    def _passes(self, plain: Sequence[Strategy], stages: Sequence[int]) -> list[Strategy]:
        """Every way of a train_step in one layout, those that recompute after those that do not."""
        found = []
        for recompute in Recompute:
            for strategy in plain:
                for zero in stages:
                    for split in self._split(replace(strategy, zero=zero, recompute=recompute)):
                        found.append(split)
                        if strategy.pp > 1 and recompute is Recompute.NONE and strategy.virtual_stages == 1:
                            found.append(replace(split, schedule=Schedule.ZERO_BUBBLE))
                        if strategy.pp > 1 and self._permits is not None and strategy.virtual_stages == 1:
                            found.append(replace(split, schedule=Schedule.GPIPE))
        return found

    def _explore(self, one: _Explored, strategies: Iterable[Strategy]) -> Front:
        """The Pareto front of these and those before. What cannot be on it is not priced:
        recomputation never takes less time than the same strategy without."""
        front, seconds = one.front, one.known
        for s in strategies:
            key = (s.micro_batches, s.sequence_parallel, s.schedule)
            if (*key, s.zero, s.recompute) in seconds:
                continue
            if self._permits is not None and not self._permits(s):
                self._reject(FORBIDDEN, lambda s=s: str(s))  # type: ignore[misc]
                continue
            memory = self._costs.call_memory(self._call, Placement(self._mesh, s))
            option = Option(s, 0.0, memory)
            size = option.total_bytes
            if size > self._capacity:
                self._too_large(s, size)
                continue
            floor = seconds.get((*key, s.zero, Recompute.NONE), 0.0)
            if floor and (better := front.better(floor, size)):
                self._no_worse(replace(option, seconds=floor), better, "at least ")
                continue
            option = replace(option, seconds=self._costs.call_s(self._call, Placement(self._mesh, s)))
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
