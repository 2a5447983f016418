"""How long sequences are: fixed, a mean and a maximum, or a distribution.

Decides what is assumed where only a mean and a maximum are known: that a sequence ends with the same
chance at every token, until the maximum cuts it (an exponential law, truncated). Where the
distribution is given or was measured, its own numbers hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import exp, expm1, isfinite, sqrt
from typing import Any

from realloc.errors import InputError
from realloc.files import Reader
from realloc.trace import Counts, Trace

MOST = 100_000_000
BINS = 64
"""A measured distribution is kept in so many bins."""

MOST_RAGGED = 0.5
_EQUAL = 1e-9
"""What rounding makes of equal lengths."""

Histogram = tuple[tuple[int, float], ...]
"""(tokens, share of the sequences), lengths rising, shares adding up to 1."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of prompts or responses in tokens; `mean == maximum` when all are equal.

    `histogram` is empty where only mean and maximum are known.
    """

    mean: float
    maximum: int
    histogram: Histogram = ()

    @property
    def is_fixed(self) -> bool:
        return self.mean == self.maximum

    @property
    def raggedness(self) -> float:
        """How ragged a pack of such sequences is (see `raggedness`)."""
        return raggedness(self.mean, self.mean_square)

    def less(self, tokens: int) -> Lengths:
        """These lengths but so many tokens of each sequence, of which at least one is left."""
        bins = _merged((max(1, length - tokens), share) for length, share in self.histogram)
        return Lengths(max(1.0, self.mean - tokens), max(1, self.maximum - tokens), bins)

    @cached_property
    def mean_square(self) -> float:
        """Mean of the squared lengths."""
        if self.is_fixed:
            return self.mean**2
        if self.histogram:
            return sum(share * tokens**2 for tokens, share in self.histogram)
        x = self._ended
        relative = 2 * (-expm1(-x) - x * exp(-x)) / x**2 if x > 1e-3 else 1 - 2 * x / 3
        return max(self.mean**2, relative * self.maximum**2)

    def alive(self, tokens: float) -> float:
        """The share of sequences that are longer than so many tokens."""
        if tokens >= self.maximum:
            return 0.0
        if self.is_fixed or tokens <= 0:
            return 1.0
        if self.histogram:
            return sum(share for length, share in self.histogram if length > tokens)
        return exp(-self._ended * tokens / self.maximum)

    @cached_property
    def _ended(self) -> float:
        """Chance of ending per token, times the maximum: x with (1 - e^-x) / x = mean / maximum."""
        ratio = self.mean / self.maximum
        low, high = 0.0, 1.0 / ratio  # (1 - e^-x) / x < 1 / x
        for _ in range(60):
            x = (low + high) / 2
            low, high = (x, high) if -expm1(-x) > ratio * x else (low, x)
        return (low + high) / 2


def raggedness(mean: float, mean_square: float) -> float:
    """The share of their mean by which lengths differ from it at most, were they spread evenly.

    0 for equal ones; up to `MOST_RAGGED`, where spreading evenly is far from what lengths are like.
    """
    excess = mean_square / mean**2 - 1
    return min(MOST_RAGGED, sqrt(3 * excess)) if excess > _EQUAL else 0.0


def lengths_of(counts: Mapping[int, int], maximum: int | None = None) -> Lengths:
    """The distribution of lengths that were counted, in at most BINS bins of equal weight.

    `maximum`: what no sequence may exceed, where that is more than the longest that was seen.
    """
    total = sum(counts.values())
    mean = sum(tokens * count for tokens, count in counts.items()) / total
    longest = max(counts)
    bins: list[tuple[int, float]] = []
    weight, tokens_sum = 0, 0.0
    for number, (tokens, count) in enumerate(sorted(counts.items()), 1):
        weight, tokens_sum = weight + count, tokens_sum + tokens * count
        if weight * BINS >= total or len(counts) <= BINS or number == len(counts):
            bins.append((round(tokens_sum / weight), weight / total))
            weight, tokens_sum = 0, 0.0
    most = longest if maximum is None else max(maximum, longest)
    if most == mean:
        return Lengths(mean, most)
    return Lengths(min(mean, float(most)), most, _merged(bins))


def run_lengths(trace: Trace) -> tuple[Lengths, Lengths] | None:
    """Lengths of a run's prompts and responses, all iterations together."""
    if not trace.lengths:
        return None
    prompts = _counts(item.prompt for item in trace.lengths)
    responses = _counts(item.response for item in trace.lengths)
    return lengths_of(prompts), lengths_of(responses)


def _counts(items: Iterable[Counts]) -> Mapping[int, int]:
    counts: dict[int, int] = {}
    for item in items:
        for tokens, count in item:
            counts[tokens] = counts.get(tokens, 0) + count
    return counts


def _merged(bins: Iterable[tuple[int, float]]) -> Histogram:
    """Bins of one length as one, their shares adding up to 1."""
    shares: dict[int, float] = {}
    for tokens, share in bins:
        shares[tokens] = shares.get(tokens, 0.0) + share
    total = sum(shares.values())
    if abs(total - 1) < 1e-9:  # what was written is read back as it was
        return tuple(sorted(shares.items()))
    return tuple((tokens, share / total) for tokens, share in sorted(shares.items()))


Measure = Callable[[int | None], Mapping[int, int]]
"""Tokens -> how many of a data set's texts have so many, none above the maximum that is given."""


def parse_lengths(reader: Reader, key: str, count: Measure | None = None) -> Lengths:
    """Reads a number, or a mapping with `max` and perhaps `mean`, a `histogram` or `percentiles`.

    `histogram` is [[tokens, weight], ...], `percentiles` maps percent of the sequences to the length
    that so many do not exceed, 100 to the longest. `measured`, or a mapping with `measured: true` and
    perhaps `max`, takes the lengths that `count` finds. Raises InputError.
    """
    value = reader.raw(key)
    if value == "measured":
        value = {"measured": True}
    if not isinstance(value, dict):
        number = reader.integer(key, minimum=1, maximum=MOST)
        return Lengths(float(number), number)
    child = Reader(value, reader.at(key))
    if child.get("measured", bool, False):
        maximum = child.integer("max", minimum=1, maximum=MOST) if child.has("max") else None
        if count is None:
            raise InputError(f"{reader.at(key)}: there is nothing to measure these lengths of; give them.")
        lengths = lengths_of(count(maximum), maximum)
    elif child.has("histogram") or child.has("percentiles"):
        lengths = _parse_distribution(child)
    else:
        maximum = child.integer("max", minimum=1, maximum=MOST)
        mean = child.number("mean", float(maximum), minimum=1.0, maximum=maximum)
        lengths = Lengths(mean, maximum)
    child.done()
    return lengths


def _parse_distribution(reader: Reader) -> Lengths:
    if reader.has("histogram") and reader.has("percentiles"):
        raise InputError(f"{reader.where}: histogram and percentiles both describe the lengths; give one.")
    bins = _read_histogram(reader) if reader.has("histogram") else _read_percentiles(reader)
    histogram = _merged(bins)
    mean = sum(tokens * share for tokens, share in histogram)
    maximum = reader.integer("max", histogram[-1][0], minimum=histogram[-1][0], maximum=MOST)
    given = reader.number("mean", mean, minimum=1.0)
    if abs(given - mean) > 0.01 * mean + 0.5:
        raise InputError(
            f"{reader.at('mean')}: {given:g}, but the distribution's mean is {mean:.4g}; leave it out."
        )
    if histogram[-1][1] > 1 - 1e-9 and histogram[-1][0] == maximum:
        return Lengths(float(maximum), maximum)
    return Lengths(min(given, float(maximum)), maximum, histogram)


def _read_histogram(reader: Reader) -> Sequence[tuple[int, float]]:
    bins: list[tuple[int, float]] = []
    for row in reader.get("histogram", list):
        if not isinstance(row, list) or len(row) != 2 or not _is_length(row[0]) or not _is_weight(row[1]):
            raise InputError(
                f"{reader.at('histogram')}: expected pairs [tokens, weight] above 0, found {row!r}."
            )
        if bins and row[0] <= bins[-1][0]:
            raise InputError(f"{reader.at('histogram')}: {row[0]} tokens must come before {bins[-1][0]}.")
        bins.append((row[0], float(row[1])))
    if not bins:
        raise InputError(f"{reader.at('histogram')}: needs at least one pair [tokens, weight].")
    return bins


def _read_percentiles(reader: Reader) -> Sequence[tuple[int, float]]:
    """Between two percentiles lengths are spread evenly."""
    where, given = reader.at("percentiles"), reader.get("percentiles", dict)
    points: list[tuple[float, int]] = []
    for percent, tokens in given.items():
        if not _is_weight(percent, zero=True) or float(percent) > 100 or not _is_length(tokens):
            raise InputError(
                f"{where}: expected percent: tokens, such as 90: 250; found {percent!r}: {tokens!r}."
            )
        points.append((float(percent), tokens))
    points.sort()
    if not points or points[-1][0] != 100:
        raise InputError(f"{where}: 100 is missing: the longest that a sequence may be.")
    if points[0][0] > 0:
        points.insert(0, (0.0, min(1, points[0][1])))
    bins: list[tuple[int, float]] = []
    for (low, shortest), (high, longest) in pairwise(points):
        if longest < shortest:
            raise InputError(
                f"{where}: {high:g} percent have up to {longest} tokens, {low:g} percent {shortest}."
            )
        parts = max(1, min(BINS // 2, longest - shortest))
        bins += [
            (round(shortest + (longest - shortest) * (i + 1) / parts), (high - low) / parts)
            for i in range(parts)
        ]
    return bins


def _is_length(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST


def _is_weight(value: Any, *, zero: bool = False) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    return is_number and (value > 0 or (zero and value == 0))


def lengths_content(lengths: Lengths) -> Mapping[str, Any]:
    """The lengths as the mapping that `parse_lengths` reads back to an equal value."""
    content: dict[str, Any] = {"mean": lengths.mean, "max": lengths.maximum}
    if lengths.histogram:
        content["histogram"] = [[tokens, share] for tokens, share in lengths.histogram]
    return content
