"""Supervised fine-tuning as a dataflow graph: one call, which trains on the data set's responses.

Decides nothing about tokens or lengths: those come from the data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.common import check_mini_batches, given_hyperparameters, passes
from realloc.dataflow import Call, CallKind, DataflowGraph, DataKey, Output, Per
from realloc.errors import InputError
from realloc.experiment import Experiment
from realloc.files import Reader


class SFT:
    """One role, `actor`, trained on prompt + response; only response tokens count in the loss.

    With `data.loss_on: assistant` only those that the assistant says count: the data set's `loss_mask`.
    """

    name = "sft"
    functions = "experiments.sft_functions"

    def hyperparameters(self, reader: Reader) -> Mapping[str, Any]:
        """`mini_batches` (optimizer steps per pass) and `epochs` (passes). Raises InputError."""
        return passes(reader)

    def graph(self, experiment: Experiment) -> DataflowGraph:
        """Raises InputError when the data name two responses, or mini-batches would be empty."""
        given = given_hyperparameters(self, experiment)
        if experiment.data is not None and experiment.data.chosen is not None:
            raise InputError(
                "experiment: data: SFT trains on one response; name its column with the key 'response', not "
                "two with 'chosen' and 'rejected'."
            )
        check_mini_batches(given, experiment)
        masked = experiment.data is not None and experiment.data.loss_on == "assistant"
        train = Call(
            name="actor_train",
            kind=CallKind.TRAIN_STEP,
            reads=("tokens", "loss_mask") if masked else ("tokens",),
            writes=(),
            role="actor",
            sequence="tokens",
            output=Output.LOGPROBS,
            prepare="prepare_weights" if masked else None,
            prepared=("loss_weights",) if masked else (),
            loss="weighted_sft_loss" if masked else "sft_loss",
            mini_batches=given["mini_batches"],
            epochs=given["epochs"],
        )
        tokens = DataKey("tokens", Per.TOKEN, "int64")
        if not masked:
            return DataflowGraph((train,), (tokens,), ("tokens",))
        keys = (tokens, *(DataKey(name, Per.RESPONSE_TOKEN) for name in ("loss_mask", "loss_weights")))
        return DataflowGraph((train,), keys, ("tokens", "loss_mask"))
