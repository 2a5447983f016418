"""RLOO's tensor functions: leave-one-out advantages, and the clipped loss of whole responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.shared_functions import (
    group_size,
    group_sums,
    policy_metrics,
    sequence_sums,
    whiten,
    with_signal,
)
from realloc.functions import Batch


def select_prompts(batch: Batch, hyperparameters: Mapping[str, Any]) -> Tensor:
    """The sequences of `dynamic_sampling` prompts, by their scores alone; see `with_signal`."""
    return with_signal(batch["scores"], batch, hyperparameters["dynamic_sampling"])


def prepare_actor(batch: Batch, hyperparameters: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """`advantages`, one per sequence: its reward less the mean reward of its prompt's other samples.

    Ahmadian et al. 2024, equation 8; the reward is the score less `kl_coef` times the log ratio of the
    whole response to the reference model.
    """
    rewards = batch["scores"].double()
    if hyperparameters["kl_coef"] > 0:
        log_ratio = (batch["logprobs"] - batch["ref_logprobs"]).double()
        rewards = rewards - hyperparameters["kl_coef"] * sequence_sums(log_ratio, batch.lengths("logprobs"))
    size = group_size(batch)
    others = (group_sums(rewards, batch) - rewards) / (size - 1).clamp(min=1)
    # alone, because the prompt's others have no score: nothing to compare with
    advantages = torch.where(size > 1, rewards - others, 0.0)
    if hyperparameters["whiten_advantages"]:
        advantages = whiten(advantages, batch)
    return {"advantages": advantages.to(torch.float32)}


def actor_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The clipped surrogate with one probability ratio a response, mean over responses.

    `output`: log-probabilities of the response tokens now. At the first step the ratio is 1 and the
    gradient that of REINFORCE.
    """
    lengths, clip = batch.lengths("logprobs"), hyperparameters["clip_range"]
    ratio = sequence_sums(output - batch["logprobs"], lengths).exp()
    unclipped = -batch["advantages"] * ratio
    clipped = -batch["advantages"] * ratio.clamp(1.0 - clip, 1.0 + clip)
    loss = torch.maximum(unclipped, clipped).sum() / batch.global_sequences
    metrics = policy_metrics(output, batch, compared=hyperparameters["kl_coef"] > 0)
    metrics["clip_fraction"] = (clipped > unclipped).sum().detach() / batch.global_sequences
    return loss, metrics
