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
        if "eval_gold" in keys:
            found["gold"] = _mean(batch["eval_gold"].double(), batch)
    return {name: value for name, value in found.items() if not isnan(value)}


def sampled_responses(batch: Batch, keys: Sequence[str]) -> Mapping[str, float]:
    """`responses`, and what choosing among the samples of a prompt is worth, for k from 2 to all of them.

    `best_of_K`: the mean over prompts of the best score of K samples. With gold scores, `gold_best_of_K`:
    that of the gold score of the sample whose score is best.
    """
    found = dict(responses(batch, keys))
    if "eval_scores" not in keys:
        return found
    judges = {"best_of": "eval_scores"}
    if "eval_gold" in keys:
        judges["gold_best_of"] = "eval_gold"
    scores, present = _samples("eval_scores", batch)
    for name, judge in judges.items():
        judged, known = _samples(judge, batch)
        for count, value in enumerate(best_of(scores, judged, present & known).tolist(), start=1):
            if count > 1 and not isnan(value):
                found[f"{name}_{count}"] = value
    return found


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
    `best_of_2`, by how much the best-scored response of a prompt is better than its mean one, as a share of
    what the truly best is.
    """
    table, present = score_table(batch["eval_scores"], batch)
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
        picked, most = (best_of(chosen, gold, present) for chosen in (table, gold))
        for count in range(2, table.shape[1] + 1):
            gain, possible = (float(means[count - 1] - means[0]) for means in (picked, most))
            found[f"best_of_{count}"] = gain / possible if possible > 0 else 0.0
    return found


def best_of(scores: Tensor, judged: Tensor, present: Tensor) -> Tensor:
    """The mean over prompts of `judged` of the best-scored of k samples; [prompts, n] each -> [n], k from 1.

    k of a prompt's samples drawn without replacement, over all subsets, so that no draw is left to chance
    (as pass@k is estimated: Chen et al. 2021, arXiv 2107.03374, section 2.1). Among equal scores each is as
    likely to be chosen. A prompt with fewer than k samples that are `present` is left out; NaN where all
    are.
    """
    counts = present.sum(1)
    total = torch.zeros(scores.shape[1], dtype=torch.float64, device=scores.device)
    prompts = torch.zeros_like(total)
    for count in counts.unique().tolist():
        if count == 0:
            continue
        rows = counts == count
        there = present[rows]
        order = scores[rows][there].double().view(-1, count).sort(1)
        values = judged[rows][there].double().view(-1, count).gather(1, order.indices)
        values = _shared_by_ties(values, order.values)
        total[:count] += (values @ _chances_of_best(count, values).T).sum(0)
        prompts[:count] += values.shape[0]
    return total / prompts


def _chances_of_best(count: int, like: Tensor) -> Tensor:
    """[k - 1, i]: the chance that of k of `count` samples the one of rank i (from the worst, 0) is best.

    C(i, k - 1) / C(count, k), each row from the one before.
    """
    ranks = torch.arange(count, dtype=torch.float64, device=like.device)
    rows = [torch.full_like(ranks, 1.0 / count)]
    for k in range(1, count):
        rows.append(rows[-1] * (ranks - k + 1).clamp(min=0.0) / k * ((k + 1) / (count - k)))
    return torch.stack(rows)


def _shared_by_ties(values: Tensor, ordered: Tensor) -> Tensor:
    """Each value replaced by the mean over those of its row whose `ordered` score is the same."""
    new = torch.zeros_like(ordered, dtype=torch.int64)
    new[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).long()
    group = new.cumsum(1)
    sums, members = (
        torch.zeros_like(values).scatter_add(1, group, x) for x in (values, values.new_ones(values.shape))
    )
    return (sums / members.clamp(min=1.0)).gather(1, group)


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


def _samples(key: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """A number of each sample as [num_prompts, samples_per_prompt], and which are numbers; on every rank."""
    values = batch[key].double()
    missing = values.isnan()
    table, there = score_table(values.masked_fill(missing, 0.0), batch)
    unknown, _ = score_table(missing.double(), batch)
    return table, there & (unknown == 0.0)


def _mean(values: Tensor, batch: Batch) -> float:
    """Over all ranks, of those that are numbers."""
    scored = values[~values.isnan()]
    count, total = batch.sum(torch.stack([torch.ones_like(scored).sum(), scored.sum()]))
    return float(total / count)
