"""The numbers of `benchmarks/fidelity.py`: what rounds of plans say about predictions. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, median
from typing import Any

from realloc.comparison import Comparison

MEANS = ("error_mean", "error_mean_all", "error_mean_at_pace", "repeat_mean")
WORST = ("error_worst", "error_worst_all", "error_worst_at_pace", "repeat_worst")
RANKING = ("spearman", "spearman_all", "spearman_at_pace", "regret", "regret_all")


@dataclass(frozen=True)
class Round:
    """What one round of one plan gives: seconds per iteration predicted and measured.

    `calm_s`: of the iterations at the profile's pace, None where they were too few. `pace`: how many times
    longer than in the profile a fixed piece of work had a core; 1 where it is not known. `core_share`: for
    how much of their computing time ranks had their core; below 0.95 the machine was not quiet.
    """

    predicted_s: float
    measured_s: float
    pace: float
    core_share: float | None
    comparison: Comparison
    calm_s: float | None = None

    @property
    def off_pace(self) -> float:
        """How far the machine was from the pace of its profile, as a share."""
        return max(self.pace, 1 / self.pace) - 1


@dataclass(frozen=True)
class Result:
    """The rounds of one plan of one experiment.

    Those count that have iterations at the profile's pace, and these iterations: of another machine nothing
    was predicted. Where there are none, all iterations of the round that is nearest to that pace.
    """

    case: str
    plan: str
    rounds: tuple[Round, ...]

    @property
    def counted(self) -> Sequence[Round]:
        calm = [each for each in self.rounds if each.calm_s is not None]
        return calm or [min(self.rounds, key=lambda each: each.off_pace)]

    @property
    def is_disturbed(self) -> bool:
        """Whether no round has iterations at the pace of its profile."""
        return self.counted[0].calm_s is None

    @property
    def counted_s(self) -> Sequence[float]:
        """Measured seconds of the rounds that count."""
        return [each.measured_s if each.calm_s is None else each.calm_s for each in self.counted]

    @property
    def predicted_s(self) -> float:
        return median(each.predicted_s for each in self.counted)

    @property
    def measured_s(self) -> float:
        return median(self.counted_s)

    @property
    def of_all(self) -> tuple[float, float]:
        """Seconds predicted and measured, had every iteration of every round counted."""
        predicted_s = median(each.predicted_s for each in self.rounds)
        return predicted_s, median(each.measured_s for each in self.rounds)

    @property
    def at_pace_s(self) -> float:
        """Measured seconds had the machine been as fast as when it was profiled, of all rounds."""
        return median(each.measured_s / each.pace for each in self.rounds)

    @property
    def core_share(self) -> float | None:
        shares = [each.core_share for each in self.counted if each.core_share is not None]
        return median(shares) if shares else None

    @property
    def typical(self) -> Round:
        """Of the rounds that count, the one in the middle."""
        ordered = sorted(self.counted, key=lambda each: each.measured_s)
        return ordered[(len(ordered) - 1) // 2]

    @property
    def error(self) -> float:
        return abs(self.predicted_s - self.measured_s) / self.measured_s

    @property
    def error_all(self) -> float:
        predicted_s, measured_s = self.of_all
        return abs(predicted_s - measured_s) / measured_s

    @property
    def error_at_pace(self) -> float:
        predicted_s, _ = self.of_all
        return abs(predicted_s - self.at_pace_s) / self.at_pace_s

    @property
    def repeats(self) -> Sequence[float]:
        pairs = combinations((each.measured_s for each in self.rounds), 2)
        return [2 * abs(a - b) / (a + b) for a, b in pairs]


def to_repeat(found: Mapping[tuple[str, str], Sequence[Round]], least: float) -> Sequence[tuple[str, str]]:
    """Which plans should run again: those without a round that counts, then those with fewer than two or
    whose rounds are further apart than `least`, as a share; of each the furthest off first."""

    def apart(key: tuple[str, str]) -> tuple[bool, float]:
        result = Result(*key, tuple(found[key]))
        if result.is_disturbed:
            return True, result.counted[0].off_pace
        if len(result.counted) < 2:
            return False, 1.0
        return False, max(result.counted_s) / min(result.counted_s) - 1

    ranks = {key: apart(key) for key in found}
    chosen = [key for key, (_, share) in ranks.items() if share > least]
    return sorted(chosen, key=lambda key: ranks[key], reverse=True)


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


def regret(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """How much slower the plan predicted best is than the fastest, as a share."""
    chosen = predicted.index(min(predicted))
    return measured[chosen] / min(measured) - 1


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """The benchmark's numbers, and how far each kind of term is off over all plans."""
    by_case: dict[str, list[Result]] = {}
    for result in results:
        by_case.setdefault(result.case, []).append(result)
    cases = {name: _numbers(found) for name, found in by_case.items()}
    # every experiment has as many plans
    means = {key: mean(case[key] for case in cases.values()) for key in MEANS}
    worst = {key: max(case[key] for case in cases.values()) for key in WORST}
    return {
        **means,
        **worst,
        **{
            key: (min if key.startswith("spearman") else max)(case[key] for case in cases.values())
            for key in RANKING
        },
        "disturbed": sum(result.is_disturbed for result in results),
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
                "calm_s": [each.calm_s for each in r.rounds],
                "core_share": r.core_share,
            }
            for r in results
        ],
        "experiments": cases,
        "core_share": min((r.core_share for r in results if r.core_share is not None), default=None),
        "terms": _term_ratios(results),
    }


def _numbers(found: Sequence[Result]) -> Mapping[str, float]:
    """Of one experiment."""
    predicted, measured = [r.predicted_s for r in found], [r.measured_s for r in found]
    every = [r.of_all for r in found]
    all_predicted, all_measured = [p for p, _ in every], [m for _, m in every]
    repeats = [apart for r in found for apart in r.repeats or (0.0,)]
    return {
        "error_mean": mean(r.error for r in found),
        "error_worst": max(r.error for r in found),
        "error_mean_all": mean(r.error_all for r in found),
        "error_worst_all": max(r.error_all for r in found),
        "error_mean_at_pace": mean(r.error_at_pace for r in found),
        "error_worst_at_pace": max(r.error_at_pace for r in found),
        "repeat_mean": mean(repeats),
        "repeat_worst": max(repeats),
        "spearman": spearman(predicted, measured),
        "spearman_all": spearman(all_predicted, all_measured),
        "spearman_at_pace": spearman(all_predicted, [r.at_pace_s for r in found]),
        "regret": regret(predicted, measured),
        "regret_all": regret(all_predicted, all_measured),
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
