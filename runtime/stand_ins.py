"""Collectives of a shard that is measured alone, on a host: they do nothing, but the rank waits as in a run.

After a wait the system has used the core's caches, and what it computes next takes longer: a decode step of
half a 260K Llama, with a dozen collectives, 1.1 ms instead of 0.8 (with idle virtual cores). What the
collectives themselves take is not counted; links are measured by themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from runtime.stopwatch import COLLECTIVES

_WAIT_S = 1e-4
"""Enough for the core to be given away; longer waits change nothing."""


class StandIns:
    """A clock that stands still within the collectives of torch.distributed, and makes them wait."""

    def __init__(self) -> None:
        self._inside = 0.0

    def now(self) -> float:
        """Seconds for which this process has had a core, without those in collectives."""
        return time.process_time() - self._inside

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Collectives wait while the block runs; their group's must return at once."""
        own: dict[str, Callable[..., Any]] = {
            name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)
        }
        try:
            for name, function in own.items():
                setattr(dist, name, self._waiting(function))
            yield
        finally:
            for name, function in own.items():
                setattr(dist, name, function)

    def _waiting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = function(*args, **kwargs)
            time.sleep(_WAIT_S)
            self._inside += time.process_time() - start
            return result

        return waiting
