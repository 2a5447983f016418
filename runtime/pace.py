"""A fixed piece of work by which a machine's pace is known again: while it is profiled, while it runs.

Small operators, a tenth of a millisecond of them: they stay in the nearest caches, so that what ran before
and what runs next hardly matter, and feel most that another thread is at the same physical core. On a
virtual machine whose neighbours came and went it took 1.0 or 1.6 times as long and hardly anything between,
for tenths of a second to seconds at a time; products took 1.1 to 1.3 times as long then, small models 1.6.
Decides what the work is; what it tells is `realloc.pace`'s. Only of hosts: GPUs keep their own pace.
"""

from __future__ import annotations

import time

import torch

from realloc.pace import PACE, iterations_between
from realloc.plan import ExecutionPlan
from runtime.tracing import Recorder

_WARM, _TIMED = 30, 100
NOMINAL_S = 1.3e-4
"""About what all of it takes; how often it is done in a run follows from it, on all ranks alike."""


class Probe:
    """The work."""

    def __init__(self) -> None:
        self._small, self._sum = torch.zeros(4, 16), torch.zeros(4, 16)

    def seconds(self) -> float:
        """For how long the work, made warm, had a core."""
        small, into = self._small, self._sum  # new memory for each sum would cost what the allocator is like
        for _ in range(_WARM):
            torch.add(small, small, out=into)
        start = time.thread_time()
        for _ in range(_TIMED):
            torch.add(small, small, out=into)
        return time.thread_time() - start


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
        start = recorder.now()
        own_s = self._probe.seconds()
        recorder.add(iteration, PACE, PACE, start, predicted_s=None, cpu_s=own_s)
