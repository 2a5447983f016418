"""Generation with filters, stop strings and shared prompts over shards and stages, against one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import toy
from realloc.sampling import Sampling
from realloc.strategy import Strategy
from runtime.batching import assign
from runtime.decoder import Decoder
from runtime.generation import generate
from runtime.parallel import single_rank
from runtime.tokenizer import read_tokenizer
from tests.ranks.engine import assert_same, make_plan, ppo_content, run, write_models
from tests.ranks.launch import run_ranks
from tests.ranks.test_decoder_ranks import make_context, make_decoder
from tests.tiny import write_tiny_llama

SAMPLES = 3
LENGTHS = tuple(n for n in (7, 3, 12, 5) for _ in range(SAMPLES))


def sample(decoder: Decoder, folder: Path, sampling: Sampling) -> Any:
    """This replica's positions, response lengths, tokens, log-probabilities."""
    context = decoder.context
    share = assign(LENGTHS, 1, context.strategy.dp, SAMPLES).of(context.at.dp)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, decoder.shape.vocab, (n,), generator=generator) for n in LENGTHS[::SAMPLES]]
    result = generate(
        decoder,
        prompts=torch.cat([prompts[p // SAMPLES] for p in share]) if context.is_first else None,
        prompt_lengths=[LENGTHS[p] for p in share],
        sequence_ids=share,
        max_new_tokens=24,
        eos_ids=(5, 9, 11, 13, 17, 19),
        sampling=sampling,
        seed=0,
        iteration=0,
        micro_batches=context.strategy.micro_batches,
        prompt_keys=[p // SAMPLES for p in share],
        tokenizer=read_tokenizer(folder),
    )
    tokens = None if result.tokens is None else result.tokens.tolist()
    logprobs = None if result.logprobs is None else result.logprobs.tolist()
    return share, result.response_lengths, tokens, logprobs


def _rank(rank: int, world_size: int, folder: Path, strategy: Strategy, sampling: Sampling) -> Any:
    return sample(make_decoder(folder, make_context(rank, world_size, strategy)), folder, sampling)


@pytest.mark.parametrize(
    ("strategy", "sampling"),
    [
        (Strategy(tp=4), Sampling(0.9, top_k=3, top_p=0.95, min_new_tokens=4)),
        (Strategy(tp=2, pp=2, micro_batches=4), Sampling(top_k=20, top_p=0.9, stop=("the", "a"))),
        (Strategy(pp=3, micro_batches=5), Sampling(min_new_tokens=2, stop=("o",))),
        (Strategy(dp=2, tp=2, micro_batches=2), Sampling(0.0, min_new_tokens=3)),
    ],
    ids=str,
)
def test_equals_one_rank(strategy: Strategy, sampling: Sampling, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path, vocab=len(toy.vocabulary()), layers=3)
    toy.write_tokenizer(folder)
    _, lengths, tokens, logprobs = sample(make_decoder(folder, single_rank()), folder, sampling)
    assert len(set(lengths)) > 1 or sampling.temperature == 0.0
    ranks = run_ranks(_rank, strategy.size, folder, strategy, sampling)
    ends = np.cumsum([p + r for p, r in zip(LENGTHS, lengths, strict=True)])[:-1]
    whole = [part.tolist() for part in np.split(np.array(tokens), ends)]
    scores = np.split(np.array(logprobs), np.cumsum(lengths)[:-1])
    for rank, (share, got_lengths, got_tokens, got_logprobs) in enumerate(ranks):
        # with as many prompts as there are, the samples of each stay together
        assert all(p // SAMPLES * SAMPLES + i in share for p in share for i in range(SAMPLES))
        assert list(got_lengths) == [lengths[p] for p in share]
        stage = strategy.coordinates(rank).pp
        if stage in (0, strategy.pp - 1):
            assert got_tokens == [t for p in share for t in whole[p]]
        if stage == strategy.pp - 1:
            expected = np.concatenate([scores[p] for p in share])
            np.testing.assert_allclose(got_logprobs, expected, rtol=0, atol=1e-4)


def test_ppo_with_samples_and_stop_strings_does_not_depend_on_the_plan(tmp_path: Path) -> None:
    models = write_models(tmp_path, hidden=32, layers=2, heads=4, kv_heads=2, ffn=48)
    workload = {
        "sequences": 12,
        "samples_per_prompt": SAMPLES,
        "prompt_tokens": {"mean": 10, "max": 16},
        "response_tokens": {"mean": 8, "max": 12},
    }
    sampling = {"top_p": 0.95, "min_new_tokens": 2, "stop": ["the", "o"]}
    content = ppo_content(tmp_path, models, workload=workload, sampling=sampling, iterations=2)
    alone = run(make_plan(tmp_path, content, 1, {"*": ("node0", "d1t1p1")}), tmp_path / "alone")
    tokens = alone.tokens[0]
    prefixes = [{tokens[3 * i + j][:3] for j in range(SAMPLES)} for i in range(4)]
    assert all(len(prefix) == 1 for prefix in prefixes)
    assert len(set(tokens.values())) > 4
    assert len({len(sequence) for sequence in tokens.values()}) > 4
    placements = {"*": ("node0", "d2t1p1m2"), "actor_gen": ("node0", "d1t1p2m3")}
    assert_same(run(make_plan(tmp_path, content, 2, placements), tmp_path / "two"), alone)
