"""Generation on one rank: `transformers` for greedy decoding, our own forward for log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from realloc.experiment import Sampling
from runtime.attention import pack
from runtime.decoder import Decoder
from runtime.generation import Generated, generate
from tests.hf_models import CONFIGS, load_oracle, write_model
from tests.unit.runtime.test_decoder import decoder_of, random_tokens

torch.set_num_threads(1)
LENGTHS = (7, 3, 12, 5, 1, 12)


def run(decoder: Decoder, prompts: torch.Tensor, lengths: tuple[int, ...], **changes: Any) -> Generated:
    settings: dict[str, Any] = {
        "sequence_ids": list(range(100, 100 + len(lengths))),
        "max_new_tokens": 20,
        "eos_ids": (),
        "sampling": Sampling(),
        "seed": 3,
        "iteration": 1,
    }
    return generate(decoder, prompts=prompts, prompt_lengths=lengths, **(settings | changes))


def responses(result: Generated, prompt_lengths: tuple[int, ...]) -> list[list[int]]:
    assert result.tokens is not None
    totals = [p + r for p, r in zip(prompt_lengths, result.response_lengths, strict=True)]
    parts = result.tokens.split(totals)
    return [part[p:].tolist() for part, p in zip(parts, prompt_lengths, strict=True)]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_transformers(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, name)
    decoder, oracle = decoder_of(folder), load_oracle(folder)
    prompts = random_tokens(decoder.shape, LENGTHS)
    expected = []
    for prompt in prompts.split(LENGTHS):
        with torch.no_grad():
            out = oracle.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        expected.append(out[0, len(prompt) :].tolist())
    # a token that appears midway in some responses serves as the end
    eos = expected[0][9]
    cut = [r[: r.index(eos) + 1] if eos in r else r for r in expected]
    result = run(decoder, prompts, LENGTHS, eos_ids={eos}, sampling=Sampling(temperature=0.0))
    assert responses(result, LENGTHS) == cut
    assert result.response_lengths == tuple(map(len, cut))
    free = run(decoder, prompts, LENGTHS, eos_ids={eos}, sampling=Sampling(temperature=0.0, ignore_eos=True))
    assert responses(free, LENGTHS) == expected


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_logprobs_equal_teacher_forced(temperature: float, tmp_path: Path) -> None:
    decoder = decoder_of(write_model(tmp_path, "qwen2"))
    prompts = random_tokens(decoder.shape, LENGTHS)
    result = run(decoder, prompts, LENGTHS, eos_ids={5, 9}, sampling=Sampling(temperature))
    assert len(set(result.response_lengths)) > 1 or temperature == 0.0
    assert result.tokens is not None
    totals = [p + r for p, r in zip(LENGTHS, result.response_lengths, strict=True)]
    with torch.no_grad():
        hidden = decoder.forward(result.tokens, pack(totals))
        every = decoder.logprobs(hidden, result.tokens.roll(-1), temperature or 1.0)
    expected = [part[p - 1 : -1] for part, p in zip(every.split(totals), LENGTHS, strict=True)]
    torch.testing.assert_close(result.logprobs, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_samples_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """Not on micro-batches, order or company; but on seed, iteration and id."""
    decoder = decoder_of(write_model(tmp_path, "llama"))
    prompts = random_tokens(decoder.shape, LENGTHS)
    whole = responses(run(decoder, prompts, LENGTHS, eos_ids={5, 9, 11}), LENGTHS)
    assert len({len(r) for r in whole}) > 2
    grouped = run(decoder, prompts, LENGTHS, eos_ids={5, 9, 11}, micro_batches=4)
    assert responses(grouped, LENGTHS) == whole
    parts = prompts.split(LENGTHS)
    order = [4, 0, 2]
    some = run(
        decoder,
        torch.cat([parts[i] for i in order]),
        tuple(LENGTHS[i] for i in order),
        eos_ids={5, 9, 11},
        sequence_ids=[100 + i for i in order],
    )
    assert responses(some, tuple(LENGTHS[i] for i in order)) == [whole[i] for i in order]
    for change in ({"seed": 4}, {"iteration": 2}, {"sequence_ids": list(range(6))}):
        other = run(decoder, prompts, LENGTHS, eos_ids={5, 9, 11}, **change)
        assert all(a != b for a, b in zip(responses(other, LENGTHS), whole, strict=True))


def test_updated_weights_are_used_at_once(tmp_path: Path) -> None:
    decoder = decoder_of(write_model(tmp_path / "a", "llama"))
    prompts = random_tokens(decoder.shape, LENGTHS)
    before = responses(run(decoder, prompts, LENGTHS), LENGTHS)
    other = decoder_of(write_model(tmp_path / "b", "llama", seed=1))
    for name, param in decoder.params.items():
        param.copy_(other.params[name])
    after = responses(run(decoder, prompts, LENGTHS), LENGTHS)
    assert after != before
    assert after == responses(run(other, prompts, LENGTHS), LENGTHS)


def test_edges(tmp_path: Path) -> None:
    decoder = decoder_of(write_model(tmp_path, "llama"))
    nothing = run(decoder, torch.empty(0, dtype=torch.int64), ())
    assert nothing.response_lengths == ()
    assert nothing.tokens is not None
    assert nothing.tokens.numel() == 0
    one = run(decoder, random_tokens(decoder.shape, (4,)), (4,), max_new_tokens=1)
    assert one.response_lengths == (1,)
    assert one.logprobs is not None
    assert one.logprobs.shape == (1,)
