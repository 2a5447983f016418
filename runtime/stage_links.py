"""Messages between the stages of one data replica while it generates.

Hidden states go from stage to stage, sampled tokens from the last stage to all others. What they
mean, and when they are sent, is not decided here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from runtime.channels import Channel
from runtime.decoder import Decoder


class Links:
    """Messages between the stages of one replica. Buffers live until they are sent."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._context = decoder, decoder.context
        self._last = self._context.strategy.pp - 1
        self._sends: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def share_prompts(self, prompts: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
        """The prompts on first and last stage, None on those between."""
        context = self._context
        if context.is_first:
            assert prompts is not None
            prompts = prompts.to(context.device)
            assert prompts.shape == (num_tokens,), (prompts.shape, num_tokens)
            if not context.is_last and num_tokens:
                self._send(prompts, self._last, Channel.FORWARD)
            return prompts
        if not context.is_last:
            return None
        buffer = torch.empty(num_tokens, dtype=torch.int64, device=context.device)
        return self._receive(buffer, 0, Channel.FORWARD) if num_tokens else buffer

    def send_hidden(self, hidden: torch.Tensor) -> None:
        self._send(hidden, self._context.at.pp + 1, Channel.FORWARD)

    def hidden_to_come(self, rows: int) -> Callable[[], torch.Tensor]:
        """The hidden states that the stage before sends next, once they are asked for."""
        size = (rows, self._decoder.shape.hidden)
        make = partial(torch.empty, size, dtype=self._decoder.dtype, device=self._context.device)
        before = self._context.stage_rank(self._context.at.pp - 1)
        return self._context.channels.to_come(make, before, Channel.FORWARD)

    def send_tokens(self, tokens: torch.Tensor) -> None:
        for stage in range(self._last):
            self._send(tokens, stage, Channel.BACKWARD)

    def tokens_to_come(self, rows: int) -> Callable[[], torch.Tensor]:
        """The tokens that the last stage samples next, once they are asked for."""
        make = partial(torch.empty, rows, dtype=torch.int64, device=self._context.device)
        last = self._context.stage_rank(self._last)
        return self._context.channels.to_come(make, last, Channel.BACKWARD)

    def finish(self) -> None:
        """Waits until everything is sent."""
        while self._sends:
            self._sends.popleft()[0].wait()

    def _send(self, tensor: torch.Tensor, stage: int, channel: Channel) -> None:
        # what was sent two rounds of groups ago has long been received
        while len(self._sends) > 2 * (self._last + 1) ** 2:
            self._sends.popleft()[0].wait()
        tensor = tensor.contiguous()
        work = self._context.channels.send(tensor, self._context.stage_rank(stage), channel)
        self._sends.append((work, tensor))

    def _receive(self, buffer: torch.Tensor, stage: int, channel: Channel) -> torch.Tensor:
        return self._context.channels.receive(buffer, self._context.stage_rank(stage), channel)
