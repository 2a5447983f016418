"""Pipeline execution of packed micro-batches: forward only, and training by any schedule.

Which micro-batch passes when is decided in `realloc.pipeline_schedule`; this module executes one
stage's actions and moves hidden states and their gradients between stages. Shapes are known on both
sides from the shared batch, so micro-batches may differ in length. With one stage it is a plain loop.

Sends do not block and receives do. Between two ranks messages of one kind are received in the order in
which they are sent; forwards and backwards go through channels of their own, so none waits for another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from realloc.pipeline_schedule import Action, Pipeline, Work, destination, pipeline_actions, source
from realloc.strategy import Schedule
from runtime.attention import PackedSequences
from runtime.channels import Channel
from runtime.decoder import Decoder
from runtime.parallel import ParallelContext

_CHANNELS = {Work.FORWARD: Channel.FORWARD, Work.BACKWARD: Channel.BACKWARD}


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one pass. `tokens` [T] is None on stages that do not embed.

    `is_mixed`: they are of what the call mixes in, not of the batch.
    """

    positions: tuple[int, ...]
    packed: PackedSequences
    tokens: torch.Tensor | None
    is_mixed: bool = False


@dataclass(frozen=True)
class _Sent:
    """A message under way to the action at place `taken_at` of the receiving stage's order."""

    taken_at: int
    work: dist.Work
    tensor: torch.Tensor


class _Links:
    """This rank's messages to and from other stages, and the sends that are still under way."""

    def __init__(
        self,
        decoder: Decoder,
        context: ParallelContext,
        pipeline: Pipeline,
        batches: Sequence[MicroBatch],
        works: Collection[Work],
    ) -> None:
        """`works`: the kinds of actions of the schedule that are executed."""
        self._decoder, self._context, self._pipeline, self._batches = decoder, context, pipeline, batches
        orders = pipeline_actions(pipeline)
        mine = context.at.pp
        self._to_come = deque(
            action
            for action in orders[mine]
            if action.work in works and (source(pipeline, mine, action) or (mine,))[0] != mine
        )
        self._next: Callable[[], torch.Tensor] | None = None
        # where each action stands in the order of every stage that this one talks to
        self._places = {
            stage: {action: place for place, action in enumerate(orders[stage])}
            for stage in {(context.at.pp + step) % pipeline.pp for step in (-1, 1)}
        }
        self._sent: dict[int, list[_Sent]] = {stage: [] for stage in self._places}

    def receive(self, action: Action) -> torch.Tensor:
        """What the action takes from another stage, [num_rows(T), hidden]. Actions come in their order."""
        stage, made_by = self._source(action)
        assert self._to_come.popleft() == action, action
        arrived = self._next or self._message(action)
        # one ahead: its sender may send while this rank computes
        self._next = self._message(self._to_come[0]) if self._to_come else None
        tensor = arrived()
        # the sender has received all that its earlier actions took
        self._let_go(stage, before=self._places[stage][made_by])
        return tensor

    def _message(self, action: Action) -> Callable[[], torch.Tensor]:
        tokens = self._batches[action.micro_batch].packed.num_tokens
        shape = (self._decoder.num_rows(tokens), self._decoder.shape.hidden)
        make = partial(torch.empty, shape, dtype=self._decoder.dtype, device=self._context.device)
        rank = self._context.stage_rank(self._source(action)[0])
        return self._context.channels.to_come(make, rank, _CHANNELS[action.work])

    def _source(self, action: Action) -> tuple[int, Action]:
        needed = source(self._pipeline, self._context.at.pp, action)
        assert needed is not None, action
        return needed

    def send(self, action: Action, tensor: torch.Tensor) -> None:
        """Sends what the action made to the stage that takes it."""
        target = destination(self._pipeline, self._context.at.pp, action)
        assert target is not None, action
        stage, taken_by = target
        tensor = tensor.detach().contiguous()
        rank = self._context.stage_rank(stage)
        work = self._context.channels.send(tensor, rank, _CHANNELS[action.work])
        self._sent[stage].append(_Sent(self._places[stage][taken_by], work, tensor))

    def flush(self) -> None:
        for stage in self._sent:
            self._let_go(stage, before=None)

    def _let_go(self, stage: int, before: int | None) -> None:
        """Waits for messages that the stage has received (None: all), and frees them."""
        waiting = []
        for sent in self._sent[stage]:
            if before is not None and sent.taken_at > before:
                waiting.append(sent)
            else:
                sent.work.wait()
        self._sent[stage] = waiting


def run_forward(
    decoder: Decoder,
    context: ParallelContext,
    batches: Sequence[MicroBatch],
    finish: Callable[[torch.Tensor, MicroBatch], None],
) -> None:
    """Forward passes; `finish(hidden [T, hidden], batch)` is called on the last stage."""
    pipeline = Pipeline(Schedule.ONE_F_ONE_B, context.strategy.pp, 1, len(batches))
    links = _Links(decoder, context, pipeline, batches, {Work.FORWARD})
    with torch.no_grad():
        for index, batch in enumerate(batches):
            action = Action(Work.FORWARD, index, 0)
            entry = _tokens(batch) if context.is_first else links.receive(action)
            hidden = decoder.forward(entry, batch.packed)
            if context.is_last:
                finish(hidden, batch)
            else:
                links.send(action, hidden)
    links.flush()


def run_training(
    decoder: Decoder,
    context: ParallelContext,
    batches: Sequence[MicroBatch],
    loss: Callable[[torch.Tensor, MicroBatch], torch.Tensor],
) -> None:
    """Forward and backward of all micro-batches as the schedule says; gradients add up in the leaves.

    `loss(hidden [T, hidden], batch)` gives the scalar contribution, on the last stage.
    """
    strategy = context.strategy
    pipeline = Pipeline(strategy.schedule, strategy.pp, strategy.virtual_stages, len(batches))
    stage = _TrainingStage(decoder, _Links(decoder, context, pipeline, batches, set(Work)), batches, loss)
    for action in pipeline_actions(pipeline)[context.at.pp]:
        stage.run(action)
    stage.finish()


class _TrainingStage:
    """This rank's stage while it trains: the passes between their forward and their backward."""

    def __init__(
        self,
        decoder: Decoder,
        links: _Links,
        batches: Sequence[MicroBatch],
        loss: Callable[[torch.Tensor, MicroBatch], torch.Tensor],
    ) -> None:
        self._decoder, self._links, self._batches, self._loss = decoder, links, batches, loss
        self._open: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def run(self, action: Action) -> None:
        if action.work is Work.FORWARD:
            self._forward(action)
        elif action.work is Work.BACKWARD:
            self._backward(action)
        else:
            assert self._decoder.weight_gradients is not None
            self._decoder.weight_gradients.run()

    def finish(self) -> None:
        self._links.flush()
        waiting = self._decoder.weight_gradients
        assert not self._open, "a micro-batch had no backward pass"
        assert waiting is None or waiting.is_empty, "weight gradients were put off and forgotten"

    def _forward(self, action: Action) -> None:
        batch, chunk = self._batches[action.micro_batch], action.chunk
        if self._decoder.embeds(chunk):
            entry = _tokens(batch)
        else:
            entry = self._links.receive(action).requires_grad_(True)
        result = self._decoder.forward(entry, batch.packed, chunk)
        if self._decoder.ends(chunk):
            result = self._loss(result, batch)
        else:
            self._links.send(action, result)
        self._open[action.micro_batch, chunk] = entry, result

    def _backward(self, action: Action) -> None:
        chunk = action.chunk
        entry, result = self._open.pop((action.micro_batch, chunk))
        gradient = None if self._decoder.ends(chunk) else self._links.receive(action)
        torch.autograd.backward(result, gradient)
        if self._decoder.weight_gradients is not None:
            self._decoder.weight_gradients.close()
        if not self._decoder.embeds(chunk):
            assert entry.grad is not None, "the chunk's input has no gradient"
            self._links.send(action, entry.grad)


def _tokens(batch: MicroBatch) -> torch.Tensor:
    assert batch.tokens is not None, "the first stage has no tokens"
    return batch.tokens
