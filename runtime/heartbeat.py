"""Heartbeats: where each rank is and that it lives, for the launcher that watches it.

Decides what a rank says of itself and how it gets there: through memory that launcher and ranks share,
since a disk that is full, frozen or busy must neither hold a rank up nor make it look dead. Knows
nothing of what the silence of a rank means; `runtime.watchdog` judges that.
"""

from __future__ import annotations

import linecache
import mmap
import struct
import sys
import sysconfig
import threading
from dataclasses import dataclass
from types import FrameType

LOADING, SAVING, EXPORTING, ENDED = -1, -2, -3, -4
"""Where a rank is when it is in no instruction."""
PHASES = {
    LOADING: "before the first iteration",
    SAVING: "taking the checkpoint",
    EXPORTING: "after the last iteration",
    ENDED: "at its end",
}
_PLACE = struct.Struct("<qq")
_BEAT = struct.Struct("<qq")
_TEXT_BYTES = 200
_SLOT_BYTES = _PLACE.size + _BEAT.size + _TEXT_BYTES
_PYTHON = sysconfig.get_path("stdlib")
_WAITING = ("/torch/distributed/distributed_c10d.py", "/torch/cuda/streams.py")
"""Whoever is in these waits for messages, or for a GPU that may be waiting for them."""


@dataclass(frozen=True)
class Beat:
    """What a rank said last. `index` is that of an instruction, or one of PHASES.

    `beats` grows as long as the rank's threads run. At its last beat the main thread was in the line
    of code `code`; `waits`: there it waited for another rank.
    """

    iteration: int
    index: int
    beats: int
    waits: bool
    code: str


class Board:
    """Shared memory with a slot for each rank of a node; made before the ranks are forked."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._memory = mmap.mmap(-1, max(1, slots) * _SLOT_BYTES)
        for slot in range(slots):
            self.put(slot, 0, LOADING)

    def put(self, slot: int, iteration: int, index: int) -> None:
        _PLACE.pack_into(self._memory, slot * _SLOT_BYTES, iteration, index)

    def beat(self, slot: int, beats: int, *, waits: bool, code: str) -> None:
        start = slot * _SLOT_BYTES + _PLACE.size
        _BEAT.pack_into(self._memory, start, beats, waits)
        text = code.encode(errors="replace")[-_TEXT_BYTES:]
        start += _BEAT.size
        self._memory[start : start + _TEXT_BYTES] = text.ljust(_TEXT_BYTES, b"\0")

    def read(self, slot: int) -> Beat:
        """The rank's place and last beat; `beats` 0 as long as there was none."""
        start = slot * _SLOT_BYTES
        iteration, index = _PLACE.unpack_from(self._memory, start)
        beats, waits = _BEAT.unpack_from(self._memory, start + _PLACE.size)
        start += _PLACE.size + _BEAT.size
        text = self._memory[start : start + _TEXT_BYTES].rstrip(b"\0")
        return Beat(iteration, index, beats, bool(waits), text.decode(errors="replace"))


class Heartbeat:
    """This rank's slot, and the thread that beats. A context manager: leaving it ends the beats."""

    def __init__(self, board: Board, slot: int, every_s: float) -> None:
        self._board, self._slot, self._every_s = board, slot, every_s
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def at(self, iteration: int, index: int) -> None:
        """Says where this rank is now."""
        self._board.put(self._slot, iteration, index)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        beats = 0
        while True:
            beats += 1
            waits, code = position(sys._current_frames().get(self._main))
            self._board.beat(self._slot, beats, waits=waits, code=code)
            if self._stop.wait(self._every_s):
                return


def position(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a thread waits for another rank, and the line it is in; not of torch's or Python's own code."""
    waits = False
    while frame is not None and _is_library(frame.f_code.co_filename):
        waits = waits or frame.f_code.co_filename.endswith(_WAITING)
        frame = frame.f_back
    if frame is None:
        return waits, ""
    path, line = frame.f_code.co_filename, frame.f_lineno
    # messages that ranks send to each other are waited for where they are used: `work.wait()`
    waits = waits or ".wait()" in linecache.getline(path, line)
    return waits, f"{frame.f_code.co_qualname} ({path}:{line})"


def _is_library(path: str) -> bool:
    is_pythons = path.startswith((_PYTHON, "<frozen")) and "/site-packages/" not in path
    return is_pythons or "/torch/" in path
