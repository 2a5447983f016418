"""ReMax as a dataflow graph: the baseline of a response is the score of the greedy one to its prompt.

Li et al. 2023, arXiv 2310.10505. So generation and reward come twice. Decides which calls an iteration has;
the tensor functions that it names are in `experiments.remax_functions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.common import (
    ROLLOUT_KEYS,
    check_mini_batches,
    generate_call,
    given_hyperparameters,
    passes,
    policy_train_call,
    ref_calls,
)
from experiments.scoring import scoring
from realloc.dataflow import Call, CallKind, DataflowGraph, DataKey, Per
from realloc.experiment import Experiment
from realloc.files import Reader

_KEYS = (
    *ROLLOUT_KEYS,
    DataKey("greedy_tokens", Per.TOKEN, "int64"),
    DataKey("greedy_logprobs", Per.RESPONSE_TOKEN),
    DataKey("greedy_scores", Per.SEQUENCE),
    DataKey("advantages", Per.RESPONSE_TOKEN),
)


class ReMax:
    """Actor, and a reference model where `kl_coef` is not 0; scores from a reward model or a function."""

    name = "remax"
    functions = "experiments.remax_functions"

    def hyperparameters(self, reader: Reader) -> Mapping[str, Any]:
        """Validated hyperparameters with every default filled in. Raises InputError.

        `kl_coef`: weight of the per-token penalty for leaving the reference model, a part of the reward.
        `gamma`: discount of later rewards. `clip_range`: how far a token's probability ratio counts from 1.
        """
        return {
            "kl_coef": reader.number("kl_coef", 0.05, minimum=0.0),
            "gamma": reader.number("gamma", 1.0, minimum=0.0, maximum=1.0),
            "clip_range": reader.number("clip_range", 0.2, minimum=1e-6),
            **passes(reader),
        }

    def graph(self, experiment: Experiment) -> DataflowGraph:
        """Five calls, six with a reference model. Raises InputError."""
        given = given_hyperparameters(self, experiment)
        check_mini_batches(given, experiment)
        greedy = Call(
            name="greedy_gen",
            kind=CallKind.GENERATE,
            reads=("prompts",),
            writes=("greedy_tokens", "greedy_logprobs"),
            role="actor",
            sequence="prompts",
            greedy=True,
        )
        scores = scoring("ReMax", experiment)
        baseline = scoring("ReMax", experiment, "greedy_", "greedy_tokens", "greedy_scores")
        calls = (
            generate_call(),
            greedy,
            *scores.calls,
            *baseline.calls,
            *ref_calls(given),
            policy_train_call(given, ("scores", "greedy_scores")),
        )
        return DataflowGraph(calls, (*_KEYS, *scores.keys, *baseline.keys), ("prompts",))
