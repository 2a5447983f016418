"""Sequences that wait for a slot, and what those under way have generated.

Decides in which order sequences enter and whose prompt is computed for whom; the same on every
stage of a replica. Knows nothing of models or messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class SavedPrompt:
    """A prompt that is in no slot of its own: its keys and values; the last hidden row (last stage)."""

    keys: torch.Tensor
    values: torch.Tensor
    hidden: torch.Tensor | None


@dataclass(frozen=True)
class Admission:
    """Sequences that enter together: `rows` in the order of their slots.

    `prompts` are the rows whose prompts are computed. Row i starts from `prompts[sources[i]]`, or
    from the saved prompt where that is -1. `keeps`: the last row's prompt is wanted again later.
    """

    rows: tuple[int, ...]
    prompts: tuple[int, ...]
    sources: tuple[int, ...]
    keeps: bool


class Waiting:
    """The sequences (rows) of one call on one replica that have not started, in order.

    Neighbours with equal `prompt_keys` share a prompt, which is computed once.
    """

    def __init__(self, prompt_keys: Sequence[int]) -> None:
        self._keys = tuple(prompt_keys)
        self._rows = deque(range(len(prompt_keys)))
        self._saved_key: int | None = None
        self.saved: SavedPrompt | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, count: int) -> Admission | None:
        """The next up to `count` sequences; None when there is no room or nobody waits."""
        rows = tuple(self._rows.popleft() for _ in range(min(count, len(self._rows))))
        if not rows:
            return None
        prompts: list[int] = []
        sources: list[int] = []
        for row in rows:
            key = self._keys[row]
            last = self._keys[prompts[-1]] if prompts else self._saved_key
            if key != last:
                prompts.append(row)
            sources.append(len(prompts) - 1)
        keeps = bool(self._rows) and self._keys[self._rows[0]] == self._keys[rows[-1]]
        self._saved_key = self._keys[rows[-1]] if keeps else None
        return Admission(rows, tuple(prompts), tuple(sources), keeps)


class Responses:
    """What has been generated, by place: token i of sequence (row) r is at r * `longest` + i.

    `tokens` int64 and `logprobs` float32 [num * longest], `lengths` int64 [num].
    """

    def __init__(self, num: int, longest: int, device: torch.device) -> None:
        self.longest = longest
        self.tokens = torch.zeros(num * longest, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(num * longest, device=device)
        self.lengths = torch.zeros(num, dtype=torch.int64, device=device)

    def packed_logprobs(self) -> torch.Tensor:
        index = torch.arange(self.longest, device=self.logprobs.device)
        return self.logprobs.view(-1, self.longest)[index < self.lengths[:, None]]

    def with_prompts(self, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Prompt + response of each sequence, packed."""
        parts = [torch.empty(0, dtype=torch.int64, device=self.tokens.device)]
        for row, length in enumerate(self.lengths.tolist()):
            start = row * self.longest
            parts += [prompts[row], self.tokens[start : start + length]]
        return torch.cat(parts)
