"""What evaluation reports: of responses to held-out prompts, and of models on held-out rows.

Report functions (`realloc.functions.ReportFunction`): every number is of the whole batch, whatever ranks
have of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.shared_functions import score_table
from realloc.functions import Batch

BINS = 10
"""Of the expected calibration error, over confidences from 0.5 to 1."""

TIE = 1e-5
"""Scores that differ by less, relative to their size, are those of one response, computed in two ways."""


def responses(batch: Batch, keys: Sequence[str]) -> Mapping[str, float]:
    """Mean `length` and `reward`, `kl` from the reference model, and `win_rate` against it, where known.

    `kl`: mean over responses of the sum of log ratios over their tokens. A tie is half a win. Samples
    without a score are left out.
    """
    lengths = batch.lengths("eval_logprobs").double()
    found = {"length": _mean(lengths, batch)}
    logprobs, reference = batch["eval_logprobs"].double(), "eval_ref_logprobs"
    if reference in keys:
        total = batch.sum((logprobs - batch[reference].double()).sum())
        found["kl"] = float(total / batch.global_sequences)
    if "eval_scores" in keys:
        scores = batch["eval_scores"].double()
        found["reward"] = _mean(scores, batch)
        if "rival_scores" in keys:
            rival = batch["rival_scores"].double()
            found["reference_reward"] = _mean(rival, batch)
            margin = scores - rival  # NaN where one of the two has no score
            margin = margin.masked_fill(margin.abs() <= TIE * (1.0 + scores.abs()), 0.0)
            found["win_rate"] = _mean(torch.where(margin.isnan(), margin, 0.5 + 0.5 * margin.sign()), batch)
    return {name: value for name, value in found.items() if not isnan(value)}


def likelihood(batch: Batch, keys: Sequence[str]) -> Mapping[str, float]:
    """Mean negative log-probability of the rows' response tokens."""
    del keys
    logprobs = batch["eval_logprobs"].double()
    count, total = batch.sum(torch.stack([torch.ones_like(logprobs).sum(), logprobs.sum()]))
    return {"loss": float(-total / count)}


def pairs(batch: Batch, keys: Sequence[str]) -> Mapping[str, float]:
    """How a reward model orders held-out preferences, each pair's chosen response first.

    `accuracy`, a tie being half right; mean `margin`; `loss`, the negative log-likelihood; `calibration`, the
    expected calibration error (Guo et al. 2017, arXiv 1706.04599) of the probability that a margin stands
    for. With gold scores: rank correlations over all responses (Spearman's, Kendall's tau-b), and
    `best_of`, by how much the best-scored response of a prompt is better than its mean one, as a share of
    what the truly best is.
    """
    table, _ = score_table(batch["eval_scores"], batch)
    margin = table[:, 0] - table[:, 1]
    found = {
        "accuracy": float((0.5 + 0.5 * margin.sign()).mean()),
        "margin": float(margin.mean()),
        "loss": float(-F.logsigmoid(margin).mean()),
        "calibration": calibration_error(margin),
    }
    if "eval_gold" in keys:
        gold, _ = score_table(batch["eval_gold"], batch)
        found["spearman"] = spearman(table.flatten(), gold.flatten())
        found["kendall"] = kendall(table.flatten(), gold.flatten())
        picked = gold.gather(1, table.argmax(1, keepdim=True))[:, 0]
        gain, most = picked - gold.mean(1), gold.amax(1) - gold.mean(1)
        found["best_of"] = float(gain.sum() / most.sum()) if most.sum() > 0 else 0.0
    return found


def calibration_error(margin: Tensor) -> float:
    """Mean over pairs of |how often the model is right - how sure it is|, by bins of how sure it is."""
    sure, right = margin.abs().sigmoid(), 0.5 + 0.5 * margin.sign()
    bins = ((sure - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=margin.dtype, device=margin.device).index_add(0, bins, right - sure)
    return float(gaps.abs().sum() / margin.numel())


def spearman(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of ranks, ties sharing their mean rank; 0 where one side is all tied."""
    x, y = (ranks - ranks.mean() for ranks in (_ranks(a), _ranks(b)))
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale > 0 else 0.0


def kendall(a: Tensor, b: Tensor) -> float:
    """Kendall's tau-b, by comparing every two; 0 where one side is all tied."""
    x, y = ((values[:, None] - values[None, :]).sign() for values in (a, b))
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    ordered, _ = values.sort()
    first = torch.searchsorted(ordered, values.contiguous())
    last = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (first + last - 1).double() / 2


def _mean(values: Tensor, batch: Batch) -> float:
    """Over all ranks, of those that are numbers."""
    scored = values[~values.isnan()]
    count, total = batch.sum(torch.stack([torch.ones_like(scored).sum(), scored.sum()]))
    return float(total / count)
