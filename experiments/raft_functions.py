"""RAFT's tensor functions: which samples are kept, and how improbable the model finds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.shared_functions import score_table, sequence_sums
from realloc.functions import Batch


def select_best(batch: Batch, hyperparameters: Mapping[str, Any]) -> Tensor:
    """bool [num_sequences]: the `keep` best of each prompt's samples; of equal scores the earlier ones."""
    table, present = score_table(batch["scores"], batch)
    ranks = (
        table.masked_fill(~present, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    )
    kept: Tensor = (ranks < hyperparameters["keep"]) & present
    return kept[batch.prompts, batch.samples]


def actor_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Mean negative log-probability of a response's tokens, mean over responses, all of which are kept.

    `output`: log-probabilities of the response tokens now.
    """
    lengths = batch.lengths("tokens") - batch.lengths("prompts")
    means = sequence_sums(output, lengths) / lengths.clamp(min=1)
    return -means.sum() / batch.global_sequences, {}
