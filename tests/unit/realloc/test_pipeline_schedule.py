"""Pipeline schedules: they complete, their bubbles are those of the papers, bad lists are refused."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realloc.pipeline_schedule import (
    EXACT_ACTIONS,
    Action,
    Pipeline,
    Work,
    check,
    makespan,
    max_in_flight,
    pipeline_actions,
    source,
)
from realloc.strategy import Schedule


@st.composite
def pipelines(draw: st.DrawFn, most: int = 40) -> Pipeline:
    schedule = draw(st.sampled_from(list(Schedule)))
    pp = draw(st.integers(1 if schedule is Schedule.ONE_F_ONE_B else 2, 8))
    virtual = draw(st.integers(2, 4)) if schedule is Schedule.INTERLEAVED else 1
    return Pipeline(schedule, pp, virtual, draw(st.integers(1, most)))


@settings(max_examples=300, deadline=None)
@given(pipelines())
def test_every_schedule_completes(pipeline: Pipeline) -> None:
    check(pipeline, pipeline_actions(pipeline))


@settings(max_examples=60, deadline=None)
@given(pipelines(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
def test_makespan_is_that_of_a_plain_simulation(
    pipeline: Pipeline, forward: int, backward: int, weight: int, send: int
) -> None:
    """Against a clock that only knows the lists and who waits for whom; times differ by chunk."""
    chunks = range(pipeline.pp * pipeline.virtual)
    forwards = [forward + chunk % 3 for chunk in chunks]
    backwards = [backward + chunk % 2 for chunk in chunks]
    weights = [weight + chunk % 4 for chunk in chunks]
    ends: dict[tuple[int, Action], float] = {}
    lists = pipeline_actions(pipeline)

    def end(stage: int, place: int) -> float:
        action = lists[stage][place]
        if (stage, action) not in ends:
            start = end(stage, place - 1) if place else 0.0
            needed = source(pipeline, stage, action)
            if needed is not None:
                after = end(needed[0], lists[needed[0]].index(needed[1]))
                start = max(start, after + (send if needed[0] != stage else 0))
            chunk = action.chunk * pipeline.pp + stage
            took = (forwards, backwards, weights)[action.work][chunk]
            if action.work is Work.BACKWARD and not pipeline.splits_backward:
                took += weights[chunk]
            ends[stage, action] = start + took
        return ends[stage, action]

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        last = max(end(stage, len(own) - 1) for stage, own in enumerate(lists))
    finally:
        sys.setrecursionlimit(limit)
    assert makespan(pipeline, forwards, backwards, weights, send) == pytest.approx(last)


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_bubbles_are_those_of_the_papers(pp: int, extra: int) -> None:
    """arXiv 2104.04473, section 2: (p - 1)(f + b), a v-th of it interleaved (chunks take a v-th);
    arXiv 2401.10241, table 2: (p - 1)(f + b - w) for ZB-H1, with b and w the parts of a backward.
    """
    total, forward, backward, weight = 2 * pp + extra, 2.0, 3.0, 1.0
    work = total * (forward + backward + weight)

    def bubble(schedule: Schedule, virtual: int = 1) -> float:
        pipeline = Pipeline(schedule, pp, virtual, total)
        return makespan(pipeline, *(time / virtual for time in (forward, backward, weight))) - work

    classic = (pp - 1) * (forward + backward + weight)
    assert bubble(Schedule.GPIPE) == pytest.approx(classic)
    assert bubble(Schedule.ONE_F_ONE_B) == pytest.approx(classic)
    for virtual in (2, 4):
        assert bubble(Schedule.INTERLEAVED, virtual) == pytest.approx(classic / virtual)
    assert bubble(Schedule.ZERO_BUBBLE) == pytest.approx((pp - 1) * (forward + backward - weight))


def test_activations_held() -> None:
    def held(schedule: Schedule, virtual: int = 1, total: int = 12) -> list[int]:
        return [max_in_flight(Pipeline(schedule, 4, virtual, total), stage) for stage in range(4)]

    assert held(Schedule.GPIPE) == [12, 12, 12, 12]
    assert held(Schedule.ONE_F_ONE_B) == [4, 3, 2, 1]
    assert held(Schedule.ZERO_BUBBLE) == [4, 4, 4, 4]
    assert held(Schedule.INTERLEAVED, 2) == [11, 9, 7, 5]
    assert held(Schedule.ONE_F_ONE_B, total=2) == [2, 2, 2, 1]


@settings(max_examples=30, deadline=None)
@given(pipelines(most=1), st.integers(0, 700), st.floats(0.5, 2), st.floats(0, 0.3))
def test_long_pipelines_are_priced_as_if_simulated(
    pipeline: Pipeline, extra: int, backward: float, send: float
) -> None:
    chunks = pipeline.pp * pipeline.virtual
    total = EXACT_ACTIONS // chunks + extra
    long = pipeline._replace(num_micro_batches=total)
    times = (
        tuple(1.0 + 0.1 * (i == chunks - 1) for i in range(chunks)),
        (backward,) * chunks,
        (0.7,) * chunks,
    )
    from realloc.pipeline_schedule import _exact_makespan

    assert makespan(long, *times, send) == pytest.approx(_exact_makespan(long, times, send), rel=2e-3)


def test_actions_of_two_stages() -> None:
    pipeline = Pipeline(Schedule.ZERO_BUBBLE, 2, 1, 3)
    text = ["".join(f"{'FBW'[a.work]}{a.micro_batch}" for a in own) for own in pipeline_actions(pipeline)]
    assert text == ["F0F1B0W0F2B1W1B2W2", "F0B0F1B1W0F2B2W1W2"]
    assert list(pipeline_actions(pipeline._replace(num_micro_batches=0))[0]) == []


def test_bad_lists_are_refused() -> None:
    pipeline = Pipeline(Schedule.ONE_F_ONE_B, 2, 1, 3)
    good = [list(own) for own in pipeline_actions(pipeline)]
    check(pipeline, good)
    early = [good[0], [good[1][1], good[1][0], *good[1][2:]]]
    with pytest.raises(AssertionError, match="waits for ever"):
        check(pipeline, early)
    with pytest.raises(AssertionError, match="all its actions once"):
        check(pipeline, [good[0][:-1], good[1]])
    forwards = [Action(Work.FORWARD, m, 0) for m in range(3)]
    backwards = [Action(Work.BACKWARD, m, 0) for m in range(3)]
    crossed = [[*forwards, *backwards], [forwards[1], forwards[0], forwards[2], *backwards]]
    with pytest.raises(AssertionError, match="comes first"):
        check(pipeline, crossed)
