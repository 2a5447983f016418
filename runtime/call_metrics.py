"""What calls report of the data they have made, for whoever looks after a run.

Everything is a sum over sequences, so no plan changes it. Knows tokens as numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from runtime.data_store import IterationData
from runtime.metrics import SQUARE, Metrics


def add_distribution(metrics: Metrics, name: str, values: torch.Tensor) -> None:
    """Mean and standard deviation of what a call wrote; `values` float64."""
    metrics.add(name, values.sum().item(), values.numel())
    metrics.add(f"{name}{SQUARE}", values.square().sum().item(), values.numel())


def add_responses(
    metrics: Metrics, data: IterationData, share: Sequence[int], written: Sequence[str], ends: Sequence[int]
) -> None:
    """What responses are like: their lengths, how they end, how sure the model was, how they repeat.

    `entropy`: in nats a token, estimated by the negative log-probability of what was drawn.
    `distinct_2`: of a response's pairs of neighbouring tokens, the share of different ones.
    """
    tokens_key, logprobs_key = written
    logprobs = data.packed(logprobs_key, share)
    metrics.add("entropy", -logprobs.double().sum().item(), logprobs.numel())
    for position in share:
        response = data.values[tokens_key][position][data.prompt_lengths[position] :].tolist()
        metrics.add("response_tokens", len(response), 1)
        metrics.add("response_tokens_max", len(response), 1)
        metrics.add("ended_by_eos", response[-1:] != [] and response[-1] in ends, 1)
        if len(response) > 1:
            metrics.add("distinct_2", len(set(pairwise(response))) / (len(response) - 1), 1)
