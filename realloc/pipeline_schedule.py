"""Pipeline schedules: the order in which each stage runs its forwards, backwards and weight gradients.

A pure function of (schedule, stages, chunks per stage, micro-batches). The runtime executes these
lists action by action and the cost model prices the same lists. Knows nothing of tensors, of how
messages travel, or of how long anything takes: durations are arguments of `makespan`.

A model is cut into pp x virtual chunks: chunk c of stage s is the (c * pp + s)-th part. All stages
take forwards in one order and backwards in another, so that messages between two stages arrive in
the order in which they are wanted; stages differ in how they merge the two.

GPipe: Huang et al., arXiv 1811.06965. 1F1B and interleaved: Narayanan et al., arXiv 2104.04473,
section 2.2. Zero bubble: Qi et al., arXiv 2401.10241, section 2.3 (ZB-H1).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

from realloc.params import split_range
from realloc.strategy import Schedule

EXACT_ACTIONS = 4096
"""Pipelines of more forwards than this are priced from shorter ones, beyond which time is linear."""


class Work(IntEnum):
    """What an action does. WEIGHT is only there under the zero-bubble schedule."""

    FORWARD = 0
    BACKWARD = 1
    WEIGHT = 2


class Action(NamedTuple):
    """One micro-batch through one chunk of a stage, in one direction."""

    work: Work
    micro_batch: int
    chunk: int


class Pipeline(NamedTuple):
    """What an order depends on."""

    schedule: Schedule
    pp: int
    virtual: int
    num_micro_batches: int

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients are actions of their own."""
        return self.schedule is Schedule.ZERO_BUBBLE


def source(pipeline: Pipeline, stage: int, action: Action) -> tuple[int, Action] | None:
    """The (stage, action) whose result this action takes; None for the first chunk's forward.

    It takes it as a message when that stage is another one.
    """
    work, micro_batch, chunk = action
    if work is Work.FORWARD:
        if stage > 0:
            return stage - 1, action
        return (pipeline.pp - 1, Action(work, micro_batch, chunk - 1)) if chunk > 0 else None
    if work is Work.WEIGHT:
        return stage, Action(Work.BACKWARD, micro_batch, chunk)
    if stage < pipeline.pp - 1:
        return stage + 1, action
    if chunk < pipeline.virtual - 1:
        return 0, Action(work, micro_batch, chunk + 1)
    return stage, Action(Work.FORWARD, micro_batch, chunk)


def destination(pipeline: Pipeline, stage: int, action: Action) -> tuple[int, Action] | None:
    """The (stage, action) that takes this action's result as a message; None when nobody does."""
    work, micro_batch, chunk = action
    if work is Work.FORWARD:
        if stage < pipeline.pp - 1:
            return stage + 1, action
        return (0, Action(work, micro_batch, chunk + 1)) if chunk < pipeline.virtual - 1 else None
    if work is Work.BACKWARD:
        if stage > 0:
            return stage - 1, action
        return (pipeline.pp - 1, Action(work, micro_batch, chunk - 1)) if chunk > 0 else None
    return None


@lru_cache(maxsize=512)
def pipeline_actions(pipeline: Pipeline) -> tuple[tuple[Action, ...], ...]:
    """The actions of every stage, in order."""
    actions: list[list[Action]] = [[] for _ in range(pipeline.pp)]
    for stage, action in _ordered(pipeline):
        actions[stage].append(action)
    return tuple(map(tuple, actions))


def max_in_flight(pipeline: Pipeline, stage: int) -> int:
    """Most micro-batch chunks whose activations the stage holds at once.

    They are held from the forward to the last action that reads them.
    """
    last = Work.WEIGHT if pipeline.splits_backward else Work.BACKWARD
    held = most = 0
    for action in pipeline_actions(pipeline)[stage]:
        held += (action.work is Work.FORWARD) - (action.work is last)
        most = max(most, held)
    return most


def check(pipeline: Pipeline, actions: Sequence[Sequence[Action]]) -> None:
    """Proves that these lists complete, with sends that never block and receives that do.

    Every stage does each of its actions once; what each takes is done before; and between any two
    stages messages of one direction are received in the order in which they are sent. Raises
    AssertionError with the stage and the action where this fails.
    """
    works = [Work.FORWARD, Work.BACKWARD, *([Work.WEIGHT] if pipeline.splits_backward else [])]
    batches, chunks = range(pipeline.num_micro_batches), range(pipeline.virtual)
    wanted = [Action(work, m, c) for work in works for m in batches for c in chunks]
    for stage, own in enumerate(actions):
        assert sorted(own) == wanted, f"stage {stage} does not do all its actions once"
    channels: dict[tuple[int, int, Work], list[Action]] = {}
    done: set[tuple[int, Action]] = set()
    places = [0] * pipeline.pp
    progress = True
    while progress:
        progress = False
        for stage, own in enumerate(actions):
            while places[stage] < len(own):
                action = own[places[stage]]
                needed = source(pipeline, stage, action)
                if needed is not None and needed not in done:
                    break
                if needed is not None and needed[0] != stage:
                    queue = channels[needed[0], stage, action.work]
                    assert queue[0] == action, f"stage {stage} wants {action}, but {queue[0]} comes first"
                    queue.pop(0)
                if (target := destination(pipeline, stage, action)) is not None:
                    channels.setdefault((stage, target[0], action.work), []).append(target[1])
                done.add((stage, action))
                places[stage] += 1
                progress = True
    for stage, own in enumerate(actions):
        assert places[stage] == len(own), f"stage {stage} waits for ever at {own[places[stage]]}"
    assert not any(channels.values()), "a message is never received"


def _groups(pipeline: Pipeline) -> list[range]:
    """Micro-batches that go through one chunk of a stage before its next chunk has its turn."""
    total = pipeline.num_micro_batches
    number = 1 if pipeline.virtual == 1 else max(1, total // pipeline.pp)
    return [range(*split_range(total, number, group)) for group in range(number)]


def _merged(pipeline: Pipeline, stage: int, forwards: list[Action], backwards: list[Action]) -> list[Action]:
    """One stage's order: some forwards ahead, then one forward and one backward in turn.

    Under ZB-H1 stage s puts weight gradients off by s micro-batches, so that every stage holds
    as many activations as 1F1B's first; those left at the end fill the bubble.
    """
    after, total = pipeline.pp - 1 - stage, len(forwards)
    if pipeline.schedule is Schedule.GPIPE:
        ahead = total
    elif pipeline.virtual == 1:
        ahead = after
    else:
        ahead = 2 * after + (pipeline.virtual - 1) * max(map(len, _groups(pipeline)), default=0)
    ahead = min(ahead, total)
    result = forwards[:ahead]
    for i, backward in enumerate(backwards):
        result += forwards[ahead + i : ahead + i + 1]
        result.append(backward)
        if pipeline.splits_backward and i >= stage:
            result.append(backwards[i - stage]._replace(work=Work.WEIGHT))
    if pipeline.splits_backward:
        result += [action._replace(work=Work.WEIGHT) for action in backwards[max(0, total - stage) :]]
    return result


@lru_cache(maxsize=512)
def _ordered(pipeline: Pipeline) -> tuple[tuple[int, Action], ...]:
    """(stage, action) of the whole pipeline, in an order in which what an action takes comes first."""
    groups, chunks = _groups(pipeline), range(pipeline.virtual)
    forwards = [Action(Work.FORWARD, m, c) for group in groups for c in chunks for m in group]
    backwards = [Action(Work.BACKWARD, m, c) for group in groups for c in reversed(chunks) for m in group]
    orders = [_merged(pipeline, stage, forwards, backwards) for stage in range(pipeline.pp)]
    result: list[tuple[int, Action]] = []
    done: set[tuple[int, Action]] = set()
    places = [0] * pipeline.pp
    while len(result) < sum(map(len, orders)):
        before = len(result)
        for stage, order in enumerate(orders):
            while places[stage] < len(order):
                needed = source(pipeline, stage, order[places[stage]])
                if needed is not None and needed not in done:
                    break
                done.add((stage, order[places[stage]]))
                result.append((stage, order[places[stage]]))
                places[stage] += 1
        assert len(result) > before, f"no stage of {pipeline} can go on"
    return tuple(result)


Durations = float | Sequence[float]


def makespan(
    pipeline: Pipeline,
    forward_s: Durations,
    backward_s: Durations,
    weight_s: Durations = 0.0,
    send_s: float = 0.0,
) -> float:
    """Seconds from the first forward to the end of the last action on any stage.

    `forward_s`, `backward_s` (gradients of the input) and `weight_s` (of the weights) are seconds
    of one micro-batch in one chunk: one number, or one for each of the pp x virtual chunks in the
    order of the model. A message arrives `send_s` after what it carries is done; sending takes the
    sender no time. Exact up to EXACT_ACTIONS; longer pipelines grow by a constant for every pp
    micro-batches once they are full, which the exact times of two shorter ones give.
    """
    chunks = pipeline.pp * pipeline.virtual
    times = tuple(_each(value, chunks) for value in (forward_s, backward_s, weight_s))
    total, pp = pipeline.num_micro_batches, pipeline.pp
    most = max(6 * pp, EXACT_ACTIONS // chunks)
    if total <= most:
        return _exact_makespan(pipeline, times, send_s)
    rounds = -(-(total - most) // pp)
    base = total - rounds * pp
    longer = _exact_makespan(pipeline._replace(num_micro_batches=base), times, send_s)
    shorter = _exact_makespan(pipeline._replace(num_micro_batches=base - pp), times, send_s)
    return longer + rounds * (longer - shorter)


def _each(value: Durations, chunks: int) -> tuple[float, ...]:
    if isinstance(value, (int, float)):
        return (float(value),) * chunks
    assert len(value) == chunks, f"{len(value)} durations for {chunks} chunks"
    return tuple(value)


@lru_cache(maxsize=65536)
def _exact_makespan(pipeline: Pipeline, times: tuple[tuple[float, ...], ...], send_s: float) -> float:
    if not pipeline.splits_backward:
        both = tuple(b + w for b, w in zip(times[1], times[2], strict=True))
        times = (times[0], both, both)
    free = [0.0] * pipeline.pp
    results = [0.0] * (2 * len(times[0]) * pipeline.num_micro_batches + 2)
    for stage, work, part, needed, slot, remote in _links(pipeline):
        start = results[needed] + send_s if remote else results[needed]
        end = (start if start > free[stage] else free[stage]) + times[work][part]
        free[stage] = results[slot] = end
    return max(free)


Link = tuple[int, int, int, int, int, bool]


@lru_cache(maxsize=512)
def _links(pipeline: Pipeline) -> tuple[Link, ...]:
    """(stage, work, chunk of the model, slot it reads, slot it writes, whether by message) of each action.

    The last slot but one stands for no input, the last takes what nobody reads.
    """
    pp, parts = pipeline.pp, pipeline.pp * pipeline.virtual
    none = 2 * parts * pipeline.num_micro_batches

    def slot(stage: int, action: Action) -> int:
        return (action.micro_batch * parts + action.chunk * pp + stage) * 2 + action.work

    links = []
    for stage, action in _ordered(pipeline):
        part = action.chunk * pp + stage
        if action.work is Work.WEIGHT:
            links.append((stage, int(action.work), part, none, none + 1, False))
            continue
        needed = source(pipeline, stage, action)
        reads = none if needed is None else slot(*needed)
        remote = needed is not None and needed[0] != stage
        links.append((stage, int(action.work), part, reads, slot(stage, action), remote))
    return tuple(links)
