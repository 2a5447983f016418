"""Generation: prompts in, sampled responses out, on one data replica's ranks.

Decides how many sequences are under way at a time and in which order the stages meet them. What
happens in a step is the lanes' affair (`runtime.lane`); the model is known through `Decoder` only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from realloc.sampling import Sampling
from runtime.decoder import Decoder
from runtime.filtering import Filter
from runtime.lane import Lane, Prompts, Rules, Watch
from runtime.rollout_decoder import RolloutDecoder
from runtime.sampling import uniforms
from runtime.stage_links import Links
from runtime.stopping import StopStrings
from runtime.tokenizer import TextTokenizer
from runtime.waiting import Responses, Waiting


@dataclass(frozen=True)
class Generated:
    """Finished sequences in the order of the prompts.

    `response_lengths` counts generated tokens, an end-of-sequence token included. `tokens` are
    prompt + response, packed (first and last stage only). `logprobs` float32, packed, one per
    response token, of the whole distribution at the sampling temperature (see `sampling.choose`;
    last stage only).
    """

    response_lengths: tuple[int, ...]
    tokens: torch.Tensor | None
    logprobs: torch.Tensor | None


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
    prompt_keys: Sequence[int] | None = None,
    limits: Sequence[int] | None = None,
    tokenizer: TextTokenizer | None = None,
    watch: Watch | None = None,
) -> Generated:
    """Continues the prompts of this data replica. Every rank of the replica calls it alike.

    `prompts` int64, packed, is needed on the first stage only. Neighbours with equal `prompt_keys`
    have the same prompt, which is computed once. Sequences end after an id of `eos_ids` (unless
    `sampling.ignore_eos`), a stop string (which needs the `tokenizer`) or `max_new_tokens`;
    `limits` gives each sequence a lower limit of its own.

    `micro_batches` m bounds the cache: as many lanes as there are stages (at most m), each with
    slots for one m-th of the sequences. A waiting sequence takes the first slot that falls free.
    Which one, and with whom, does not change what is sampled. `watch`: see `Lane`.
    """
    num, context = len(prompt_lengths), decoder.context
    assert max_new_tokens >= 1, max_new_tokens
    assert min(prompt_lengths, default=1) >= 1, "a prompt is empty"
    links = Links(decoder)
    prompts = links.share_prompts(prompts, sum(prompt_lengths))
    parts = None if prompts is None else prompts.split(list(prompt_lengths))
    responses = Responses(num, max_new_tokens, context.device)
    if num:
        rules = _rules(sampling, limits or [max_new_tokens] * num, eos_ids, tokenizer, context.device)
        draws = None
        if context.is_last and sampling.temperature != 0.0:
            draws = _draws(sequence_ids, prompt_lengths, max_new_tokens, seed, iteration, context.device)
        waiting = Waiting(range(num) if prompt_keys is None else prompt_keys)
        kept = Prompts(tuple(prompt_lengths), parts, draws)
        with torch.inference_mode(), _flushed_denormals():
            _respond(decoder, links, kept, waiting, responses, rules, min(micro_batches, num), watch)
    links.finish()
    tokens = None if parts is None else responses.with_prompts(parts)
    logprobs = responses.packed_logprobs() if context.is_last else None
    return Generated(tuple(responses.lengths.tolist()), tokens, logprobs)


def _respond(
    decoder: Decoder,
    links: Links,
    prompts: Prompts,
    waiting: Waiting,
    responses: Responses,
    rules: Rules,
    groups: int,
    watch: Watch | None,
) -> None:
    """Fills in the responses, one part of `groups` of the sequences in each lane at a time."""
    num = len(prompts.lengths)
    slots = -(-num // groups)
    # the last sampled token is never an input, so it needs no place in the cache
    longest = max(prompts.lengths) + int(rules.limits.max()) - 1
    ready = RolloutDecoder(decoder, steps=responses.longest * (num // slots), longest=longest)
    lanes = [
        Lane(ready, links, prompts, waiting, responses, rules, slots, watch)
        for _ in range(min(decoder.context.strategy.pp, groups))
    ]
    _run(lanes, is_last=decoder.context.is_last)


@contextmanager
def _flushed_denormals() -> Iterator[None]:
    """Numbers below 1e-38 are 0 meanwhile: a softmax makes many, and they slow CPUs down several times."""
    before = not torch.full((1,), 1e-40).mul_(1.0).any()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _run(lanes: Sequence[Lane], *, is_last: bool) -> None:
    """Steps the lanes in turn until all are empty. All stages meet them in the same order.

    The last stage, which knows all tokens, begins with the next lane before it computes, so that what it
    needs for it can come meanwhile.
    """
    live = list(lanes)
    while live:
        for lane, following in zip(live, [*live[1:], live[0]], strict=True):
            lane.begin()
            if following is not lane and is_last:
                following.begin()
            lane.step()
        live = [lane for lane in live if not lane.is_done]


def _rules(
    sampling: Sampling,
    limits: Sequence[int],
    eos_ids: Collection[int],
    tokenizer: TextTokenizer | None,
    device: torch.device,
) -> Rules:
    def ids(values: Collection[int]) -> torch.Tensor:
        return torch.tensor(sorted(values), dtype=torch.int64, device=device)

    ends = ids(() if sampling.ignore_eos else eos_ids)
    stops = None
    if sampling.stop:
        assert tokenizer is not None, "stop strings need a tokenizer"
        stops = StopStrings(tokenizer, sampling.stop)
    return Rules(
        limits=torch.tensor(list(limits), dtype=torch.int64, device=device),
        eos_ids=ends,
        min_new_tokens=sampling.min_new_tokens,
        stops=stops,
        temperature=sampling.temperature,
        filter=Filter(sampling.top_k, sampling.top_p, ends),
    )


def _draws(
    sequence_ids: Sequence[int],
    prompt_lengths: Sequence[int],
    longest: int,
    seed: int,
    iteration: int,
    device: torch.device,
) -> torch.Tensor:
    """The random number of each token: float64 [sequences * longest], by id and place in the sequence."""
    ids = torch.tensor(list(sequence_ids), dtype=torch.int64, device=device)
    starts = torch.tensor(list(prompt_lengths), dtype=torch.int64, device=device)
    positions = starts[:, None] + torch.arange(longest, device=device)
    return uniforms(seed, iteration, ids[:, None].expand_as(positions).reshape(-1), positions.reshape(-1))
