"""Contracts of the functions that algorithms and users supply, and that the runtime calls.

Tensors are typed `Any` here: this package knows no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Sample:
    """One finished sequence as text, for reward functions.

    `row` is the row of the data set that the prompt came from, `where` its file and line. `finished`
    says whether the response ended by itself rather than at the length limit.
    """

    id: int
    prompt: str
    response: str
    finished: bool
    row: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


class RewardFunction(Protocol):
    """`compute` call: one finite number for each sample, in order.

    It runs in a process of its own (see `realloc.rewards`), in which samples and rows are what JSON
    can say. `options` of the experiment come as keyword arguments.
    """

    def __call__(self, samples: Sequence[Sample]) -> Sequence[float]: ...


class Batch(Protocol):
    """Sequences of one data-parallel rank, packed without padding.

    `batch[key]` is a 1-D tensor: the values of all sequences one after the other.
    `batch.lengths(key)` is an int64 tensor [num_sequences]: how many each sequence has.
    """

    @property
    def num_sequences(self) -> int:
        """Sequences in this batch on this rank."""

    @property
    def global_sequences(self) -> int:
        """Sequences over all data-parallel ranks (of the mini-batch, inside a loss)."""

    @property
    def global_elements(self) -> int:
        """Elements of the model's output over all data-parallel ranks (of the mini-batch)."""

    @property
    def prompts(self) -> Any:
        """int64 tensor [num_sequences]: which of the iteration's prompts each sequence continues."""

    @property
    def samples(self) -> Any:
        """int64 tensor [num_sequences]: which of its prompt's samples (or of its pair) each sequence is."""

    @property
    def num_prompts(self) -> int:
        """Distinct prompts of the iteration."""

    @property
    def samples_per_prompt(self) -> int:
        """How many neighbouring sequences continue one prompt."""

    @property
    def max_response_tokens(self) -> int:
        """The longest response that the workload allows."""

    def __getitem__(self, key: str) -> Any: ...

    def lengths(self, key: str) -> Any: ...

    @property
    def state(self) -> dict[str, float]:
        """Numbers that a call's `prepare` keeps from one iteration to the next; empty at first.

        They are in checkpoints, so a resumed run goes on with them. Derive them from hyperparameters and
        from `sum` alone: then all ranks have the same.
        """

    def report(self, name: str, value: float) -> None:
        """A metric of the iteration, from `select` or `prepare`; the same number on every rank."""

    def finished(self, key: str) -> Any:
        """bool tensor [num_sequences]: whether the response in the sequence `key` ended by itself.

        That is before the longest allowed response, or with an end-of-sequence token.
        """

    def sum(self, value: Any) -> Any:
        """Sum of a tensor over all data-parallel ranks (every rank must call it)."""


class PrepareFunction(Protocol):
    """Runs once per iteration before a `train_step`, on the whole share of each rank of what is selected.

    Returns the packed values of the call's `prepared` keys. Statistics over the whole batch go
    through `batch.sum`, so that they do not depend on the plan.
    """

    def __call__(self, batch: Batch, hyperparameters: Mapping[str, Any]) -> Mapping[str, Any]: ...


class SelectFunction(Protocol):
    """Which sequences a call works on; runs before anything else, on the whole share of each rank.

    Returns a tensor [num_sequences] that is not 0 for those, `Call.selected` at most over all ranks. What
    is compared over the batch goes through `batch.sum`: then any plan selects the same.
    """

    def __call__(self, batch: Batch, hyperparameters: Mapping[str, Any]) -> Any: ...


class ReportFunction(Protocol):
    """Numbers about a whole batch: the same on every rank, which `batch.sum` sees to. `keys`: what it has."""

    def __call__(self, batch: Batch, keys: Sequence[str]) -> Mapping[str, float]: ...


class LossFunction(Protocol):
    """The loss of one micro-batch.

    `output` is what the model computed (`Call.output`), packed. Returns a scalar tensor and
    metrics (name -> scalar tensor). Both are contributions: summed over all micro-batches and
    data-parallel ranks they give the mini-batch's loss and metrics, so divide by
    `batch.global_elements` or `batch.global_sequences`.
    """

    def __call__(
        self, output: Any, batch: Batch, hyperparameters: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]: ...
