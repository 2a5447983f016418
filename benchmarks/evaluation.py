"""Evaluation as an algorithm of its own: a model answers, a reward scores, nothing is trained.

`algorithm: benchmarks.evaluation:Evaluation`; planned and run as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.common import ROLLOUT_KEYS, generate_call
from experiments.scoring import scoring
from realloc.dataflow import DataflowGraph
from realloc.experiment import Experiment
from realloc.files import Reader


class Evaluation:
    """Generation and scores."""

    name = "evaluation"
    functions = "experiments.shared_functions"

    def hyperparameters(self, reader: Reader) -> Mapping[str, Any]:
        """It has none."""
        return {}

    def graph(self, experiment: Experiment) -> DataflowGraph:
        """Raises InputError without a source of scores."""
        scores = scoring("evaluation", experiment)
        return DataflowGraph((generate_call(), *scores.calls), (*ROLLOUT_KEYS, *scores.keys), ("prompts",))
