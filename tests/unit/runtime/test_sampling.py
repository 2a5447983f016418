"""Random numbers by counter, and inverse-CDF sampling."""

from __future__ import annotations

import pytest
import torch

from runtime.sampling import BLOCK, choose, uniforms


def _splitmix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def test_uniforms_equal_integer_arithmetic() -> None:
    ids, positions = [0, 5, 10**12, 2**62], [0, 77, 3, 2**40]
    got = uniforms(9, 4, torch.tensor(ids), torch.tensor(positions)).tolist()
    for value, sequence, position in zip(got, ids, positions, strict=True):
        state = _splitmix(_splitmix(_splitmix(_splitmix(9) + 4) + sequence) + position)
        assert value == (state >> 11) / 2**53


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    grid = uniforms(0, 0, torch.arange(400).repeat_interleave(400), torch.arange(400).repeat(400)).view(
        400, 400
    )
    assert grid.unique().numel() == grid.numel()
    assert abs(grid.mean() - 0.5) < 0.003
    assert abs(grid.var() - 1 / 12) < 0.002
    for other in (grid.roll(1, 0), grid.roll(1, 1), grid.T, grid.roll((1, -1), (0, 1))):
        assert abs(torch.corrcoef(torch.stack([grid.flatten(), other.flatten()]))[0, 1]) < 0.01


def test_the_first_test_vector_of_splitmix64() -> None:
    """Seed 0 gives 0xE220A8397B1DCDAF first (reference implementation by S. Vigna)."""
    from runtime.sampling import _mix_int

    assert _mix_int(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("vocab", [3, 128, 300])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_frequencies_follow_the_distribution(vocab: int, temperature: float) -> None:
    row = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    draws = 40_000
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens, logprobs = choose(row.repeat(draws, 1), uniform, temperature, 0, None)
    probs = (row / temperature).softmax(0)
    # a regular grid of numbers must give each token its share to within one draw
    counts = torch.bincount(tokens, minlength=vocab)
    assert (counts - draws * probs).abs().max() <= 1.01
    torch.testing.assert_close(logprobs, (row / temperature).log_softmax(0)[tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_impossible_tokens_are_never_chosen(uniform: float) -> None:
    row = torch.full((200,), float("-inf"))
    row[150:153] = 0.0
    token, logprob = choose(row[None].clone(), torch.tensor([uniform], dtype=torch.float64), 1.0, 0, None)
    assert token.item() == (150 if uniform == 0.0 else 152)
    assert abs(logprob.item() + torch.log(torch.tensor(3.0)).item()) < 1e-6


def test_greedy_reports_logprobs_at_temperature_one() -> None:
    row = torch.tensor([[0.0, 3.0, 1.0]])
    token, logprob = choose(row.clone(), None, 0.0, 0, None)
    assert token.item() == 1
    torch.testing.assert_close(logprob, row.log_softmax(1)[:, 1])


def test_rounding_between_a_block_and_its_tokens_reaches_no_impossible_token() -> None:
    """An aim at the very start of a block, whose float32 sum exceeds that of its tokens in float64."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 2 * BLOCK, generator=generator)
    rows[:, BLOCK] = float("-inf")
    weights = (rows - rows.amax(1, keepdim=True)).exp().view(-1, 2, BLOCK)
    ends = weights.sum(-1).cumsum(-1, dtype=torch.float64)
    assert (weights[:, 1].sum(-1) > weights[:, 1].sum(-1, dtype=torch.float64)).any()
    # the smallest number whose aim is past the first block
    uniform = (ends[:, 0] / ends[:, 1]).nextafter(torch.ones(2000, dtype=torch.float64))
    tokens, _ = choose(rows.clone(), uniform, 1.0, 0, None)
    assert (rows.gather(1, tokens[:, None]) > float("-inf")).all()
    assert (tokens > BLOCK).any()
