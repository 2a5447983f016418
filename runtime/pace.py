"""A fixed piece of work by which a machine's pace is known again: while it is profiled, while it runs.

Of what models do on a host: products, streams over memory, small operators, in about equal parts.
Decides what it is; what it tells is `realloc.pace`'s. Only of hosts: GPUs keep their own pace.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from realloc.pace import PACE, iterations_between
from realloc.plan import ExecutionPlan
from runtime.tracing import Recorder

_WARM = 3
NOMINAL_S = 1.2e-3 * (_WARM + 1)
"""About what all of it takes; how often it is done in a run follows from it, on all ranks alike."""
_ROWS, _WIDTH = 64, 256
_STREAM = 1 << 20
_PRODUCTS, _STREAMS, _SMALL = 4, 2, 350


class Probe:
    """The work and its memory, which stays the same."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(_ROWS, _WIDTH, generator=generator)
        self._weight = torch.randn(_WIDTH, _WIDTH, generator=generator)
        self._stream = torch.zeros(_STREAM)
        self._small = torch.randn(4, 16, generator=generator)

    @torch.no_grad()
    def run(self) -> None:
        for _ in range(_PRODUCTS):
            F.linear(self._x, self._weight)
        for _ in range(_STREAMS):
            self._stream.add_(1.0)
        small = self._small
        for _ in range(_SMALL):
            torch.add(small, small)

    def warm(self) -> None:
        """What precedes every count: whatever ran before has left other data in the caches.

        After an iteration of a 15M Llama the first run took 1.5 times as long as the fourth, the second 1.2
        times; from the fourth on they were alike.
        """
        for _ in range(_WARM):
            self.run()

    def seconds(self) -> float:
        """For how long the work, made warm, had a core."""
        self.warm()
        start = time.process_time()
        self.run()
        return time.process_time() - start


class RunPace:
    """The probe in a run: at the ends of some iterations, on every rank."""

    def __init__(self, plan: ExecutionPlan, device: torch.device) -> None:
        predictions = plan.predictions
        self._every = iterations_between(None if predictions is None else predictions.iteration_s, NOMINAL_S)
        self._probe = Probe() if device.type == "cpu" else None

    def at_end(self, iteration: int, recorder: Recorder) -> None:
        """Does the work and records it, where its turn has come."""
        if self._probe is None or iteration % self._every:
            return
        self._probe.warm()
        start, cpu_start = recorder.now(), time.thread_time()
        self._probe.run()
        recorder.add(iteration, PACE, PACE, start, predicted_s=None, cpu_s=time.thread_time() - cpu_start)
