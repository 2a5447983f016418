"""Which launchers of a run are still there: each tells the others through node 0's store, and listens.

Decides when a launcher counts as lost, and when node 0 does. What follows from it is not decided here.
A thread does the talking, on a connection of its own, for a cut link may leave it waiting for ever: so its
silence is judged from outside. Time is counted in steps of which none counts for more than MAX_STEP_S: a
launcher that was itself stopped for a while finds nobody lost for it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch.distributed as dist

MAX_STEP_S = 1.0


@dataclass(frozen=True)
class Trouble:
    """What has gone wrong on a node, as all are told. `text` is empty where its ranks have to say it."""

    node: int
    text: str


def raise_alarm(store: dist.Store, attempt: int, trouble: Trouble) -> None:
    """Tells all launchers to stop this attempt, unless somebody else has already."""
    store.compare_set(_alarm(attempt), "", json.dumps(asdict(trouble)))


class Silence:
    """How long a number has not changed, in steps of bounded length."""

    def __init__(self) -> None:
        self._last, self._seen = time.monotonic(), -1
        self.seconds = 0.0

    def look(self, number: int) -> float:
        now = time.monotonic()
        step, self._last = min(now - self._last, MAX_STEP_S), now
        self.seconds = 0.0 if number != self._seen else self.seconds + step
        self._seen = number
        return self.seconds


class Presence:
    """This launcher's beats, and what it hears. Node 0 listens to all others, they listen to node 0.

    `store` must be a connection of its own. Ends with the process, or with `stop`.
    """

    def __init__(self, store: dist.Store, node: int, others: Iterable[int], lost_s: float) -> None:
        """`lost_s`: so long a launcher may be silent."""
        self._store, self._node, self._lost_s = store, node, lost_s
        self._silent = {other: Silence() for other in others}
        self._store_silent = Silence()
        self._turns = 0
        self._is_broken = False
        self._troubles: dict[int, Trouble] = {}
        self._lost: set[int] = set()
        self._stop = threading.Event()
        self._talking = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)
        self.attempt = 0
        """The one whose alarm is listened for."""
        self._thread.start()

    @property
    def trouble(self) -> Trouble | None:
        """What a launcher has raised the alarm for in this attempt."""
        return self._troubles.get(self.attempt)

    @property
    def lost(self) -> frozenset[int]:
        """Nodes whose launchers are silent for too long."""
        return frozenset(self._lost)

    @property
    def is_cut_off(self) -> bool:
        """Whether node 0's store does not answer any more. To be asked several times a second."""
        return self._is_broken or self._store_silent.look(self._turns) > self._lost_s

    def stop(self) -> None:
        """Ends the thread, unless a cut link holds it: one that a question's answer finds while the
        interpreter ends takes the process down with it."""
        self._stop.set()
        if not self.is_cut_off:
            self._thread.join(self._lost_s)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """The thread is not inside torch's store while the block runs, unless a cut link holds it there.

        For forks: the store's locks are the process's, and one that a thread holds is held for ever in the
        child, which has no such thread.
        """
        held = self._talking.acquire(timeout=self._lost_s)
        try:
            yield
        finally:
            if held:
                self._talking.release()

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._lost_s / 12):
                with self._talking:
                    self._store.set(_beat(self._node), str(self._turns))
                    self._listen()
                self._turns += 1
        except dist.DistError:
            self._is_broken = True

    def _listen(self) -> None:
        attempt = self.attempt
        if attempt not in self._troubles and self._store.check([_alarm(attempt)]):
            self._troubles[attempt] = Trouble(**json.loads(self._store.get(_alarm(attempt))))
        for node, silence in self._silent.items():
            if not self._store.check([hello_key(node)]):
                continue  # a node that has not come yet is waited for elsewhere
            # it may be cut off after it has come and before its first beat
            beats = int(self._store.get(_beat(node))) if self._store.check([_beat(node)]) else -1
            if silence.look(beats) > self._lost_s:
                self._lost.add(node)


def hello_key(node: int) -> str:
    """Where a node's launcher says that it has come."""
    return f"hello/{node}"


def _beat(node: int) -> str:
    return f"beat/{node}"


def _alarm(attempt: int) -> str:
    return f"alarm/{attempt}"
