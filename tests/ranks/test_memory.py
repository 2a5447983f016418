"""Memory that ranks take, against the memory model: a 15M-class model, by call and kind of strategy.

What stays is predicted to 1%, the peak of every call and of the plan to 5%, and what generation and the
actor's train_step need beside what stays, which is where mistakes would show, to 10%. Under ZeRO 3 the
prediction may be higher: gloo's own thread gives memory back when it gets to it, which is not recorded,
and what is taken off for that is up to 7% of a peak too much.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.memory_runs import differences, memory_plan, predict, watch

ALONE = ("actor_gen alone", "actor_train alone")


@pytest.mark.parametrize(
    ("gpus", "training", "over", "text"),
    [
        (1, "d1t1p1", 0.05, 0),
        (2, "d2t1p1m2z3", 0.12, 0),
        (2, "d1t2p1+sp", 0.05, 0),
        (2, "d1t1p2m4+full", 0.05, 0),
        (2, "d1t1p2m2+gpipe", 0.05, 96),
    ],
)
def test_peaks_are_as_predicted(tmp_path: Path, gpus: int, training: str, over: float, text: int) -> None:
    plan = memory_plan(tmp_path, gpus, training, text=text)
    found = differences(watch(plan, tmp_path), predict(plan, "cpu"))
    assert abs(found["resident"]) < 0.01, found
    peaks = {name: found[name] for name in (*plan.placements, "plan")}
    assert min(peaks.values()) > -0.05, peaks
    assert max(peaks.values()) < over, peaks
    alone = {name: found[name] for name in ALONE}
    assert max(map(abs, alone.values())) < 0.10, alone
