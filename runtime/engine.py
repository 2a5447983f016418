"""The engine: executes this rank's instructions, iteration after iteration.

It decides nothing: what runs, and in which order, stands in the program. It records what each
instruction took and reports each call's metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from time import thread_time

import torch

from realloc.augmented import Node, NodeKind
from realloc.dataflow import DataKey, Per
from realloc.errors import InputError
from realloc.layout import layout
from realloc.plan import ExecutionPlan
from realloc.reallocation import schedule
from runtime.averages import Averager, Mixing
from runtime.calls import CallExecutor
from runtime.data_store import DTYPES as VALUE_DTYPES
from runtime.data_store import IterationData
from runtime.dataset import DataBatch, Dataset
from runtime.functions import FunctionTable
from runtime.parallel import Groups
from runtime.program import Instruction, Program
from runtime.reallocation import Holding, Reallocator, Staging
from runtime.roles import DTYPES, RankRole
from runtime.scoring import Scorer
from runtime.stopwatch import Stopwatch
from runtime.tracing import Recorder
from runtime.transfer import TransferExecutor

Sums = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Observer:
    """What the engine tells the outside: where it is, and what an iteration's calls measured."""

    entering: Callable[[int, int], None]
    """(iteration, instruction index), before each instruction."""
    report: Callable[[int, Sums, IterationData], None]
    """(iteration, metric -> numerator and denominator, what the rank holds), after each iteration."""


class Engine:
    """One rank's executors, one for each of its instructions."""

    def __init__(
        self,
        plan: ExecutionPlan,
        program: Program,
        rank: int,
        groups: Groups,
        roles: Mapping[str, RankRole],
        dataset: Dataset,
        device: torch.device,
    ) -> None:
        self._plan, self._rank, self._roles, self._dataset = plan, rank, roles, dataset
        self._groups, self._device = groups, device
        self._staging = Staging(device)
        self._functions = FunctionTable(plan.experiment.resolve_algorithm().functions)
        self._instructions = program.of(rank)
        self._watch = Stopwatch()
        self._calls: dict[str, CallExecutor] = {}
        self._transfers: dict[str, TransferExecutor] = {}
        self._reallocators: dict[str, Reallocator | Averager] = {}
        for instruction in self._instructions:
            self._build(instruction.node)

    @property
    def states(self) -> Mapping[str, Mapping[str, float]]:
        """Call -> what its `prepare` keeps between iterations, of the calls that keep something here."""
        return {name: call.state for name, call in self._calls.items() if call.state}

    def resume(self, states: Mapping[str, Mapping[str, float]]) -> None:
        """Goes on with what a checkpoint holds of `states`."""
        for name, call in self._calls.items():
            call.state.update(states.get(name, {}))

    def run(self, iterations: range, recorder: Recorder, observer: Observer) -> None:
        """Executes whole iterations. Whatever an instruction raises passes through."""
        for iteration in iterations:
            data = self._source(self._dataset.batch(iteration))
            evaluation = None
            sums: Sums = {}
            for instruction in self._instructions:
                observer.entering(iteration, instruction.index)
                node = instruction.node
                if not node.runs_in(iteration):
                    continue
                if node.every and evaluation is None:
                    evaluation = self._source(self._held_out.batch(0), evaluates=True)
                mine = evaluation if node.every and evaluation is not None else data
                self._execute(instruction, iteration, mine, recorder, sums)
            observer.report(iteration, sums, data)

    def evaluate(self, iteration: int, entering: Callable[[int, int], None]) -> Sums:
        """Evaluation alone, of the models as they are after `iteration` iterations; the trace lacks it.

        Of an experiment with evaluation. What comes to the device for its calls, and leaves it, does so too.
        """
        data = self._source(self._held_out.batch(0), evaluates=True)
        aside, sums = Recorder(self._rank, 0.0), Sums()
        for instruction in self._instructions:
            if instruction.node.every or instruction.node.kind in (NodeKind.LOAD, NodeKind.OFFLOAD):
                entering(iteration, instruction.index)
                self._execute(instruction, iteration, data, aside, sums)
        return sums

    @cached_property
    def _held_out(self) -> Dataset:
        """The rows that evaluation takes: as many as an iteration, in the same shape."""
        work = self._plan.experiment.workload
        return self._dataset.held_out(work.sequences, work.samples_per_prompt)

    def _execute(
        self,
        instruction: Instruction,
        iteration: int,
        data: IterationData,
        recorder: Recorder,
        sums: Sums,
    ) -> None:
        node = instruction.node
        start, cpu_start = recorder.now(), thread_time()
        sent, tokens = 0, 0
        terms: Mapping[str, float] = {}
        if node.kind is NodeKind.CALL:
            executor = self._calls[node.name]
            if node.role is not None:
                self._roles[node.role].memory.wait()
            with self._watch.during(executor.context) as terms:
                metrics = executor.run(data, iteration)
            tokens = int(metrics.sums["tokens"][0])
            if executor.reports:
                sums.update({f"{node.name}/{k}": v for k, v in metrics.sums.items()})
        elif node.kind is NodeKind.TRANSFER:
            sent = self._transfers[node.name].run(data)
        elif node.kind is NodeKind.REALLOCATE:
            self._roles[str(node.role)].memory.load(node.name)
            sent = self._reallocators[node.name].run()
        elif node.kind is NodeKind.LOAD:
            self._roles[str(node.role)].memory.load(node.name)
        else:
            self._roles[str(node.role)].memory.offload(node.name)
        if self._device.type == "cuda":  # not the whole device: a load may still be under way
            torch.cuda.current_stream(self._device).synchronize()
        recorder.add(
            iteration,
            node.name,
            str(node.kind),
            start,
            predicted_s=instruction.predicted_s,
            sent_bytes=sent,
            tokens=tokens,
            terms=terms,
            cpu_s=thread_time() - cpu_start,
        )

    def _source(self, batch: DataBatch, *, evaluates: bool = False) -> IterationData:
        """The data of an iteration, or of evaluation, as the data set gives it; the same on every rank."""
        graph = self._plan.graph
        data = IterationData(
            graph.key,
            [len(prompt) for prompt in batch.prompts],
            samples_per_prompt=batch.samples_per_prompt,
        )
        read = {key for call in graph.calls if (call.every > 0) == evaluates for key in call.reads}
        for key in graph.source_keys:
            if key in read:
                _put_source(data, batch, graph.key[key])
        return data

    def _mixed(self, iteration: int) -> IterationData:
        """What train_steps mix in, as the data set gives it; the same on every rank."""
        graph, dataset = self._plan.graph, self._dataset.mixed
        if dataset is None:
            raise AssertionError("the data set has nothing to mix in")
        batch = dataset.batch(iteration)
        data = IterationData(graph.key, [len(prompt) for prompt in batch.prompts])
        for mixture in graph.mixtures:
            _put_source(data, batch, graph.key[mixture.sequence])
        return data

    def _build(self, node: Node) -> None:
        placements = self._plan.placements
        if node.kind is NodeKind.CALL:
            self._calls[node.name] = self._call_executor(node)
        elif node.kind is NodeKind.TRANSFER:
            src, dst = placements[str(node.src)], placements[str(node.dst)]
            self._transfers[node.name] = TransferExecutor(self._plan.graph, node, src, dst, self._rank)
        elif node.kind is NodeKind.REALLOCATE:
            self._reallocators[node.name] = self._reallocator(node)

    def _call_executor(self, node: Node) -> CallExecutor:
        call = self._plan.graph.by_name[node.name]
        context = self._groups.context(self._plan.placements[node.name], self._device)
        if context is None:
            raise AssertionError(f"rank {self._rank} has no part in {node.name}")
        role = None if call.role is None else self._roles[call.role]
        trains = role is not None and call == self._plan.graph.trainer(str(call.role))
        return CallExecutor(
            call=call,
            context=context,
            experiment=self._plan.experiment,
            functions=self._functions,
            dataset=self._held_out if call.every else self._dataset,
            decoder=None if role is None else role.by_call[node.name].decoder,
            trainer=role.trainer if role is not None and trains else None,
            watch=self._watch,
            scorer=Scorer(call) if call.functions else None,
            mixed=None if call.mixture is None else self._mixed,
        )

    def _reallocator(self, node: Node) -> Reallocator | Averager:
        role = self._roles[str(node.role)]
        source = self._plan.graph.by_name[str(node.src)].role
        average = self._plan.graph.average(str(node.role))
        ends = [self._plan.placements[str(name)] for name in (node.src, node.dst)]
        src, dst = (layout(role.shape, end.mesh, end.strategy) for end in ends)
        trained = self._roles[str(source)]
        models = [trained.by_call.get(str(node.src)), role.by_call.get(str(node.dst))]
        held = [None if m is None else Holding(m.params.views, m.params.boxes) for m in models]
        mixing = None
        if average is not None and models[1] is not None:
            mixing = Mixing(models[1].params, average.decay)
            held[1] = mixing.news
        dtype = DTYPES[self._plan.experiment.dtype]
        with (
            role.memory.on_device(),
            trained.memory.on_device(),
        ):  # it takes views, which need memory to be of
            reallocator = Reallocator(
                schedule(src, dst, self._plan.cluster.gpus_per_node, self._rank),
                self._rank,
                *held,
                src_dtype=dtype,
                dst_dtype=dtype,
                staging=self._staging,
                shared=role.shared,
            )
        return reallocator if mixing is None else Averager(reallocator, mixing)


def _put_source(data: IterationData, batch: DataBatch, key: DataKey) -> None:
    """Puts a source key's values of all sequences."""
    sequences = source_sequences(batch, key)
    data.lengths[key.name] = [len(sequence) for sequence in sequences]
    data.values[key.name] = {
        position: torch.tensor(sequence, dtype=VALUE_DTYPES[key.dtype])
        for position, sequence in enumerate(sequences)
    }


def source_sequences(batch: DataBatch, key: DataKey) -> list[tuple[int, ...]]:
    """What a source key has for each sequence: prompts, prompts and responses, or the responses' masks.

    Raises InputError when the data have no responses and the key needs them.
    """
    if key.per is Per.PROMPT_TOKEN:
        return list(batch.prompts)
    if batch.responses is None:
        raise InputError(
            f"experiment: data: the algorithm trains on '{key.name}', prompts with their responses; "
            f"name the column of the responses (data.response)."
        )
    if key.per is Per.RESPONSE_TOKEN:
        return list(batch.masks or (tuple(1 for _ in response) for response in batch.responses))
    return [p + r for p, r in zip(batch.prompts, batch.responses, strict=True)]
