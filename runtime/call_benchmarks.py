"""Times whole calls of an experiment on one rank, to learn what they take beside their model.

Assembling micro-batches, advantages, losses, metrics: the call is executed as in a run, on made-up
data, and what its passes and optimizer steps take by themselves is subtracted. What they lose by
following each other is so counted with the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import torch

from realloc.dataflow import Call, CallKind, Output, Per
from realloc.experiment import Experiment
from runtime.calls import CallExecutor
from runtime.data_store import DTYPES, IterationData
from runtime.functions import FunctionTable
from runtime.layer_benchmarks import Effort, ShardBenchmarks, pack_lengths


class CallBenchmarks:
    """The inference and train_step calls of one role of an experiment."""

    def __init__(self, experiment: Experiment, bench: ShardBenchmarks) -> None:
        """`bench` holds the whole model of the role."""
        self._experiment, self._bench = experiment, bench
        self._graph = experiment.graph()
        self._functions = FunctionTable(experiment.resolve_algorithm().functions)

    def beside_model(self, call: Call, sequences: int, micro_batches: int, effort: Effort) -> list[float]:
        """Seconds of the call on so many sequences, in all, less those of its model and optimizer.

        Both are timed in turn, as much work of the one as of the other: the difference is small, and the
        machine's slow moments longer. Noise can make it less than nothing.
        """
        data = self._data(sequences)
        whole, model_s = self._whole(call, data, micro_batches), self._model_s(call, data, micro_batches)
        return self._bench.samples(lambda: self._bench.timed(whole) - model_s(), effort)

    def pace_s(self) -> float:
        """As `ShardBenchmarks.pace_s`."""
        return self._bench.pace_s()

    def whole(self, call: Call, sequences: int, micro_batches: int, effort: Effort) -> list[float]:
        """Seconds of the call on so many sequences."""
        whole = self._whole(call, self._data(sequences), micro_batches)
        return self._bench.samples(lambda: self._bench.timed(whole), effort)

    def _whole(self, call: Call, data: IterationData, micro_batches: int) -> Callable[[], object]:
        bench = self._bench
        executor = CallExecutor(
            # micro-batches of a mixture are priced as those of the batch, and selecting apart
            call=replace(call, mixture=None, select=None, selected=0),
            context=bench.context(micro_batches=micro_batches),
            experiment=self._experiment,
            functions=self._functions,
            # generation and rewards alone ask it for more; made-up sequences end nowhere
            dataset=cast(Any, SimpleNamespace(eos_ids=())),
            decoder=bench.decoder(micro_batches=micro_batches),
            trainer=bench.trainer if call.kind is CallKind.TRAIN_STEP else None,
        )
        return lambda: executor.run(data, 0)

    def _model_s(self, call: Call, data: IterationData, micro_batches: int) -> Callable[[], float]:
        """Runs as many passes and optimizer steps as the call: their seconds, timed as for tables."""
        bench = self._bench
        layers = bench.shape.num_layers
        steps = call.mini_batches * call.epochs if call.kind is CallKind.TRAIN_STEP else 1
        parts = micro_batches * (call.mini_batches if call.kind is CallKind.TRAIN_STEP else 1)
        totals = data.lengths[str(call.sequence)]
        each = max(1, len(totals) // parts)
        lengths = totals[:each]
        prompts = sum(data.prompt_lengths[:each])
        rows = each if call.output is Output.SCORES else sum(lengths) - prompts
        trains = call.kind is CallKind.TRAIN_STEP
        once = bench.training_pass(lengths, rows) if trains else bench.inference_pass(lengths, rows)

        def model_s() -> float:
            seconds = 0.0
            for _ in range(steps):
                for _ in range(micro_batches):
                    found = once()
                    seconds += found.total + layers * (found.layer + found.layer_backward)
                if trains:
                    seconds += bench.timed(bench.optimizer_step)
            return seconds

        return model_s

    def _data(self, sequences: int) -> IterationData:
        """Every key of the graph, of sequences with the workload's mean lengths."""
        workload, graph = self._experiment.workload, self._graph
        prompt = max(1, round(workload.prompt.mean))
        responses = list(
            pack_lengths(sequences, max(1, round(workload.response.mean)), workload.response.raggedness)
        )
        samples = workload.samples_per_prompt
        data = IterationData(
            graph.key,
            [prompt] * sequences,
            samples_per_prompt=samples if sequences % samples == 0 else sequences,
        )
        for name, key in graph.key.items():
            lengths = {
                Per.SEQUENCE: [1] * sequences,
                Per.PROMPT_TOKEN: [prompt] * sequences,
                Per.RESPONSE_TOKEN: responses,
                Per.TOKEN: [prompt + response for response in responses],
            }[key.per]
            data.lengths[name] = lengths
            whole = self._values(sum(lengths), DTYPES[key.dtype])
            data.values[name] = dict(enumerate(whole.split(lengths)))
        return data

    def _values(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        if dtype == torch.int64:
            return torch.randint(self._bench.shape.vocab, (count,), generator=generator)
        return torch.rand(count, generator=generator, dtype=dtype) - 1.0
