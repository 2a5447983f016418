"""ReMax's tensor functions: rewards from each token on, less the score of the greedy response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from experiments.shared_functions import clipped_policy_loss, returns
from realloc.functions import Batch


def prepare_actor(batch: Batch, hyperparameters: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """`advantages`, one per response token (Li et al. 2023, algorithm 1)."""
    return {"advantages": returns(batch, batch["scores"] - batch["greedy_scores"], hyperparameters)}


def actor_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The clipped surrogate, mean over tokens; at the first step its gradient is that of REINFORCE.

    `output`: log-probabilities of the response tokens now.
    """
    return clipped_policy_loss(output, batch, hyperparameters, compared=hyperparameters["kl_coef"] > 0)
