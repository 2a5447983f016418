"""The loss of reward modelling: how improbable the model finds the data set's preferences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from realloc.functions import Batch


def reward_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Bradley and Terry's negative log-likelihood, mean over pairs (Ouyang et al. 2022, arXiv 2203.02155).

    `output`: scores, of each pair first the chosen one's. Metrics: the share of pairs in their order, and
    the mean difference.
    """
    pairs, smoothing = batch.global_sequences // 2, hyperparameters["label_smoothing"]
    chosen, rejected = output[0::2], output[1::2]
    margin = chosen - rejected
    losses = -(1.0 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    losses = losses + hyperparameters["centre_coef"] * (chosen + rejected).square()
    with torch.no_grad():
        metrics = {"accuracy": (margin > 0).sum() / pairs, "margin": margin.sum() / pairs}
    return losses.sum() / pairs, metrics
