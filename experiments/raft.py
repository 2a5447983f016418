"""RAFT as a dataflow graph: supervised training on the best of the actor's own samples.

Rejection sampling; Dong et al. 2023, arXiv 2304.06767. Decides which calls an iteration has; the tensor
functions that it names are in `experiments.raft_functions`.
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
    passes,
)
from experiments.scoring import scoring
from realloc.dataflow import Call, CallKind, DataflowGraph, Output
from realloc.errors import InputError
from realloc.experiment import Experiment
from realloc.files import Reader


class RAFT:
    """One trained role, `actor`; scores from a reward model or a function choose what it learns from."""

    name = "raft"
    functions = "experiments.raft_functions"

    def hyperparameters(self, reader: Reader) -> Mapping[str, Any]:
        """`keep`: how many of a prompt's samples are learned from; and passes. Raises InputError."""
        return {"keep": reader.integer("keep", 1, minimum=1, maximum=100_000_000), **passes(reader)}

    def graph(self, experiment: Experiment) -> DataflowGraph:
        """Three calls; only what is kept is trained on. Raises InputError when nothing would be rejected."""
        given = given_hyperparameters(self, experiment)
        check_samples("RAFT", 2, experiment)
        if given["keep"] >= experiment.workload.samples_per_prompt:
            raise InputError(
                f"experiment: hyperparameters.keep: {given['keep']} of "
                f"{experiment.workload.samples_per_prompt} samples a prompt rejects none; lower it, or raise "
                f"workload.samples_per_prompt."
            )
        kept = experiment.workload.prompts * given["keep"]
        check_mini_batches(given, experiment, selected=kept)
        train = Call(
            name="actor_train",
            kind=CallKind.TRAIN_STEP,
            reads=("tokens", "scores"),
            writes=(),
            role="actor",
            sequence="tokens",
            output=Output.LOGPROBS,
            loss="actor_loss",
            mini_batches=given["mini_batches"],
            epochs=given["epochs"],
            select="select_best",
            selected=kept,
        )
        scores = scoring("RAFT", experiment)
        keys = (*ROLLOUT_KEYS, *scores.keys)
        return DataflowGraph((generate_call(), *scores.calls, train), keys, ("prompts",))
