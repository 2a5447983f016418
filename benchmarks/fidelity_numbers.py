"""The numbers of `benchmarks/fidelity.py`: what rounds of plans say about predictions. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, median
from typing import Any

from realloc.comparison import Comparison

MEANS = ("error_mean", "error_mean_at_pace", "error_mean_one_profile", "repeat_mean")
WORST = ("error_worst", "error_worst_at_pace", "error_worst_one_profile", "repeat_worst")
RANKING = ("spearman", "spearman_at_pace", "regret")


@dataclass(frozen=True)
class Round:
    """What one round of one plan gives: seconds per iteration predicted and measured.

    `pace`: 1 where it is not known. `core_share`: for how much of their computing time ranks had their
    core; below 0.95 the machine was not quiet.
    """

    predicted_s: float
    measured_s: float
    pace: float
    core_share: float | None
    comparison: Comparison


@dataclass(frozen=True)
class Result:
    """The rounds of one plan of one experiment."""

    case: str
    plan: str
    rounds: tuple[Round, ...]

    @property
    def predicted_s(self) -> float:
        return median(each.predicted_s for each in self.rounds)

    @property
    def measured_s(self) -> float:
        return median(each.measured_s for each in self.rounds)

    @property
    def at_pace_s(self) -> float:
        """Measured seconds had the machine been as fast as when it was profiled."""
        return median(each.measured_s / each.pace for each in self.rounds)

    @property
    def core_share(self) -> float | None:
        shares = [each.core_share for each in self.rounds if each.core_share is not None]
        return median(shares) if shares else None

    @property
    def typical(self) -> Round:
        """The round in the middle."""
        return sorted(self.rounds, key=lambda each: each.measured_s)[(len(self.rounds) - 1) // 2]

    @property
    def error(self) -> float:
        return abs(self.predicted_s - self.measured_s) / self.measured_s

    @property
    def error_one_profile(self) -> float:
        return abs(self.rounds[0].predicted_s - self.measured_s) / self.measured_s

    @property
    def error_at_pace(self) -> float:
        return abs(self.predicted_s - self.at_pace_s) / self.at_pace_s

    @property
    def repeats(self) -> Sequence[float]:
        pairs = combinations((each.measured_s for each in self.rounds), 2)
        return [2 * abs(a - b) / (a + b) for a, b in pairs]


def furthest_apart(
    found: Mapping[tuple[str, str], Sequence[Round]], least: float
) -> Sequence[tuple[str, str]]:
    """Which plans have two rounds that are further apart than `least`, as a share; the furthest first."""
    apart = {key: max(Result(*key, tuple(rounds)).repeats) for key, rounds in found.items()}
    return sorted((key for key, share in apart.items() if share > least), key=lambda key: -apart[key])


def spearman(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Rank correlation; ties share their mean rank."""
    if len(predicted) < 2:
        return 1.0
    one, other = _ranks(predicted), _ranks(measured)
    a, b = mean(one), mean(other)
    covariance = sum((x - a) * (y - b) for x, y in zip(one, other, strict=True))
    spread = sum((x - a) ** 2 for x in one) * sum((y - b) ** 2 for y in other)
    return covariance / spread**0.5 if spread else 1.0


def _ranks(values: Sequence[float]) -> Sequence[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def regret(results: Sequence[Result]) -> float:
    """How much slower the plan predicted best is than the fastest, as a share."""
    chosen = min(results, key=lambda result: result.predicted_s)
    return chosen.measured_s / min(result.measured_s for result in results) - 1


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """The benchmark's numbers, and how far each kind of term is off over all plans."""
    by_case: dict[str, list[Result]] = {}
    for result in results:
        by_case.setdefault(result.case, []).append(result)
    cases = {
        name: {
            "error_mean": mean(r.error for r in found),
            "error_worst": max(r.error for r in found),
            "error_mean_at_pace": mean(r.error_at_pace for r in found),
            "error_worst_at_pace": max(r.error_at_pace for r in found),
            "error_mean_one_profile": mean(r.error_one_profile for r in found),
            "error_worst_one_profile": max(r.error_one_profile for r in found),
            "repeat_mean": mean(apart for r in found for apart in r.repeats or (0.0,)),
            "repeat_worst": max(apart for r in found for apart in r.repeats or (0.0,)),
            "spearman": spearman([r.predicted_s for r in found], [r.measured_s for r in found]),
            "spearman_at_pace": spearman([r.predicted_s for r in found], [r.at_pace_s for r in found]),
            "regret": regret(found),
        }
        for name, found in by_case.items()
    }
    # every experiment has as many plans
    means = {key: mean(case[key] for case in cases.values()) for key in MEANS}
    worst = {key: max(case[key] for case in cases.values()) for key in WORST}
    return {
        **means,
        **worst,
        "spearman": min(case["spearman"] for case in cases.values()),
        "spearman_at_pace": min(case["spearman_at_pace"] for case in cases.values()),
        "regret": max(case["regret"] for case in cases.values()),
        "plans": [
            {
                "experiment": r.case,
                "plan": r.plan,
                "predicted_s": r.predicted_s,
                "measured_s": r.measured_s,
                "error": r.error,
                "error_at_pace": r.error_at_pace,
                "predictions_s": [each.predicted_s for each in r.rounds],
                "rounds_s": [each.measured_s for each in r.rounds],
                "paces": [each.pace for each in r.rounds],
                "core_share": r.core_share,
            }
            for r in results
        ],
        "experiments": cases,
        "core_share": min((r.core_share for r in results if r.core_share is not None), default=None),
        "terms": _term_ratios(results),
    }


def _term_ratios(results: Sequence[Result]) -> Mapping[str, Mapping[str, Any]]:
    """Call and term (or kind of node) -> seconds predicted and measured, over all plans of an experiment."""
    sums: dict[str, list[float]] = {}
    for result in results:
        for line in result.typical.comparison.lines:
            if line.predicted_s is None or line.measured_s is None:
                continue
            node = line.node if line.term else line.node.partition(":")[0]
            entry = sums.setdefault(f"{result.case} {node} {line.term}".strip(), [0.0, 0.0])
            entry[0] += line.predicted_s
            entry[1] += line.measured_s
    return {
        name: {"predicted_s": a, "measured_s": b, "ratio": b / a if a else None}
        for name, (a, b) in sums.items()
    }
