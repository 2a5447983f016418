"""RAFT's tensor functions: which samples are kept, and how improbable the model finds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.shared_functions import per_token, score_table
from realloc.functions import Batch


def prepare_actor(batch: Batch, hyperparameters: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """`weights`, one per response token: 0 unless its sequence is of the `keep` best of its prompt's samples.

    They add up to samples / keep over a kept sequence, so to 1 a sequence on average. Of equal scores the
    earlier samples come first.
    """
    table, present = score_table(batch["scores"], batch)
    ranks = (
        table.masked_fill(~present, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    )
    kept = (ranks < hyperparameters["keep"]) & present
    lengths = batch.lengths("weights")
    weights = kept[batch.prompts, batch.samples].float() * (present.sum() / kept.sum())
    weights = (weights / lengths.clamp(min=1)).float()
    return {"weights": per_token(weights, lengths, int(lengths.sum()))}


def actor_loss(
    output: Tensor, batch: Batch, hyperparameters: Mapping[str, Any]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Mean negative log-probability of a kept response's tokens, mean over kept responses.

    `output`: log-probabilities of the response tokens now.
    """
    return -(batch["weights"] * output).sum() / batch.global_sequences, {}
