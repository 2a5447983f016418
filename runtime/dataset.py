"""The sequences of each iteration, as token ids.

Decides which examples make up which iteration: a pure function of (seed, iteration), so every rank reads any
iteration without state, and resuming takes a number. What an example is, `realloc.examples` decides. Knows
nothing of tensors, ranks or calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from realloc.columns import Want, wanted
from realloc.data_spec import DataSpec
from realloc.errors import InputError
from realloc.examples import Counts, Example, Examples, Limits, open_examples
from realloc.experiment import Experiment
from realloc.pretrain import SECTION
from realloc.row_sources import held_out_spec, row_at
from runtime.row_index import cache_folder, used_rows
from runtime.row_order import Order, groups_of, split
from runtime.tokenizer import TextTokenizer, read_tokenizer

_RECENT = 2
"""Batches that are kept, for those who ask for their rows."""
_MIXED_SEED = 2**48
"""Added to the seed for the order of what is mixed in: not that of data, should both be the same file."""


@dataclass(frozen=True)
class DataBatch:
    """The sequences of one iteration, in order of position. `responses` is None when the data have none.

    Each `samples_per_prompt` neighbours have one prompt. `masks`: for each response, 1 for the tokens that
    are learned; None where all are.
    """

    ids: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...] | None
    rows: tuple[Mapping[str, Any], ...]
    samples_per_prompt: int = 1
    masks: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples in their order; an iteration uses `sequences / samples_per_prompt` of them.

    `held`: the rows that no iteration uses; `mixed`: the data set that train_steps mix in, with iterations of
    its own.
    """

    examples: Examples
    order: Order
    tokenizer: TextTokenizer
    sequences: int
    samples_per_prompt: int
    counts: Counts
    held: Dataset | None = None
    mixed: Dataset | None = None
    _recent: dict[int, DataBatch] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """Examples of an epoch."""
        return len(self.order)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.tokenizer.eos_ids

    @property
    def pad_id(self) -> int | None:
        return self.tokenizer.pad_id

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these tokens; special tokens give none."""
        return self.tokenizer.decode(tokens)

    def held_out(self, sequences: int, samples_per_prompt: int = 1) -> Dataset:
        """The rows that no iteration trains on, in batches of so many sequences.

        Raises InputError when the experiment keeps none.
        """
        if self.held is None:
            raise InputError(
                "experiment: data: evaluation takes rows that are not trained on; keep some with "
                "data.holdout, such as holdout: 0.05, or name others with data.holdout_path."
            )
        return replace(self.held, sequences=sequences, samples_per_prompt=samples_per_prompt, _recent={})

    def example(self, index: int) -> Example:
        """The example at a place of the order (from 0). Epoch follows epoch, each in its own order."""
        return self.examples.read([self.order.row(index)])[0]

    def batch(self, iteration: int) -> DataBatch:
        """The sequences of an iteration (from 0)."""
        if iteration not in self._recent:
            while len(self._recent) >= _RECENT:
                self._recent.pop(next(iter(self._recent)))
            self._recent[iteration] = self._batch(iteration)
        return self._recent[iteration]

    def _batch(self, iteration: int) -> DataBatch:
        first, each = iteration * self.sequences, self.samples_per_prompt
        ids = tuple(range(first, first + self.sequences))
        indices = range(ids[0] // each, ids[-1] // each + 1)
        found = self.examples.read([self.order.row(index) for index in indices])
        examples = [found[index // each - indices[0]] for index in ids]
        pairs = [
            (example, index % len(example.responses))
            for index, example in zip(ids, examples, strict=True)
            if example.responses
        ]
        responses = tuple(example.responses[which] for example, which in pairs)
        masks = tuple(example.masks[which] for example, which in pairs if example.masks)
        return DataBatch(
            ids=ids,
            prompts=tuple(example.prompt for example in examples),
            responses=responses or None,
            rows=tuple(example.row for example in examples),
            samples_per_prompt=each,
            masks=masks or None,
        )

    def row(self, iteration: int, position: int) -> Mapping[str, Any]:
        """The row of the file that a sequence came from."""
        if iteration in self._recent:
            return self._recent[iteration].rows[position]
        index = (iteration * self.sequences + position) // self.samples_per_prompt
        return row_at(self.examples.source.rows, self.order.row(index))

    def where(self, iteration: int, position: int) -> str:
        """File and line of that row."""
        index = (iteration * self.sequences + position) // self.samples_per_prompt
        return self.examples.source.rows.where(self.order.row(index))

    def summary(self) -> str:
        """One log line: which columns, and how much was read, left out and cut."""
        text = f"data: {self.counts}; columns {self.examples.columns}"
        if self.held is not None:
            text += f"; {len(self.held):,} rows held out"
        if self.mixed is None:
            return text
        return f"{text}; {SECTION}: {self.mixed.counts}; columns {self.mixed.examples.columns}"


def open_dataset(experiment: Experiment) -> Dataset:
    """Opens the experiment's data with the tokenizer of the first role's model.

    Raises InputError: no data, a model without weights and so without a tokenizer, a bad file (with its
    line), no prompt short enough, a token that a model's vocabulary lacks.
    """
    if experiment.data is None:
        raise InputError("experiment: a run needs prompts; add data: {path: FILE.jsonl, prompt: COLUMN}.")
    graph = experiment.graph()
    spec = experiment.models[graph.roles[0]]
    if not spec.has_weights:
        raise InputError(
            f"experiment: models.{spec.role}: '{spec.model}' is the name of a shape, for planning only; a "
            f"run needs the folder of a model, with weights and tokenizer."
        )
    dataset = read_dataset(
        experiment.data,
        read_tokenizer(spec.model),
        want=wanted(graph),
        sequences=experiment.workload.sequences,
        max_prompt=experiment.workload.prompt.maximum,
        max_response=experiment.workload.response.maximum,
        seed=experiment.seed,
        samples_per_prompt=experiment.workload.samples_per_prompt,
        kept_in=cache_folder(),
    )
    if experiment.mixed is not None:
        dataset = replace(dataset, mixed=_open_mixed(experiment, dataset.tokenizer))
    _check_vocabularies(experiment, dataset, spec.model)
    return dataset


def _open_mixed(experiment: Experiment, tokenizer: TextTokenizer) -> Dataset:
    """The texts of the section `pretrain_data`. Raises InputError as `open_dataset` does."""
    assert experiment.pretrain is not None
    work = experiment.mixed
    assert work is not None
    return read_dataset(
        experiment.pretrain.data,
        tokenizer,
        want=Want.TEXTS,
        sequences=work.sequences,
        max_prompt=work.prompt.maximum,
        max_response=work.response.maximum,
        seed=experiment.seed + _MIXED_SEED,
        kept_in=cache_folder(),
    )


def read_dataset(
    data: DataSpec,
    tokenizer: TextTokenizer,
    *,
    want: Want,
    sequences: int,
    max_prompt: int,
    max_response: int,
    seed: int,
    samples_per_prompt: int = 1,
    kept_in: Path | None = None,
) -> Dataset:
    """Opens a data set; maxima are in tokens. Raises InputError, as `open_dataset` does.

    `kept_in`: a folder that keeps which rows of large data sets are used.
    """
    limits = Limits(max_prompt, max_response)
    examples = open_examples(data, want, tokenizer, limits)
    rows, counts = used_rows(examples, kept_in)
    used, held_rows = split(rows, data.holdout, seed)
    if data.holdout and not (len(used) and len(held_rows)):
        raise InputError(
            f"{data.path}: data.holdout: {data.holdout:g} of {len(rows)} rows keeps {len(held_rows)} and "
            f"leaves {len(used)} to train on; both need at least one."
        )
    groups = groups_of(used, examples.source.parts) if data.weights else (used,)
    if not all(map(len, groups)):
        raise InputError(f"{data.path}: a path with a weight has no row that can be used.")
    held: Dataset | None = None
    if (apart := held_out_spec(data)) is not None:
        held = read_dataset(
            apart,
            tokenizer,
            want=want,
            sequences=sequences,
            max_prompt=max_prompt,
            max_response=max_response,
            seed=seed,
            kept_in=kept_in,
        )
    elif len(held_rows):
        held = Dataset(examples, Order((held_rows,), (), seed), tokenizer, sequences, 1, counts)
    order = Order(groups, data.weights, seed)
    return Dataset(examples, order, tokenizer, sequences, samples_per_prompt, counts, held)


def _check_vocabularies(experiment: Experiment, dataset: Dataset, folder: str) -> None:
    sets = (dataset, dataset.held, dataset.mixed)
    largest = max((*dataset.eos_ids, *(found.counts.largest_token for found in sets if found is not None)))
    for spec in experiment.models.values():
        if largest >= spec.shape.vocab:
            raise InputError(
                f"experiment: models.{spec.role}: has a vocabulary of {spec.shape.vocab}, but the tokenizer "
                f"of {folder} makes the token {largest} of the data; all models must share one vocabulary."
            )
