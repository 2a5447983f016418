"""What a failed run says: which rank failed first, where it was, why, and how to go on.

Reads what the ranks left in the run's folder; knows neither how ranks are started nor how they are stopped.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path

from runtime.checkpoint_files import checkpoints_folder, list_checkpoints
from runtime.program import Program
from runtime.tracing import read_status


def describe_failure(out: Path, program: Program, exit_codes: Mapping[int, int]) -> str:
    """One message that names the rank that failed first, the iteration, the call and the cause.

    `exit_codes` are those that the agent saw; a rank killed by a signal goes before ranks that
    raised, since their errors follow from its death.
    """
    texts = [path.read_text(encoding="utf-8") for path in sorted((out / "errors").glob("rank-*.json"))]
    errors = [json.loads(text) for text in texts if text.strip()]
    killed = [r for r, code in sorted(exit_codes.items()) if code < 0 and -code != signal.SIGTERM]
    if killed:
        rank, code = killed[0], -exit_codes[killed[0]]
        cause = f"was killed by signal {code} ({signal.Signals(code).name})"
        if code == signal.SIGKILL:
            cause += "; if nobody killed it, the machine may have run out of memory"
    elif errors:
        first = min(errors, key=lambda e: e["time_s"])
        rank = first["rank"]
        kind = "" if first["is_for_users"] else f"{first['type']}: "
        cause = f"failed: {kind}{first['message'].strip()}"
    else:
        rank, code = next(iter(exit_codes.items()), (0, 1))
        cause = f"ended with exit code {code}"
    logs = f"\nLogs of all ranks: {out / 'logs'}"
    return f"rank {rank}{_place(out, program, rank)} {cause}{logs}{continuation(out)}"


def continuation(out: Path) -> str:
    """How to go on from the last checkpoint; empty when there is none."""
    found = list_checkpoints(checkpoints_folder(out))
    return f"\nContinue from {found[-1].name}: realloc run --resume {out}" if found else ""


def _place(out: Path, program: Program, rank: int) -> str:
    status = read_status(out / "status" / f"rank-{rank}")
    if status is None:
        return " (before the first iteration)"
    iteration, index = status
    return f" (iteration {iteration}, {program.instructions[index].node.name})"
