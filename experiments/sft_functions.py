"""The loss of supervised fine-tuning: how improbable the model finds the responses of the data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from realloc.functions import Batch


def sft_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Mean negative log-probability of the response tokens, in nats. `output`: their log-probabilities."""
    return -output.sum() / batch.global_elements, {}
