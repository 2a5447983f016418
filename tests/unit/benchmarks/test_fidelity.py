"""The fidelity benchmark's numbers by hand, and that its plans are legal and differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fidelity import CASES, PLANS, place, prepare
from benchmarks.fidelity_numbers import Result, Round, regret, spearman, summary, to_repeat
from realloc.comparison import Comparison, Line
from realloc.experiment import read_experiment


def result(plan: str, predicted_s: float, measured_s: float, case: str = "a") -> Result:
    return Result(case, plan, (round_of(predicted_s, measured_s),))


def round_of(predicted_s: float, measured_s: float, calm_s: float | None = 0.0, pace: float = 1.0) -> Round:
    """`calm_s`: 0 as all iterations."""
    total = Line("", "", "", predicted_s, measured_s)
    comparison = Comparison((total,), total, (), "")
    return Round(predicted_s, measured_s, pace, 1.0, comparison, measured_s if calm_s == 0.0 else calm_s)


def test_rank_correlation():
    assert spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Wikipedia's formula without ties: 1 - 6 sum d^2 / (n (n^2 - 1)), here d = 0, 1, 1, 0
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1.0)


def test_numbers_are_of_the_worst_experiment():
    good = [result("x", 1.0, 1.0), result("y", 2.0, 2.0)]
    bad = [result("x", 1.0, 1.2, "b"), result("y", 1.1, 1.0, "b")]
    assert regret([1.0, 2.0], [1.0, 2.0]) == 0.0
    assert regret([1.0, 1.1], [1.2, 1.0]) == pytest.approx(0.2)
    found = summary([*good, *bad])
    assert found["regret"] == pytest.approx(0.2)
    assert found["spearman"] == pytest.approx(-1.0)
    assert found["error_worst"] == pytest.approx(0.2 / 1.2)
    assert found["error_mean"] == pytest.approx((0.2 / 1.2 + 0.1) / 4)
    assert len(found["plans"]) == 4


def test_iterations_at_another_pace_than_the_profiles_do_not_count_and_are_told():
    rounds = (round_of(1.0, 1.3, None, 1.3), round_of(1.1, 1.2, 1.1, 1.06), round_of(0.9, 1.0))
    slow = Result("a", "x", rounds)
    assert slow.counted == list(rounds[1:])
    assert not slow.is_disturbed
    assert slow.predicted_s == pytest.approx(1.0)
    assert slow.measured_s == pytest.approx(1.05)
    assert slow.at_pace_s == pytest.approx(1.0)  # of 1.0, 1.13 and 1.0
    assert slow.typical is rounds[2]
    found = summary([slow])
    assert found["disturbed"] == 0
    assert found["error_mean"] == pytest.approx(0.05 / 1.05)
    assert found["error_mean_all"] == pytest.approx(0.2 / 1.2)
    assert found["error_mean_at_pace"] == pytest.approx(0.0)
    (plan,) = found["plans"]
    assert plan["rounds_s"] == [1.3, 1.2, 1.0]
    assert plan["calm_s"] == [None, 1.1, 1.0]
    assert plan["predictions_s"] == [1.0, 1.1, 0.9]


def test_of_disturbed_rounds_alone_the_least_disturbed_counts():
    """Too fast is as far off as too slow."""
    rounds = tuple(round_of(1.0, pace, None, pace) for pace in (1.3, 0.8, 1.2))
    found = Result("a", "x", rounds)
    assert found.counted == [rounds[2]]
    assert found.measured_s == 1.2
    assert found.is_disturbed
    assert Result("a", "x", rounds[:2]).counted == [rounds[1]]
    assert summary([found])["disturbed"] == 1


def test_the_choice_of_rounds_knows_nothing_of_predictions():
    found = Result("a", "x", (round_of(1.0, 1.3, 1.3, 1.01), round_of(1.0, 1.0, None, 1.2)))
    assert found.error == pytest.approx(0.3 / 1.3)


def test_how_far_rounds_are_apart():
    found = summary([Result("a", "x", (round_of(2.0, 1.0), round_of(1.0, 1.5), round_of(1.0, 1.0)))])
    assert found["error_worst"] == 0.0
    assert found["repeat_worst"] == pytest.approx(0.4)
    assert found["repeat_mean"] == pytest.approx(0.8 / 3)
    assert summary([result("x", 1.0, 1.0)])["repeat_worst"] == 0.0  # one round says nothing


def test_disturbed_plans_run_again_first_then_those_of_uneven_rounds():
    measured = {
        ("a", "even"): (round_of(1.0, 1.0), round_of(1.0, 1.04)),
        ("a", "even while calm"): (round_of(1.0, 1.5, 1.0), round_of(1.0, 1.04)),
        ("a", "uneven"): (round_of(1.0, 1.0), round_of(1.0, 1.2)),
        ("a", "one round"): (round_of(1.0, 1.0), round_of(1.0, 1.0, None, 1.2)),
        ("b", "slow"): (round_of(1.0, 1.5, None, 1.5), round_of(1.0, 1.2, None, 1.2)),
        ("b", "fast"): (round_of(1.0, 0.5, None, 0.5), round_of(1.0, 0.6, None, 0.6)),
    }
    order = [label for _, label in to_repeat(measured, 0.05)]
    assert order == ["fast", "slow", "one round", "uneven"]


@pytest.mark.parametrize("name", [case.name for case in CASES if case.name.endswith("260K")])
def test_every_plan_is_legal_and_no_two_are_alike(tmp_path: Path, name: str):
    case = next(c for c in CASES if c.name == name)
    experiment = read_experiment(prepare(case, tmp_path / "case", quick=True))
    plans = [place(experiment, placed) for placed in PLANS.values()]
    assert len({tuple(map(str, plan.placements.values())) for plan in plans}) == len(PLANS)
    assert experiment.workload.prompt.histogram
