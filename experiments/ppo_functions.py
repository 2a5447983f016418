"""PPO's tensor functions: per-token rewards, advantages, and the two clipped losses.

Works on packed sequences (no padding) of one data-parallel rank; knows neither models nor ranks. Everything
that spans the batch goes through `batch.sum`, so results do not depend on how the batch is split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.shared_functions import (
    add_at_ends,
    clipped_policy_loss,
    discounted_suffix_sums,
    remaining,
    whiten,
)
from realloc.functions import Batch


def prepare_actor(batch: Batch, hyperparameters: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """`advantages`, one per response token, whitened over the whole batch if so asked."""
    advantages = _advantages(batch, hyperparameters)
    if hyperparameters["whiten_advantages"]:
        advantages = whiten(advantages, batch)
    return {"advantages": advantages}


def prepare_critic(batch: Batch, hyperparameters: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """`returns`, one per response token: the advantage (not whitened) plus the value it was measured from."""
    return {"returns": _advantages(batch, hyperparameters) + batch["values"]}


def actor_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, equation 7), mean over tokens.

    `output`: log-probabilities of the response tokens now.
    """
    loss, metrics = clipped_policy_loss(output, batch, hyperparameters, compared=True)
    metrics["advantage"] = batch["advantages"].sum() / batch.global_elements
    return loss, metrics


def critic_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Half the squared error to the returns, mean over response tokens.

    With a `value_clip_range`, the larger of the errors of the value and of the value clipped to within that
    range of the old one.

    `output`: values now, at the positions that precede the response tokens.
    """
    tokens, clip = batch.global_elements, hyperparameters["value_clip_range"]
    returns, old = batch["returns"], batch["values"]
    error = (output - returns).square()
    clipped = (old + (output - old).clamp(-clip, clip) - returns).square() if clip > 0 else error
    loss = 0.5 * torch.maximum(error, clipped).sum() / tokens
    with torch.no_grad():
        metrics = {
            "value_clip_fraction": (clipped > error).sum() / tokens,
            "return": returns.sum() / tokens,
        }
    return loss, metrics


def _rewards(batch: Batch, hyperparameters: Mapping[str, Any]) -> Tensor:
    """The penalty for leaving the reference at every response token, the score added at the last one."""
    rewards: Tensor = -hyperparameters["kl_coef"] * (batch["logprobs"] - batch["ref_logprobs"])
    scores, limit = batch["scores"], hyperparameters["reward_clip"]
    if limit > 0:
        scores = scores.clamp(-limit, limit)
    return add_at_ends(rewards, scores, batch.lengths("logprobs"))


def _advantages(batch: Batch, hyperparameters: Mapping[str, Any]) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438, equations 11 and 16), packed.

    A response ends its episode, also where the length limit cut it: the value after its last token is 0.
    """
    gamma, decay = hyperparameters["gamma"], hyperparameters["gamma"] * hyperparameters["gae_lambda"]
    values = batch["values"]
    following = remaining(batch.lengths("values"), values.numel())
    next_values = torch.where(following >= 1, values.roll(-1), 0.0)
    delta = _rewards(batch, hyperparameters) + gamma * next_values - values
    return discounted_suffix_sums(delta, following, decay)
