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
from statistics import mean, median

import torch

from realloc.dataflow import Call, CallKind
from realloc.experiment import Experiment, read_experiment
from runtime.layer_benchmarks import ShardBenchmarks, pack_lengths
from runtime.microbenchmarks import group_sizes, turns
from runtime.neighbours import Neighbours, Work
from runtime.pace import Probe

Load = Callable[[], object]
_ROUNDS = 6
_PROBES = 4
"""Of the pace, in each round, alone and beside others."""


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
    return tuple(pack_lengths(min(count, max(1, 2048 // length)), length, not work.response.is_fixed))


def _slowdowns(make: Callable[[], Load], ranks: int, seconds: float) -> Mapping[int, tuple[float, float]]:
    """Ranks at once -> slowdown of the load, of the probe. Every process makes a load of its own.

    In turns with the load alone, in windows of seconds, and the median over them: hosts change pace.
    """
    window = seconds / 2 / _ROUNDS
    # forked before there is a load that they could share
    with closing(Neighbours(ranks - 1, _beside(make))) as others:
        load, probe = make(), Probe()
        load()
        found = {1: (1.0, 1.0)}
        for busy in group_sizes(ranks, first=2):
            ratios, probed = [], []
            for _ in range(_ROUNDS):
                alone = _time(load, probe, window)
                with others.at(0, busy - 1):
                    beside = _time(load, probe, window)
                ratios.append(beside[0] / alone[0])
                probed.append(beside[1] / alone[1])
            found[busy] = (median(ratios) * turns(busy), median(probed) * turns(busy))
    return found


def _beside(make: Callable[[], Load]) -> Work:
    """What a neighbour does: the load, which it makes once."""
    load = cache(make)

    def work(_: int, stopped: Callable[[], bool]) -> None:
        load()()
        while not stopped():
            load()()

    return work


def _time(load: Load, probe: Probe, seconds: float) -> tuple[float, float]:
    """Mean seconds on a core of the load, run again and again for so many, and of the probe between."""
    probed: list[float] = []
    start, spent, count = time.perf_counter(), 0.0, 0
    while count < _PROBES or time.perf_counter() < start + seconds:
        if count < _PROBES:
            probed.append(probe.seconds())
        begin = time.process_time()
        load()
        spent += time.process_time() - begin
        count += 1
    return spent / count, mean(probed)
