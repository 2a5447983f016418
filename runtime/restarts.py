"""Restarts: whether a run that has failed is tried again, from where, and the record of it.

Decides which failures are worth another attempt. Errors of what the user gave never are: they would come
again. Neither is a failure that has come twice in the same place without a new checkpoint in between.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from realloc.errors import InputError, RunError
from runtime.checkpoint_files import Manifest, checkpoints_folder, list_checkpoints, verify
from runtime.verdict import Failure, continuation

RECORD = "restarts.jsonl"


class Restarts:
    """The restarts of one run, up to `limit` of them."""

    def __init__(self, out: Path, limit: int, *, trust: bool = False) -> None:
        """`trust`: the run was given `--trust`, which is to be repeated."""
        self._out, self._limit, self._trust = out, limit, trust
        self._last: tuple[Failure, int] | None = None
        self.count = 0

    def after(self, failure: Failure) -> tuple[Path, Manifest] | None:
        """The checkpoint to go on from after a failure; None: from the beginning.

        Says what has failed and what follows, and keeps it in the run's folder. Raises RunError when
        there is to be no other attempt.
        """
        go_on = continuation(self._out, trust=self._trust)
        end = f"{failure.message}\nLogs of all ranks: {self._out / 'logs'}{go_on}"
        if failure.is_final or self._limit == 0:
            raise RunError(end)
        if self.count == self._limit:
            raise RunError(f"{end}\nNot restarted again: --max-restarts is {self._limit}.")
        found = newest_intact(self._out)
        done = 0 if found is None else found[1].iteration
        if self._last is not None and _is_same(failure, self._last[0]) and done == self._last[1]:
            raise RunError(f"{end}\nNot restarted again: it has failed in the same place before.")
        self._last = failure, done
        self.count += 1
        start = "the beginning" if found is None else found[0].name
        print(
            f"realloc: {failure.message}\nrealloc: restart {self.count} of {self._limit}, from {start}",
            file=sys.stderr,
            flush=True,
        )
        self._keep(failure, done)
        return found

    def _keep(self, failure: Failure, done: int) -> None:
        row = {
            "restart": self.count,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "from_iteration": done,
            **asdict(failure),
        }
        try:
            with (self._out / RECORD).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
        except OSError as error:
            raise RunError(f"{failure.message}\n{self._out / RECORD}: {error.strerror}.") from None


def _is_same(one: Failure, other: Failure) -> bool:
    """Whether two failures have come in the same place, in the same way."""
    return (one.kind, one.rank, one.iteration, one.instruction) == (
        other.kind,
        other.rank,
        other.iteration,
        other.instruction,
    )


def newest_intact(out: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that is whole; what is wrong with newer ones is said."""
    for checkpoint in reversed(list_checkpoints(checkpoints_folder(out))):
        try:
            return checkpoint, verify(checkpoint)
        except InputError as error:
            print(f"realloc: warning: {error} Going back to the one before.", file=sys.stderr)
    return None
