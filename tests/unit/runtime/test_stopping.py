"""Stop strings: incremental matching equals searching the decoded text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from experiments import toy
from realloc.sampling import Sampling
from runtime.stopping import StopStrings
from runtime.tokenizer import TextTokenizer, read_tokenizer
from tests.unit.runtime.test_decoder import decoder_of
from tests.unit.runtime.test_generation import responses, run


@pytest.fixture
def toy_tokenizer(tmp_path: Path) -> TextTokenizer:
    toy.write_tokenizer(tmp_path)
    return read_tokenizer(tmp_path)


def byte_tokenizer() -> TextTokenizer:
    """A byte-level tokenizer whose tokens cut characters in pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return TextTokenizer(backend, (), None)


def first_stop(tokenizer: TextTokenizer, tokens: list[int], strings: list[str]) -> int | None:
    """Tokens after which the decoded text first contains a string, by decoding it again and again."""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count])
        if any(string in text for string in strings):
            return count
    return None


def incremental(tokenizer: TextTokenizer, tokens: list[int], strings: list[str]) -> int | None:
    stops = StopStrings(tokenizer, strings)
    for count, token in enumerate(tokens, 1):
        if stops.stops(0, token):
            return count
    return None


def test_words(toy_tokenizer: TextTokenizer) -> None:
    rng = random.Random(0)
    vocab = toy_tokenizer.backend.get_vocab_size()
    found = 0
    for _ in range(300):
        tokens = [rng.randrange(3, vocab) for _ in range(rng.randrange(1, 25))]
        text = toy_tokenizer.decode(tokens)
        start = rng.randrange(len(text))
        strings = [text[start : start + rng.randrange(1, 12)], "zzz"]
        expected = first_stop(toy_tokenizer, tokens, strings)
        found += expected is not None
        assert incremental(toy_tokenizer, tokens, strings) == expected, (text, strings)
    assert found > 250


def test_characters_in_pieces() -> None:
    tokenizer = byte_tokenizer()
    tokens = next(iter(tokenizer.encode(["naïve → 日本語 done"], special_tokens=False)))
    for strings in (["ï"], ["日"], ["本語 d"], ["→"], ["done"], ["nothing"], ["e", "日"]):
        assert incremental(tokenizer, tokens, strings) == first_stop(tokenizer, tokens, strings)


def test_what_came_too_early_does_not_count_later(toy_tokenizer: TextTokenizer) -> None:
    tokens = [10, 11, 12, 13]
    word = toy_tokenizer.decode([tokens[1]])
    stops = StopStrings(toy_tokenizer, [word, "a much longer string that never comes"])
    assert [stops.stops(0, token, may_stop=i > 1) for i, token in enumerate(tokens)] == [False] * len(tokens)
    stops.forget(0)
    assert stops.stops(0, tokens[1])


def test_generation_ends_at_a_stop_string(tmp_path: Path) -> None:
    from tests.tiny import write_tiny_llama

    folder = write_tiny_llama(tmp_path, vocab=len(toy.vocabulary()))
    toy.write_tokenizer(folder)
    decoder, tokenizer = decoder_of(folder), read_tokenizer(folder)
    prompts, lengths = torch.arange(3, 11), (2,) * 4
    free = responses(run(decoder, prompts, lengths, max_new_tokens=30), lengths)
    strings = [tokenizer.decode(free[0][7:9]), tokenizer.decode(free[2][4:5])]
    expected = [tokens[: first_stop(tokenizer, tokens, strings)] for tokens in free]
    assert len({len(tokens) for tokens in expected}) > 2
    sampling = Sampling(stop=tuple(strings))
    for micro_batches in (1, 2):
        result = run(
            decoder,
            prompts,
            lengths,
            max_new_tokens=30,
            sampling=sampling,
            tokenizer=tokenizer,
            micro_batches=micro_batches,
        )
        assert responses(result, lengths) == expected
