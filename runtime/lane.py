"""One cache with its slots, on one stage: sequences enter, take a token a step, and leave.

A finished sequence leaves at once, and as soon as there is room for a few those that wait enter:
their prompts go through the stage together with the next tokens of the others. Every stage runs
the same bookkeeping, so that only hidden states and tokens have to be sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from runtime.attention import PackedSequences
from runtime.decode_graph import DecodeGraphs
from runtime.filtering import Filter
from runtime.kv_cache import DecodeStep, KVCache
from runtime.rollout_decoder import Prefill, RolloutDecoder
from runtime.sampling import choose
from runtime.stage_links import Links
from runtime.stopping import StopStrings
from runtime.waiting import Admission, Responses, SavedPrompt, Waiting

ENTER_SHARE = 4
"""Sequences enter when one in so many slots is free. A step with prompts costs several plain ones, and
an idle slot next to nothing: of 16 slots 4 at a time take 5% more steps, but a quarter of those."""


Watch = Callable[[], None]


@dataclass(frozen=True, eq=False)
class Rules:
    """How tokens are drawn and when sequences end.

    `limits` int64 [sequences]: tokens after which each ends. `eos_ids` int64: tokens that end one,
    empty to ignore ends. Before `min_new_tokens` neither those nor stop strings end one.
    """

    limits: torch.Tensor
    eos_ids: torch.Tensor
    min_new_tokens: int
    stops: StopStrings | None
    temperature: float
    filter: Filter


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of a call and the random numbers that continue them.

    `tokens` by row, known on the first and the last stage only. `draws` float64 [rows * longest
    response]: one number for each token that may be generated; None where nothing is drawn.
    """

    lengths: Sequence[int]
    tokens: Sequence[torch.Tensor] | None
    draws: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class _Step:
    """One step of a lane that has begun: who was live, who enters, and what is computed from what.

    `inputs` are the hidden states of the stage before, once they are asked for.
    """

    live: int
    admission: Admission | None
    prefill: Prefill | None
    decode: DecodeStep | None
    last_tokens: torch.Tensor
    inputs: Callable[[], torch.Tensor] | None


class Lane:
    """Slots of one cache. Slots 0..n-1 are live; slot s holds the sequence `rows[s]`.

    `positions[s]` is where its next input token stands, `counts[s]` how many it has generated,
    `places[s]` where its next token goes among the responses, `last_tokens[s]` its latest token.
    What is the same for many steps, or follows without asking the device, is kept in Python.
    """

    def __init__(
        self,
        decoder: RolloutDecoder,
        links: Links,
        prompts: Prompts,
        waiting: Waiting,
        responses: Responses,
        rules: Rules,
        slots: int,
        watch: Watch | None = None,
    ) -> None:
        """`watch` is called three times a step: when it has begun, after the model, and when it is done."""
        self._watch: Watch = watch or _ignore
        self._decoder, self._links, self._rules = decoder, links, rules
        self._prompts, self._waiting, self._responses = prompts, waiting, responses
        self._slots = slots
        device = decoder.context.device
        self._cache: KVCache = decoder.new_cache(slots)
        self._graphs = DecodeGraphs(decoder, self._cache) if DecodeGraphs.suit(decoder) else None
        self._tokens_to_come: Callable[[], torch.Tensor] | None = None
        self._begun: _Step | None = None
        self.last_tokens = torch.empty(0, dtype=torch.int64, device=device)
        self._occupy(self.last_tokens, torch.empty(3, 0, dtype=torch.int64, device=device))

    @property
    def is_done(self) -> bool:
        return not self.rows.shape[0] and not len(self._waiting)

    def _occupy(self, rows: torch.Tensor, state: torch.Tensor) -> None:
        """Who is where from now on. `state` int64 [3, n]: positions, counts and places."""
        self.rows, self._state = rows, state
        self.positions, self.counts, self.places = state.unbind()
        if rows.shape[0]:
            lowest, highest = self.positions.aminmax()
            self._context, self._is_even = int(highest) + 1, bool(lowest == highest)
            self._steps_to_limit = int((self._rules.limits[rows] - self.counts).min())

    def begin(self) -> None:
        """Learns the tokens of the last step and lets waiting sequences in, unless that has been done."""
        if self._begun is not None:
            return
        self._settle()
        live = self.rows.shape[0]
        admission = self._waiting.take(self._slots - live) if self._admits(live) else None
        if not live and admission is None:
            return
        last_tokens, decode = self.last_tokens, self._decode_step()
        prefill = None if admission is None else self._enter(admission, live)
        num = 0 if prefill is None else prefill.packed.num_tokens
        num += 0 if decode is None else decode.positions.shape[0]
        inputs = None
        if num and not self._decoder.context.is_first:
            inputs = self._links.hidden_to_come(num)
        self._begun = _Step(live, admission, prefill, decode, last_tokens, inputs)

    def step(self) -> None:
        """Takes all live sequences one token further through this stage, as it was begun."""
        if self._begun is None:
            return
        step, self._begun = self._begun, None
        self._watch()
        hidden = self._forward(step)
        self._watch()
        if step.admission is not None:
            hidden = self._share_prompts(step.admission, step.live, step.prefill, hidden)
        if self._decoder.context.is_last:
            assert hidden is not None
            self._sample(hidden)
        else:
            # asked for at once: the last stage may be computing with another lane when it has them
            self._tokens_to_come = self._links.tokens_to_come(self.rows.shape[0])
        self._watch()

    def _admits(self, live: int) -> bool:
        """Whether waiting sequences enter now: several at a time, if there are so many and any are live."""
        enough = max(1, self._slots // ENTER_SHARE)
        return not live or self._slots - live >= min(enough, len(self._waiting))

    def _settle(self) -> None:
        """Learns the tokens of the last step from the last stage, if any are outstanding."""
        if self._tokens_to_come is not None:
            signed, self._tokens_to_come = self._tokens_to_come(), None
            stopped = signed < 0
            self._append(torch.where(stopped, -1 - signed, signed), stopped)

    def _decode_step(self) -> DecodeStep | None:
        if not self.positions.shape[0]:
            return None
        return DecodeStep(self._cache, self.positions, self._context, self._is_even)

    def _enter(self, admission: Admission, live: int) -> Prefill | None:
        """Takes slots for these sequences; returns the prompts that have to be computed."""
        lengths, device = self._prompts.lengths, self.rows.device
        rows = torch.tensor(admission.rows, dtype=torch.int64, device=device)
        starts = torch.tensor([lengths[row] - 1 for row in admission.rows], device=device)
        new = torch.stack([starts, torch.zeros_like(rows), rows * self._responses.longest])
        self._occupy(torch.cat([self.rows, rows]), torch.cat([self._state, new], dim=1))
        if not admission.prompts:
            return None
        packed = PackedSequences(tuple(lengths[row] for row in admission.prompts), device)
        slots = [live + admission.rows.index(row) for row in admission.prompts]
        return Prefill(packed, torch.tensor(slots, device=device))

    def _forward(self, step: _Step) -> torch.Tensor | None:
        """Hidden states of the prompts' tokens and of one token of each live sequence; None of none."""
        decoder, admission = self._decoder, step.admission
        if step.prefill is None and step.decode is None:
            return None
        if step.inputs is not None:
            inputs = step.inputs()
        elif admission is None or self._prompts.tokens is None:
            inputs = step.last_tokens
        else:
            tokens = self._prompts.tokens
            inputs = torch.cat([*(tokens[row] for row in admission.prompts), step.last_tokens])
        if step.prefill is None and step.decode is not None and self._graphs is not None:
            hidden = self._graphs.decode(inputs, step.decode)
        else:
            hidden = decoder.step(inputs, step.prefill, step.decode, self._cache)
        if not decoder.context.is_last:
            self._links.send_hidden(hidden)
        return hidden

    def _share_prompts(
        self, admission: Admission, live: int, prefill: Prefill | None, hidden: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Gives each new sequence its prompt's cache; returns a hidden row for each live one (last stage).

        Keeps the last prompt when sequences that wait will need it.
        """
        cache, waiting, lengths = self._cache, self._waiting, self._prompts.lengths
        device, saved = self.rows.device, waiting.saved
        for source in dict.fromkeys(admission.sources):
            slots = [live + i for i, s in enumerate(admission.sources) if s == source]
            if source < 0:
                assert saved is not None
                cache.put(torch.tensor(slots, device=device), saved.keys, saved.values)
            elif len(slots) > 1:
                length = lengths[admission.prompts[source]]
                leader, others = torch.tensor(slots, device=device).split([1, len(slots) - 1])
                cache.move(leader, others, length)
        rows = None
        if self._decoder.context.is_last:
            rows = _rows_to_sample(admission, prefill, hidden, saved)
        if not admission.keeps:
            waiting.saved = None
        elif admission.sources[-1] >= 0:
            slot = torch.tensor([self.rows.shape[0] - 1], device=device)
            taken = cache.take(slot, lengths[admission.rows[-1]])
            waiting.saved = SavedPrompt(*taken, None if rows is None else rows[-1:])
        return rows

    def _sample(self, hidden: torch.Tensor) -> None:
        decoder, rules = self._decoder, self._rules
        draw = None if self._prompts.draws is None else self._prompts.draws.index_select(0, self.places)
        start, group = decoder.vocab_start, decoder.context.tp_group
        banned = self.counts < rules.min_new_tokens if rules.min_new_tokens else None

        def restrict(logits: torch.Tensor) -> torch.Tensor | None:
            return rules.filter.apply(logits, banned, start, group)

        tokens, logprobs = choose(
            decoder.local_logits(hidden), draw, rules.temperature, start, group, restrict
        )
        self._responses.logprobs.index_put_((self.places,), logprobs)
        stopped = self._stopped(tokens)
        self._links.send_tokens(tokens if stopped is None else torch.where(stopped, -1 - tokens, tokens))
        self._append(tokens, stopped)

    def _stopped(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Which sequences a stop string ends: the same on all shards, since it follows from the tokens."""
        rules = self._rules
        if rules.stops is None:
            return None
        new = zip(self.rows.tolist(), self.counts.tolist(), tokens.tolist(), strict=True)
        flags = [
            rules.stops.stops(row, token, may_stop=count + 1 >= rules.min_new_tokens)
            for row, count, token in new
        ]
        return torch.tensor(flags, device=tokens.device)

    def _append(self, tokens: torch.Tensor, stopped: torch.Tensor | None) -> None:
        """Records one token per live sequence and lets finished sequences go."""
        self._responses.tokens.index_put_((self.places,), tokens)
        self.last_tokens = tokens
        self._state.add_(1)
        self._context += 1
        self._steps_to_limit -= 1
        ended = self._ended(tokens, stopped)
        if ended is not None and (not self._steps_to_limit or bool(ended.any())):
            self._leave(ended)

    def _ended(self, tokens: torch.Tensor, stopped: torch.Tensor | None) -> torch.Tensor | None:
        """Which sequences end with these tokens; None if none can."""
        rules, ended = self._rules, stopped
        if rules.eos_ids.numel():
            # an end that came too early was banned, unless nothing else could be drawn
            one = rules.eos_ids.numel() == 1
            ends = tokens == rules.eos_ids if one else torch.isin(tokens, rules.eos_ids)
            ended = ends if ended is None else ended | ends
        if not self._steps_to_limit:
            full = self.counts >= rules.limits[self.rows]
            ended = full if ended is None else ended | full
        return ended

    def _leave(self, ended: torch.Tensor) -> None:
        """Moves the last live slots into the slots that fell free among the first."""
        self._responses.lengths[self.rows[ended]] = self.counts[ended]
        if self._rules.stops is not None:
            for row in self.rows[ended].tolist():
                self._rules.stops.forget(row)
        alive = ~ended
        num = int(alive.sum())
        free = (~alive[:num]).nonzero()[:, 0]
        movers = alive[num:].nonzero()[:, 0] + num
        if movers.numel():
            self._cache.move(movers, free, int(self.positions[movers].max()))
        order = torch.arange(num, device=alive.device)
        order[free] = movers
        self.last_tokens = self.last_tokens[order]
        self._occupy(self.rows[order], self._state[:, order])


def _ignore() -> None:
    pass


def _rows_to_sample(
    admission: Admission, prefill: Prefill | None, hidden: torch.Tensor | None, saved: SavedPrompt | None
) -> torch.Tensor:
    """The hidden rows of the sequences under way, then each new one's: its prompt's last row."""
    ends = [] if saved is None or saved.hidden is None else [saved.hidden]
    first, num = len(ends), 0
    if prefill is not None:
        assert hidden is not None
        ends.append(hidden[prefill.packed.last_index])
        num = prefill.packed.num_tokens
    starts = torch.cat(ends)[[source + first for source in admission.sources]]
    return starts if hidden is None else torch.cat([hidden[num:], starts])
