"""Runs the points of a shard of a model: by themselves, and beside as many as there will be ranks.

Decides what of a point's passes becomes an entry of which table. Which points there are is
`runtime.measuring_plan`'s affair, what is kept of them `runtime.table_profiler`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import psutil
import torch
import torch.distributed as dist

from realloc.errors import InputError
from realloc.model_shape import ModelShape
from realloc.signature import ends_signature, layer_signature
from realloc.strategy import Recompute
from runtime.layer_benchmarks import Effort, ShardBenchmarks, pack_lengths
from runtime.measuring_plan import Point, Subject, Work
from runtime.microbenchmarks import turns
from runtime.neighbours import Neighbours
from runtime.table_rows import LEAST_S, STEP, Entry, Found, typical
from runtime.unit_timer import PassSeconds

_NEW_TOKENS = 10
"""Of a generate call: enough that it packs its weights, as longer ones do."""
_ALONE = (Work.SELECTIVE, Work.FULL, Work.DECODE)
_NOT_BESIDE = ("pack_weights", "sample")
"""Work and quantities that are not measured beside others: small differences of large times, and parts of a
decode step, which by themselves find in a cache what the whole step must fetch from memory."""


class PointRunner:
    """Runs the points of one subject."""

    def __init__(self, subject: Subject, bench: ShardBenchmarks, effort: Effort) -> None:
        self._bench, self._effort = bench, effort
        self._layer = layer_signature(subject.shape, subject.tp)
        self._ends = ends_signature(subject.shape, subject.tp)

    def run(self, point: Point) -> tuple[float, list[Entry]]:
        """Seconds of the point's longest pass, and what was measured."""
        if point.work is Work.OPTIMIZER:
            samples = self._bench.optimizer(self._effort)
            entry = Entry("optimizer", "optimizer", 0.0, float(self._bench.num_elements), 1.0, samples)
            return max(samples), [entry]
        if point.work is Work.DECODE:
            steps = self._bench.decode(point.count, point.length, point.ragged, self._effort)
            return max(steps), [self._of_layer(point, "decode", self._each(steps))]
        if point.work is Work.GENERATE:
            return self._generate(point)
        return self._passes(point)

    def _passes(self, point: Point) -> tuple[float, list[Entry]]:
        bench, effort, rows = self._bench, self._effort, max(1, point.rows)
        lengths = pack_lengths(point.count, point.length, point.ragged)
        tokens = sum(lengths)
        if point.work in (Work.INFERENCE, Work.INFERENCE_SP):
            split = point.work is Work.INFERENCE_SP
            passes = bench.inference(lengths, rows, effort, split=split)
            entries = [self._of_layer(point, str(point.work), [p.layer for p in passes])]
            if not split:
                entries.append(self._of_ends("enter", tokens, [p.enter for p in passes]))
                entries.append(self._of_ends("head", rows, [p.output for p in passes]))
            return _seconds(passes, bench), entries
        if point.work is Work.PREFILL:
            whole = bench.prefill(lengths, effort)
            return max(whole), [self._of_layer(point, "prefill", self._each(whole))]
        if point.work is Work.WEIGHT:
            samples = bench.weight_gradients(lengths, rows, effort)
            pass_s = 3 * typical(samples) * bench.shape.num_layers
            return pass_s, [self._of_layer(point, "weight", samples)]
        if point.work in (Work.SELECTIVE, Work.FULL):
            return self._recompute(point, lengths, rows)
        split = point.work is Work.TRAINING_SP
        passes = bench.training(lengths, rows, effort, split=split)
        suffix = "_sp" if split else ""
        entries = [
            self._of_layer(point, f"forward{suffix}", [p.layer for p in passes]),
            self._of_layer(point, f"backward{suffix}", [p.layer_backward for p in passes]),
        ]
        if not split:
            entries += [
                self._of_ends("enter_train", tokens, [p.enter for p in passes]),
                self._of_ends("enter_backward", tokens, [p.leave for p in passes]),
                self._of_ends("head_train", rows, [p.output for p in passes]),
                self._of_ends("head_backward", rows, [p.output_backward for p in passes]),
            ]
        return _seconds(passes, bench), entries

    def _recompute(self, point: Point, lengths: Sequence[int], rows: int) -> tuple[float, list[Entry]]:
        """What recomputation adds, against passes without it at about the same time."""
        kind = Recompute(str(point.work))
        plain = self._bench.training(lengths, rows, self._effort)
        passes = self._bench.training(lengths, rows, self._effort, recompute=kind)
        without = typical([p.layer + p.layer_backward for p in plain])
        least = 0.02 * without  # noise must not make it free
        samples = [max(least, p.layer + p.layer_backward - without) for p in passes]
        return _seconds(passes, self._bench), [self._of_layer(point, str(kind), samples)]

    def _generate(self, point: Point) -> tuple[float, list[Entry]]:
        """Sampling, and what a generate call takes beside its steps: whole calls less what they hold."""
        bench, effort = self._bench, self._effort
        # a neighbour goes on with whole calls until it is stopped
        prefill_s = typical(bench.prefill((point.length,) * point.count, replace(effort, stopped=None)))
        calls = bench.generate(point.count, point.length, _NEW_TOKENS, point.sampling, effort)
        steps = [step for call in calls for step in call.steps]
        sample = [seconds for call in calls for seconds in call.beside]
        once = prefill_s + typical(sample)
        fixed = [max(LEAST_S, call.first + call.last - once) for call in calls]
        entries = [
            self._of_ends("sample", point.count, sample),
            self._of_ends(STEP, point.count, steps),
            Entry(self._layer, STEP, 0.0, float(point.count), 1.0, steps),
            Entry(self._layer, "pack_weights", 0.0, float(bench.shape.num_layers), 1.0, fixed),
        ]
        return max(call.total for call in calls) / 4, entries

    def _each(self, whole: Sequence[float]) -> list[float]:
        """A layer's part of passes; what little there is around the layers counts with them."""
        return [seconds / self._bench.shape.num_layers for seconds in whole]

    def _of_layer(self, point: Point, quantity: str, samples: list[float]) -> Entry:
        return Entry(self._layer, quantity, point.ragged, float(point.count), float(point.length), samples)

    def _of_ends(self, quantity: str, rows: int, samples: list[float]) -> Entry:
        return Entry(self._ends, quantity, 0.0, float(rows), 1.0, samples)


def _seconds(passes: Sequence[PassSeconds], bench: ShardBenchmarks) -> float:
    layers = bench.shape.num_layers
    return max(p.total + layers * (p.layer + p.layer_backward) for p in passes)


class SubjectRunner:
    """The points of one subject, by themselves and, on hosts, beside as many as there will be ranks."""

    def __init__(
        self,
        subject: Subject,
        group: dist.ProcessGroup | None,
        device: torch.device,
        effort: Effort,
        ranks: int,
        *,
        beside: bool = True,
    ) -> None:
        """`group`: of the subject's tensor-parallel degree, None for 1. `ranks`: of the host.

        `beside`: whether points run beside others too.
        """
        self._subject, self._group, self._device, self._effort = subject, group, device, effort
        self._ranks = ranks if device.type == "cpu" else 1
        self._beside_others = beside
        self._bench: ShardBenchmarks | None = None
        self._neighbours: Neighbours | None = None

    def run(self, number: int) -> Found:
        """What `PointRunner.run` finds of the point, with what it is together, and the pace."""
        beside = min(self._ranks, len(os.sched_getaffinity(0))) - 1  # more of them would only take turns
        if self._neighbours is None and self._beside_others and beside > 0:
            # before there is anything for them to share
            self._neighbours = Neighbours(beside, self._beside)
        seconds, entries = self._run(number, self._effort)
        assert self._bench is not None
        if self._neighbours is None or self._subject.points[number].work in _ALONE:
            return Found(seconds, entries, self._bench.pace_s())
        with self._neighbours.at(number):
            together = self._run(number, replace(self._effort, beside=True))[1]
        shared = turns(self._ranks)
        both = [
            replace(alone, together=[shared * sample for sample in other.samples])
            if alone.quantity not in _NOT_BESIDE
            else alone
            for alone, other in zip(entries, together, strict=True)
        ]
        return Found(seconds, both, self._bench.pace_s(), self._bench.pace_s(beside=True))

    def _run(self, number: int, effort: Effort) -> tuple[float, list[Entry]]:
        if self._bench is None:
            subject = self._subject
            shape = fitting(subject, self._device, self._ranks)
            self._bench = ShardBenchmarks(shape, subject.dtype, subject.tp, self._group, self._device)
        return PointRunner(self._subject, self._bench, effort).run(self._subject.points[number])

    def _beside(self, number: int, stopped: Callable[[], bool]) -> None:
        self._run(number, Effort(1, 0.0, stopped=stopped))

    def close(self) -> None:
        if self._neighbours is not None:
            self._neighbours.close()


def fitting(subject: Subject, device: torch.device, ranks: int = 1) -> ModelShape:
    """The shape with as many layers as a third of the memory trains, shared among so many ranks."""
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    else:
        available = psutil.virtual_memory().available // ranks
    shape = subject.shape
    per_element = 16 if subject.dtype == "float32" else 18
    ends = (1 if shape.tied_embeddings or shape.head == "scalar" else 2) * shape.vocab * shape.hidden
    layer = max(1, (shape.num_params - ends) // shape.num_layers)
    fits = int((available / 3 / per_element * subject.tp - ends) // layer)
    if fits < 1:
        raise InputError(
            f"realloc profile: one layer of {layer_signature(shape, subject.tp)} and its embedding need "
            f"{per_element * (layer + ends) / subject.tp / 2**30:.1f} GiB to train, and a third of the "
            f"{available / 2**30:.1f} GiB that are free may be used; measure a larger --tp alone."
        )
    return replace(shape, num_layers=min(shape.num_layers, fits))
