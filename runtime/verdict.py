"""What a failed run says: which rank failed first, where it was, why, and how to go on.

Decides who is to blame and whether another attempt could go better. Knows neither how ranks are started
nor how they are stopped.
"""

from __future__ import annotations

import errno
import json
import shlex
import signal
import socket
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException

from realloc.errors import ReallocError
from runtime.checkpoint_files import checkpoints_folder, list_checkpoints
from runtime.heartbeat import PHASES, SAVING, Beat, position
from runtime.program import Program
from runtime.watchdog import DIED, Evidence

USER, DISK, PEER, OTHER = "user", "disk", "peer", "other"
"""Why a rank fails: what the user gave, a disk, another rank that is gone, anything else."""
KILLED, OUT_OF_MEMORY, ERROR = "killed", "out of memory", "error"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class RankError:
    """How a rank failed, written to `errors/rank-N.json` as it dies. `cause`: USER, DISK, PEER or OTHER."""

    rank: int
    time_s: float
    type: str
    message: str
    cause: str


@dataclass(frozen=True)
class Failure:
    """Why an attempt to run a plan ended. None: no rank is to blame, or it was in no instruction.

    `kind`: KILLED, OUT_OF_MEMORY, ERROR, what a watchdog finds, or what befell a node. `is_secondary`: it
    follows from a failure somewhere else. `is_final`: another attempt would end in the same way.
    """

    kind: str
    host: str
    message: str
    rank: int | None = None
    iteration: int | None = None
    instruction: str | None = None
    call: str | None = None
    is_secondary: bool = False
    is_final: bool = False


def cause_of(error: BaseException) -> str:
    """Why a rank fails with this error."""
    if isinstance(error, ReallocError):
        return USER
    if isinstance(error, OSError) and error.errno in _FULL:
        return DISK
    if isinstance(error, (dist.DistError, SignalException)):
        return PEER
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    waits, _ = position(frames[-1]) if frames else (False, "")
    return PEER if waits and isinstance(error, RuntimeError) else OTHER


def read_errors(out: Path, ranks: Sequence[int]) -> list[RankError]:
    """What these ranks have said as they died; of one that was killed while it wrote, nothing."""
    found = []
    for path in (out / "errors" / f"rank-{rank}.json" for rank in ranks):
        if path.exists():
            with suppress(ValueError):
                found.append(RankError(**json.loads(path.read_bytes())))
    return found


def failure_of(evidence: Evidence, errors: Sequence[RankError], program: Program) -> Failure:
    """Who of a node's ranks is to blame.

    Ranks that the kernel ended go before those that raised, and these before those that only missed a peer.
    """
    finding = evidence.finding
    if finding is not None and finding.kind != DIED:
        return _failure(finding.kind, finding.rank, finding.beat, finding.text, program)
    own = [error for error in errors if error.cause != PEER]
    codes = {rank: code for rank, code in sorted(evidence.exit_codes.items()) if code < 0}
    killed = [r for r, code in codes.items() if -code not in (signal.SIGTERM, signal.SIGABRT)]
    # gloo may abort a process whose peers are gone
    killed = killed or [r for r, code in codes.items() if -code == signal.SIGABRT and not own]
    if killed:
        rank = killed[0]
        kind, text = _killed(-codes[rank], evidence, rank)
        return _failure(kind, rank, evidence.beats[rank], text, program)
    if errors:
        error = min(own or errors, key=lambda e: e.time_s)
        name = "" if error.cause == USER else f"{error.type}: "
        kind = OUT_OF_MEMORY if _lacks_memory(error) else ERROR
        text = f"failed: {name}{error.message.strip()}"
        failure = _failure(kind, error.rank, evidence.beats[error.rank], text, program)
        return replace(failure, is_secondary=error.cause == PEER, is_final=error.cause in (USER, DISK))
    rank, code = next(iter(evidence.exit_codes.items()), (min(evidence.beats), 1))
    return _failure(ERROR, rank, evidence.beats[rank], f"ended with exit code {code}", program)


def _lacks_memory(error: RankError) -> bool:
    """Of a GPU or of the host, as torch and Python say it."""
    return error.type in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in error.message


def _killed(number: int, evidence: Evidence, rank: int) -> tuple[str, str]:
    """The kind of the failure, and what to say, of a rank that a signal has ended."""
    text = f"was killed by signal {number} ({signal.Signals(number).name})"
    if number != signal.SIGKILL:
        return KILLED, text
    held = f"it held {evidence.resident_bytes.get(rank, 0) / 1e9:.2f} GB"
    if evidence.num_oom_kills:
        return OUT_OF_MEMORY, f"{text}: this host, or its container, has run out of memory; {held}"
    return KILLED, f"{text}; {held}, and the kernel has killed nothing for want of memory"


def _failure(kind: str, rank: int, beat: Beat, text: str, program: Program) -> Failure:
    host = socket.gethostname()
    if beat.index >= 0:
        node = program.instructions[beat.index].node
        number = f"instruction {beat.index + 1} of {len(program.instructions)}"
        message = f"rank {rank} on {host} (iteration {beat.iteration}, {node.name}, {number}) {text}"
        call = node.call or node.dst or node.src
        return Failure(kind, host, message, rank, beat.iteration, node.name, call)
    phase = PHASES[beat.index]
    where = f"iteration {beat.iteration}, {phase}" if beat.index == SAVING else phase
    return Failure(kind, host, f"rank {rank} on {host} ({where}) {text}", rank, beat.iteration)


def continuation(out: Path, *, trust: bool) -> str:
    """How to go on from the last checkpoint; empty when there is none. `trust`: the run needed `--trust`."""
    found = list_checkpoints(checkpoints_folder(out))
    if not found:
        return ""
    command = ["realloc", "run", "--resume", str(out), *(["--trust"] if trust else [])]
    return f"\nContinue from {found[-1].name}: {shlex.join(command)}"
