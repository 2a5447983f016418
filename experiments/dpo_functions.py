"""The losses of preference learning, on packed pairs of one data-parallel rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.shared_functions import score_table, sequence_sums
from realloc.functions import Batch


def dpo_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The loss of pairs (chosen, rejected), which are neighbours; mean over pairs.

    `output`: log-probabilities of the response tokens now.
    """
    rewards = _log_ratios(output, batch, hyperparameters)
    return _pair_loss(rewards[0::2], rewards[1::2], batch.global_sequences // 2, hyperparameters)


def select_best_and_worst(batch: Batch, hyperparameters: Mapping[str, Any]) -> Tensor:
    """bool [num_sequences]: the best-scored and the worst of each prompt's samples.

    Of equal scores the first sample is the best and the last the worst. Of a prompt with less than two scored
    samples there is none.
    """
    table, present = score_table(batch["scores"], batch)
    last = table.shape[1] - 1
    best = table.masked_fill(~present, -torch.inf).argmax(1)
    worst = last - table.masked_fill(~present, torch.inf).flip(1).argmin(1)
    prompts, samples = batch.prompts, batch.samples
    chosen: Tensor = (samples == best[prompts]) != (samples == worst[prompts])
    return chosen


def online_dpo_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The loss of the best against the worst sample of each prompt, which are neighbours; mean over prompts.

    `output`: log-probabilities of the response tokens now. Of equal scores the first is the best.
    """
    rewards, scores = _log_ratios(output, batch, hyperparameters), batch["scores"]
    in_order = scores[0::2] >= scores[1::2]
    chosen = torch.where(in_order, rewards[0::2], rewards[1::2])
    rejected = torch.where(in_order, rewards[1::2], rewards[0::2])
    return _pair_loss(chosen, rejected, batch.global_sequences // 2, hyperparameters)


def _log_ratios(output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]) -> Tensor:
    """Log ratio of each response to the reference model; [num_sequences]. Of `ipo`: its mean over tokens."""
    lengths = batch.lengths("ref_logprobs")
    ratios = sequence_sums(output - batch["ref_logprobs"], lengths)
    return ratios / lengths.clamp(min=1) if hyperparameters["loss"] == "ipo" else ratios


def _pair_loss(
    chosen: Tensor, rejected: Tensor, pairs: int, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """`chosen`, `rejected`: log ratios to the reference of this micro-batch's pairs, of `pairs` in all.

    Metrics: the share of pairs whose chosen response has the larger implicit reward (`beta` times the log
    ratio), and the mean difference of the two.
    """
    beta, smoothing = hyperparameters["beta"], hyperparameters["label_smoothing"]
    margin = chosen - rejected
    if hyperparameters["loss"] == "ipo":
        losses = (margin - 1.0 / (2.0 * beta)).square()
    elif hyperparameters["loss"] == "hinge":
        losses = torch.relu(1.0 - beta * margin)
    else:
        losses = -(1.0 - smoothing) * F.logsigmoid(beta * margin) - smoothing * F.logsigmoid(-beta * margin)
    with torch.no_grad():
        metrics = {
            "accuracy": (margin > 0).sum() / pairs,
            "margin": beta * margin.sum() / pairs,
            "chosen_reward": beta * chosen.sum() / pairs,
            "rejected_reward": beta * rejected.sum() / pairs,
        }
    return losses.sum() / pairs, metrics
