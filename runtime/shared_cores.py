"""How much slower a rank computes while others of its host do: measured with an experiment's own training.

Products hardly feel what another core does, small operators and streams feel it much, where cores share
caches, memory or a physical core. So the mixture matters, and an experiment's own passes are run, by as many
processes at once as there will be ranks. The time that counts is that in
which this process had a core, so that a host which is busy with something else gives the same numbers;
ranks beyond the cores take turns besides. Only of hosts without GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from statistics import mean

import torch

from realloc.dataflow import Call, CallKind
from realloc.experiment import Experiment, read_experiment
from runtime.calm import CalmMoments, Paced
from runtime.layer_benchmarks import ShardBenchmarks, pack_lengths
from runtime.microbenchmarks import group_sizes, turns
from runtime.neighbours import Neighbours, Work
from runtime.table_rows import typical

Load = Callable[[], object]
_ROUNDS = 6
_FEWEST = 2
"""Samples of the load in each round, alone and beside others."""


@dataclass(frozen=True)
class SharedCores:
    """[ranks that compute at once, how many times longer each takes than alone], mean over experiments.

    `probe`: how many times longer the work of `runtime.pace` takes with all ranks computing.
    """

    points: list[list[float]]
    probe: float


def shared_cores(paths: Sequence[str], ranks: int, seconds: float) -> SharedCores | None:
    """Every point is measured for about so many seconds, by this process and as many more as it takes.

    Experiments that train nothing say nothing; None when none does.
    """
    curves: list[Mapping[int, tuple[float, float]]] = []
    for path in paths:
        experiment = read_experiment(path)
        trained = [call for call in experiment.graph().calls if call.kind is CallKind.TRAIN_STEP]
        if trained:
            curves.append(_slowdowns(partial(training_load, experiment, trained[0]), ranks, seconds))
    if not curves:
        return None
    points = [[float(n), max(1.0, mean(curve[n][0] for curve in curves))] for n in sorted(curves[0])]
    return SharedCores(points, max(1.0, mean(curve[ranks][1] for curve in curves)))


def training_load(experiment: Experiment, call: Call) -> Load:
    """One forward and backward pass of the role that the call trains, of a rank's share of a mini-batch."""
    shape = experiment.role_shape(experiment.graph(), str(call.role))
    bench = ShardBenchmarks(shape, experiment.dtype, 1, None, torch.device("cpu"))
    lengths = _lengths(experiment, call)
    return bench.training_pass(lengths, max(1, sum(lengths) // 2))


def _lengths(experiment: Experiment, call: Call) -> tuple[int, ...]:
    work = experiment.workload
    count = max(1, call.num_sequences(work.sequences) // call.mini_batches // 2)
    length = max(2, round(work.prompt.mean + work.response.mean))
    return tuple(pack_lengths(min(count, max(1, 2048 // length)), length, work.sequence_raggedness))


def _slowdowns(make: Callable[[], Load], ranks: int, seconds: float) -> Mapping[int, tuple[float, float]]:
    """Ranks at once -> slowdown of the load, of the probe. Every process makes a load of its own.

    In turns with the load alone, in windows of seconds: hosts change pace.
    """
    window = seconds / 2 / _ROUNDS
    # forked before there is a load that they could share
    with closing(Neighbours(ranks - 1, _beside(make))) as others:
        load, moments = make(), CalmMoments()
        load()
        found = {1: (1.0, 1.0)}
        for busy in group_sizes(ranks, first=2):
            alone: list[Paced[float]] = []
            beside: list[Paced[float]] = []
            for _ in range(_ROUNDS):
                alone += _taken(load, moments, window)
                with others.at(0, busy - 1):
                    beside += _taken(load, moments, window)
            alone_s, alone_pace_s = _typical(moments, alone)
            beside_s, beside_pace_s = _typical(moments, beside)
            found[busy] = (beside_s / alone_s * turns(busy), beside_pace_s / alone_pace_s * turns(busy))
    return found


def _beside(make: Callable[[], Load]) -> Work:
    """What a neighbour does: the load, which it makes once."""
    load = cache(make)

    def work(_: int, stopped: Callable[[], bool]) -> None:
        load()()
        while not stopped():
            load()()

    return work


def _taken(load: Load, moments: CalmMoments, seconds: float) -> Sequence[Paced[float]]:
    """Seconds on a core of the load, run again and again for so many."""

    def once() -> float:
        begin = time.process_time()
        load()
        return time.process_time() - begin

    taken: list[Paced[float]] = []
    start = time.perf_counter()
    for each in moments.taken(once):
        taken.append(each)
        if len(taken) >= _FEWEST and time.perf_counter() >= start + seconds:
            break
    return taken


def _typical(moments: CalmMoments, taken: Sequence[Paced[float]]) -> tuple[float, float]:
    """Typical seconds of the load in calm moments, and of the pace meanwhile."""
    chosen = moments.chosen(taken, _FEWEST)
    return typical([each.value for each in chosen]), mean(each.pace_s for each in chosen)
