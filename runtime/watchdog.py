"""The watchdog of a node: finds ranks that have died, stopped or hung, and says which one is to blame.

Decides when a rank counts as lost. It sees the ranks' heartbeats and, through the kernel, their
processes; what follows from what it finds is not decided here.

Time is counted in the watchdog's own steps, of which none counts for more than MAX_STEP_S: when the
whole machine was asleep or the launcher was stopped, nobody is found dead for it. No clocks are compared.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess

from runtime.heartbeat import ENDED, Beat, Board
from runtime.host_process import HostProcess, oom_kills
from runtime.program import Program

MAX_STEP_S = 1.0
GRACE_S = 1.0
"""How long the ranks beside one that has died may go on, to say what they have seen."""
_STOPPED_SHARE, _SILENT_SHARE = 0.4, 0.75
"""Of the time within which a rank has to be found: how long it may be stopped, how long silent."""
_IDLE_SHARE = 0.05
"""Of a core: a rank that uses more is at work and not frozen, be it ever so silent."""

DIED, STOPPED, FROZEN, HUNG = "died", "stopped", "frozen", "hung"


@dataclass(frozen=True)
class Limits:
    """When a rank is lost.

    `detect_within_s`: a rank that died, was stopped or whose threads all stand still is found in this
    time. An instruction hangs when it takes more than `hang_factor` times what the plan predicts, and
    more than `hang_floor_s`.
    """

    detect_within_s: float = 10.0
    hang_factor: float = 20.0
    hang_floor_s: float = 600.0

    @property
    def beat_s(self) -> float:
        """From one beat of a rank to the next."""
        return min(1.0, self.detect_within_s / 10)

    def deadline_s(self, predicted_s: float | None) -> float:
        return max(self.hang_floor_s, self.hang_factor * (predicted_s or 0.0))


@dataclass(frozen=True)
class Watched:
    """One rank as the watchdog sees it.

    `same_s`: how long it has been where it is; `silent_s`: how long without a beat. The rest is asked
    of ranks that have missed a beat: `cpu_s` is what it has computed since.
    """

    rank: int
    beat: Beat
    same_s: float = 0.0
    silent_s: float = 0.0
    is_dead: bool = False
    is_stopped: bool = False
    is_runnable: bool = False
    cpu_s: float = 0.0


@dataclass(frozen=True)
class Finding:
    """A rank that is lost: DIED, STOPPED, FROZEN or HUNG, where it was, and what is to say of it."""

    kind: str
    rank: int
    beat: Beat
    text: str


@dataclass(frozen=True)
class Evidence:
    """What a watchdog knows of its ranks when they have to end: of each its last beat and host memory.

    `exit_codes` are those of the ranks that ended by themselves.
    """

    finding: Finding | None
    beats: Mapping[int, Beat]
    exit_codes: Mapping[int, int]
    resident_bytes: Mapping[int, int]
    num_oom_kills: int
    """Processes that the kernel has killed for want of memory since the ranks began."""


def judge(ranks: Sequence[Watched], program: Program, limits: Limits) -> Finding | None:
    """The rank to blame, if one is lost.

    Dead ranks go before stopped ones, these before those that hang: the others follow from them.
    """
    at_work = [rank for rank in ranks if rank.beat.index != ENDED]
    for w in at_work:
        if w.is_dead:
            return Finding(DIED, w.rank, w.beat, "has ended")
    for w in at_work:
        if w.is_stopped and w.silent_s >= _STOPPED_SHARE * limits.detect_within_s:
            return Finding(STOPPED, w.rank, w.beat, "was stopped (SIGSTOP, or a debugger)")
    for w in at_work:
        if _is_frozen(w, limits):
            return Finding(
                FROZEN, w.rank, w.beat, f"is frozen: none of its threads ran for {w.silent_s:.1f} s"
            )
    return _hung(at_work, len(ranks) == program.world_size, program, limits)


def _is_frozen(w: Watched, limits: Limits) -> bool:
    """Silent, and not because a long call keeps the interpreter to itself, or for want of a core."""
    return (
        w.silent_s >= _SILENT_SHARE * limits.detect_within_s
        and w.cpu_s < _IDLE_SHARE * w.silent_s
        and not w.is_runnable
    )


def _hung(at_work: Sequence[Watched], are_all: bool, program: Program, limits: Limits) -> Finding | None:
    """A rank that is in its instruction for too long and does not wait there for others.

    Where all ranks of the run wait for each other (a message was lost), the one that is furthest behind.
    """

    def deadline_s(w: Watched) -> float:
        return limits.deadline_s(program.instructions[w.beat.index].predicted_s)

    late = sorted(
        (w for w in at_work if w.beat.index >= 0 and w.same_s > deadline_s(w)),
        key=lambda w: (w.beat.iteration, w.beat.index),
    )
    stuck = [w for w in late if not w.beat.waits]
    all_wait = are_all and all(w.beat.waits and w.same_s > limits.hang_floor_s for w in at_work)
    if not stuck and not (late and all_wait):
        return None
    first = (stuck or late)[0]
    text = f"hangs: {first.same_s:.0f} s in an instruction that may take {deadline_s(first):.0f} s"
    if first.beat.code:
        text += f"; it is in {first.beat.code}"
    if not stuck:
        text += ", waiting for other ranks, as all of them do"
    return Finding(HUNG, first.rank, first.beat, text)


class Watchdog:
    """Watches the ranks of a node, once it is told their processes.

    All of it in one thread, the one that also joins the ranks.
    """

    def __init__(self, board: Board, first_rank: int, program: Program, limits: Limits) -> None:
        self.board, self.limits = board, limits
        self._first_rank, self._program = first_rank, program
        self._processes: Sequence[BaseProcess] = ()
        self._tracks: list[_Track] = []
        self._oom_kills = oom_kills()
        self._last = time.monotonic()
        self._grace_s = GRACE_S

    def watch(self, processes: Sequence[BaseProcess]) -> None:
        """Takes the ranks' processes, in the order of the ranks; some may have ended already."""
        self._processes = processes
        self._tracks = [
            _Track(self._first_rank + slot, slot, self.board, process, self.limits)
            for slot, process in enumerate(processes)
        ]

    def step(self) -> Finding | None:
        """Looks at all ranks; to be called several times a second while they run.

        Returns what it finds. That a rank has died it says only after the others have had GRACE_S to
        tell what they saw of it, or have ended too.
        """
        now = time.monotonic()
        passed, self._last = min(now - self._last, MAX_STEP_S), now
        watched = [track.look(passed) for track in self._tracks]
        finding = judge(watched, self._program, self.limits)
        if finding is not None and finding.kind == DIED and not all(w.is_dead for w in watched):
            self._grace_s -= passed
            if self._grace_s > 0:
                return None
        return finding

    @property
    def all_at_end(self) -> bool:
        """Whether all ranks have done their work."""
        return all(self.board.read(slot).index == ENDED for slot in range(self.board.slots))

    def kill(self) -> None:
        """Ends all ranks that are still there, stopped ones too."""
        for process in self._processes:
            if process.exitcode is None:
                process.kill()

    def evidence(self, finding: Finding | None) -> Evidence:
        """What is known now; to be asked before `kill`, whose victims have exit codes that say nothing."""
        ranks = range(self._first_rank, self._first_rank + self.board.slots)
        ended = {r: p.exitcode for r, p in zip(ranks, self._processes, strict=True)}
        return Evidence(
            finding,
            {rank: self.board.read(slot) for slot, rank in enumerate(ranks)},
            {rank: code for rank, code in ended.items() if code is not None},
            {rank: track.resident_bytes for rank, track in zip(ranks, self._tracks, strict=True)},
            oom_kills() - self._oom_kills,
        )


class _Track:
    """What has been seen of one rank so far."""

    def __init__(self, rank: int, slot: int, board: Board, process: BaseProcess, limits: Limits) -> None:
        assert process.pid is not None, "it has been started"
        self._rank, self._slot, self._board, self._process = rank, slot, board, process
        self._host = HostProcess(process.pid)
        self._missed_s = 2 * limits.beat_s
        self._beat = board.read(slot)
        self._same_s = self._silent_s = self._cpu_s = 0.0
        self.resident_bytes = self._host.resident_bytes

    def look(self, passed_s: float) -> Watched:
        """The rank as it is, `passed_s` seconds after the last look."""
        beat = self._board.read(self._slot)
        is_same = (beat.iteration, beat.index) == (self._beat.iteration, self._beat.index)
        self._same_s = self._same_s + passed_s if is_same else 0.0
        if beat.beats == self._beat.beats:
            self._silent_s += passed_s
        else:
            self._silent_s = 0.0
            self._cpu_s = self._host.cpu_s
            self.resident_bytes = self._host.resident_bytes or self.resident_bytes
        self._beat = beat
        seen = Watched(self._rank, beat, self._same_s, self._silent_s, self._process.exitcode is not None)
        if seen.is_dead or self._silent_s < self._missed_s:
            return seen
        return replace(
            seen,
            is_stopped=self._host.is_stopped,
            is_runnable=self._host.has_runnable_thread,
            cpu_s=self._host.cpu_s - self._cpu_s,
        )
