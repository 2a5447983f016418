"""The view of packed sequences that algorithm functions get (`realloc.functions.Batch`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from runtime.data_store import IterationData


@dataclass
class PackedBatch:
    """Sequences at `positions` of one iteration's data, on one data-parallel rank."""

    data: IterationData
    positions: Sequence[int]
    global_sequences: int
    global_elements: int
    device: torch.device
    dp_group: dist.ProcessGroup | None = None
    max_response_tokens: int = 0
    eos_ids: tuple[int, ...] = ()
    state: dict[str, float] = field(default_factory=dict)
    reported: dict[str, float] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        return len(self.positions)

    @property
    def samples_per_prompt(self) -> int:
        return self.data.samples_per_prompt

    @property
    def prompts(self) -> torch.Tensor:
        each = self.data.samples_per_prompt
        return torch.tensor([p // each for p in self.positions], dtype=torch.int64, device=self.device)

    @property
    def samples(self) -> torch.Tensor:
        each = self.data.samples_per_prompt
        return torch.tensor([p % each for p in self.positions], dtype=torch.int64, device=self.device)

    @property
    def num_prompts(self) -> int:
        return self.data.num_sequences // self.data.samples_per_prompt

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.data.packed(key, self.positions).to(self.device)

    def lengths(self, key: str) -> torch.Tensor:
        lengths = self.data.key_lengths(key)
        return torch.tensor([lengths[p] for p in self.positions], dtype=torch.int64, device=self.device)

    def report(self, name: str, value: float) -> None:
        self.reported[name] = value

    def finished(self, key: str) -> torch.Tensor:
        lengths, values = self.data.key_lengths(key), self.data.values.get(key, {})
        ended = [
            lengths[p] - self.data.prompt_lengths[p] < self.max_response_tokens
            or int(values[p][-1]) in self.eos_ids
            for p in self.positions
        ]
        return torch.tensor(ended, dtype=torch.bool, device=self.device)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        if self.dp_group is None:
            return value
        total = value.detach().clone()
        dist.all_reduce(total, group=self.dp_group)
        return total
