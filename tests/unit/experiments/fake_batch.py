"""Batches of sequences given as Python lists, on one rank or on several at once."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

PER_TOKEN = ("logprobs", "ref_logprobs", "values", "advantages", "returns", "output")
Sequence_ = Mapping[str, Any]
"""One sequence: a list for each per-token key, a number for `scores`."""


class Ranks:
    """Adds up what as many threads hand in, and gives each the sum."""

    def __init__(self, count: int) -> None:
        self._parts: list[torch.Tensor] = []
        self._total = torch.zeros(0)
        self._barrier = threading.Barrier(count, action=self._add)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        self._parts.append(value)
        self._barrier.wait(timeout=20)
        return self._total

    def _add(self) -> None:
        self._total = torch.stack(self._parts).sum(0)
        self._parts.clear()


@dataclass
class FakeBatch:
    """Some sequences as one rank's packed batch; alone, or one of several `ranks`."""

    sequences: Sequence[Sequence_]
    global_sequences: int
    global_elements: int
    ranks: Ranks | None = None
    num_sums: int = 0
    num_prompts: int = 0
    samples_per_prompt: int = 0
    max_response_tokens: int = 0
    state: dict[str, float] = field(default_factory=dict)
    reported: dict[str, float] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        return len(self.sequences)

    @property
    def samples(self) -> torch.Tensor:
        return torch.tensor([s["sample"] for s in self.sequences], dtype=torch.int64)

    @property
    def prompts(self) -> torch.Tensor:
        return torch.tensor([s["prompt"] for s in self.sequences], dtype=torch.int64)

    def __getitem__(self, key: str) -> torch.Tensor:
        if self.sequences and not isinstance(self.sequences[0][key], list):
            return torch.tensor([s[key] for s in self.sequences], dtype=torch.float32)
        return torch.tensor([x for s in self.sequences for x in s[key]], dtype=torch.float32)

    def lengths(self, key: str) -> torch.Tensor:
        if key == "scores":
            return torch.ones(self.num_sequences, dtype=torch.int64)
        return torch.tensor([len(s[key]) for s in self.sequences], dtype=torch.int64)

    def finished(self, key: str) -> torch.Tensor:
        return torch.tensor([s["finished"] for s in self.sequences], dtype=torch.bool)

    def report(self, name: str, value: float) -> None:
        self.reported[name] = value

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        self.num_sums += 1
        return value if self.ranks is None else self.ranks.sum(value)


def whole_batch(sequences: Sequence[Sequence_], **more: Any) -> FakeBatch:
    return FakeBatch(sequences, len(sequences), sum(len(s["values"]) for s in sequences), **more)


def prepare_on_ranks(
    prepare: Callable[..., Mapping[str, torch.Tensor]],
    shares: Sequence[Sequence[Sequence_]],
    hyperparameters: Mapping[str, Any],
    **more: Any,
) -> list[Mapping[str, torch.Tensor]]:
    """Runs `prepare` on every share at once, as ranks that sum with each other; `more` of a FakeBatch."""
    everyone, ranks = whole_batch([s for share in shares for s in share]), Ranks(len(shares))
    with ThreadPoolExecutor(len(shares)) as pool:
        futures = [
            pool.submit(
                prepare,
                FakeBatch(share, everyone.global_sequences, everyone.global_elements, ranks, **more),
                hyperparameters,
            )
            for share in shares
        ]
        return [future.result() for future in futures]


def make_sequences(lengths: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {key: [rng.gauss(0, 1) for _ in range(n)] for key in PER_TOKEN}
        | {"scores": rng.gauss(0, 3), "finished": n % 2 == 0}
        for n in lengths
    ]
