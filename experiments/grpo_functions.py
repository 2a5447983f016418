"""GRPO's tensor functions: advantages within groups, and the clipped loss in its published variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.shared_functions import (
    group_size,
    group_sums,
    inverse_ratio_kl,
    per_token,
    sequence_sums,
    with_signal,
)
from realloc.functions import Batch

STD_FLOOR = 1e-4
"""Added to a standard deviation before dividing by it, so that groups of equal scores stay finite."""


def select_prompts(batch: Batch, hyperparameters: Mapping[str, Any]) -> Tensor:
    """The sequences of `dynamic_sampling` prompts; see `with_signal`."""
    return with_signal(_final_scores(batch, hyperparameters), batch, hyperparameters["dynamic_sampling"])


def prepare_actor(batch: Batch, hyperparameters: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """`advantages`, one per sequence: the score less the mean of its prompt's samples, scaled."""
    scores = _final_scores(batch, hyperparameters)
    size = group_size(batch)
    centred = scores - group_sums(scores, batch) / size
    if hyperparameters["scale"] == "group":
        # of a sample of the policy's responses: n - 1
        variance = group_sums(centred.square(), batch) / (size - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + STD_FLOOR)
    elif hyperparameters["scale"] == "batch":
        total = batch.sum(scores.new_tensor([scores.numel(), scores.sum(), scores.square().sum()]))
        variance = (total[2] - total[1].square() / total[0]) / (total[0] - 1).clamp(min=1)
        centred = centred / (variance.clamp(min=0).sqrt() + STD_FLOOR)
    return {"advantages": centred.to(torch.float32)}


def actor_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The clipped surrogate plus `kl_coef` times the divergence from the reference, aggregated as asked.

    `output`: log-probabilities of the response tokens now. `ref_kl` is the mean over tokens of the estimate
    that the loss contains (Shao et al. 2024, equation 4).
    """
    lengths, tokens = batch.lengths("logprobs"), batch.global_elements
    advantages = per_token(batch["advantages"], lengths, output.numel())
    log_ratio = output - batch["logprobs"]
    ratio = log_ratio.exp()
    low, high = 1.0 - hyperparameters["clip_range"], 1.0 + hyperparameters["clip_range_high"]
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(low, high)
    losses = torch.maximum(unclipped, clipped)
    metrics = {}
    if hyperparameters["kl_coef"] > 0:
        divergence = inverse_ratio_kl(output, batch["ref_logprobs"])
        losses = losses + hyperparameters["kl_coef"] * divergence
        metrics["ref_kl"] = divergence.detach().sum() / tokens
    with torch.no_grad():
        metrics["clip_fraction"] = (clipped > unclipped).sum() / tokens
        metrics["approx_kl"] = (ratio - 1.0 - log_ratio).sum() / tokens
        if ratio.numel():
            metrics["ratio_max"] = ratio.max()
    return _aggregate(losses, lengths, batch, hyperparameters["aggregation"]), metrics


def _aggregate(losses: Tensor, lengths: Tensor, batch: Batch, how: str) -> Tensor:
    if how == "token":
        return losses.sum() / batch.global_elements
    if how == "constant":
        return losses.sum() / (batch.global_sequences * batch.max_response_tokens)
    means = sequence_sums(losses, lengths) / lengths.clamp(min=1)
    return means.sum() / batch.global_sequences


def _final_scores(batch: Batch, hyperparameters: Mapping[str, Any]) -> Tensor:
    penalty = _overlong_penalty(batch, hyperparameters["overlong_buffer"])
    scores: Tensor = batch["scores"].double() - penalty
    return scores


def _overlong_penalty(batch: Batch, buffer: int) -> Tensor:
    """0 up to `buffer` tokens before the limit, then linearly to 1 (Yu et al. 2025, equation 13)."""
    lengths = batch.lengths("logprobs").double()
    if buffer == 0:
        return torch.zeros_like(lengths)
    penalty: Tensor = ((lengths - batch.max_response_tokens + buffer) / buffer).clamp(0.0, 1.0)
    return penalty
