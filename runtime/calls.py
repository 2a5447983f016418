"""Executing one model function call on one rank: generate, inference, train_step, compute.

Each takes what it reads from the iteration's data, runs this rank's part, and puts what it writes
back. Nothing here knows other calls or where data goes next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from realloc.augmented import Placement
from realloc.dataflow import Call, CallKind, Output, Per
from realloc.errors import RunError
from realloc.experiment import Experiment
from runtime.batch import PackedBatch
from runtime.batching import Assignment, num_passes
from runtime.call_metrics import add_distribution, add_responses
from runtime.data_store import IterationData
from runtime.dataset import Dataset
from runtime.decoder import Decoder
from runtime.deepspeed_backend import DeepSpeedTrainer
from runtime.functions import FunctionTable
from runtime.generation import generate
from runtime.metrics import Metrics, StepReport
from runtime.parallel import ParallelContext
from runtime.passes import (
    MixedStep,
    compute_output,
    empty_pass,
    make_micro_batches,
    mixed_steps,
    num_elements,
    zero_loss,
)
from runtime.pipeline import MicroBatch, run_forward
from runtime.scoring import Scorer, may_skip, text_samples, unscored, weighted_sum
from runtime.selection import settle
from runtime.stopwatch import Stopwatch
from runtime.training import Trainer
from runtime.transfer import assignment_of


@dataclass(frozen=True)
class CallExecutor:
    """One call on this rank. `decoder` is None for compute, `trainer` but for train_step.

    `watch` times what a train_step spends on the optimizer. `state`: what `prepare` keeps (`Batch.state`).
    `mixed`: what a train_step with a mixture mixes in, by iteration.
    """

    call: Call
    context: ParallelContext
    experiment: Experiment
    functions: FunctionTable
    dataset: Dataset
    decoder: Decoder | None = None
    trainer: Trainer | DeepSpeedTrainer | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    state: dict[str, float] = field(default_factory=dict)
    scorer: Scorer | None = None
    mixed: Callable[[int], IterationData] | None = None

    def run(self, data: IterationData, iteration: int) -> Metrics:
        """Runs this rank's share; returns its contribution to the call's metrics.

        Every call reports `tokens`: prompt and response tokens of the batch, each counted once.
        """
        assignment, reported = self._assignment(data), dict[str, float]()
        if self.call.select is not None:
            assignment, reported = self._select(data, assignment, self.call.select)
        metrics = self._run(data, assignment, iteration)
        for name, value in reported.items():
            metrics.add(name, value, 1.0)
        written = self.call.writes[0] if self.call.kind is CallKind.GENERATE else self._sequence
        if self.call.weights:  # it works on scores
            written = next(key for key in self.call.reads if data.keys[key].per is Per.TOKEN)
        lengths = data.key_lengths(written)
        tokens = sum(lengths[p] for p in assignment.of(self.context.at.dp))
        metrics.add("tokens", tokens, 1.0 / self.context.strategy.dp)
        return metrics

    def _run(self, data: IterationData, assignment: Assignment, iteration: int) -> Metrics:
        self._announce_lengths(data)
        if self.call.kind is CallKind.GENERATE:
            return self._generate(data, assignment, iteration)
        if self.call.kind is CallKind.INFERENCE:
            return self._inference(data, assignment, iteration)
        if self.call.kind is CallKind.TRAIN_STEP:
            return self._train(data, assignment, iteration)
        return self._compute(data, assignment, iteration)

    @property
    def reports(self) -> bool:
        """Whether this rank is the one of its data replica that reports metrics."""
        return self.context.is_last and self.context.at.tp == 0

    def _assignment(self, data: IterationData) -> Assignment:
        placement = Placement(self.context.mesh, self.context.strategy)
        return assignment_of(self.call, placement, data)

    def _announce_lengths(self, data: IterationData) -> None:
        """Sets the lengths of written keys that follow from those of the sequence."""
        key = self.call.sequence
        if self.call.kind is CallKind.GENERATE or key is None:
            return
        totals = data.key_lengths(key)
        responses = [n - p for n, p in zip(totals, data.prompt_lengths, strict=True)]
        for written in (*self.call.writes, *self.call.prepared):
            per = data.keys[written].per
            if per in (Per.RESPONSE_TOKEN, Per.TOKEN):
                data.lengths[written] = responses if per is Per.RESPONSE_TOKEN else totals

    def _select(
        self, data: IterationData, before: Assignment, function: str
    ) -> tuple[Assignment, dict[str, float]]:
        """What the call works on, and what the algorithm reports of that."""
        chosen: list[int] = []
        reported: dict[str, float] = {}
        if self.context.is_last:
            batch = self._unmarked(data, before, self._marked(data, before))
            flags = self.functions.select(function)(batch, self.experiment.hyperparameters or {}).tolist()
            chosen = [p for p, flag in zip(batch.positions, flags, strict=True) if flag]
            reported = batch.reported
        with self.watch.timed("dp_communication"):
            return settle(self.call, self.context, data, before, chosen), reported

    # generate -------------------------------------------------------------------------------

    def _generate(self, data: IterationData, assignment: Assignment, iteration: int) -> Metrics:
        key = self._sequence
        share = assignment.of(self.context.at.dp)
        prompts = data.packed(key, share) if self.context.is_first else None
        sampling = self.experiment.sampling
        result = generate(
            self._model,
            prompts=prompts,
            prompt_lengths=[data.prompt_lengths[p] for p in share],
            sequence_ids=[iteration * data.num_sequences + p for p in share],
            max_new_tokens=self.experiment.workload.response.maximum,
            eos_ids=self.dataset.eos_ids,
            sampling=replace(sampling, temperature=0.0) if self.call.greedy else sampling,
            seed=self.experiment.seed + (self.call.every > 0),  # other draws than the iteration's own
            iteration=iteration,
            micro_batches=self.context.strategy.micro_batches,
            prompt_keys=[p // data.samples_per_prompt for p in share],
            tokenizer=self.dataset.tokenizer,
        )
        responses = self._share_lengths(data, share, result.response_lengths)
        tokens_key, logprobs_key = self.call.writes
        data.lengths[tokens_key] = [p + r for p, r in zip(data.prompt_lengths, responses, strict=True)]
        data.lengths[logprobs_key] = responses
        metrics = Metrics()
        if result.tokens is not None and result.logprobs is not None and self.context.is_last:
            data.put(tokens_key, share, result.tokens.cpu())
            data.put(logprobs_key, share, result.logprobs.float().cpu())
            mine = [responses[p] for p in share]
            longest = self.experiment.workload.response.maximum
            metrics.add("truncated", sum(n == longest for n in mine), len(mine))
            add_responses(metrics, data, share, self.call.writes, self.dataset.eos_ids)
        return metrics

    def _share_lengths(
        self, data: IterationData, share: Sequence[int], response_lengths: Sequence[int]
    ) -> list[int]:
        """Response lengths of the whole batch, from every replica's own."""
        lengths = torch.zeros(data.num_sequences, dtype=torch.int64)
        lengths[list(share)] = torch.tensor(list(response_lengths), dtype=torch.int64)
        if self.context.dp_group is not None:
            lengths = lengths.to(self.context.device)
            dist.all_reduce(lengths, group=self.context.dp_group)
        result: list[int] = lengths.tolist()
        return result

    # inference ------------------------------------------------------------------------------

    def _inference(self, data: IterationData, assignment: Assignment, iteration: int) -> Metrics:
        share = assignment.of(self.context.at.dp)
        metrics = Metrics()
        (written,) = self.call.writes
        if self.call.select is not None and self.context.is_last:
            whole = self._assignment(data).of(self.context.at.dp)
            lengths = data.key_lengths(written)
            data.put(written, whole, torch.zeros(sum(lengths[p] for p in whole)))

        def finish(hidden: torch.Tensor, batch: MicroBatch) -> None:
            output = self._output(hidden, batch, data).float().cpu()
            if self.call.output is Output.SCORES and not bool(output.isfinite().all()):
                at = int((~output.isfinite()).nonzero()[0])
                sample = iteration * data.num_sequences + batch.positions[at]
                raise RunError(f"{self.call.name}: the model's score of sample {sample} is {output[at]:g}.")
            data.put(written, batch.positions, output)
            add_distribution(metrics, written, output.double())

        run_forward(self._model, self.context, self._micro_batches(data, share), finish)
        return metrics

    # train_step -----------------------------------------------------------------------------

    def _train(self, data: IterationData, assignment: Assignment, iteration: int) -> Metrics:
        metrics = Metrics()
        marked = self._marked(data, assignment)
        self._prepare(data, assignment, metrics, marked)
        steps = assignment.shares * self.call.epochs
        mixed = self._mixed_steps(iteration, metrics)
        for number, mini_batch in enumerate(steps):
            self._mini_batch(data, mini_batch, metrics, marked, mixed[number] if mixed else None)
        return metrics

    def _mixed_steps(self, iteration: int, metrics: Metrics) -> list[MixedStep]:
        """What is mixed into each optimizer step of the iteration; reports this replica's tokens of it."""
        if self.call.mixture is None or self.mixed is None:
            return []
        context = self.context
        steps = mixed_steps(self.call, context, self.mixed(iteration))
        metrics.add(
            "mixed_tokens", sum(s.num_tokens(context.at.dp) for s in steps), 1.0 / context.strategy.dp
        )
        return steps

    def _marked(self, data: IterationData, assignment: Assignment) -> Set[int]:
        """Sequences of the whole batch that have no score; known on the last stage, which has the loss.

        They pass through the model with the others, since every rank must know what passes, but no
        function sees them and no mean counts them.
        """
        if not (self.context.is_last and may_skip(self.experiment)):
            return frozenset()
        marks = unscored(self.call, data, assignment.of(self.context.at.dp)).to(self.context.device)
        if self.context.dp_group is not None:
            dist.all_reduce(marks, group=self.context.dp_group)
        marked = frozenset(marks.nonzero()[:, 0].tolist())
        if len(marked) == data.num_sequences:
            raise RunError(
                f"{self.call.name}: none of the {len(marked)} samples of this iteration has a score: rewards "
                f"failed on each, as the logs say, and 'on_failure: skip' left nothing to learn from."
            )
        return marked

    def _mini_batch(
        self,
        data: IterationData,
        shares: Sequence[Sequence[int]],
        metrics: Metrics,
        marked: Set[int],
        mixed: MixedStep | None,
    ) -> None:
        if self.trainer is None or self.call.loss is None:
            raise AssertionError(f"{self.call.name} cannot train")
        counted = [[p for p in share if p not in marked] for share in shares]
        positions = [p for share in counted for p in share]
        elements = self._num_elements(data, positions)
        function = self.functions.loss(self.call.loss)
        report = StepReport(metrics, counted, () if mixed is None else mixed.shares)

        def loss(hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
            if batch.is_mixed and mixed is not None:
                return self._mixed_loss(hidden, batch, mixed, report)
            kept = [p for p in batch.positions if p not in marked]
            if not kept:
                return zero_loss(self.call.output, self._model, hidden, batch)
            output = self._output(hidden, batch, data)
            if len(kept) < len(batch.positions):
                output = output[self._counted_rows(data, batch, marked)]
            view = self._view(data, kept, len(positions), elements)
            return report.loss(*function(output, view, self.experiment.hyperparameters or {}))

        with self.watch.timed("optimizer"):
            self.trainer.zero_gradients()
        batches = self._micro_batches(data, shares[self.context.at.dp])
        batches += mixed.micro_batches(self.context) if mixed is not None else []
        if self.trainer.equal_passes:
            passes = num_passes(shares, self.context.strategy.micro_batches, self.call.together)
            passes += mixed.num_passes(self.context) if mixed is not None else 0
            batches += [empty_pass(self.context)] * (passes - len(batches))
        self.trainer.run(batches, loss)
        with self.watch.timed("optimizer"):
            step = self.trainer.step()
        report.close(self.context.at.dp, step)

    def _mixed_loss(
        self,
        hidden: torch.Tensor,
        batch: MicroBatch,
        mixed: MixedStep,
        report: StepReport,
    ) -> torch.Tensor:
        """The mixture's loss of a micro-batch; log-probabilities are the model's own, whatever is sampled."""
        key, everyone, kind = mixed.mixture.sequence, mixed.positions, self.call.output
        output = compute_output(kind, self._model, hidden, batch, mixed.data, key, 1.0)
        elements = num_elements(kind, mixed.data, key, everyone)
        view = self._view(mixed.data, batch.positions, len(everyone), elements)
        function = self.functions.loss(mixed.mixture.loss)
        value, extra = function(output, view, self.experiment.hyperparameters or {})
        return report.loss(value, extra, is_mixed=True)

    def _counted_rows(self, data: IterationData, batch: MicroBatch, marked: Set[int]) -> torch.Tensor:
        """Which elements of the model's output are of sequences that are not marked; bool [elements]."""
        counts = [self._num_elements(data, [p]) for p in batch.positions]
        flags = torch.tensor([p not in marked for p in batch.positions])
        return flags.repeat_interleave(torch.tensor(counts)).to(self.context.device)

    def _prepare(
        self, data: IterationData, assignment: Assignment, metrics: Metrics, marked: Set[int]
    ) -> None:
        """Runs the algorithm's `prepare` where its inputs are: on the last stage."""
        if self.call.prepare is None or not self.context.is_last:
            return
        batch = self._unmarked(data, assignment, marked)
        function = self.functions.prepare(self.call.prepare, self.call.prepared)
        prepared = function(batch, self.experiment.hyperparameters or {})
        for key in self.call.prepared:
            data.put(key, batch.positions, prepared[key].detach().cpu())
        for name, value in batch.reported.items():
            metrics.add(name, value, 1.0)

    def _unmarked(self, data: IterationData, assignment: Assignment, marked: Set[int]) -> PackedBatch:
        """This replica's sequences but those that are marked, of all that are assigned."""
        share = [p for p in assignment.of(self.context.at.dp) if p not in marked]
        everyone = [p for p in assignment.positions if p not in marked]
        return self._view(data, share, len(everyone), self._num_elements(data, everyone))

    def _view(
        self, data: IterationData, positions: Sequence[int], sequences: int, elements: int
    ) -> PackedBatch:
        """Some of this replica's sequences as the algorithm's functions see them."""
        longest = self.experiment.workload.response.maximum
        context = self.context
        return PackedBatch(
            data,
            positions,
            sequences,
            elements,
            context.device,
            context.dp_group,
            longest,
            self.dataset.eos_ids,
            self.state,
        )

    # compute --------------------------------------------------------------------------------

    def _compute(self, data: IterationData, assignment: Assignment, iteration: int) -> Metrics:
        share, metrics = assignment.of(self.context.at.dp), Metrics()
        if self.call.report is not None:
            everyone = range(data.num_sequences)
            batch = self._view(data, share, len(everyone), self._num_elements(data, everyone))
            for name, value in self.functions.report(self.call.report)(batch, self.call.reads).items():
                metrics.add(name, value, 1.0)
            return metrics
        if self.call.weights:
            values = weighted_sum(self.call, data, share, metrics)
        elif self.scorer is not None:
            rows = 0 if self.call.every else iteration  # evaluation takes the same rows each time
            samples = text_samples(self.call, self.experiment, self.dataset, data, share, rows)
            values = self.scorer.score(samples, iteration, self.context.strategy.dp, metrics)
        else:
            raise AssertionError(f"{self.call.name} has no function")
        data.put(self.call.writes[0], share, torch.tensor(values, dtype=torch.float32))
        return metrics

    # shared ---------------------------------------------------------------------------------

    @property
    def _sequence(self) -> str:
        if self.call.sequence is None:
            raise AssertionError(f"{self.call.name} has no sequence key")
        return self.call.sequence

    @property
    def _model(self) -> Decoder:
        if self.decoder is None:
            raise AssertionError(f"{self.call.name} has no model")
        return self.decoder

    def _micro_batches(self, data: IterationData, share: Sequence[int]) -> list[MicroBatch]:
        return make_micro_batches(self.context, data, self._sequence, share, self.call.together)

    def _num_elements(self, data: IterationData, positions: Sequence[int]) -> int:
        """Elements of the model's output for these sequences."""
        return num_elements(self.call.output, data, self._sequence, positions)

    def _output(self, hidden: torch.Tensor, batch: MicroBatch, data: IterationData) -> torch.Tensor:
        """What the call's model computes for a micro-batch, from the last stage's hidden."""
        temperature = self.experiment.sampling.temperature or 1.0
        kind, key = self.call.output, self._sequence
        return compute_output(kind, self._model, hidden, batch, data, key, temperature)
