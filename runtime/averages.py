"""Moving averages of parameters: a role that follows another one, which is trained.

What is mixed in comes by an ordinary reallocation into memory beside the average's own.
"""

from __future__ import annotations

import torch

from runtime.parameters import FlatParameters, allocate
from runtime.reallocation import Holding, Reallocator


class Mixing:
    """This rank's part of one layout of the average, and memory for what is mixed in."""

    def __init__(self, params: FlatParameters, decay: float) -> None:
        self._own, self._weight = params.flat, 1.0 - decay
        self._news = allocate(params.boxes, params.flat.dtype, params.flat.device)
        self.news = Holding(self._news.views, self._news.boxes)
        """Where the reallocation puts the trained parameters."""

    @torch.no_grad()
    def mix(self) -> None:
        """Takes `decay` of the average and the rest of the news; rounded to the parameters' dtype."""
        self._own.lerp_(self._news.flat, self._weight)


class Averager:
    """A reallocation that is followed by mixing."""

    def __init__(self, reallocator: Reallocator, mixing: Mixing) -> None:
        self._reallocator, self._mixing = reallocator, mixing

    def run(self) -> int:
        """As `Reallocator.run`."""
        sent = self._reallocator.run()
        self._mixing.mix()
        return sent
