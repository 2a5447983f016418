"""Shares: samples of a prompt stay together where that costs no balance."""

from __future__ import annotations

import pytest

from runtime.batching import assign, balanced_split, micro_batches, num_passes, split_together


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_samples_of_a_prompt_stay_on_one_rank(parts: int) -> None:
    lengths = [n for n in (10, 10, 11, 10, 10, 11, 10, 10) for _ in range(4)]
    split = split_together(lengths, parts, 4)
    assert sorted(i for group in split for i in group) == list(range(32))
    for group in split:
        assert all(i // 4 * 4 + j in group for i in group for j in range(4))


@pytest.mark.parametrize(
    ("lengths", "parts", "together"),
    [
        ([10] * 8, 4, 8),  # one prompt on four ranks
        ([10] * 12, 2, 4),  # three prompts on two
        ([90] * 2 + [10] * 2, 2, 2),  # one prompt far longer
        ([10] * 7, 2, 2),  # a mini-batch that cuts a prompt's samples
    ],
)
def test_balance_comes_first(lengths: list[int], parts: int, together: int) -> None:
    assert split_together(lengths, parts, together) == balanced_split(lengths, parts)


def test_other_calls_split_freely() -> None:
    lengths = [5, 9, 5, 9, 7, 7, 3, 3]
    assert assign(lengths, 2, 2) == assign(lengths, 2, 2, 1)
    assert assign([4] * 8, 1, 2, 4).shares == (((0, 1, 2, 3), (4, 5, 6, 7)),)


@pytest.mark.parametrize(("mini_batches", "dp", "count"), [(1, 1, 1), (1, 3, 2), (3, 2, 5), (2, 4, 1)])
def test_pairs_are_never_parted(mini_batches: int, dp: int, count: int) -> None:
    lengths = [9, 1, 5, 5, 30, 2, 7, 7, 1, 1, 4, 8, 6, 3]
    assignment = assign(lengths, mini_batches, dp, 2, always=True)
    assert sorted(p for dp_rank in range(dp) for p in assignment.of(dp_rank)) == list(range(len(lengths)))
    for shares in assignment.shares:
        for share in shares:
            groups = micro_batches(share, lengths, count, 2)
            assert len(groups) == min(count, len(share) // 2) <= num_passes(shares, count, 2)
            for group in groups:
                assert all(b == a + 1 and a % 2 == 0 for a, b in zip(group[::2], group[1::2], strict=True))
