"""Lengths of a data set's texts in tokens, for workloads that say `measured`.

Reads what the runtime will read, with the same tokenizer and without torch. Decides which rows stand for
the whole: at most MOST_ROWS of them, evenly spaced.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realloc.errors import InputError

MOST_ROWS = 10_000


@dataclass(frozen=True)
class TextLengths:
    """What there is to measure: a model's folder and a file with its columns, where they are given.

    `where` is the workload that asks, for messages. Both methods raise InputError, naming what is
    missing or the line that is wrong.
    """

    where: str
    folder: str | None
    path: str | None = None
    prompt: str | None = None
    responses_in: tuple[str, ...] = ()

    def prompts(self, longest: int | None) -> Mapping[int, int]:
        """Tokens -> how many prompts have so many; longer ones are left out, as a run leaves them out."""
        if self.path is None or self.prompt is None or self.folder is None:
            raise InputError(
                f"{self.where}.prompt_tokens: measuring takes data and a model's folder with its tokenizer."
            )
        found = Counter(_lengths(_texts(Path(self.path), self.prompt), self.folder, special_tokens=True))
        kept = {tokens: n for tokens, n in found.items() if longest is None or tokens <= longest}
        if not kept:
            raise InputError(
                f"{self.path}: all prompts are longer than the {longest} tokens allowed: they have "
                f"{min(found)} to {max(found)}."
            )
        return kept

    def responses(self, longest: int | None) -> Mapping[int, int]:
        """Tokens -> how many responses have so many, with the token that ends one; longer ones are cut.

        A response that begins with its prompt is taken for the whole text.
        """
        if self.path is None or self.prompt is None or not self.responses_in or self.folder is None:
            raise InputError(
                f"{self.where}.response_tokens: only data with responses (data.response) can be measured; "
                f"those that a model samples are known after a run: realloc lengths RUN."
            )
        path = Path(self.path)
        prompts = _texts(path, self.prompt)
        alone = [
            text.removeprefix(prompt)
            for column in self.responses_in
            for prompt, text in zip(prompts, _texts(path, column), strict=True)
        ]
        found = (n + 1 for n in _lengths(alone, self.folder, special_tokens=False))
        return Counter(n if longest is None else min(n, longest) for n in found)


def _texts(path: Path, column: str) -> Sequence[str]:
    try:
        lines = [
            (n, line) for n, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1) if line.strip()
        ]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (the experiment's data.path).") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}.") from None
    if not lines:
        raise InputError(f"{path}: has no rows, so there are no lengths to measure.")
    step = -(-len(lines) // MOST_ROWS)
    return [_text(f"{path}, line {number}", line, column) for number, line in lines[::step]]


def _text(where: str, line: str, column: str) -> str:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not valid JSON.") from None
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise InputError(f"{where}: has no text in the column '{column}'.")
    return text


def _lengths(texts: Sequence[str], folder: str, *, special_tokens: bool) -> Sequence[int]:
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; lengths are measured with a model's tokenizer.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the library raises nothing narrower)
        raise InputError(f"{path}: cannot be read as a tokenizer: {error}.") from None
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=special_tokens)
    return [len(item.ids) for item in encoded]
