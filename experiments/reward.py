"""Reward modelling as a dataflow graph: one call, which trains on preferences of the data set.

Decides nothing about tokens or lengths: those come from the data set. The loss that it names is in
`experiments.reward_functions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.common import check_mini_batches, check_pairs, given_hyperparameters, passes
from realloc.dataflow import Call, CallKind, DataflowGraph, DataKey, Output, Per
from realloc.experiment import Experiment
from realloc.files import Reader


class Reward:
    """One role, `reward`: a decoder with a scalar head, which scores the last token of a response."""

    name = "reward"
    functions = "experiments.reward_functions"

    def hyperparameters(self, reader: Reader) -> Mapping[str, Any]:
        """Validated hyperparameters with every default filled in. Raises InputError.

        `label_smoothing`: the share of preferences that are taken to be the wrong way round.
        `centre_coef`: weight of the squared sum of a pair's scores, which keeps their mean near 0
        (Eisenstein et al. 2023, arXiv 2312.09244).
        """
        return {
            "label_smoothing": reader.number("label_smoothing", 0.0, minimum=0.0, maximum=0.5),
            "centre_coef": reader.number("centre_coef", 0.0, minimum=0.0),
            **passes(reader),
        }

    def graph(self, experiment: Experiment) -> DataflowGraph:
        """Raises InputError when the data are no preferences."""
        given = given_hyperparameters(self, experiment)
        check_pairs("reward modelling", experiment)
        check_mini_batches(given, experiment, together=2)
        train = Call(
            name="reward_train",
            kind=CallKind.TRAIN_STEP,
            reads=("tokens",),
            writes=(),
            role="reward",
            sequence="tokens",
            output=Output.SCORES,
            loss="reward_loss",
            mini_batches=given["mini_batches"],
            epochs=given["epochs"],
            together=2,
        )
        return DataflowGraph((train,), (DataKey("tokens", Per.TOKEN, "int64"),), ("tokens",))
