"""Pipeline execution of packed micro-batches: forward only, and 1F1B for training.

Point-to-point messages between neighbouring stages; shapes are known on both sides from the
shared batch, so micro-batches may differ in length. With one stage it is a plain loop.

1F1B: Narayanan et al., arXiv 2104.04473, section 2.2 (PipeDream-Flush).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from runtime.attention import PackedSequences
from runtime.decoder import Decoder
from runtime.parallel import ParallelContext


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one pass. `tokens` [T] is None on stages that do not embed."""

    positions: tuple[int, ...]
    packed: PackedSequences
    tokens: torch.Tensor | None


class _Stage:
    """This rank's stage: its neighbours, and the sends that are still under way."""

    def __init__(self, decoder: Decoder, context: ParallelContext) -> None:
        self._decoder, self._context = decoder, context
        self._pending: list[tuple[dist.Work | None, torch.Tensor]] = []

    def receive_input(self, batch: MicroBatch) -> torch.Tensor:
        if self._context.is_first:
            if batch.tokens is None:
                raise AssertionError("the first stage has no tokens")
            return batch.tokens
        return self._receive(batch, self._context.at.pp - 1)

    def receive_gradient(self, batch: MicroBatch) -> torch.Tensor:
        return self._receive(batch, self._context.at.pp + 1)

    def send_output(self, hidden: torch.Tensor) -> None:
        self._send(hidden, self._context.at.pp + 1)

    def send_gradient(self, gradient: torch.Tensor) -> None:
        self._send(gradient, self._context.at.pp - 1)

    def flush(self) -> None:
        for work, _ in self._pending:
            if work is not None:
                work.wait()
        self._pending.clear()

    def _receive(self, batch: MicroBatch, stage: int) -> torch.Tensor:
        shape = (self._decoder.num_rows(batch.packed.num_tokens), self._decoder.shape.hidden)
        buffer = torch.empty(shape, dtype=self._decoder.dtype, device=self._context.device)
        dist.recv(buffer, src=self._context.stage_rank(stage))
        return buffer

    def _send(self, tensor: torch.Tensor, stage: int) -> None:
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, dst=self._context.stage_rank(stage))
        self._pending.append((work, tensor))


def run_forward(
    decoder: Decoder,
    context: ParallelContext,
    batches: Sequence[MicroBatch],
    finish: Callable[[torch.Tensor, MicroBatch], None],
) -> None:
    """Forward passes; `finish(hidden [T, hidden], batch)` is called on the last stage."""
    stage = _Stage(decoder, context)
    with torch.no_grad():
        for batch in batches:
            hidden = decoder.forward(stage.receive_input(batch), batch.packed)
            if context.is_last:
                finish(hidden, batch)
            else:
                stage.send_output(hidden)
    stage.flush()


def run_training(
    decoder: Decoder,
    context: ParallelContext,
    batches: Sequence[MicroBatch],
    loss: Callable[[torch.Tensor, MicroBatch], torch.Tensor],
) -> None:
    """Forward and backward of all micro-batches in 1F1B order; gradients add up in the leaves.

    `loss(hidden [T, hidden], batch)` gives the scalar contribution, on the last stage.
    """
    stage = _Stage(decoder, context)
    waiting: list[tuple[torch.Tensor, torch.Tensor, MicroBatch]] = []

    def forward(batch: MicroBatch) -> None:
        entry = stage.receive_input(batch)
        if not context.is_first:
            entry.requires_grad_(True)
        result = decoder.forward(entry, batch.packed)
        if context.is_last:
            result = loss(result, batch)
        else:
            stage.send_output(result)
        waiting.append((entry, result, batch))

    def backward() -> None:
        entry, result, batch = waiting.pop(0)
        if context.is_last:
            result.backward()
        else:
            torch.autograd.backward(result, stage.receive_gradient(batch))
        if not context.is_first:
            if entry.grad is None:
                raise AssertionError("the stage's input has no gradient")
            stage.send_gradient(entry.grad)

    warm_up = min(context.strategy.pp - 1 - context.at.pp, len(batches))
    for batch in batches[:warm_up]:
        forward(batch)
    for batch in batches[warm_up:]:
        forward(batch)
        backward()
    while waiting:
        backward()
    stage.flush()
