"""The process that measures the tables of a profile: point after point, each kept as soon as it is done.

It runs alone on one device and writes what it has measured to a file beside the profile, keyed by
what was measured, so that a measurement which was interrupted goes on where it stopped. Rows are
put together here; which points there are is `runtime.measuring_plan`'s affair.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.distributed as dist

from realloc.dataflow import Call, CallKind, DataflowGraph
from realloc.errors import InputError
from realloc.experiment import read_experiment
from realloc.model_shape import ModelShape, resolve_shape
from realloc.signature import call_signature, ends_signature, layer_signature
from realloc.strategy import Recompute
from runtime.call_benchmarks import CallBenchmarks
from runtime.host_memory import keep_freed_memory
from runtime.layer_benchmarks import Effort, ShardBenchmarks, pack_lengths
from runtime.measuring_plan import (
    Point,
    Sizes,
    Subject,
    Work,
    default_sizes,
    experiment_sizes,
    subjects,
)
from runtime.pace import Probe
from runtime.shared_cores import SharedCores, shared_cores
from runtime.supported import check_runs
from runtime.table_rows import LEAST_S, Entry, Kept, table_rows, typical
from runtime.unit_timer import PassSeconds

# New tokens of two generate calls: the second's further steps are all alike.
_FEW, _MANY = 10, 26
_MOST_SEQUENCES = 64
"""Of whole calls: what they do beside their models grows evenly with the sequences."""


@dataclass(frozen=True)
class TableSpec:
    """What to measure tables of. `tp`: the highest tensor-parallel degree. `kept`: where results go.

    `ranks`: as many as compute at once on a host, to learn how they slow each other down.
    """

    models: tuple[str, ...]
    experiments: tuple[str, ...]
    dtypes: tuple[str, ...]
    tp: int
    quick: bool
    kept: str
    ranks: int = 1


def wanted(spec: TableSpec, *, gpu: bool) -> Sequence[Subject]:
    """The subjects of a spec. Raises InputError for a model or an experiment that cannot be read."""
    sizes: list[tuple[ModelShape, str, Sizes]] = []
    for path in spec.experiments:
        experiment = read_experiment(path)
        sizes += [(shape, experiment.dtype, s) for shape, s in experiment_sizes(experiment)]
    for model in spec.models:
        shape = resolve_shape(model, "realloc profile: --model")
        sizes += [(shape, dtype, s) for dtype in spec.dtypes for s in default_sizes(shape, gpu=gpu)]
    for shape, _, _ in sizes:
        check_runs(shape, "realloc profile")
    return subjects(sizes, spec.tp, quick=spec.quick)


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
            entry = Entry("optimizer", "optimizer", False, float(self._bench.num_elements), 1.0, samples)
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
        in_step = typical(bench.decode(point.count, point.length + (_FEW + _MANY) // 2, False, effort))
        prefill_s = typical(bench.prefill((point.length,) * point.count, effort))
        # differences of long times: more of them
        often = replace(effort, samples=3 * effort.samples)
        rounds = bench.generate(point.count, point.length, (_FEW, _MANY), point.sampling, often)
        few_s, many_s = (typical([call[i] for call in rounds]) for i in (0, 1))
        step_s = max(in_step, (many_s - few_s) / (_MANY - _FEW))
        sample = [max(LEAST_S, (many - few_s) / (_MANY - _FEW) - in_step) for _, many in rounds]
        last_s = step_s - in_step
        fixed = [max(LEAST_S, few - prefill_s - (_FEW - 1) * step_s - last_s) for few, _ in rounds]
        entries = [
            self._of_ends("sample", point.count, sample),
            Entry(self._layer, "pack_weights", False, float(bench.shape.num_layers), 1.0, fixed),
        ]
        return max(many for _, many in rounds) / 4, entries

    def _each(self, whole: Sequence[float]) -> list[float]:
        """A layer's part of passes; what little there is around the layers counts with them."""
        return [seconds / self._bench.shape.num_layers for seconds in whole]

    def _of_layer(self, point: Point, quantity: str, samples: list[float]) -> Entry:
        return Entry(self._layer, quantity, point.ragged, float(point.count), float(point.length), samples)

    def _of_ends(self, quantity: str, rows: int, samples: list[float]) -> Entry:
        return Entry(self._ends, quantity, False, float(rows), 1.0, samples)


def _seconds(passes: Sequence[PassSeconds], bench: ShardBenchmarks) -> float:
    layers = bench.shape.num_layers
    return max(p.total + layers * (p.layer + p.layer_backward) for p in passes)


def measure_tables(
    spec: TableSpec, device: torch.device, fingerprint: str, groups: Mapping[int, dist.ProcessGroup]
) -> Mapping[str, Any]:
    """Measures a spec's points; returns `tables`, `notes`, `concurrency` and `pace`, empty where unknown.

    Says on stdout how far it is.
    """
    gpu = device.type == "cuda"
    todo = wanted(spec, gpu=gpu)
    shares = not gpu and spec.ranks > 1 and bool(spec.experiments)
    graphs = [read_experiment(path).graph() for path in spec.experiments]
    calls = sum(len(_timed_calls(graph, role)) for graph in graphs for role in graph.roles)
    steps = Steps(sum(len(subject.points) for subject in todo) + calls + shares)
    effort = Effort(4, 0.08) if spec.quick else Effort(5, 0.4)
    longest_s = (0.3 if spec.quick else 2.5) * (0.2 if gpu else 1.0)
    kept = Kept(Path(spec.kept), fingerprint)
    collected: list[tuple[str, Entry]] = []
    notes: list[str] = []
    pace = TablePace(kept)
    for subject in todo:
        bench: ShardBenchmarks | None = None
        over: dict[tuple[object, ...], int] = {}
        for point in subject.points:
            steps.begin(f"{point.work}, {point.count} x {point.length} tokens, tp {subject.tp}")
            if point.line in over:
                continue
            key = f"{subject.name} {point}"
            found = kept.get(key)
            if found is None:
                if bench is None:
                    shape = _fitting(subject, device)
                    bench = ShardBenchmarks(shape, subject.dtype, subject.tp, groups.get(subject.tp), device)
                found = PointRunner(subject, bench, effort).run(point)
                kept.put(key, *found)
                pace.sample()
            collected += [(subject.dtype, entry) for entry in found[1]]
            if found[0] > longest_s:
                over[point.line] = point.count
    for path in spec.experiments:
        collected += _calls_of(path, kept, effort, device, steps)
    shared: SharedCores | None = None
    if shares:
        steps.begin(f"{spec.ranks} ranks at once")
        shared = shared_cores(spec.experiments, spec.ranks, 8.0 if spec.quick else 24.0)
    return {
        "tables": table_rows(collected),
        "notes": notes,
        "concurrency": [] if shared is None else shared.points,
        "pace": {} if gpu else pace.content(spec.ranks, shared),
    }


class Steps:
    """Says on stdout, line by line, which of so many steps has begun."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0

    def begin(self, what: str) -> None:
        print(json.dumps({"done": self._done, "total": self._total, "what": what}), flush=True)
        self._done += 1


class TablePace:
    """The pace of the machine while tables are measured, of one rank as they are."""

    _KEY = "pace"

    def __init__(self, kept: Kept) -> None:
        self._kept, self._probe = kept, Probe()
        found = kept.get(self._KEY)
        self._samples = [] if found is None else list(found[1][0].samples)

    def sample(self) -> None:
        """Beside every point, as warm as the work that tables are of."""
        self._probe.run()
        self._samples.append(min(self._probe.seconds(time.process_time) for _ in range(2)))
        entry = Entry(self._KEY, self._KEY, False, 1.0, 1.0, self._samples)
        self._kept.put(self._KEY, 0.0, [entry])

    def content(self, ranks: int, shared: SharedCores | None) -> Mapping[str, Any]:
        """What a profile holds of it: what more ranks do to it counts where that was measured."""
        if not self._samples:
            return {}
        alone_s = median(self._samples)
        quarter = len(self._samples) // 4
        ordered = sorted(self._samples)
        return {
            "alone_s": alone_s,
            "together_s": alone_s * (1.0 if shared is None else shared.probe),
            "ranks": 1 if shared is None else ranks,
            "spread": (ordered[-1 - quarter] - ordered[quarter]) / alone_s,
        }


def _timed_calls(graph: DataflowGraph, role: str) -> Sequence[Call]:
    """Calls of the role whose work beside the model is timed."""
    return [call for call in graph.calls_of(role) if call.kind is not CallKind.GENERATE]


def _calls_of(
    path: str, kept: Kept, effort: Effort, device: torch.device, steps: Steps
) -> list[tuple[str, Entry]]:
    """What the calls of an experiment take beside their models: by sequences and micro-batches."""
    experiment = read_experiment(path)
    graph = experiment.graph()
    whole = min(experiment.workload.sequences, _MOST_SEQUENCES)
    found: list[tuple[str, Entry]] = []
    for role in graph.roles:
        subject = Subject(experiment.role_shape(graph, role), experiment.dtype, 1, ())
        bench: CallBenchmarks | None = None
        for call in _timed_calls(graph, role):
            of = call_signature(call.name, str(call.loss or call.output))
            steps.begin(of)
            for sequences, micro_batches in sorted({(max(1, whole // 4), 1), (whole, 1), (whole, 4)}):
                if sequences < micro_batches * call.mini_batches:
                    continue
                key = f"{of}, {subject.name}, {experiment.workload}, {sequences} / {micro_batches}"
                known = kept.get(key)
                if known is None:
                    if bench is None:
                        shape = _fitting(subject, device)
                        bench = CallBenchmarks(
                            experiment, ShardBenchmarks(shape, experiment.dtype, 1, None, device)
                        )
                    samples = bench.beside_model(call, sequences, micro_batches, effort)
                    entry = Entry(of, "call", False, float(sequences), float(micro_batches), samples)
                    known = (0.0, [entry])
                    kept.put(key, *known)
                found += [(experiment.dtype, entry) for entry in known[1]]
    return found


def _fitting(subject: Subject, device: torch.device) -> ModelShape:
    """The shape with as many layers as a third of the memory trains."""
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    else:
        available = psutil.virtual_memory().available
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the spec file says and writes the result file."""
    parser = argparse.ArgumentParser(prog="runtime.table_profiler")
    parser.add_argument("spec", type=Path)
    parser.add_argument("result", type=Path)
    options = parser.parse_args(arguments)
    content = json.loads(options.spec.read_text(encoding="utf-8"))
    fingerprint = content["fingerprint"]
    lists = {key: tuple(content.pop(key)) for key in ("models", "experiments", "dtypes")}
    spec = TableSpec(
        tp=content["tp"], quick=content["quick"], kept=content["kept"], ranks=content["ranks"], **lists
    )
    torch.set_num_threads(1)
    keep_freed_memory()  # as ranks of a run do
    # what stands in for communication leaves numbers as they come
    torch.set_flush_denormal(True)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    try:
        result = measure_tables(spec, device, fingerprint, stand_in_groups(spec.tp))
    except InputError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        sys.exit(1)
    options.result.write_text(json.dumps(result), encoding="utf-8")


def stand_in_groups(most: int) -> Mapping[int, dist.ProcessGroup]:
    """Tensor-parallel groups of every size up to `most` whose collectives return at once."""
    if most < 2:
        return {}
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=most)
    return {size: dist.new_group(list(range(size))) for size in range(2, most + 1)}


if __name__ == "__main__":
    main()
