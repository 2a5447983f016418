"""Prompts (and, for supervised training, responses) from a JSONL file, as token ids.

Decides which rows make up which iteration: a pure function of (seed, iteration), so every rank reads any
iteration without state, and resuming takes a number. Knows nothing of tensors, ranks or calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realloc.data_spec import DataSpec
from realloc.errors import InputError
from realloc.experiment import Experiment
from realloc.files import nearest
from runtime.tokenizer import TextTokenizer, read_tokenizer

HOLDOUT = 2**32
"""The order that decides which rows are held out is that of an epoch no run reaches."""


@dataclass(frozen=True)
class Example:
    """A row of the file that is used, and its responses; each ends with EOS unless it was cut.

    None without responses in the data, two (chosen, rejected) with preferences, else one.
    """

    row: Mapping[str, Any]
    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class DataBatch:
    """The sequences of one iteration, in order of position. `responses` is None when the data have none.

    Each `samples_per_prompt` neighbours have one prompt.
    """

    ids: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...] | None
    rows: tuple[Mapping[str, Any], ...]
    samples_per_prompt: int = 1


@dataclass(frozen=True)
class Dataset:
    """All examples, and which of them an iteration uses: `sequences / samples_per_prompt` of them.

    `dropped` rows had prompts over the maximum; `truncated` responses were cut to theirs.
    """

    examples: tuple[Example, ...]
    tokenizer: TextTokenizer
    sequences: int
    seed: int
    dropped: int = 0
    truncated: int = 0
    samples_per_prompt: int = 1
    held: tuple[Example, ...] = ()

    def held_out(self, sequences: int, samples_per_prompt: int = 1) -> Dataset:
        """The rows that no iteration trains on, in batches of so many sequences.

        Raises InputError when the experiment keeps none.
        """
        if not self.held:
            raise InputError(
                "experiment: data: evaluation takes rows that are not trained on; keep some with "
                "data.holdout, such as holdout: 0.05."
            )
        return replace(
            self,
            examples=self.held,
            held=(),
            sequences=sequences,
            samples_per_prompt=samples_per_prompt,
            dropped=0,
            truncated=0,
        )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.tokenizer.eos_ids

    @property
    def pad_id(self) -> int | None:
        return self.tokenizer.pad_id

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these tokens; special tokens give none."""
        return self.tokenizer.decode(tokens)

    def batch(self, iteration: int) -> DataBatch:
        """The sequences of an iteration (from 0). Epoch follows epoch, each in its own order."""
        first = iteration * self.sequences
        ids = tuple(range(first, first + self.sequences))
        examples = [self._example(index // self.samples_per_prompt) for index in ids]
        responses = tuple(
            e.responses[index % len(e.responses)]
            for index, e in zip(ids, examples, strict=True)
            if e.responses
        )
        return DataBatch(
            ids=ids,
            prompts=tuple(e.prompt for e in examples),
            responses=responses or None,
            rows=tuple(e.row for e in examples),
            samples_per_prompt=self.samples_per_prompt,
        )

    def row(self, iteration: int, position: int) -> Mapping[str, Any]:
        """The row of the file that a sequence came from."""
        return self._example((iteration * self.sequences + position) // self.samples_per_prompt).row

    def summary(self) -> str:
        """One log line: how much was read, dropped and cut."""
        text = f"data: {len(self.examples)} examples"
        if self.dropped:
            text += f", {self.dropped} dropped for their long prompts"
        if self.truncated:
            text += f", {self.truncated} responses cut"
        return text

    def _example(self, index: int) -> Example:
        epoch, offset = divmod(index, len(self.examples))
        return self.examples[int(shuffled(len(self.examples), self.seed, epoch)[offset])]


@lru_cache(maxsize=4)
def shuffled(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of range(count): the order of hashes of (seed, epoch, index).

    The hash is SplitMix64 (Steele, Lea and Flood 2014). Own arithmetic, because numpy may change its
    generators' streams between versions, and a resumed run must go on in the same order.
    """
    start = _mix(_mix(np.full(count, seed, dtype=np.uint64)) + np.uint64(epoch))
    keys = _mix(np.arange(count, dtype=np.uint64) + start)
    return np.argsort(keys, kind="stable").astype(np.int64)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's next output for each state; uint64 arithmetic wraps around."""
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def open_dataset(experiment: Experiment) -> Dataset:
    """Reads the experiment's data and tokenizes them with the tokenizer of the first role's model.

    Raises InputError: no data, a model without weights and so without a tokenizer, a bad file (with its
    line), no prompt short enough, a token that a model's vocabulary lacks.
    """
    if experiment.data is None:
        raise InputError("experiment: a run needs prompts; add data: {path: FILE.jsonl, prompt: COLUMN}.")
    spec = experiment.models[experiment.graph().roles[0]]
    if not spec.has_weights:
        raise InputError(
            f"experiment: models.{spec.role}: '{spec.model}' is the name of a shape, for planning only; a "
            f"run needs the folder of a model, with weights and tokenizer."
        )
    dataset = read_dataset(
        experiment.data,
        read_tokenizer(spec.model),
        sequences=experiment.workload.sequences,
        max_prompt=experiment.workload.prompt.maximum,
        max_response=experiment.workload.response.maximum,
        seed=experiment.seed,
        samples_per_prompt=experiment.workload.samples_per_prompt,
    )
    _check_vocabularies(experiment, dataset, spec.model)
    return dataset


def read_dataset(
    data: DataSpec,
    tokenizer: TextTokenizer,
    *,
    sequences: int,
    max_prompt: int,
    max_response: int,
    seed: int,
    samples_per_prompt: int = 1,
) -> Dataset:
    """Reads a JSONL file; maxima are in tokens. Raises InputError, as `open_dataset` does."""
    path = Path(data.path)
    rows = list(_rows(path))
    if not rows:
        raise InputError(f"{path}: has no rows; it needs one JSON object a line.")
    prompts = [_text(path, line, row, data.prompt, may_be_empty=False) for line, row in rows]
    encoded = list(tokenizer.encode(prompts, special_tokens=True))
    for (line, _), ids in zip(rows, encoded, strict=True):
        if not ids:
            raise InputError(f"{path}, line {line}: the tokenizer makes no token of the prompt.")
    kept = [i for i, ids in enumerate(encoded) if len(ids) <= max_prompt]
    if not kept:
        raise InputError(
            f"{path}: all {len(rows)} prompts are longer than workload.prompt_tokens, {max_prompt}: they "
            f"have {min(map(len, encoded))} to {max(map(len, encoded))} tokens; raise it or shorten them."
        )
    columns: list[list[tuple[int, ...]]] = []
    truncated = 0
    for column in data.responses:
        texts = [_text(path, *rows[i], column, may_be_empty=True) for i in kept]
        whole = _responses(tokenizer, [prompts[i] for i in kept], [encoded[i] for i in kept], texts)
        truncated += sum(len(ids) > max_response for ids in whole)
        columns.append([tuple(ids[:max_response]) for ids in whole])
    examples = tuple(
        Example(rows[i][1], tuple(encoded[i]), tuple(column[at] for column in columns))
        for at, i in enumerate(kept)
    )
    dropped = len(rows) - len(kept)
    used, held = _split(examples, data.holdout, seed)
    return Dataset(used, tokenizer, sequences, seed, dropped, truncated, samples_per_prompt, held)


def _split(
    examples: tuple[Example, ...], holdout: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """What iterations use and what is held out, at least one of each; both in the order of the file."""
    if holdout == 0 or len(examples) < 2:
        return examples, ()
    number = min(max(1, round(holdout * len(examples))), len(examples) - 1)
    held = set(shuffled(len(examples), seed, HOLDOUT)[:number].tolist())
    kept = tuple(example for i, example in enumerate(examples) if i not in held)
    return kept, tuple(examples[i] for i in sorted(held))


def _responses(
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    prompt_ids: Sequence[Sequence[int]],
    texts: Sequence[str],
) -> list[list[int]]:
    """Token ids of each response with EOS at the end, prompt excluded.

    A response that begins with its prompt is taken for the whole text. Prompt and response are tokenized
    together, so that the seam is as in running text; where that changes the prompt's own tokens, apart.
    """
    whole = [t if t.startswith(p) else p + t for p, t in zip(prompts, texts, strict=True)]
    joined = list(tokenizer.encode(whole, special_tokens=True))
    rest = [text[len(prompt) :] for prompt, text in zip(prompts, whole, strict=True)]
    alone = tokenizer.encode(rest, special_tokens=False)
    end = list(tokenizer.eos_ids[:1])
    result = []
    for ids, together, apart in zip(prompt_ids, joined, alone, strict=True):
        seamless = together[: len(ids)] == list(ids)
        result.append((together[len(ids) :] if seamless else apart) + end)
    return result


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line number and object of every line that is not blank."""
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                if raw.strip():
                    yield number, _row(f"{path}, line {number}", raw)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (the experiment's data.path).") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from None


def _row(where: str, raw: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte {error.start} of the line).") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error.msg} (column {error.colno}).") from None
    except RecursionError:
        raise InputError(f"{where}: not valid JSON: nested too deeply.") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}.")
    return value


def _text(path: Path, line: int, row: Mapping[str, Any], column: str, *, may_be_empty: bool) -> str:
    if column not in row:
        raise InputError(f"{path}, line {line}: has no column '{column}'.{nearest(column, row)}")
    value = row[column]
    if not isinstance(value, str):
        raise InputError(f"{path}, line {line}: {column}: expected text, found {type(value).__name__}.")
    if not may_be_empty and not value.strip():
        raise InputError(f"{path}, line {line}: {column}: is empty.")
    return value


def _check_vocabularies(experiment: Experiment, dataset: Dataset, folder: str) -> None:
    largest = max(
        (
            *dataset.eos_ids,
            *(max((*e.prompt, *(t for r in e.responses for t in r))) for e in dataset.examples),
        )
    )
    for spec in experiment.models.values():
        if largest >= spec.shape.vocab:
            raise InputError(
                f"experiment: models.{spec.role}: has a vocabulary of {spec.shape.vocab}, but the tokenizer "
                f"of {folder} makes the token {largest} of the data; all models must share one vocabulary."
            )
