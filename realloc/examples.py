"""Rows as token ids: which rows of a data set are used, and the prompt and responses of each.

Decides where a prompt ends and its response begins, what is too long, and what becomes of it. Keeps no
texts and no tokens: an example is made when it is asked for. Knows nothing of iterations or ranks.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from realloc.chat import read_chat_template
from realloc.columns import Columns, TextReader, Texts, Want, find_columns
from realloc.data_spec import DataSpec
from realloc.errors import InputError
from realloc.row_sources import BLOCK, BadRow, Row, Source, open_source

Ids = tuple[int, ...]
FEW = 8192
"""Of no more rows than this the examples that `scan` makes are kept: making them again takes longer."""


class Tokens(Protocol):
    """A tokenizer. `places` are the characters from-to of each token."""

    @property
    def folder(self) -> str: ...

    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    def encode(self, texts: Sequence[str], *, special_tokens: bool) -> Iterator[list[int]]: ...

    def places(
        self, texts: Sequence[str], *, special_tokens: bool
    ) -> Iterator[tuple[list[int], Sequence[tuple[int, int]]]]: ...


@dataclass(frozen=True)
class Limits:
    """The most tokens that a prompt and a response may have; None: any number."""

    prompt: int | None = None
    response: int | None = None


@dataclass(frozen=True)
class Example:
    """A row and its token ids; each response ends with EOS unless it was cut.

    `responses`: none where only prompts are wanted, two (chosen, rejected) of a preference, else one.
    `masks`: for each response, 1 for the tokens that are learned; empty where all are.
    """

    row: Row
    prompt: Ids
    responses: tuple[Ids, ...] = ()
    masks: tuple[Ids, ...] = ()


@dataclass(frozen=True)
class Fit:
    """An example within the limits; what was cut, and why it is not to be used where it is not."""

    example: Example
    prompt_tokens: int
    cut_prompt: bool = False
    cut_responses: int = 0
    problem: BadRow | None = None


@dataclass(frozen=True)
class Counts:
    """What reading found: `dropped` are rows by reason."""

    rows: int
    dropped: Mapping[str, int]
    cut_prompts: int = 0
    cut_responses: int = 0
    largest_token: int = 0

    @property
    def kept(self) -> int:
        return self.rows - sum(self.dropped.values())

    def __str__(self) -> str:
        text = f"{self.kept:,} of {self.rows:,} rows"
        if self.dropped:
            text += "; left out: " + ", ".join(f"{n:,} ({reason})" for reason, n in self.dropped.items())
        cut = [(self.cut_prompts, "prompts"), (self.cut_responses, "responses")]
        if any(n for n, _ in cut):
            text += "; cut: " + ", ".join(f"{n:,} {what}" for n, what in cut if n)
        return text


@dataclass(frozen=True)
class Examples:
    """The rows of a data section as examples, by the index of their row."""

    data: DataSpec
    source: Source
    reader: TextReader
    tokens: Tokens
    limits: Limits
    _made: dict[int, Example] = field(default_factory=dict, repr=False)

    @property
    def is_small(self) -> bool:
        return len(self.source.rows) <= FEW

    @property
    def columns(self) -> Columns:
        return self.reader.columns

    def read(self, indices: Sequence[int]) -> list[Example]:
        """The examples of rows that `scan` kept, in this order. Raises InputError."""
        rows = self.source.rows
        made = {index: self._made[index] for index in indices if index in self._made}
        missing = [index for index in indices if index not in made]
        for index, fit in self._fit((index, rows.block(index, index + 1)[0]) for index in missing):
            if isinstance(fit, BadRow) or fit.problem is not None:
                where = rows.where(index)
                raise InputError(f"{where}: changed since the run began; leave data alone during a run.")
            made[index] = fit.example
        return [made[index] for index in indices]

    def sample(self, most: int) -> list[Example]:
        """At most so many examples, evenly spaced. Raises InputError as `scan` does."""
        rows = self.source.rows
        step = -(-len(rows) // most)
        found: list[Example] = []
        lengths = array("q")
        for start in range(0, len(rows), step * BLOCK):
            indices = range(start, min(start + step * BLOCK, len(rows)), step)
            for _, fit in self._fit((index, rows.block(index, index + 1)[0]) for index in indices):
                if isinstance(fit, Fit):
                    lengths.append(fit.prompt_tokens)
                    if fit.problem is None:
                        found.append(fit.example)
        if not found:
            raise InputError(self._nothing(Counts(0, {}), lengths))
        return found

    def scan(self) -> tuple[list[int], Counts]:
        """The indices of all rows that are used, and what became of the others.

        Raises InputError: a bad row, unless such are skipped; none that can be used.
        """
        dropped: Counter[str] = Counter()
        kept: list[int] = []
        lengths = array("q")
        cut_prompts = cut_responses = largest = 0
        seen: set[bytes] = set()
        rows = self.source.rows
        for start in range(0, len(rows), BLOCK):
            block = rows.block(start, min(start + BLOCK, len(rows)))
            for index, fit in self._fit(enumerate(block, start)):
                problem = fit if isinstance(fit, BadRow) else fit.problem
                if not isinstance(fit, BadRow):
                    lengths.append(fit.prompt_tokens)
                if problem is None and self.data.duplicates == "drop" and _is_known(fit, seen):
                    problem = BadRow("", "", "duplicate")
                if problem is not None:
                    dropped[problem.reason] += 1
                    continue
                assert isinstance(fit, Fit)
                kept.append(index)
                if self.is_small:
                    self._made[index] = fit.example
                cut_prompts += fit.cut_prompt
                cut_responses += fit.cut_responses
                largest = max(largest, *map(max, (fit.example.prompt, *filter(None, fit.example.responses))))
        counts = Counts(len(rows), dict(dropped), cut_prompts, cut_responses, largest)
        if not kept:
            raise InputError(self._nothing(counts, lengths))
        return kept, counts

    def _nothing(self, counts: Counts, lengths: Sequence[int]) -> str:
        """Why no row is left."""
        most = self.limits.prompt
        if lengths and most is not None and min(lengths) > most:
            return (
                f"{self.data.path}: all {len(lengths)} prompts are longer than workload.prompt_tokens, "
                f"{most}: they have {min(lengths)} to {max(lengths)} tokens; raise it or shorten them."
            )
        return f"{self.data.path}: no row can be used: {counts}."

    def _fit(self, rows: Iterable[tuple[int, Row | BadRow]]) -> Iterator[tuple[int, Fit | BadRow]]:
        """Each row within the limits, or why it cannot be."""
        texts: list[tuple[int, Row, Texts]] = []
        bad: list[tuple[int, BadRow]] = []
        order: list[int] = []
        for index, row in rows:
            order.append(index)
            if isinstance(row, BadRow):
                bad.append((index, self._bad(row)))
                continue
            try:
                texts.append((index, row, self.reader.read(row, self.source.rows.where(index))))
            except BadRow as problem:
                bad.append((index, self._bad(problem)))
        found: list[tuple[int, Fit | BadRow]] = [*bad]
        for is_chat in (False, True):
            group = [entry for entry in texts if entry[2].is_chat is is_chat]
            encoded = encode(self.tokens, [text for _, _, text in group])
            for (index, row, _), example in zip(group, encoded, strict=True):
                found.append((index, self._limited(replace(example, row=row), index)))
        # as they were asked for, which may be twice
        by_index = dict(found)
        return ((index, by_index[index]) for index in order)

    def _bad(self, problem: BadRow) -> BadRow:
        if self.data.on_bad_row == "error":
            raise problem
        return problem

    def _limited(self, example: Example, index: int) -> Fit | BadRow:
        where = self.source.rows.where(index)
        length = len(example.prompt)
        if not example.prompt:
            empty = BadRow(where, "the tokenizer makes no token of the prompt.", "prompt without tokens")
            return self._bad(empty)
        most, longest = self.limits.prompt, self.limits.response
        cut_prompt = most is not None and length > most
        problem: BadRow | None = None
        if cut_prompt and self.data.long_prompts in ("drop", "error"):
            problem = BadRow(
                where,
                f"the prompt has {length} tokens, more than workload.prompt_tokens, {most}; raise that, or "
                f"set {self.data.section}.long_prompts to drop, truncate_left or truncate_right.",
                f"prompt over {most} tokens",
            )
            if self.data.long_prompts == "error":
                raise problem
        elif cut_prompt and most is not None:
            example = replace(example, prompt=self._cut_prompt(example.prompt, most))
        long = [len(r) for r in example.responses if longest is not None and len(r) > longest]
        if long and self.data.long_responses != "truncate":
            limit = "workload.response_tokens"
            if self.reader.want is Want.TEXTS:  # the first token stands for a prompt
                limit = f"{self.data.section}.tokens without the first"
            problem = problem or BadRow(
                where,
                f"a response has {max(long)} tokens, more than {limit}, {longest}; raise "
                f"that, or set {self.data.section}.long_responses to drop or truncate.",
                f"response over {longest} tokens",
            )
            if self.data.long_responses == "error":
                raise problem
        example = replace(
            example,
            responses=tuple(ids[:longest] for ids in example.responses),
            masks=tuple(mask[:longest] for mask in example.masks),
        )
        if problem is None and example.masks and not any(map(any, example.masks)):
            problem = BadRow(where, "", "nothing to learn within the limits")
        if problem is None and self.reader.want is Want.TEXTS and not any(example.responses):
            problem = BadRow(where, "", "text of one token")  # of a tokenizer that ends no text
        return Fit(example, length, cut_prompt, len(long), problem)

    def _cut_prompt(self, ids: Ids, most: int) -> Ids:
        """The last tokens, after those that the tokenizer begins every text with; or the first."""
        if self.data.long_prompts == "truncate_right":
            return ids[:most]
        (begin,) = self.tokens.encode([""], special_tokens=True)
        head = tuple(begin[: most - 1]) if ids[: len(begin)] == tuple(begin) else ()
        return head + ids[len(ids) - (most - len(head)) :]


def _is_known(fit: Fit | BadRow, seen: set[bytes]) -> bool:
    """Whether the same tokens came before."""
    assert isinstance(fit, Fit)
    content = repr((fit.example.prompt, fit.example.responses)).encode()
    digest = hashlib.blake2b(content, digest_size=12).digest()
    known = digest in seen
    seen.add(digest)
    return known


def open_examples(data: DataSpec, want: Want, tokens: Tokens, limits: Limits) -> Examples:
    """Opens the data and finds their columns. Raises InputError: no such file, columns that are not there."""
    source = open_source(data)
    first = source.rows.block(0, min(BLOCK, len(source.rows)))
    row = next((row for row in first if isinstance(row, Mapping)), first[0])
    if isinstance(row, BadRow):
        raise row
    columns = find_columns(data, want, tuple(row), source.rows.where(0))
    if data.loss_on != "response" and want is not Want.RESPONSES:
        raise InputError(
            f"experiment: {data.section}.loss_on: {data.loss_on} is for supervised training; the algorithm "
            f"takes {want.value}."
        )
    if data.loss_on == "assistant" and columns.messages is None:
        raise InputError(
            f"experiment: data.loss_on: assistant takes conversations (data.messages); the columns "
            f"are {columns}."
        )
    template = read_chat_template(tokens.folder, data.chat_template)
    reader = TextReader(columns, want, data.loss_on, data.chat, template, tokens.folder, data.section)
    return Examples(data, source, reader, tokens, limits)


def encode(tokens: Tokens, texts: Sequence[Texts]) -> list[Example]:
    """Token ids of texts that are all chats or all none; `row` is to be filled in."""
    special = not (texts and texts[0].is_chat)
    prompts = list(tokens.encode([text.prompt or "" for text in texts], special_tokens=special))
    wholes = iter(
        list(tokens.encode([w for t in texts for w in t.wholes if t.said is None], special_tokens=special))
    )
    examples = []
    for text, prompt in zip(texts, prompts, strict=True):
        if text.said is not None:
            examples.append(_masked(tokens, text, special))
            continue
        together = [next(wholes) for _ in text.wholes]
        if text.prompt is None:
            (ids,) = together
            examples.append(Example({}, tuple(ids[:1]), (_ended(ids[1:], tokens),) if ids else ()))
            continue
        responses = []
        for whole, ids in zip(text.wholes, together, strict=True):
            rest = ids[len(prompt) :]
            if ids[: len(prompt)] != prompt:  # a token reaches over the seam
                (rest,) = tokens.encode([whole[len(text.prompt) :]], special_tokens=False)
            responses.append(_ended(rest, tokens))
        examples.append(Example({}, tuple(prompt), tuple(responses)))
    return examples


def _masked(tokens: Tokens, text: Texts, special: bool) -> Example:
    """The whole text as its tokens are, split where the first learned one begins."""
    assert text.said is not None
    ((ids, places),) = tokens.places(text.wholes, special_tokens=special)
    learned = [
        any(start <= begin < stop for start, stop in text.said) if end > begin else False
        for begin, end in places
    ]
    first = learned.index(True) if any(learned) else len(ids)
    first = max(first, 1)
    response = _ended(ids[first:], tokens)
    mask = [int(flag) for flag in learned[first:]] + [1] * (len(response) - len(ids[first:]))
    return Example({}, tuple(ids[:first]), (response,), (tuple(mask),))


def _ended(ids: Sequence[int], tokens: Tokens) -> Ids:
    """With EOS at the end, once."""
    if ids and ids[-1] in tokens.eos_ids:
        return tuple(ids)
    return (*ids, *tokens.eos_ids[:1])
