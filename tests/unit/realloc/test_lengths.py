"""Lengths: the forms in files, and the numbers of a law against sequences drawn from it."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from realloc.errors import InputError
from realloc.experiment import Workload
from realloc.files import Reader
from realloc.lengths import (
    BINS,
    MOST_RAGGED,
    Lengths,
    lengths_content,
    lengths_of,
    parse_lengths,
    raggedness,
)


def parse(value: object) -> Lengths:
    return parse_lengths(Reader({"tokens": value}, "test"), "tokens")


def test_short_forms_stay():
    assert parse(64) == Lengths(64.0, 64)
    assert parse({"max": 64}) == Lengths(64.0, 64)
    assert parse({"mean": 20, "max": 64}) == Lengths(20.0, 64)
    assert parse(64).is_fixed
    assert not parse({"mean": 20, "max": 64}).is_fixed


@pytest.mark.parametrize("mean", [2.0, 20.0, 63.0, 63.99])
def test_mean_and_maximum_are_those_of_the_law_that_is_assumed(mean: float):
    lengths = Lengths(mean, 64)
    steps = [i / 100 for i in range(6400)]
    alive = [lengths.alive(t) for t in steps]
    assert all(a >= b for a, b in pairwise(alive))
    assert sum(alive) / 100 == pytest.approx(mean, rel=0.01)
    # E[L^2] is the integral of 2 t P(L > t)
    square = sum(2 * t * share for t, share in zip(steps, alive, strict=True)) / 100
    assert lengths.mean_square == pytest.approx(square, rel=0.01)


def test_how_ragged_lengths_are():
    assert parse(64).raggedness == 0.0
    # lengths from 80 to 120, evenly: a fifth of their mean
    evenly = parse({"histogram": [[tokens, 1] for tokens in range(80, 121)], "max": 120})
    assert evenly.raggedness == pytest.approx(0.2, abs=0.01)
    assert parse({"mean": 20, "max": 64}).raggedness == MOST_RAGGED
    # prompts and responses of equal lengths; and such that differ by as much as rounding
    assert Workload(4, parse(100), parse(11)).sequence_raggedness == 0.0
    assert raggedness(0.1, 0.1**2 * (1 + 1e-15)) == 0.0
    # responses of equal length make sequences less ragged
    assert Workload(4, evenly, parse(100)).sequence_raggedness == pytest.approx(0.1, abs=0.005)


def test_a_histogram_speaks_for_itself():
    lengths = parse({"histogram": [[10, 3], [30, 1]], "max": 40})
    assert lengths.mean == 15.0
    assert lengths.maximum == 40
    assert lengths.mean_square == pytest.approx((3 * 100 + 900) / 4)
    assert [lengths.alive(t) for t in (0, 9, 10, 29, 30, 40)] == pytest.approx([1, 1, 0.25, 0.25, 0, 0])


def test_percentiles_are_points_of_the_distribution():
    lengths = parse({"percentiles": {50: 20, 90: 60, 100: 100}})
    assert lengths.maximum == 100
    assert lengths.alive(20) == pytest.approx(0.5)
    assert lengths.alive(60) == pytest.approx(0.1)
    assert 20 < lengths.mean < 40


@pytest.mark.parametrize(
    "value",
    [64, {"mean": 20.5, "max": 64}, {"histogram": [[1, 1], [3, 1], [7, 5]]}, {"percentiles": {100: 9}}],
)
def test_content_reads_back_to_an_equal_value(value: object):
    lengths = parse(value)
    assert parse(lengths_content(lengths)) == lengths


def test_counted_lengths_keep_mean_and_spread_in_few_bins():
    draw = random.Random(3)
    drawn = [min(500, 1 + int(draw.expovariate(1 / 120))) for _ in range(5000)]
    lengths = lengths_of({n: drawn.count(n) for n in set(drawn)})
    assert len(lengths.histogram) <= BINS + 1
    assert lengths.maximum == max(drawn)
    assert lengths.mean == pytest.approx(sum(drawn) / len(drawn))
    assert lengths.mean_square == pytest.approx(sum(n * n for n in drawn) / len(drawn), rel=0.01)
    for tokens in (50, 120, 300):
        assert lengths.alive(tokens) == pytest.approx(sum(n > tokens for n in drawn) / len(drawn), abs=0.02)
    assert lengths_of({7: 4}) == Lengths(7.0, 7)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"mean": 70, "max": 64}, "70"),
        ({"histogram": []}, "at least one pair"),
        ({"histogram": [[5, 1], [5, 2]]}, "must come before"),
        ({"histogram": [[5, 0]]}, "above 0"),
        ({"histogram": [[5, 1]], "percentiles": {100: 5}}, "give one"),
        ({"histogram": [[5, 1], [9, 1]], "max": 8}, "8"),
        ({"histogram": [[5, 1], [9, 1]], "mean": 3}, "leave it out"),
        ({"percentiles": {50: 10}}, "100 is missing"),
        ({"percentiles": {50: 10, 100: 4}}, "up to 4 tokens"),
        ({"percentiles": {"half": 10, 100: 40}}, "percent: tokens"),
        ({"max": 64, "median": 3}, "median"),
    ],
)
def test_what_contradicts_itself_is_refused(value: object, message: str):
    with pytest.raises(InputError, match=message):
        parse(value)
