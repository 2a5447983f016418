"""RLOO as a dataflow graph: the baseline of a response is the mean reward of the prompt's other ones.

REINFORCE leave-one-out (Kool et al. 2019; for RLHF: Ahmadian et al. 2024, arXiv 2402.14740). Decides which
calls an iteration has; the tensor functions that it names are in `experiments.rloo_functions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.common import critic_free_graph, dynamic_sampling, passes
from realloc.dataflow import DataflowGraph, Per
from realloc.experiment import Experiment
from realloc.files import Reader


class RLOO:
    """Actor, and a reference model where `kl_coef` is not 0; scores from a reward model or a function."""

    name = "rloo"
    functions = "experiments.rloo_functions"

    def hyperparameters(self, reader: Reader) -> Mapping[str, Any]:
        """Validated hyperparameters with every default filled in. Raises InputError.

        `kl_coef`: weight of the whole response's penalty for leaving the reference model, a part of its
        reward. `clip_range`: how far a response's probability ratio counts from 1.
        `whiten_advantages`: shift and scale them to mean 0, variance 1 over the batch. `dynamic_sampling`:
        as of `experiments.common.dynamic_sampling`.
        """
        return {
            "kl_coef": reader.number("kl_coef", 0.05, minimum=0.0),
            "clip_range": reader.number("clip_range", 0.2, minimum=1e-6),
            "whiten_advantages": reader.get("whiten_advantages", bool, False),
            **dynamic_sampling(reader),
            **passes(reader),
        }

    def graph(self, experiment: Experiment) -> DataflowGraph:
        """Three calls, four with a reference model. Raises InputError for less than two samples a prompt."""
        return critic_free_graph(self, "RLOO", experiment, Per.SEQUENCE, least_samples=2)
