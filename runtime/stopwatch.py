"""What of a call is communication: seconds of collectives and receptions, by what they are for.

While a call runs, the blocking functions of torch.distributed and of `runtime.channels` are replaced by ones
that look at the clock as well, so that nobody who communicates knows of it. A reading costs a microsecond,
the fastest collective a hundred. Only where these functions block the host is the time that of the
communication: on a GPU they return at once, and nothing is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch.distributed as dist

from runtime import channels
from runtime.parallel import ParallelContext
from runtime.zero import UnitExchange

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_single",
    "all_gather_into_tensor",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)


class Stopwatch:
    """Seconds of one call by term, exclusive of each other.

    `tp_communication`, `dp_communication` and `mesh_communication` are collectives of that group, ZeRO's
    with the copies around them; `pipeline` are receptions from other stages (their work before a message
    included), `optimizer` is what `timed` is told to be that.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._terms: dict[Any, str] = {}
        self._inside = 0.0

    @contextmanager
    def timed(self, term: str) -> Iterator[None]:
        """Adds what the block takes to a term, less what is timed within it."""
        outside, self._inside = self._inside, 0.0
        start = perf_counter()
        try:
            yield
        finally:
            spent = perf_counter() - start
            self._seconds[term] = self._seconds.get(term, 0.0) + spent - self._inside
            self._inside = outside + spent

    @contextmanager
    def during(self, context: ParallelContext) -> Iterator[dict[str, float]]:
        """Times the block, a call in that context; the seconds are complete when it is left."""
        self._seconds = {}
        if context.device.type != "cpu":
            yield {}
            return
        self._terms = {
            context.mesh_group: "mesh_communication",
            context.ends_group: "dp_communication",
            context.dp_group: "dp_communication",
            context.tp_group: "tp_communication",
        }
        self._terms.pop(None, None)  # groups of one rank, and the whole world's
        names = COLLECTIVES if context.mesh.size > 1 else ()
        own: dict[tuple[Any, str], Callable[..., Any]] = {
            (dist, name): getattr(dist, name) for name in names if hasattr(dist, name)
        }
        replaced = {door: self._timing(function) for door, function in own.items()}
        if context.strategy.pp > 1:
            for door in ((dist, "recv"), (channels, "wait_for")):
                own[door] = getattr(*door)
                replaced[door] = self._receiving(own[door])
        if context.strategy.zero:
            for name in ("gather", "reduce"):
                exchange = getattr(UnitExchange, name)
                own[UnitExchange, name] = exchange
                replaced[UnitExchange, name] = self.timed("dp_communication")(exchange)
        try:
            for door, function in replaced.items():
                setattr(*door, function)
            yield self._seconds
        finally:
            for door, function in own.items():
                setattr(*door, function)

    def _timing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*args: Any, **kwargs: Any) -> Any:
            term = self._terms.get(kwargs.get("group"))
            if term is None:
                return function(*args, **kwargs)
            return self._run(term, function, args, kwargs)

        return timing

    def _receiving(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def receiving(*args: Any, **kwargs: Any) -> Any:
            return self._run("pipeline", function, args, kwargs)

        return receiving

    def _run(self, term: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`timed` for what nothing is timed within: a third of its price, for decoding's many."""
        start = perf_counter()
        result = function(*args, **kwargs)
        spent = perf_counter() - start
        self._seconds[term] = self._seconds.get(term, 0.0) + spent
        self._inside += spent
        return result
