"""Which placements were left out of the candidates, how many, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from realloc.dataflow import Call


@dataclass(frozen=True)
class Rejection:
    """Why `count` placements of a call were left out, with the numbers of one of them."""

    call: str
    reason: str
    count: int
    example: str


@dataclass
class Rejections:
    """Collects them, one entry for each call and reason."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    examples: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, call: Call, reason: str, count: int, example: str) -> None:
        self.count(call, reason, count, lambda: example)

    def count(self, call: Call, reason: str, count: int, example: Callable[[], str]) -> None:
        """`example` is asked for the first time alone."""
        key = (call.name, reason)
        if key not in self.counts:
            self.examples[key] = example()
        self.counts[key] = self.counts.get(key, 0) + count

    def of(self, call: Call, reason: str) -> Mapping[str, int]:
        """An example of a call's rejections for one reason -> how many there were."""
        key = (call.name, reason)
        return {self.examples[key]: self.counts[key]} if key in self.counts else {}

    def join(self, others: Rejections) -> None:
        """Adds those of other calls."""
        for key, count in others.counts.items():
            self.counts[key] = self.counts.get(key, 0) + count
            self.examples.setdefault(key, others.examples[key])

    def result(self) -> tuple[Rejection, ...]:
        return tuple(
            Rejection(call, reason, count, self.examples[call, reason])
            for (call, reason), count in self.counts.items()
        )
