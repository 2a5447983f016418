"""Sequences as micro-batches, and what a model computes for one: of a call's batch, or of what it mixes in.

Knows one call's data, no other calls, and nothing of losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from realloc.dataflow import Call, Mixture, Output
from runtime.attention import PackedSequences
from runtime.batching import assign, micro_batches, num_passes
from runtime.data_store import IterationData
from runtime.decoder import Decoder
from runtime.parallel import ParallelContext
from runtime.pipeline import MicroBatch


@dataclass(frozen=True)
class MixedStep:
    """What one optimizer step learns of a mixture. `shares`: positions by data-parallel rank."""

    mixture: Mixture
    data: IterationData
    shares: Sequence[Sequence[int]]

    @property
    def positions(self) -> tuple[int, ...]:
        """Those of all ranks."""
        return tuple(p for share in self.shares for p in share)

    def num_tokens(self, dp: int) -> int:
        """Tokens of one rank's share."""
        lengths = self.data.key_lengths(self.mixture.sequence)
        return sum(lengths[p] for p in self.shares[dp])

    def micro_batches(self, context: ParallelContext) -> list[MicroBatch]:
        """This rank's, as many again as the strategy splits a share of the batch into."""
        share = self.shares[context.at.dp]
        return make_micro_batches(context, self.data, self.mixture.sequence, share, is_mixed=True)

    def num_passes(self, context: ParallelContext) -> int:
        """The largest number of micro-batches that any rank has."""
        return num_passes(self.shares, context.strategy.micro_batches)


def mixed_steps(call: Call, context: ParallelContext, data: IterationData) -> list[MixedStep]:
    """A mixture's sequences of an iteration by optimizer step: in parts by position, over ranks by length."""
    assert call.mixture is not None
    lengths = data.key_lengths(call.mixture.sequence)
    parts = assign(lengths, call.mini_batches * call.epochs, context.strategy.dp)
    return [MixedStep(call.mixture, data, shares) for shares in parts.shares]


def make_micro_batches(
    context: ParallelContext,
    data: IterationData,
    key: str,
    share: Sequence[int],
    together: int = 1,
    *,
    is_mixed: bool = False,
) -> list[MicroBatch]:
    """A rank's share as micro-batches; each `together` neighbours are in one."""
    lengths, result = data.key_lengths(key), []
    for positions in micro_batches(share, lengths, context.strategy.micro_batches, together):
        packed = PackedSequences(tuple(lengths[p] for p in positions), context.device)
        ends = context.is_first or context.is_last
        tokens = data.packed(key, positions).to(context.device) if ends else None
        result.append(MicroBatch(positions, packed, tokens, is_mixed))
    return result


def num_elements(output: Output | None, data: IterationData, key: str, positions: Sequence[int]) -> int:
    """Elements of a model's output for these sequences."""
    if output is Output.SCORES:
        return len(positions)
    lengths = data.key_lengths(key)
    return sum(lengths[p] - data.prompt_lengths[p] for p in positions)


def compute_output(
    output: Output | None,
    model: Decoder,
    hidden: torch.Tensor,
    batch: MicroBatch,
    data: IterationData,
    key: str,
    temperature: float,
) -> torch.Tensor:
    """What a model computes for a micro-batch, from the last stage's hidden; [elements].

    `temperature` is that of log-probabilities.
    """
    lengths = data.key_lengths(key)
    totals = [lengths[p] for p in batch.positions]
    if output is Output.SCORES:
        last = torch.tensor(totals, device=hidden.device).cumsum(0) - 1
        return model.scalar(hidden[last])
    rows = response_rows(totals, [data.prompt_lengths[p] for p in batch.positions])
    rows = rows.to(hidden.device)
    if output is Output.VALUES:
        return model.scalar(hidden[rows])
    if batch.tokens is None:
        raise AssertionError("the last stage has no tokens")
    return model.logprobs(hidden[rows], batch.tokens[rows + 1], temperature)


def response_rows(totals: Sequence[int], prompts: Sequence[int]) -> torch.Tensor:
    """Rows of a packed batch that predict its response tokens: prompt end - 1 to end - 2."""
    rows: list[int] = []
    start = 0
    for total, prompt in zip(totals, prompts, strict=True):
        rows.extend(range(start + prompt - 1, start + total - 1))
        start += total
    return torch.tensor(rows, dtype=torch.int64)


def empty_pass(context: ParallelContext) -> MicroBatch:
    """One token of no sequence: replicas that communicate in every pass run equally many."""
    device = context.device
    return MicroBatch((), PackedSequences((1,), device), torch.zeros(1, dtype=torch.int64, device=device))


def zero_loss(output: Output | None, model: Decoder, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """A loss that depends on every parameter and has no gradient."""
    if output is Output.LOGPROBS and batch.tokens is not None:
        values = model.logprobs(hidden, batch.tokens)
    else:
        values = model.scalar(hidden)
    return values.sum() * 0.0
