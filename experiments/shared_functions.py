"""Tensor functions that several algorithms share, on packed sequences of one data-parallel rank.

Everything that spans the batch goes through `batch.sum` in float64, so that results do not depend
on how the batch is split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from realloc.functions import Batch

VARIANCE_FLOOR = 1e-8
SAME = 1e-4
"""Scores of a prompt that differ by no more teach nothing: as much rounding may make of equal responses."""


def whiten(values: Tensor, batch: Batch, *, shift: bool = True) -> Tensor:
    """Shifted and scaled to mean 0 and variance 1 over all ranks; [elements] -> [elements].

    Without `shift` the mean stays as it was.
    """
    wide = values.double()
    count = torch.full_like(wide.sum(), wide.numel())
    count, total = batch.sum(torch.stack([count, wide.sum()]))
    mean = total / count
    variance = batch.sum((wide - mean).square().sum()) / count
    whitened: Tensor = (wide - mean) * (variance + VARIANCE_FLOOR).rsqrt()
    if not shift:
        whitened = whitened + mean
    return whitened.to(values.dtype)


def group_sums(values: Tensor, batch: Batch) -> Tensor:
    """For each sequence the sum of `values` ([num_sequences]) over all samples of its prompt, float64."""
    wide = values.double()
    totals = batch.sum(wide.new_zeros(batch.num_prompts).index_add(0, batch.prompts, wide))
    result: Tensor = totals[batch.prompts]
    return result


def group_size(batch: Batch) -> Tensor:
    """Samples of each sequence's prompt; float64 [num_sequences]."""
    return group_sums(torch.ones_like(batch.prompts, dtype=torch.float64), batch)


def score_table(values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """`values` ([num_sequences]) as [num_prompts, samples_per_prompt], float64, and which entries are there.

    On every rank. Samples without a score are not in the batch.
    """
    shape = (2, batch.num_prompts, batch.samples_per_prompt)
    tables = torch.zeros(shape, dtype=torch.float64, device=values.device)
    tables[0, batch.prompts, batch.samples] = values.double()
    tables[1, batch.prompts, batch.samples] = 1.0
    scores, present = batch.sum(tables)
    return scores, present > 0


def with_signal(values: Tensor, batch: Batch, count: int) -> Tensor:
    """bool [num_sequences]: the sequences of `count` prompts, first of those whose scores differ.

    Of these, and of the others where they are too few, the earlier ones; last come those without any score.
    `values`: scores, [num_sequences]. Reports how many prompts had no signal, and how many of the `count`.
    """
    table, present = score_table(values, batch)
    highest = table.masked_fill(~present, -torch.inf).amax(1)
    lowest = table.masked_fill(~present, torch.inf).amin(1)
    signal = highest - lowest > SAME
    order = (2 * signal.int() + present.any(1).int()).argsort(descending=True, stable=True)
    chosen = torch.zeros_like(signal)
    chosen[order[:count]] = True
    batch.report("without_signal", int((~signal).sum()))
    batch.report("missing", int((chosen & ~signal).sum()))
    return chosen[batch.prompts]


def sequence_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of packed values over each sequence; [elements], [sequences] -> [sequences]."""
    index = torch.arange(lengths.numel(), device=lengths.device)
    index = index.repeat_interleave(lengths, output_size=values.numel())
    return values.new_zeros(lengths.numel()).index_add(0, index, values)


def per_token(values: Tensor, lengths: Tensor, total: int) -> Tensor:
    """One value a sequence -> the same value at each of its `total` packed elements."""
    return values.repeat_interleave(lengths, output_size=total)


def remaining(lengths: Tensor, total: int) -> Tensor:
    """How many elements of the same sequence follow each element; int64 [total]."""
    ends = lengths.cumsum(0).repeat_interleave(lengths, output_size=total)
    return ends - 1 - torch.arange(total, device=lengths.device)


def discounted_suffix_sums(terms: Tensor, following: Tensor, decay: float) -> Tensor:
    """Within each sequence, sum over k >= 0 of decay^k * terms[t + k]; `following` as of `remaining`.

    By doubling: after step j an element holds its first 2^j terms. So about log2(longest) passes over the
    packed tensor, and no padding.
    """
    longest = int(following.max()) + 1 if following.numel() else 0
    total, span = terms, 1
    while span < longest:
        later = torch.where(following >= span, total.roll(-span), 0.0)
        total = total + decay**span * later
        span *= 2
    return total


def add_at_ends(per_element: Tensor, scores: Tensor, lengths: Tensor) -> Tensor:
    """Each sequence's score added at its last element; sequences without elements have nowhere to put it."""
    filled = lengths > 0
    last = lengths.cumsum(0) - 1
    return per_element.index_add(0, last[filled], scores[filled].to(per_element.dtype))


def inverse_ratio_kl(output: Tensor, reference: Tensor) -> Tensor:
    """An unbiased, non-negative estimate of each token's KL(policy || reference) from samples of the policy.

    ratio - 1 - log ratio, with ratio = reference / policy (Schulman 2020, "Approximating KL divergence").
    """
    log_ratio = reference - output
    return log_ratio.exp() - 1.0 - log_ratio


def returns(batch: Batch, scores: Tensor, hyperparameters: Mapping[str, Any]) -> Tensor:
    """Discounted (`gamma`) sums of the rewards from each response token on; [elements].

    A token's reward is the penalty for leaving the reference model (`kl_coef`, if not 0), at the last token
    plus the score; `scores`: [num_sequences].
    """
    behaviour, lengths = batch["logprobs"], batch.lengths("logprobs")
    rewards = torch.zeros_like(behaviour)
    if hyperparameters["kl_coef"] > 0:
        rewards = -hyperparameters["kl_coef"] * (behaviour - batch["ref_logprobs"])
    rewards = add_at_ends(rewards, scores, lengths)
    return discounted_suffix_sums(rewards, remaining(lengths, rewards.numel()), hyperparameters["gamma"])


def clipped_policy_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any], *, compared: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, equation 7), mean over tokens.

    `output`: log-probabilities of the response tokens now; `batch` has `logprobs` and `advantages`, one
    per token, and, where it is `compared` with the reference model, `ref_logprobs`. A ratio counts up to
    `clip_range_high` above 1, or `clip_range` where there is none.
    """
    tokens, low, advantages = batch.global_elements, hyperparameters["clip_range"], batch["advantages"]
    high = hyperparameters.get("clip_range_high", low)
    ratio = (output - batch["logprobs"]).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - low, 1.0 + high)
    metrics = policy_metrics(output, batch, compared=compared)
    metrics["clip_fraction"] = (clipped > unclipped).sum().detach() / tokens
    return torch.maximum(unclipped, clipped).sum() / tokens, metrics


def policy_metrics(output: Tensor, batch: Batch, *, compared: bool) -> dict[str, Tensor]:
    """`approx_kl`, from the policy that generated, and, where `compared`, `ref_kl`, from the reference.

    `approx_kl` is the mean over tokens of ratio - 1 - log ratio (Schulman 2020, "Approximating KL
    divergence"), `ref_kl` the mean log ratio at generation, `ratio_max` the largest ratio of a token.
    """
    tokens, behaviour = batch.global_elements, batch["logprobs"]
    with torch.no_grad():
        log_ratio = output - behaviour
        metrics = {"approx_kl": (log_ratio.exp() - 1.0 - log_ratio).sum() / tokens}
        if log_ratio.numel():
            metrics["ratio_max"] = log_ratio.max().exp()
        if compared:
            metrics["ref_kl"] = (behaviour - batch["ref_logprobs"]).sum() / tokens
    return metrics
