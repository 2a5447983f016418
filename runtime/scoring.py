"""Executing compute calls: Python rewards on samples as text, and weighted sums of scores.

Decides what a sample without a score becomes: an error, or a mark (its score is NaN), by which training
leaves it out. Knows nothing of models or of other ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from realloc.dataflow import Call, Per
from realloc.experiment import Experiment
from realloc.functions import Sample
from realloc.rewards import SKIP
from runtime.call_metrics import add_distribution
from runtime.data_store import IterationData
from runtime.dataset import Dataset
from runtime.metrics import Metrics
from runtime.reward_worker import Failure, RewardWorker

UNSCORED = math.nan


class Scorer:
    """The functions of one compute call on one rank, each in a process of its own."""

    def __init__(self, call: Call) -> None:
        self._workers = [RewardWorker(source) for source in call.functions]
        self._where = call.name
        (self._written,) = call.writes

    def score(
        self, samples: Sequence[Sample], iteration: int, replicas: int, metrics: Metrics
    ) -> list[float]:
        """The weighted sum of all functions for each sample, UNSCORED for one that has to be left out.

        Metrics: the mean score, each function's mean where there are several, and, where samples may be
        left out, their number (`skipped`; it is divided by `replicas`, the ranks that report). Raises
        RunError.
        """
        if any(worker.source.on_failure == SKIP for worker in self._workers):
            metrics.add("skipped", 0.0, 1.0 / replicas)
        if not samples:
            return []
        for worker in self._workers:
            worker.wait_ready()
        for worker in self._workers:  # all of them work at the same time
            worker.post(samples)
        totals = [0.0] * len(samples)
        for worker in self._workers:
            values = worker.take(samples, f"{self._where}: iteration {iteration}")
            numbers = [UNSCORED if isinstance(value, Failure) else value for value in values]
            totals = [t + worker.source.weight * n for t, n in zip(totals, numbers, strict=True)]
            if len(self._workers) > 1:
                _report(metrics, worker.source.name, numbers)
        _report(metrics, self._written, totals)
        if "skipped" in metrics.sums:
            metrics.add("skipped", sum(map(math.isnan, totals)), 0.0)
        return totals

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.close()


def weighted_sum(call: Call, data: IterationData, share: Sequence[int], metrics: Metrics) -> list[float]:
    """The sum that a compute call with `weights` makes; a sample that one source has not scored has none."""
    total = torch.zeros(len(share), dtype=torch.float64)
    for key, weight in call.weights:
        total += weight * data.packed(key, share).double()
    values: list[float] = total.tolist()
    _report(metrics, call.writes[0], values)
    return values


def text_samples(
    call: Call,
    experiment: Experiment,
    dataset: Dataset,
    data: IterationData,
    share: Sequence[int],
    iteration: int,
) -> list[Sample]:
    """The sequences of a rank's share as the call's functions see them."""
    key, samples = str(call.sequence), []
    for position in share:
        tokens = data.packed(key, [position]).tolist()
        prompt = data.prompt_lengths[position]
        response = dataset.decode(tokens[prompt:])
        ended = tokens[-1] in dataset.eos_ids and len(tokens) > prompt
        samples.append(
            Sample(
                id=iteration * data.num_sequences + position,
                prompt=dataset.decode(tokens[:prompt]),
                response=response,
                finished=ended or any(string in response for string in experiment.sampling.stop),
                row=dataset.row(iteration, position),
                where=dataset.where(iteration, position),
            )
        )
    return samples


def _report(metrics: Metrics, name: str, values: Sequence[float]) -> None:
    """Mean and deviation of those that are scored."""
    scored = [value for value in values if not math.isnan(value)]
    add_distribution(metrics, name, torch.tensor(scored, dtype=torch.float64))


def may_skip(experiment: Experiment) -> bool:
    """Whether some sample may come without a score."""
    return any(source.on_failure == SKIP for source in experiment.rewards)


def unscored(call: Call, data: IterationData, share: Sequence[int]) -> torch.Tensor:
    """Marks of a rank's share, 1 where a score that the call reads is UNSCORED; float64 [num_sequences]."""
    marks = torch.zeros(data.num_sequences, dtype=torch.float64)
    for key in call.reads:
        if data.keys[key].per is Per.SEQUENCE and data.keys[key].dtype == "float32":
            marks[list(share)] += data.packed(key, share).isnan().double()
    return marks.clamp(max=1.0)
