"""The data of the iterations in flight that one rank holds.

Every value is kept per sequence, by its position in the batch, so that any call can take any
share of it. Lengths are known for the whole batch even where values are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from realloc.dataflow import DataKey, Per
from realloc.errors import RunError

DTYPES = {"int64": torch.int64, "float32": torch.float32}


@dataclass
class IterationData:
    """Data of one iteration on this rank.

    `prompt_lengths[position]` come from the data set. `lengths[key][position]` are known for
    every key that this rank has written or been told of; `values[key][position]` are 1-D tensors
    for the sequences that it holds. Each `samples_per_prompt` neighbours have one prompt.
    """

    keys: Mapping[str, DataKey]
    prompt_lengths: Sequence[int]
    lengths: dict[str, list[int]] = field(default_factory=dict)
    values: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    samples_per_prompt: int = 1

    @property
    def num_sequences(self) -> int:
        return len(self.prompt_lengths)

    def key_lengths(self, key: str) -> list[int]:
        """Elements of `key` per sequence, for the whole batch."""
        per = self.keys[key].per
        if per is Per.SEQUENCE:
            return [1] * self.num_sequences
        if per is Per.PROMPT_TOKEN:
            return list(self.prompt_lengths)
        return self.lengths[key]

    def knows(self, key: str) -> bool:
        return key in self.lengths or self.keys[key].per in (Per.SEQUENCE, Per.PROMPT_TOKEN)

    def put(self, key: str, positions: Sequence[int], packed: torch.Tensor) -> None:
        """Stores packed values of these positions, in this order. Raises RunError: too many or too few."""
        lengths = self.key_lengths(key)
        expected = [lengths[p] for p in positions]
        if packed.shape != (sum(expected),):
            raise RunError(
                f"'{key}' has values of shape {list(packed.shape)}; {len(expected)} sequences take "
                f"[{sum(expected)}] (per {self.keys[key].per.value})."
            )
        parts = packed.split(expected)
        self.values.setdefault(key, {}).update(zip(positions, parts, strict=True))

    def packed(self, key: str, positions: Sequence[int]) -> torch.Tensor:
        """Values of these positions one after the other, 1-D."""
        held = self.values.get(key, {})
        if not positions:
            return torch.empty(0, dtype=DTYPES[self.keys[key].dtype])
        return torch.cat([held[p] for p in positions])
