"""Lengths of a data set's texts in tokens, for workloads that say `measured`.

Reads what the runtime will read, with the same tokenizer and without torch. Decides which rows stand for
the whole: at most MOST_ROWS of them, evenly spaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from realloc.columns import NoColumns, Want
from realloc.data_spec import DataSpec
from realloc.errors import InputError
from realloc.examples import Example, Limits, open_examples
from realloc.tokenizer import read_tokenizer

MOST_ROWS = 10_000


@dataclass(frozen=True)
class TextLengths:
    """What there is to measure: a model's folder and the data section, where they are given.

    `where` is the section that asks, for messages. All methods raise InputError, naming what is
    missing or the line that is wrong.
    """

    where: str
    folder: str | None
    data: DataSpec | None = None

    def prompts(self, longest: int | None) -> Mapping[int, int]:
        """Tokens -> how many prompts have so many; longer ones are left out, or cut, as a run does."""
        if self.data is None or self.folder is None:
            raise InputError(
                f"{self.where}.prompt_tokens: measuring takes data and a model's folder with its tokenizer."
            )
        wants = (Want.PROMPTS, Want.RESPONSES)
        if self.data.loss_on != "response" or self.data.text is not None:
            wants = (Want.RESPONSES, Want.PROMPTS)
        examples = _examples(self.data, wants, self.folder, Limits(prompt=longest))
        return Counter(len(example.prompt) for example in examples)

    def responses(self, longest: int | None) -> Mapping[int, int]:
        """Tokens -> how many responses have so many, with the token that ends one; longer ones are cut."""
        missing = (
            f"{self.where}.response_tokens: only data with responses (data.response) can be measured; those "
            f"that a model samples are known after a run: realloc lengths RUN."
        )
        if self.data is None or self.folder is None:
            raise InputError(missing)
        try:
            wants = (Want.PAIRS, Want.RESPONSES)
            examples = _examples(self.data, wants, self.folder, Limits(response=longest))
        except NoColumns:
            raise InputError(missing) from None
        return Counter(len(response) for example in examples for response in example.responses)

    def texts(self, longest: int | None) -> Mapping[int, int]:
        """Tokens -> how many texts have so many, with the token that ends one; longer ones are cut."""
        if self.data is None or self.folder is None:
            raise InputError(f"{self.where}.tokens: measuring takes a model's folder with its tokenizer.")
        limits = Limits(1, None if longest is None else max(1, longest - 1))
        examples = _examples(self.data, (Want.TEXTS, Want.TEXTS), self.folder, limits)
        return Counter(1 + len(response) for example in examples for response in example.responses)


def _examples(data: DataSpec, wants: tuple[Want, Want], folder: str, limits: Limits) -> Sequence[Example]:
    """Examples of evenly spaced rows, of the first kind that the data have. Raises InputError."""
    tokenizer = read_tokenizer(folder)
    try:
        found = open_examples(data, wants[0], tokenizer, limits)
    except NoColumns:
        found = open_examples(data, wants[1], tokenizer, limits)
    return found.sample(MOST_ROWS)
