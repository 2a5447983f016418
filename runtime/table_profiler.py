"""The process that measures the tables of a profile: point after point, each kept as soon as it is done.

It runs alone on one device and writes what it has measured to a file beside the profile, keyed by
what was measured, so that a measurement which was interrupted goes on where it stopped. Rows are
put together here; which points there are is `runtime.measuring_plan`'s affair.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from realloc.dataflow import Call, CallKind, DataflowGraph
from realloc.errors import InputError
from realloc.experiment import Experiment, read_experiment
from realloc.model_shape import ModelShape, resolve_shape
from realloc.signature import call_signature
from runtime.call_benchmarks import CallBenchmarks
from runtime.host_memory import keep_freed_memory
from runtime.layer_benchmarks import Effort, ShardBenchmarks
from runtime.measuring_plan import (
    Sizes,
    Subject,
    default_sizes,
    experiment_sizes,
    subjects,
)
from runtime.point_runner import SubjectRunner, fitting
from runtime.shared_cores import SharedCores, shared_cores
from runtime.supported import check_runs
from runtime.table_pace import evened, pace_content
from runtime.table_rows import Entry, Found, Kept, table_rows

ROUNDS = 2
"""In which points of a host are measured, minutes apart where there is much: its pace changes."""
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


def measure_tables(
    spec: TableSpec, device: torch.device, fingerprint: str, groups: Mapping[int, dist.ProcessGroup]
) -> Mapping[str, Any]:
    """Measures a spec's points; returns `tables`, `concurrency` and `pace`, empty where unknown.

    Says on stdout how far it is.
    """
    gpu = device.type == "cuda"
    todo = wanted(spec, gpu=gpu)
    shares = not gpu and spec.ranks > 1 and bool(spec.experiments)
    graphs = [read_experiment(path).graph() for path in spec.experiments]
    calls = sum(len(_timed_calls(graph, role)) for graph in graphs for role in graph.roles)
    rounds = 1 if gpu else ROUNDS
    # when time is short, shards, and points beside others, in the first round alone
    turns = [(i, s) for i in range(rounds) for s in todo if not i or s.tp == 1 or not spec.quick]
    steps = Steps(sum(len(subject.points) for _, subject in turns) + calls + shares)
    effort = Effort(4, 0.08) if spec.quick else Effort(5, 0.4)
    longest_s = (0.3 if spec.quick else 2.5) * (0.2 if gpu else 1.0)
    each = replace(effort, samples=-(-effort.samples // rounds), seconds=effort.seconds / rounds)
    kept = Kept(Path(spec.kept), fingerprint)
    collected: list[tuple[str, Found]] = []
    for turn, subject in turns:
        group = groups.get(subject.tp)
        over: dict[tuple[object, ...], int] = {}
        beside = not (turn and spec.quick)
        with closing(SubjectRunner(subject, group, device, each, spec.ranks, beside=beside)) as runner:
            for number, point in enumerate(subject.points):
                steps.begin(f"{point.work}, {point.count} x {point.length} tokens, tp {subject.tp}")
                if point.line in over:
                    continue
                key = f"{subject.name} {point}" + (f", round {turn + 1}" if turn else "")
                measured = kept.found(key, partial(runner.run, number))
                collected.append((subject.dtype, measured))
                if measured.pass_s > longest_s:
                    over[point.line] = point.count
    for path in spec.experiments:
        collected += _calls_of(path, kept, effort, device, steps)
    shared: SharedCores | None = None
    if shares:
        steps.begin(f"{spec.ranks} ranks at once")
        shared = shared_cores(spec.experiments, spec.ranks, 3.0 if spec.quick else 24.0)
    found = [each for _, each in collected]
    entries = [
        (dtype, entry)
        for (dtype, _), entries in zip(collected, evened(found, shared), strict=True)
        for entry in entries
    ]
    return {
        "tables": table_rows(entries),
        "concurrency": [] if shared is None else shared.points,
        "pace": pace_content(found, spec.ranks, shared),
    }


class Steps:
    """Says on stdout, line by line, which of so many steps has begun."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0

    def begin(self, what: str) -> None:
        print(json.dumps({"done": self._done, "total": self._total, "what": what}), flush=True)
        self._done += 1


def _timed_calls(graph: DataflowGraph, role: str) -> Sequence[Call]:
    """Calls of the role whose work beside the model is timed."""
    return [call for call in graph.calls_of(role) if call.kind is not CallKind.GENERATE]


def _calls_of(
    path: str, kept: Kept, effort: Effort, device: torch.device, steps: Steps
) -> list[tuple[str, Found]]:
    """What the calls of an experiment take beside their models: by sequences and micro-batches."""
    experiment = read_experiment(path)
    graph = experiment.graph()
    whole = min(experiment.workload.sequences, _MOST_SEQUENCES)
    collected: list[tuple[str, Found]] = []
    for role in graph.roles:
        subject = Subject(experiment.role_shape(graph, role), experiment.dtype, 1, ())
        bench = cache(partial(_call_benchmarks, experiment, subject, device))
        for call in _timed_calls(graph, role):
            computes = str(call.loss or call.output)
            of = call_signature(call.name, computes, subject.shape)
            steps.begin(call_signature(call.name, computes))
            for sequences, micro_batches in sorted({(max(1, whole // 4), 1), (whole, 1), (whole, 4)}):
                if sequences < micro_batches * call.mini_batches:
                    continue
                key = f"{of}, {subject.name}, {experiment.workload}, {sequences} / {micro_batches}"
                measure = partial(_beside, bench, call, of, sequences, micro_batches, effort)
                collected.append((experiment.dtype, kept.found(key, measure)))
    return collected


def _call_benchmarks(experiment: Experiment, subject: Subject, device: torch.device) -> CallBenchmarks:
    shape = fitting(subject, device)
    return CallBenchmarks(experiment, ShardBenchmarks(shape, experiment.dtype, 1, None, device))


def _beside(
    bench: Callable[[], CallBenchmarks],
    call: Call,
    of: str,
    sequences: int,
    micro_batches: int,
    effort: Effort,
) -> Found:
    samples = bench().beside_model(call, sequences, micro_batches, effort)
    entry = Entry(of, "call", 0.0, float(sequences), float(micro_batches), samples)
    return Found(0.0, [entry], bench().pace_s())


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
