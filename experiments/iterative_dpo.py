"""Iterative (online) DPO as a dataflow graph: pairs are the best and the worst of the actor's own samples.

Guo et al. 2024, arXiv 2402.04792; Xiong et al. 2023, arXiv 2312.11456. Decides which calls an iteration
has; the tensor functions that it names are in `experiments.dpo_functions`.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from realloc.dataflow import Call, CallKind, DataflowGraph, DataKey, Output, Per
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
        """Four calls. Raises InputError for less than two samples a prompt.

        Of more than two samples all are passed through the actor, though only two have a gradient.
        """
        given = given_hyperparameters(self, experiment)
        check_samples("iterative DPO", 2, experiment)
        samples = experiment.workload.samples_per_prompt
        check_mini_batches(given, experiment, together=samples)
        train = Call(
            name="actor_train",
            kind=CallKind.TRAIN_STEP,
            reads=("tokens", "ref_logprobs", "scores"),
            writes=(),
            role="actor",
            sequence="tokens",
            output=Output.LOGPROBS,
            prepare="prepare_best_and_worst",
            prepared=("choices",),
            loss="online_dpo_loss",
            mini_batches=given["mini_batches"],
            epochs=given["epochs"],
            together=samples,
        )
        scores = scoring("iterative DPO", experiment)
        keys = (*ROLLOUT_KEYS, *scores.keys, DataKey("choices", Per.SEQUENCE))
        return DataflowGraph((generate_call(), *scores.calls, ref_call(), train), keys, ("prompts",))
