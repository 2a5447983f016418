"""Whom the watchdog blames, and whom it leaves in peace."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from realloc.augmented import Node, NodeKind
from runtime.heartbeat import ENDED, LOADING, SAVING, Beat, Board, Heartbeat
from runtime.program import Instruction, Program
from runtime.watchdog import DIED, FROZEN, HUNG, STOPPED, Limits, Watchdog, Watched, judge

LIMITS = Limits(detect_within_s=10, hang_factor=20, hang_floor_s=600)
PREDICTED_S = (1.0, None, 100.0)
PROGRAM = Program(
    3,
    tuple(
        Instruction(index, Node(f"call{index}", NodeKind.CALL, (0, 1, 2), call=f"call{index}"), predicted_s)
        for index, predicted_s in enumerate(PREDICTED_S)
    ),
)


def rank(number: int, index: int = 1, *, waits: bool = False, iteration: int = 4, **seen: Any) -> Watched:
    beat = Beat(iteration, index, 9, waits, f"code_of_{number}")
    return replace(Watched(number, beat, same_s=seen.pop("same_s", 1.0)), **seen)


def test_nobody_is_blamed_for_being_slow_silent_or_without_a_core() -> None:
    patient = [
        rank(0, 0, same_s=599.0),  # ten times slower than predicted, and more, but not yet the floor
        rank(0, 2, same_s=1999.0),  # predicted to take 100 s
        rank(0, LOADING, same_s=1e5),
        rank(0, SAVING, same_s=1e5),
        rank(0, silent_s=3.9, is_stopped=True),  # a debugger's short stop
        rank(0, silent_s=60.0, cpu_s=30.0),  # a long call that keeps the interpreter to itself
        rank(0, silent_s=60.0, is_runnable=True),  # no core to run on
    ]
    for watched in patient:
        assert judge([watched, rank(1, waits=True, same_s=1e4)], PROGRAM, LIMITS) is None, watched
    assert judge([rank(0, ENDED, silent_s=1e5, is_dead=True), rank(1)], PROGRAM, LIMITS) is None


@pytest.mark.parametrize(
    ("lost", "kind"),
    [
        ({"is_dead": True}, DIED),
        ({"is_stopped": True, "silent_s": 4.1}, STOPPED),
        ({"silent_s": 7.6, "cpu_s": 0.1}, FROZEN),
        ({"same_s": 601.0}, HUNG),
    ],
)
def test_the_rank_itself_is_blamed_and_not_those_that_wait_for_it(lost: dict[str, Any], kind: str) -> None:
    waiting = [rank(0, waits=True, same_s=5000.0), rank(2, 2, waits=True, same_s=5000.0)]
    finding = judge([waiting[0], rank(1, **lost), waiting[1]], PROGRAM, LIMITS)
    assert finding is not None
    assert (finding.kind, finding.rank) == (kind, 1)
    # whatever else is wrong, a dead rank is why
    finding = judge([rank(0, **lost), rank(1, is_dead=True)], PROGRAM, LIMITS)
    assert finding is not None
    assert finding.rank == (0 if kind == DIED else 1)


def test_where_all_wait_the_last_in_the_program_is_blamed() -> None:
    ranks = [
        rank(0, 2, waits=True, same_s=700.0),
        rank(1, 1, waits=True, same_s=700.0),
        rank(2, 2, iteration=3, waits=True, same_s=2100.0),
    ]
    finding = judge(ranks, PROGRAM, LIMITS)
    assert finding is not None
    assert finding.rank == 2
    assert "as all of them do" in finding.text
    assert judge([*ranks[:2], replace(ranks[2], same_s=10.0)], PROGRAM, LIMITS) is None


def test_a_heartbeat_says_where_the_main_thread_is_and_goes_on_while_it_waits() -> None:
    board = Board(2)
    assert board.read(1) == Beat(0, LOADING, 0, False, "")
    with Heartbeat(board, 1, 0.01) as heartbeat:
        heartbeat.at(7, 3)
        deadline = time.monotonic() + 20
        while (beat := board.read(1)).beats < 5:
            time.sleep(0.001)
            assert time.monotonic() < deadline
        assert (beat.iteration, beat.index, beat.waits) == (7, 3, False)
        assert "test_a_heartbeat_says" in beat.code
        threading.Event().wait(0.1)  # no wait for another rank
        assert not board.read(1).waits
        assert "test_a_heartbeat_says" in board.read(1).code
    assert board.read(0).beats == 0
    stopped = board.read(1).beats
    time.sleep(0.05)
    assert board.read(1).beats == stopped


def test_a_rank_that_ended_before_it_could_be_looked_at_is_found() -> None:
    fork = multiprocessing.get_context("fork")
    gone, there = fork.Process(target=os._exit, args=(7,)), fork.Process(target=time.sleep, args=(60,))
    for process in (gone, there):
        process.start()
    gone.join()
    watchdog = Watchdog(Board(2), 4, PROGRAM, LIMITS)
    watchdog.watch([gone, there])
    try:
        deadline = time.monotonic() + 30.0
        while (finding := watchdog.step()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert finding is not None
        assert (finding.kind, finding.rank) == (DIED, 4)
        assert watchdog.evidence(finding).exit_codes == {4: 7}
    finally:
        watchdog.kill()
        there.join()
