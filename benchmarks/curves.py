"""Whether two trainers learn alike: curves of several seeds each, compared iteration by iteration.

Knows curves as numbers only. The measure of noise is the joint spread, sqrt(a^2 + b^2), a and b being the
standard deviations over the seeds of either side. Means of n seeds of one distribution differ by more than
twice that with a probability of a few percent at n = 3; so curves are called the same when at least
`SHARE` of the iterations lie within it, and the ends, means over the last quarter, do too. With more seeds
the ends may be asked to lie within fewer spreads: of 5 seeds, within one (Student's t of 8 degrees of
freedom at sqrt(5), a probability of 6% to differ by more).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from statistics import mean, stdev
from typing import Any

SHARE = 0.9
SPREADS = 2.0

Curves = Sequence[Sequence[float]]
"""One curve for each seed, a number for each iteration."""


def compare_curves(ours: Curves, theirs: Curves, *, end_spreads: float = SPREADS) -> dict[str, Any]:
    """Both sides' means and spreads by iteration, and the verdict `same`; None with a single seed.

    The ends may differ by `end_spreads` joint spreads.
    """
    iterations = min(len(curve) for curve in (*ours, *theirs))
    sides = {"ours": ours, "trl": theirs}
    means = {name: [mean(c[i] for c in side) for i in range(iterations)] for name, side in sides.items()}
    result: dict[str, Any] = {"iterations": iterations, "seeds": [len(ours), len(theirs)], "mean": means}
    ends = {name: [_end(curve[:iterations]) for curve in side] for name, side in sides.items()}
    result["final"] = {name: mean(values) for name, values in ends.items()}
    result["final_difference"] = result["final"]["ours"] - result["final"]["trl"]
    result["same"] = None
    if min(len(ours), len(theirs)) < 2:
        return result
    spreads = {
        name: [stdev(curve[i] for curve in side) for i in range(iterations)] for name, side in sides.items()
    }
    within = [
        abs(means["ours"][i] - means["trl"][i]) <= SPREADS * hypot(spreads["ours"][i], spreads["trl"][i])
        for i in range(iterations)
    ]
    noise = hypot(*(stdev(values) for values in ends.values()))
    result |= {
        "spread": spreads,
        "share_within": sum(within) / iterations,
        "final_joint_spread": noise,
    }
    alike_at_the_end = abs(result["final_difference"]) <= end_spreads * noise
    result["same"] = result["share_within"] >= SHARE and alike_at_the_end
    return result


def _end(curve: Sequence[float]) -> float:
    return mean(curve[-max(1, len(curve) // 4) :])
