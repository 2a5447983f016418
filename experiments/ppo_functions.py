"""PPO's tensor functions: per-token rewards, advantages, and the two clipped losses.

Works on packed sequences (no padding) of one data-parallel rank; knows neither models nor ranks. Everything
that spans the batch goes through `batch.sum`, so results do not depend on how the batch is split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.shared_functions import (
    VARIANCE_FLOOR,
    add_at_ends,
    clipped_policy_loss,
    discounted_suffix_sums,
    inverse_ratio_kl,
    remaining,
    whiten,
)
from realloc.functions import Batch

SCORE_STD_FLOOR = 1e-5
"""Added to the scores' standard deviation before dividing by it, so that equal scores stay finite."""
KL_ERROR_LIMIT = 0.2
"""How much of a relative error the adaptive coefficient reacts to (Ziegler et al. 2019, section 2.2)."""


def prepare_actor(batch: Batch, hyperparameters: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """`advantages`, one per response token, whitened over the whole batch if so asked.

    0, which has no gradient, as long as the critic is to learn alone.
    """
    advantages = _advantages(batch, hyperparameters)
    if hyperparameters["whiten_advantages"]:
        advantages = whiten(advantages, batch)
    if hyperparameters["critic_warmup"] > 0:
        batch.state["iterations"] = batch.state.get("iterations", 0.0) + 1.0
        if _critic_learns_alone(batch, hyperparameters):
            advantages = torch.zeros_like(advantages)
    return {"advantages": advantages}


def prepare_critic(batch: Batch, hyperparameters: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """`returns`, one per response token: the advantage (not whitened) plus the value it was measured from.

    Reports `explained_variance`, the share of the returns' variance that the values explain before training.
    """
    values = batch["values"]
    returns = _advantages(batch, hyperparameters) + values
    wide, error = returns.double(), (returns - values).double()
    terms = [wide.sum(), wide.square().sum(), error.sum(), error.square().sum()]
    count, *sums = batch.sum(torch.stack([torch.full_like(terms[0], wide.numel()), *terms])).tolist()
    if count > 0:
        variance, unexplained = (sums[i + 1] / count - (sums[i] / count) ** 2 for i in (0, 2))
        if variance > VARIANCE_FLOOR:
            batch.report("explained_variance", 1.0 - unexplained / variance)
    return {"returns": returns}


def actor_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, equation 7), mean over tokens.

    `output`: log-probabilities of the response tokens now.
    """
    loss, metrics = clipped_policy_loss(output, batch, hyperparameters, compared=True)
    metrics["advantage"] = batch["advantages"].sum() / batch.global_elements
    return loss, metrics


def ptx_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """`ptx_coef` times the mean negative log-probability of the texts' tokens, of each but its first.

    `output`: their log-probabilities now. Equation 2 of Ouyang et al. 2022 has the log-probability of whole
    texts, times 27.8, which appendix C.4 applies to the gradients without saying over what they are averaged.
    A mean over tokens makes the coefficient independent of the texts' lengths and number.
    """
    value = -output.sum() / max(1, batch.global_elements)
    coefficient = 0.0 if _critic_learns_alone(batch, hyperparameters) else hyperparameters["ptx_coef"]
    return coefficient * value, {"ptx_loss": value.detach()}


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


def _critic_learns_alone(batch: Batch, hyperparameters: Mapping[str, Any]) -> bool:
    """In the first iterations, which `prepare_actor` counts; this one is counted already."""
    return bool(batch.state.get("iterations", 0.0) <= hyperparameters["critic_warmup"] > 0)


def _rewards(batch: Batch, hyperparameters: Mapping[str, Any]) -> Tensor:
    """The penalty for leaving the reference at every response token, the score added at the last one."""
    log_ratio = batch["logprobs"] - batch["ref_logprobs"]
    penalty = log_ratio
    if hyperparameters["kl_estimator"] == "k2":
        penalty = 0.5 * log_ratio.square()
    elif hyperparameters["kl_estimator"] == "k3":
        penalty = inverse_ratio_kl(batch["logprobs"], batch["ref_logprobs"])
    rewards: Tensor = -_kl_coef(batch, log_ratio, hyperparameters) * penalty
    rewards = add_at_ends(rewards, _scores(batch, hyperparameters), batch.lengths("logprobs"))
    return whiten(rewards, batch, shift=False) if hyperparameters["whiten_rewards"] else rewards


def _kl_coef(batch: Batch, log_ratio: Tensor, hyperparameters: Mapping[str, Any]) -> float:
    """The coefficient of this iteration; an adaptive one is also set for the next, from this divergence."""
    first, target = float(hyperparameters["kl_coef"]), hyperparameters["kl_target"]
    if target == 0:
        return first
    coefficient = batch.state.get("kl_coef", first)
    sequences = batch.global_sequences
    divergence = batch.sum(log_ratio.double().sum()).item() / sequences
    error = min(max(divergence / target - 1.0, -KL_ERROR_LIMIT), KL_ERROR_LIMIT)
    batch.state["kl_coef"] = coefficient * (1.0 + error * sequences / hyperparameters["kl_horizon"])
    batch.report("kl_coef", coefficient)
    return coefficient


def _scores(batch: Batch, hyperparameters: Mapping[str, Any]) -> Tensor:
    """Scores normalised, clipped, less the penalty of responses without an end; [num_sequences]."""
    scores, limit = batch["scores"], hyperparameters["reward_clip"]
    if hyperparameters["score_normalization"] != "none":
        mean, deviation = _score_statistics(batch, hyperparameters["score_normalization"] == "running")
        scores = (scores - mean) / (deviation + SCORE_STD_FLOOR)
    if limit > 0:
        scores = scores.clamp(-limit, limit)
    penalty = hyperparameters["missing_eos_penalty"]
    if penalty > 0:
        scores = scores - penalty * (~batch.finished("tokens")).to(scores.dtype)
    result: Tensor = scores
    return result


def _score_statistics(batch: Batch, running: bool) -> tuple[float, float]:
    """Mean and standard deviation of this batch's scores, or of all so far, this batch's included.

    Statistics of parts are joined as Chan, Golub and LeVeque 1983 (The American Statistician 37) do.
    """
    wide = batch["scores"].double()
    count = float(batch.global_sequences)
    mean = batch.sum(wide.sum()).item() / count
    squares = batch.sum((wide - mean).square().sum()).item()
    if running:
        before = batch.state.get("score_count", 0.0)
        step, total = mean - batch.state.get("score_mean", 0.0), before + count
        mean = batch.state.get("score_mean", 0.0) + step * count / total
        squares += batch.state.get("score_squares", 0.0) + step * step * before * count / total
        count = total
        batch.state.update(score_count=count, score_mean=mean, score_squares=squares)
    return mean, math.sqrt(squares / count)


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
