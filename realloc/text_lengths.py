"""Lengths of a data set's texts in tokens, for workloads that say `measured`.

Reads what the runtime will read, with the same tokenizer and without torch. Decides which rows stand for
the whole: at most MOST_ROWS of them, evenly spaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from realloc.columns import Want
from realloc.data_spec import DataSpec
from realloc.errors import InputError
from realloc.examples import Example, Limits, open_examples
from realloc.tokenizer import read_tokenizer

MOST_ROWS = 10_000


@dataclass(frozen=True)
class TextLengths:
    """What there is to measure: a model's folder and the data section, where they are given.

    `want`: what the algorithm takes from the data, which decides where a prompt ends.
    `where` is the section that asks, for messages. All methods raise InputError, naming what is
    missing or the line that is wrong.
    """

    where: str
    folder: str | None
    data: DataSpec | None
    want: Want

    def prompts(self, longest: int | None) -> Mapping[int, int]:
        """Tokens -> how many prompts have so many; longer ones are left out, or cut, as a run does."""
        if self.data is None or self.folder is None:
            raise InputError(
                f"{self.where}.prompt_tokens: measuring takes data and a model's folder with its tokenizer."
            )
        examples = self._examples(self.data, self.folder, Limits(prompt=longest))
        return Counter(len(example.prompt) for example in examples)

    def responses(self, longest: int | None) -> Mapping[int, int]:
        """Tokens -> how many responses have so many, with the token that ends one; longer ones are cut."""
        if self.data is None or self.folder is None or self.want is Want.PROMPTS:
            raise InputError(
                f"{self.where}.response_tokens: only data with responses (data.response) can be measured; "
                f"those that a model samples are known after a run: realloc lengths RUN."
            )
        examples = self._examples(self.data, self.folder, Limits(response=longest))
        return Counter(len(response) for example in examples for response in example.responses)

    def texts(self, longest: int | None) -> Mapping[int, int]:
        """Tokens -> how many texts have so many, with the token that ends one; longer ones are cut."""
        if self.data is None or self.folder is None:
            raise InputError(f"{self.where}.tokens: measuring takes a model's folder with its tokenizer.")
        limits = Limits(1, None if longest is None else max(1, longest - 1))
        examples = self._examples(self.data, self.folder, limits)
        return Counter(1 + len(response) for example in examples for response in example.responses)

    def _examples(self, data: DataSpec, folder: str, limits: Limits) -> Sequence[Example]:
        """Examples of evenly spaced rows."""
        return open_examples(data, self.want, read_tokenizer(folder), limits).sample(MOST_ROWS)
