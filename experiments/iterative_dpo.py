"""Iterative (online) DPO as a dataflow graph: pairs are the best and the worst of the actor's own samples.

Guo et al. 2024, arXiv 2402.04792; Xiong et al. 2023, arXiv 2312.11456. Decides which calls an iteration
has; the tensor functions that it names are in `experiments.dpo_functions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from experiments.common import (
    ROLLOUT_KEYS,
    check_mini_batches,
    check_samples,
    generate_call,
    given_hyperparameters,
    ref_call,
)
from experiments.dpo import preference_hyperparameters
from experiments.scoring import scoring
from realloc.dataflow import Call, CallKind, DataflowGraph, Output
from realloc.experiment import Experiment
from realloc.files import Reader


class IterativeDPO:
    """Actor and reference model; scores from a reward model or a function choose the pairs."""

    name = "iterative_dpo"
    functions = "experiments.dpo_functions"

    def hyperparameters(self, reader: Reader) -> Mapping[str, Any]:
        """As of `experiments.dpo.preference_hyperparameters`. Raises InputError."""
        return preference_hyperparameters(reader)

    def graph(self, experiment: Experiment) -> DataflowGraph:
        """Four calls, of which the last two work on the chosen pairs alone. Raises InputError for less than
        two samples a prompt.
        """
        given = given_hyperparameters(self, experiment)
        check_samples("iterative DPO", 2, experiment)
        work = experiment.workload
        chosen = 2 * work.prompts
        check_mini_batches(given, experiment, together=2, selected=chosen)
        reference = ref_call()
        if chosen < work.sequences:  # it waits for the scores then, but has less to do
            reads = (*reference.reads, "scores")
            reference = replace(reference, reads=reads, select="select_best_and_worst", selected=chosen)
        train = Call(
            name="actor_train",
            kind=CallKind.TRAIN_STEP,
            reads=("tokens", "ref_logprobs", "scores"),
            writes=(),
            role="actor",
            sequence="tokens",
            output=Output.LOGPROBS,
            loss="online_dpo_loss",
            mini_batches=given["mini_batches"],
            epochs=given["epochs"],
            together=2,
            select="select_best_and_worst",
            selected=chosen,
        )
        scores = scoring("iterative DPO", experiment)
        keys = (*ROLLOUT_KEYS, *scores.keys)
        return DataflowGraph((generate_call(), *scores.calls, reference, train), keys, ("prompts",))
