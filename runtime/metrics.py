"""Metrics: what ranks report of an iteration, added up over ranks.

A metric is a ratio of two sums over ranks, so that a rank reports its own share without any
communication. One whose name ends in `_max` is the largest value that was reported. One `X_square`
beside an `X` gives `X_std`, the standard deviation. Reports travel as JSON through the run's key-value store.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist

_WRITTEN = "written"
LARGEST, SQUARE, DEVIATION = "_max", "_square", "_std"


@dataclass
class Metrics:
    """Numerators and denominators of one call on one rank."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    _step: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, name: str, numerator: float, denominator: float) -> None:
        self.sums[name] = _joined(name, self.sums.get(name), (numerator, denominator))

    def add_contribution(self, name: str, value: float, reporters: int) -> None:
        """Adds to a metric of the current optimizer step: the sum of what so many `reporters` have."""
        if name.endswith(LARGEST):
            self.add(name, value, 1.0)
        else:
            self._step[name] = self._step.get(name, (0.0, 0))[0] + value, reporters

    def end_step(self) -> None:
        """Closes an optimizer step; metrics average over steps."""
        for name, (value, reporters) in self._step.items():
            self.add(name, value, 1.0 / reporters)
        self._step.clear()


@dataclass(frozen=True)
class StepReport:
    """What a rank reports of one optimizer step. `own` and `mixed`: sequences by data-parallel rank.

    Replicas without sequences of a kind have no metrics of its loss.
    """

    metrics: Metrics
    own: Sequence[Sequence[int]]
    mixed: Sequence[Sequence[int]] = ()

    def loss(
        self, value: torch.Tensor, extra: Mapping[str, torch.Tensor], *, is_mixed: bool = False
    ) -> torch.Tensor:
        """Adds a micro-batch's part of the step's loss and of its metrics; returns the loss."""
        reporters = sum(map(bool, self.mixed if is_mixed else self.own))
        self.metrics.add_contribution("loss", value.detach().double().item(), self._all)
        for name, contribution in extra.items():
            self.metrics.add_contribution(name, float(contribution), reporters)
        return value

    def close(self, dp: int, step: Mapping[str, float]) -> None:
        """Adds what the optimizer says, the same on every rank, and ends the step."""
        if self._has(dp):
            for name, value in step.items():
                self.metrics.add_contribution(name, value / self._all, self._all)
            self.metrics.end_step()

    def _has(self, dp: int) -> bool:
        return bool(self.own[dp]) or bool(self.mixed and self.mixed[dp])

    @property
    def _all(self) -> int:
        return sum(self._has(dp) for dp in range(len(self.own)))


def combine(reports: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """Metric -> value, from the reports of all ranks."""
    totals: dict[str, tuple[float, float]] = {}
    for report in reports:
        for name, (numerator, denominator) in report.items():
            totals[name] = _joined(name, totals.get(name), (numerator, denominator))
    means = {name: a / b for name, (a, b) in totals.items() if b}
    for name in [name for name in means if name.endswith(SQUARE) and name.removesuffix(SQUARE) in means]:
        mean = means[name.removesuffix(SQUARE)]
        means[name.removesuffix(SQUARE) + DEVIATION] = sqrt(max(0.0, means.pop(name) - mean * mean))
    return means


def _joined(name: str, one: tuple[float, float] | None, other: tuple[float, float]) -> tuple[float, float]:
    if one is None:
        return other
    if name.endswith(LARGEST):
        return max(one[0], other[0]), 1.0
    return one[0] + other[0], one[1] + other[1]


@dataclass(frozen=True)
class Collected:
    """One iteration's metrics, and what each rank knows of its samples."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


class MetricsChannel:
    """Carries reports to one collector through a key-value store, never blocking a reporter."""

    def __init__(self, store: dist.Store, reporters: Iterable[int]) -> None:
        self._store = store
        self.reporters = frozenset(reporters)

    def report(
        self,
        iteration: int,
        rank: int,
        sums: Mapping[str, tuple[float, float]],
        samples: Mapping[str, Any] | None = None,
    ) -> None:
        """`samples`: what the rank knows of the iteration's samples (`runtime.samples`)."""
        self._store.set(_key(iteration, rank), json.dumps({"sums": sums, "samples": samples or {}}))

    def collect(self, iteration: int, *, wait: bool) -> Collected | None:
        """What all ranks have reported; None when some rank has not and `wait` is false."""
        keys = [_key(iteration, rank) for rank in sorted(self.reporters)]
        if not wait and not self._store.check(keys):
            return None
        reports, samples = [], []
        for key in keys:
            report = json.loads(self._store.get(key))
            reports.append({k: tuple(v) for k, v in report["sums"].items()})
            samples.append(report["samples"])
            self._store.delete_key(key)
        return Collected(combine(reports), samples)

    def confirm(self, iteration: int) -> None:
        """The collector says that the metrics of this and all earlier iterations are on disk."""
        self._store.set(_WRITTEN, str(iteration))

    def is_written(self, iteration: int) -> bool:
        """Whether the collector has confirmed the iteration."""
        return self._store.check([_WRITTEN]) and int(self._store.get(_WRITTEN)) >= iteration


def _key(iteration: int, rank: int) -> str:
    return f"{iteration}/{rank}"
