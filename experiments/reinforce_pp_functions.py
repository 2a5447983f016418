"""REINFORCE++'s tensor functions: whitened sums of later rewards, and PPO's clipped loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from experiments.shared_functions import (
    clipped_policy_loss,
    group_size,
    group_sums,
    returns,
    whiten,
)
from realloc.functions import Batch


def prepare_actor(batch: Batch, hyperparameters: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """`advantages`, one per response token: the rewards from there on, whitened over the batch.

    Hu 2025, equations 6 to 8.
    """
    scores, limit = batch["scores"], hyperparameters["reward_clip"]
    if limit > 0:
        scores = scores.clamp(-limit, limit)
    if hyperparameters["group_baseline"]:
        scores = (scores - group_sums(scores, batch) / group_size(batch)).to(scores.dtype)
    return {"advantages": whiten(returns(batch, scores, hyperparameters), batch)}


def actor_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """PPO's clipped surrogate, mean over tokens. `output`: log-probabilities of the response tokens now."""
    return clipped_policy_loss(output, batch, hyperparameters, compared=hyperparameters["kl_coef"] > 0)
