"""The fidelity benchmark's numbers by hand, and that its plans are legal and differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fidelity import CASES, PLANS, place, prepare
from benchmarks.fidelity_numbers import Result, Round, furthest_apart, regret, spearman, summary
from realloc.comparison import Comparison, Line
from realloc.experiment import read_experiment


def result(plan: str, predicted_s: float, measured_s: float, case: str = "a") -> Result:
    return Result(case, plan, (round_of(predicted_s, measured_s),))


def round_of(predicted_s: float, measured_s: float, pace: float = 1.0) -> Round:
    total = Line("", "", "", predicted_s, measured_s)
    return Round(predicted_s, measured_s, pace, 1.0, Comparison((total,), total, (), ""))


def test_rank_correlation():
    assert spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Wikipedia's formula without ties: 1 - 6 sum d^2 / (n (n^2 - 1)), here d = 0, 1, 1, 0
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1.0)


def test_numbers_are_of_the_worst_experiment():
    good = [result("x", 1.0, 1.0), result("y", 2.0, 2.0)]
    bad = [result("x", 1.0, 1.2, "b"), result("y", 1.1, 1.0, "b")]
    assert regret(good) == 0.0
    assert regret(bad) == pytest.approx(0.2)
    found = summary([*good, *bad])
    assert found["regret"] == pytest.approx(0.2)
    assert found["spearman"] == pytest.approx(-1.0)
    assert found["error_worst"] == pytest.approx(0.2 / 1.2)
    assert found["error_mean"] == pytest.approx((0.2 / 1.2 + 0.1) / 4)
    assert len(found["plans"]) == 4


def test_what_a_slow_machine_adds_is_told_apart_and_hides_nothing():
    slow = Result("a", "x", (round_of(1.0, 1.3, 1.3), round_of(1.1, 1.8, 1.5), round_of(0.9, 1.1)))
    assert (slow.predicted_s, slow.measured_s) == (1.0, 1.3)
    assert slow.at_pace_s == pytest.approx(1.1)  # of 1.0, 1.2 and 1.1
    assert slow.typical is slow.rounds[0]
    found = summary([slow])
    assert found["error_mean"] == pytest.approx(0.3 / 1.3)
    assert found["error_mean_at_pace"] == pytest.approx(0.1 / 1.1)
    assert found["plans"][0]["rounds_s"] == [1.3, 1.8, 1.1]
    assert found["plans"][0]["predictions_s"] == [1.0, 1.1, 0.9]


def test_what_one_profile_says_and_how_far_rounds_are_apart():
    found = summary([Result("a", "x", (round_of(2.0, 1.0), round_of(1.0, 1.5), round_of(1.0, 1.0)))])
    assert found["error_worst"] == 0.0
    assert found["error_worst_one_profile"] == pytest.approx(1.0)
    assert found["repeat_worst"] == pytest.approx(0.4)
    assert found["repeat_mean"] == pytest.approx(0.8 / 3)
    assert summary([result("x", 1.0, 1.0)])["repeat_worst"] == 0.0  # one round says nothing


def test_plans_of_uneven_rounds_run_again_the_most_uneven_first():
    measured = {("a", "even"): (1.0, 1.04), ("a", "uneven"): (1.0, 1.2), ("b", "worst"): (1.5, 1.0)}
    found = {key: [round_of(1.0, seconds) for seconds in both] for key, both in measured.items()}
    assert furthest_apart(found, 0.05) == [("b", "worst"), ("a", "uneven")]
    # of three the middle one counts, and a profile's prediction no more than another's
    again = Result("b", "worst", (round_of(1.0, 1.5), round_of(1.2, 1.0), round_of(1.1, 1.1)))
    assert (again.predicted_s, again.measured_s) == (1.1, 1.1)


@pytest.mark.parametrize("name", [case.name for case in CASES if case.name.endswith("260K")])
def test_every_plan_is_legal_and_no_two_are_alike(tmp_path: Path, name: str):
    case = next(c for c in CASES if c.name == name)
    experiment = read_experiment(prepare(case, tmp_path / "case", quick=True))
    plans = [place(experiment, placed) for placed in PLANS.values()]
    assert len({tuple(map(str, plan.placements.values())) for plan in plans}) == len(PLANS)
    assert experiment.workload.prompt.histogram
