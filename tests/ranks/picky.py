"""A reward that has no number for some responses: which ones follows from their text alone."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.rewards import sentiment
from realloc.functions import Sample


def score(samples: Sequence[Sample]) -> list[float]:
    """`sentiment`; raises for responses whose number of letters divides by 3, nan for those by 5."""
    values = list(sentiment(samples))
    for i, sample in enumerate(samples):
        letters = sum(map(str.isalpha, sample.response))
        if letters % 3 == 0:
            raise ValueError(f"{letters} letters")
        if letters % 5 == 0:
            values[i] = float("nan")
    return values


def none(samples: Sequence[Sample]) -> list[float]:
    return [float("nan") for _ in samples]
