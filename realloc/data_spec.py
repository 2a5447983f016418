"""The `data` section of an experiment: which file, and which of its columns are what.

Decides how the section is written; knows nothing of reading files or of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realloc.errors import InputError
from realloc.files import Reader, resolve_path


@dataclass(frozen=True)
class DataSpec:
    """A JSONL file and its columns. Rows are shuffled by the experiment's seed.

    `chosen` and `rejected` are the two responses of a preference: two neighbouring sequences. `holdout`:
    the share of the rows that no iteration trains on, kept for evaluation.
    """

    path: str
    prompt: str = "prompt"
    response: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    holdout: float = 0.0

    @property
    def responses(self) -> tuple[str, ...]:
        """The columns of a row's responses, in the order of their sequences."""
        if self.chosen is not None and self.rejected is not None:
            return (self.chosen, self.rejected)
        return () if self.response is None else (self.response,)


def parse_data(reader: Reader, folder: Path) -> DataSpec:
    """Reads the section; a path in it is relative to `folder`. Raises InputError."""
    path = resolve_path(reader.get("path", str), folder, reader.at("path"))
    data = DataSpec(
        path=str(path),
        prompt=reader.get("prompt", str, "prompt"),
        response=reader.get("response", str, None),
        chosen=reader.get("chosen", str, None),
        rejected=reader.get("rejected", str, None),
        holdout=reader.number("holdout", 0.0, minimum=0.0, maximum=0.9),
    )
    reader.done()
    if (data.chosen is None) != (data.rejected is None):
        missing = "rejected" if data.rejected is None else "chosen"
        raise InputError(f"{reader.where}: a preference has two responses; name the column '{missing}' too.")
    if data.chosen is not None and data.response is not None:
        raise InputError(f"{reader.where}: give response, or chosen and rejected, not both.")
    return data


def data_content(data: DataSpec) -> Mapping[str, Any]:
    """The section as the mapping that `parse_data` reads back to an equal value."""
    return {name: value for name, value in vars(data).items() if value not in (None, 0.0)}
