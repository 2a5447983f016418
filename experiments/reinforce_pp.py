"""REINFORCE++ as a dataflow graph: PPO's loss without a critic, advantages whitened over the batch.

Hu 2025, arXiv 2501.03262. Decides which calls an iteration has; the tensor functions that it names are
in `experiments.reinforce_pp_functions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.common import check_samples, critic_free_graph, given_hyperparameters, passes
from realloc.dataflow import DataflowGraph, Per
from realloc.experiment import Experiment
from realloc.files import Reader


class ReinforcePP:
    """Actor, and a reference model where `kl_coef` is not 0; scores from a reward model or a function."""

    name = "reinforce_pp"
    functions = "experiments.reinforce_pp_functions"

    def hyperparameters(self, reader: Reader) -> Mapping[str, Any]:
        """Validated hyperparameters with every default filled in. Raises InputError.

        `kl_coef`: weight of the per-token penalty for leaving the reference model, a part of the reward.
        `gamma`: discount of later rewards. `clip_range`: how far a token's probability ratio counts from 1.
        `reward_clip`: scores are clipped to plus or minus this; 0 clips nothing.
        `group_baseline`: scores are first compared with the mean of their prompt's samples (the paper's
        REINFORCE++-baseline).
        """
        return {
            "kl_coef": reader.number("kl_coef", 0.01, minimum=0.0),
            "gamma": reader.number("gamma", 1.0, minimum=0.0, maximum=1.0),
            "clip_range": reader.number("clip_range", 0.2, minimum=1e-6),
            "reward_clip": reader.number("reward_clip", 0.0, minimum=0.0),
            "group_baseline": reader.get("group_baseline", bool, False),
            **passes(reader),
        }

    def graph(self, experiment: Experiment) -> DataflowGraph:
        """Three calls, four with a reference model. Raises InputError for a group of one sample."""
        if given_hyperparameters(self, experiment)["group_baseline"]:
            check_samples("REINFORCE++ with group_baseline", 2, experiment)
        return critic_free_graph(self, "REINFORCE++", experiment, Per.RESPONSE_TOKEN, least_samples=1)
