"""The loss of supervised fine-tuning: how improbable the model finds the responses of the data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from realloc.functions import Batch


def sft_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Mean negative log-probability of the response tokens, in nats. `output`: their log-probabilities."""
    return -output.sum() / batch.global_elements, {}


def prepare_weights(batch: Batch, hyperparameters: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Of each response token: its mask (1 where it is learned, else 0) over the mean of all masks."""
    mask = batch["loss_mask"]
    counts = batch.sum(torch.stack((mask.sum(dtype=torch.float64), mask.new_tensor(mask.numel()).double())))
    return {"loss_weights": mask * (counts[1] / counts[0]).float()}


def weighted_sft_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Mean negative log-probability, in nats, of the tokens that are learned.

    The mean is that of the iteration: each of several mini-batches counts by the tokens it has, learned or
    not, which makes their losses alike in scale and their sum right.
    """
    return -(output * batch["loss_weights"]).sum() / batch.global_elements, {}
