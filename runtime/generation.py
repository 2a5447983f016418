"""Generation: prompts in, sampled responses out, on one data replica's ranks.

Decides the order of prefill and decoding, which sequence lives in which cache slot, and what
stages tell each other: hidden states go from stage to stage, sampled tokens from the last stage to
all others, so that every stage runs the same bookkeeping. Knows the model through `Decoder` only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from realloc.experiment import Sampling
from realloc.params import split_range
from runtime.attention import DecodeStep, KVCache, PackedSequences
from runtime.decoder import Decoder
from runtime.parallel import ParallelContext
from runtime.sampling import choose, uniforms


@dataclass(frozen=True)
class Generated:
    """Finished sequences in the order of the prompts.

    `response_lengths` counts generated tokens, an end-of-sequence token included. `tokens` are
    prompt + response, packed (first and last stage only). `logprobs` float32, packed, one per
    response token, at the sampling temperature (see `sampling.choose`; last stage only).
    """

    response_lengths: tuple[int, ...]
    tokens: torch.Tensor | None
    logprobs: torch.Tensor | None


@dataclass(frozen=True)
class Rules:
    """When sequences end and how tokens are drawn. `eos_ids` int64; empty to ignore ends."""

    max_new_tokens: int
    eos_ids: torch.Tensor
    temperature: float
    seed: int
    iteration: int


@torch.no_grad()
def generate(
    decoder: Decoder,
    *,
    prompts: torch.Tensor | None,
    prompt_lengths: Sequence[int],
    sequence_ids: Sequence[int],
    max_new_tokens: int,
    eos_ids: Collection[int],
    sampling: Sampling,
    seed: int,
    iteration: int,
    micro_batches: int = 1,
) -> Generated:
    """Continues the prompts of this data replica. Every rank of the replica calls it alike.

    `prompts` int64, packed, is needed on the first stage only. Sequences end after an id of
    `eos_ids` (unless `sampling.ignore_eos`) or `max_new_tokens`. They run in `micro_batches`
    groups; as many groups as there are stages are in flight at a time, and each has its own cache
    while it is.
    """
    device = decoder.context.device
    rules = Rules(
        max_new_tokens,
        torch.tensor([] if sampling.ignore_eos else sorted(eos_ids), dtype=torch.int64, device=device),
        sampling.temperature,
        seed,
        iteration,
    )
    assert max_new_tokens >= 1, max_new_tokens
    assert min(prompt_lengths, default=1) >= 1, "a prompt is empty"
    links = Links(decoder)
    prompts = links.share_prompts(prompts, sum(prompt_lengths))
    num = len(prompt_lengths)
    groups = []
    offset = 0
    for part in range(min(micro_batches, num)):
        span = slice(*split_range(num, min(micro_batches, num), part))
        packed = PackedSequences(tuple(prompt_lengths[span]), device)
        own = None if prompts is None else prompts[offset : offset + packed.num_tokens]
        offset += packed.num_tokens
        ids = torch.tensor(list(sequence_ids[span]), dtype=torch.int64, device=device)
        groups.append(Group(decoder, links, packed, own, ids, rules))
    _run(groups, in_flight=decoder.context.strategy.pp)
    links.finish()
    return _joined(groups, decoder.context, device)


def _run(groups: Sequence[Group], in_flight: int) -> None:
    """Steps the groups in turn. All stages meet the groups in the same order."""
    waiting = deque(groups)
    live = [waiting.popleft() for _ in range(min(in_flight, len(waiting)))]
    while live:
        following: list[Group] = []
        for group in live:
            group.settle()
            if not group.is_done:
                following.append(group)
            else:
                group.close()
                if not waiting:
                    continue
                following.append(waiting.popleft())
            following[-1].step()
        live = following


class Group:
    """One micro-batch of sequences on its way, on one stage.

    `slot_rows[s]` is the sequence (row) that lives in cache slot s; `positions[s]` where its next
    input token stands, `last_tokens[s]` that token. Live sequences fill the first slots.
    """

    def __init__(
        self,
        decoder: Decoder,
        links: Links,
        packed: PackedSequences,
        prompts: torch.Tensor | None,
        ids: torch.Tensor,
        rules: Rules,
    ) -> None:
        self._decoder, self._links, self._rules = decoder, links, rules
        self._packed, self._prompts, self._ids = packed, prompts, ids
        num, device = ids.shape[0], ids.device
        self.slot_rows = torch.arange(num, device=device)
        self.positions = packed.lengths_tensor - 1
        self.last_tokens = torch.empty(0, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(num, dtype=torch.int64, device=device)
        self.responses = torch.zeros(num, rules.max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(num, rules.max_new_tokens, device=device)
        self._num_steps = 0
        self._longest = max(packed.lengths)
        self._awaits_tokens = False
        self._cache: KVCache | None = None

    @property
    def is_done(self) -> bool:
        return self.slot_rows.shape[0] == 0

    def close(self) -> None:
        """Frees the cache."""
        self._cache = None

    def step(self) -> None:
        """Takes all live sequences one token further through this stage."""
        decoder, links, context = self._decoder, self._links, self._decoder.context
        if self._cache is None:
            # the last sampled token is never an input, so it needs no place
            size = self._longest + self._rules.max_new_tokens - 1
            self._cache = decoder.new_cache(self.slot_rows.shape[0], size)
            rows = self._packed.num_tokens
            inputs = self._prompts if context.is_first else links.receive_hidden(rows)
            assert inputs is not None
            hidden = decoder.forward(inputs, self._packed, cache=self._cache)
            if context.is_last:
                hidden = hidden[self._packed.last_index]
        else:
            inputs = self.last_tokens if context.is_first else links.receive_hidden(self.positions.shape[0])
            decoding = DecodeStep(self.positions, self._longest + self._num_steps)
            hidden = decoder.decode(inputs, decoding, self._cache)
        if context.is_last:
            self._sample(hidden)
        else:
            links.send_hidden(hidden)
            self._awaits_tokens = True

    def settle(self) -> None:
        """Learns the tokens of the last step from the last stage, if any are outstanding."""
        if self._awaits_tokens:
            self._awaits_tokens = False
            self._append(self._links.receive_tokens(self.slot_rows.shape[0]))

    def _sample(self, hidden: torch.Tensor) -> None:
        decoder, rules = self._decoder, self._rules
        draw = None
        if rules.temperature != 0.0:
            ids = self._ids[self.slot_rows]
            draw = uniforms(rules.seed, rules.iteration, ids, self.positions + 1)
        tokens, logprobs = choose(
            decoder.local_logits(hidden),
            draw,
            rules.temperature,
            decoder.vocab_start,
            decoder.context.tp_group,
        )
        self.logprobs[self.slot_rows, self._num_steps] = logprobs
        self._links.send_tokens(tokens)
        self._append(tokens)

    def _append(self, tokens: torch.Tensor) -> None:
        """Records one token per live sequence and lets finished sequences go."""
        self.responses[self.slot_rows, self._num_steps] = tokens
        self._num_steps += 1
        self.last_tokens = tokens
        self.positions = self.positions + 1
        if self._num_steps == self._rules.max_new_tokens:
            self.lengths[self.slot_rows] = self._num_steps
            self.slot_rows = self.slot_rows[:0]
        elif self._rules.eos_ids.numel():
            ended = (tokens[:, None] == self._rules.eos_ids).any(dim=1)
            if ended.any():
                self.lengths[self.slot_rows[ended]] = self._num_steps
                self._keep(~ended)

    def _keep(self, alive: torch.Tensor) -> None:
        """Moves the last live slots into the slots that fell free among the first."""
        num = int(alive.sum())
        free = (~alive[:num]).nonzero()[:, 0]
        movers = alive[num:].nonzero()[:, 0] + num
        if movers.numel() and self._cache is not None:
            self._cache.move(movers, free, self._longest + self._num_steps - 1)
        order = torch.arange(num, device=alive.device)
        order[free] = movers
        self.slot_rows = self.slot_rows[order]
        self.positions = self.positions[order]
        self.last_tokens = self.last_tokens[order]

    def tokens(self) -> torch.Tensor | None:
        """Prompt + response of each sequence, packed; None where the prompts are unknown."""
        if self._prompts is None:
            return None
        prompts = torch.split(self._prompts, list(self._packed.lengths))
        parts = []
        for row, length in enumerate(self.lengths.tolist()):
            parts += [prompts[row], self.responses[row, :length]]
        return torch.cat(parts)

    def packed_logprobs(self) -> torch.Tensor:
        index = torch.arange(self.logprobs.shape[1], device=self.logprobs.device)
        return self.logprobs[index < self.lengths[:, None]]


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
                self._send(prompts, self._last)
            return prompts
        if not context.is_last:
            return None
        buffer = torch.empty(num_tokens, dtype=torch.int64, device=context.device)
        return self._receive(buffer, 0) if num_tokens else buffer

    def send_hidden(self, hidden: torch.Tensor) -> None:
        self._send(hidden, self._context.at.pp + 1)

    def receive_hidden(self, rows: int) -> torch.Tensor:
        size = (rows, self._decoder.shape.hidden)
        buffer = torch.empty(size, dtype=self._decoder.dtype, device=self._context.device)
        return self._receive(buffer, self._context.at.pp - 1)

    def send_tokens(self, tokens: torch.Tensor) -> None:
        for stage in range(self._last):
            self._send(tokens, stage)

    def receive_tokens(self, rows: int) -> torch.Tensor:
        buffer = torch.empty(rows, dtype=torch.int64, device=self._context.device)
        return self._receive(buffer, self._last)

    def finish(self) -> None:
        """Waits until everything is sent."""
        while self._sends:
            self._sends.popleft()[0].wait()

    def _send(self, tensor: torch.Tensor, stage: int) -> None:
        # what was sent two rounds of groups ago has long been received
        while len(self._sends) > 2 * (self._last + 1) ** 2:
            self._sends.popleft()[0].wait()
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self._context.stage_rank(stage))
        assert work is not None
        self._sends.append((work, tensor))

    def _receive(self, buffer: torch.Tensor, stage: int) -> torch.Tensor:
        dist.recv(buffer, self._context.stage_rank(stage))
        return buffer


def _joined(groups: Sequence[Group], context: ParallelContext, device: torch.device) -> Generated:
    lengths = [length for group in groups for length in group.lengths.tolist()]
    parts = [part for group in groups if (part := group.tokens()) is not None]
    knows_tokens = context.is_first or context.is_last
    empty = torch.empty(0, dtype=torch.int64, device=device)
    tokens = (torch.cat(parts) if parts else empty) if knows_tokens else None
    logprobs = None
    if context.is_last:
        logprobs = torch.cat([torch.empty(0, device=device), *(g.packed_logprobs() for g in groups)])
    return Generated(tuple(lengths), tokens, logprobs)
