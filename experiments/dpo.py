"""DPO as a dataflow graph: the actor learns from pairs of responses of the data set, without rewards.

Rafailov et al. 2023, arXiv 2305.18290. Decides which calls an iteration has; the loss that it names is in
`experiments.dpo_functions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.common import check_mini_batches, check_pairs, given_hyperparameters, passes, ref_call
from realloc.dataflow import Call, CallKind, DataflowGraph, DataKey, Output, Per
from realloc.errors import InputError
from realloc.experiment import Experiment
from realloc.files import Reader

LOSSES = ("sigmoid", "ipo", "hinge")


def preference_hyperparameters(reader: Reader) -> Mapping[str, Any]:
    """`beta`: how strongly the actor is held to the reference model. `loss`: `sigmoid` (DPO), `ipo`
    (Azar et al. 2023, arXiv 2310.12036) or `hinge` (Zhao et al. 2023, arXiv 2305.10425).
    `label_smoothing`: the share of preferences that are taken to be the wrong way round (`sigmoid` alone).
    Raises InputError.
    """
    loss = reader.choice("loss", LOSSES, "sigmoid")
    smoothing = reader.number("label_smoothing", 0.0, minimum=0.0, maximum=0.5)
    if smoothing > 0 and loss != "sigmoid":
        raise InputError(
            f"{reader.at('label_smoothing')}: does nothing with the loss '{loss}'; leave it out."
        )
    return {
        "beta": reader.number("beta", 0.1, minimum=1e-6),
        "loss": loss,
        "label_smoothing": smoothing,
        **passes(reader),
    }


class DPO:
    """Actor and reference model; the data have a chosen and a rejected response to each prompt."""

    name = "dpo"
    functions = "experiments.dpo_functions"

    def hyperparameters(self, reader: Reader) -> Mapping[str, Any]:
        """As of `preference_hyperparameters`. Raises InputError."""
        return preference_hyperparameters(reader)

    def graph(self, experiment: Experiment) -> DataflowGraph:
        """Two calls. Raises InputError when the data are no preferences."""
        given = given_hyperparameters(self, experiment)
        check_pairs("DPO", experiment)
        check_mini_batches(given, experiment, together=2)
        train = Call(
            name="actor_train",
            kind=CallKind.TRAIN_STEP,
            reads=("tokens", "ref_logprobs"),
            writes=(),
            role="actor",
            sequence="tokens",
            output=Output.LOGPROBS,
            loss="dpo_loss",
            mini_batches=given["mini_batches"],
            epochs=given["epochs"],
            together=2,
        )
        keys = (DataKey("tokens", Per.TOKEN, "int64"), DataKey("ref_logprobs", Per.RESPONSE_TOKEN))
        return DataflowGraph((ref_call(), train), keys, ("tokens",))
