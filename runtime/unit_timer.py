"""When a decoder's units begin and end, forward and backward: stamps taken while real passes run.

It watches through the same door as parameters that come and go (`runtime.decoder.ParameterSource`)
and changes nothing of what is computed. What the stamps are used for is not decided here. On CPUs
the time is that in which this process had a core: one thread computes, and what else the machine
does is not the code's affair.
"""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from realloc.model_shape import ModelShape
from runtime.decoder import EMBEDDING_UNIT, HEAD_UNIT, Decoder
from runtime.parallel import ParallelContext

OUTPUT = "output"
"""The unit after the last: log-probabilities or the scalar head."""


@dataclass(frozen=True)
class PassSeconds:
    """One pass by part: a mean over layers, and what is outside of them.

    `enter`: from the start to the first layer, and the final norm. `leave`: the same backwards.
    `output` forward and `output_backward` are the head with what is computed from it.
    """

    layer: float
    enter: float
    output: float = 0.0
    layer_backward: float = 0.0
    leave: float = 0.0
    output_backward: float = 0.0

    @property
    def total(self) -> float:
        return self.enter + self.output + self.leave + self.output_backward


class UnitTimer:
    """Stamps on one device; `start` clears them. A ParameterSource that brings no parameters."""

    def __init__(self, device: torch.device, now: Callable[[], float] = time.process_time) -> None:
        """`now`: the clock of CPUs."""
        self._device, self._now = device, now
        self._stamps: list[tuple[str, str, Any]] = []

    def before(self, unit: str) -> None:
        self.stamp("before", unit)

    def after(self, unit: str, output: torch.Tensor) -> None:
        self.stamp("after", unit)
        if output.requires_grad:

            def arrived(_: torch.Tensor) -> None:
                self.stamp("gradient", unit)

            output.register_hook(arrived)

    def stamp(self, what: str, unit: str) -> None:
        if self._device.type == "cuda":
            kind: Any = torch.cuda.Event  # untyped in torch
            event = kind(enable_timing=True)
            event.record()
            self._stamps.append((what, unit, event))
        else:
            self._stamps.append((what, unit, self._now()))

    def start(self) -> None:
        self._stamps.clear()
        self.stamp("start", "")

    def passes(self) -> list[PassSeconds]:
        """The passes since `start`, which ends now. Their forward passes must have been in turn."""
        self.stamp("end", "")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        times = [(what, unit, self._seconds(stamp)) for what, unit, stamp in self._stamps]
        firsts = [i for i, (what, unit, _) in enumerate(times) if (what, unit) == ("before", EMBEDDING_UNIT)]
        result = []
        for place, first in enumerate(firsts):
            start = times[0][2] if place == 0 else times[first][2]
            last = place + 1 == len(firsts)
            span = times[first : None if last else firsts[place + 1]]
            result.append(_pass_seconds(span, start, times[-1][2] if last else span[-1][2]))
        return result

    def spans(self) -> list[float]:
        """Seconds from each stamp to the next, since `start` and to now, which is the last."""
        self.stamp("end", "")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return [after - before for before, after in pairwise(self._seconds(s[2]) for s in self._stamps)]

    @property
    def elapsed_s(self) -> float:
        """Seconds from `start` to the last stamp."""
        return self._seconds(self._stamps[-1][2])

    def _seconds(self, stamp: Any) -> float:
        first = self._stamps[0][2]
        if self._device.type == "cuda":
            elapsed: float = first.elapsed_time(stamp) / 1e3
            return elapsed
        passed: float = stamp - first
        return passed


def _pass_seconds(times: list[tuple[str, str, float]], start: float, end: float) -> PassSeconds:
    at = {(what, unit): seconds for what, unit, seconds in times}
    layers = [unit for what, unit, _ in times if what == "before" and unit.startswith("layers.")]
    spent = [at["after", unit] - at["before", unit] for unit in layers]
    norm = at["after", HEAD_UNIT] - at["before", HEAD_UNIT]
    enter = at["before", layers[0]] - start + norm
    output = 0.0
    if ("after", OUTPUT) in at:
        output = at["after", OUTPUT] - at["before", OUTPUT]
    if ("gradient", HEAD_UNIT) not in at:
        return PassSeconds(sum(spent) / len(spent), enter, output)
    # the gradient of a unit's output arrives when all later units are done
    before = [EMBEDDING_UNIT, *layers[:-1]]
    back = [
        at["gradient", earlier] - at["gradient", unit] for earlier, unit in zip(before, layers, strict=True)
    ]
    leave = at["gradient", layers[-1]] - at["gradient", HEAD_UNIT] + end - at["gradient", EMBEDDING_UNIT]
    output_backward = at["gradient", HEAD_UNIT] - at["after", OUTPUT]
    return PassSeconds(sum(spent) / len(spent), enter, output, sum(back) / len(back), leave, output_backward)


class TimedDecoder(Decoder):
    """A decoder that is watched."""

    def __init__(
        self,
        shape: ModelShape,
        context: ParallelContext,
        dtype: torch.dtype,
        params: MutableMapping[str, torch.Tensor],
        timer: UnitTimer,
    ) -> None:
        super().__init__(shape, context, dtype, params, timer)
        self._timer = timer

    def logprobs(self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        self._timer.stamp("before", OUTPUT)
        result = super().logprobs(hidden, targets, temperature)
        self._timer.stamp("after", OUTPUT)
        return result

    def scalar(self, hidden: torch.Tensor) -> torch.Tensor:
        self._timer.stamp("before", OUTPUT)
        result = super().scalar(hidden)
        self._timer.stamp("after", OUTPUT)
        return result
