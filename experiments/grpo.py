"""GRPO and its kin as a dataflow graph: no critic, samples of one prompt are compared with each other.

Shao et al. 2024 (arXiv 2402.03300); the options of Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) and of
DAPO (Yu et al. 2025, arXiv 2503.14476). Decides which calls an iteration has; the tensor functions that it
names are in `experiments.grpo_functions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.common import critic_free_graph, dynamic_sampling, given_hyperparameters, passes
from realloc.dataflow import DataflowGraph, Per
from realloc.errors import InputError
from realloc.experiment import Experiment
from realloc.files import Reader


class GRPO:
    """Actor, and a reference model where `kl_coef` is not 0; scores from a reward model or a function."""

    name = "grpo"
    functions = "experiments.grpo_functions"

    def hyperparameters(self, reader: Reader) -> Mapping[str, Any]:
        """Validated hyperparameters with every default filled in. Raises InputError.

        `kl_coef`: weight of the divergence from the reference model in the loss; 0 needs no such model.
        `clip_range`, `clip_range_high`: how far a token's probability ratio counts below and above 1 (the
        second is the first unless given; DAPO: 0.28).
        `scale`: advantages are divided by the standard deviation of their `group` (GRPO), of the `batch`,
        or not at all (`none`: Dr. GRPO).
        `aggregation`: the loss is a mean over tokens of each sequence, then over sequences (`sequence`:
        GRPO), over all tokens (`token`: DAPO), or a sum over tokens divided by sequences and the longest
        response allowed (`constant`: Dr. GRPO).
        `overlong_buffer`: scores of the last so many tokens before the limit fall linearly, by 1 at the
        limit (DAPO's soft overlong punishment); 0: they do not. `dynamic_sampling`: as of
        `experiments.common.dynamic_sampling`, by scores with that punishment.
        """
        clip = reader.number("clip_range", 0.2, minimum=1e-6)
        return {
            "kl_coef": reader.number("kl_coef", 0.04, minimum=0.0),
            "clip_range": clip,
            "clip_range_high": reader.number("clip_range_high", clip, minimum=1e-6),
            "scale": reader.choice("scale", ("group", "batch", "none"), "group"),
            "aggregation": reader.choice("aggregation", ("sequence", "token", "constant"), "sequence"),
            "overlong_buffer": reader.integer("overlong_buffer", 0, minimum=0, maximum=100_000_000),
            **dynamic_sampling(reader),
            **passes(reader),
        }

    def graph(self, experiment: Experiment) -> DataflowGraph:
        """Three calls, four with a reference model. Raises InputError for less than two samples a prompt."""
        buffer = given_hyperparameters(self, experiment)["overlong_buffer"]
        longest = experiment.workload.response.maximum
        if buffer > longest:
            raise InputError(
                f"experiment: hyperparameters.overlong_buffer: {buffer} is more than the {longest} tokens of "
                f"the longest response, so that even empty ones would be punished; lower it."
            )
        return critic_free_graph(self, "GRPO", experiment, Per.SEQUENCE, least_samples=2)
