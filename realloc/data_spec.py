"""The `data` section of an experiment: which rows, which of their columns are what, what becomes of odd ones.

Decides how the section is written; knows nothing of reading files (`realloc.row_sources`), of what columns
mean (`realloc.columns`) or of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from realloc.errors import InputError
from realloc.files import Reader, resolve_path

HUB = "hf://"
FORMATS = ("jsonl", "json", "parquet", "datasets")
LOSS_ON = ("response", "assistant", "all")
BAD_ROWS = ("error", "skip")
LONG_PROMPTS = ("drop", "error", "truncate_left", "truncate_right")
LONG_RESPONSES = ("truncate", "drop", "error")
DUPLICATES = ("keep", "drop")


@dataclass(frozen=True)
class DataSpec:
    """Where the rows are, and their columns. Rows are shuffled by the experiment's seed.

    `paths` are files, globs, folders or `hf://ORG/NAME`; `weights`, as many or none, say how often an epoch
    goes through each. `prompt` to `messages` are column names, where they are not those that are known
    (`realloc.columns`): `chosen` and `rejected` are the two responses of a preference, two neighbouring
    sequences; `text` is a whole text; `messages` a conversation. `loss_on`: what supervised training learns.
    `holdout`: the share of the rows that no iteration trains on, kept for evaluation; or `holdout_paths`, or
    the split `holdout_split`, all of whose rows are. `section` is where it stands, for messages.
    """

    paths: tuple[str, ...]
    prompt: str | None = None
    response: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    text: str | None = None
    messages: str | None = None
    format: str | None = None
    split: str | None = None
    config: str | None = None
    weights: tuple[float, ...] = ()
    chat: bool = False
    chat_template: str | None = None
    loss_on: str = "response"
    on_bad_row: str = "error"
    long_prompts: str = "drop"
    long_responses: str = "truncate"
    duplicates: str = "keep"
    holdout: float = 0.0
    holdout_paths: tuple[str, ...] = ()
    holdout_split: str | None = None
    section: str = "data"

    @property
    def holds_out(self) -> bool:
        """Whether some rows are kept for evaluation."""
        return self.holdout > 0 or bool(self.holdout_paths) or self.holdout_split is not None

    @property
    def path(self) -> str:
        """All paths as one text, for messages."""
        return ", ".join(self.paths)


def parse_data(reader: Reader, folder: Path, section: str = "data") -> DataSpec:
    """Reads the section; paths in it are relative to `folder`. Raises InputError."""
    template = reader.get("chat_template", str, None)
    if template is not None:
        template = str(resolve_path(template, folder, reader.at("chat_template")))
    data = DataSpec(
        paths=_paths(reader, "path", folder),
        prompt=reader.get("prompt", str, None),
        response=reader.get("response", str, None),
        chosen=reader.get("chosen", str, None),
        rejected=reader.get("rejected", str, None),
        text=reader.get("text", str, None),
        messages=reader.get("messages", str, None),
        format=reader.choice("format", FORMATS, None),
        split=reader.get("split", str, None),
        config=reader.get("config", str, None),
        weights=_weights(reader),
        chat=reader.get("chat", bool, False),
        chat_template=template,
        loss_on=reader.choice("loss_on", LOSS_ON, "response"),
        on_bad_row=reader.choice("on_bad_row", BAD_ROWS, "error"),
        long_prompts=reader.choice("long_prompts", LONG_PROMPTS, "drop"),
        long_responses=reader.choice("long_responses", LONG_RESPONSES, "truncate"),
        duplicates=reader.choice("duplicates", DUPLICATES, "keep"),
        holdout=reader.number("holdout", 0.0, minimum=0.0, maximum=0.9),
        holdout_paths=_paths(reader, "holdout_path", folder, needed=False),
        holdout_split=reader.get("holdout_split", str, None),
        section=section,
    )
    reader.done()
    _check(data, reader)
    return data


def _check(data: DataSpec, reader: Reader) -> None:
    if (data.chosen is None) != (data.rejected is None):
        missing = "rejected" if data.rejected is None else "chosen"
        raise InputError(f"{reader.where}: a preference has two responses; name the column '{missing}' too.")
    if data.chosen is not None and data.response is not None:
        raise InputError(f"{reader.where}: give response, or chosen and rejected, not both.")
    if data.weights and len(data.weights) != len(data.paths):
        raise InputError(
            f"{reader.at('weights')}: {len(data.weights)} weights for {len(data.paths)} paths; give each one."
        )
    ways = [data.holdout > 0, bool(data.holdout_paths), data.holdout_split is not None]
    if sum(ways) > 1:
        raise InputError(f"{reader.where}: give one of holdout, holdout_path and holdout_split.")


def _paths(reader: Reader, key: str, folder: Path, *, needed: bool = True) -> tuple[str, ...]:
    """One path or a list of them; names of the hub stay as they are."""
    value = reader.raw(key) if needed else reader.raw(key, None)
    if value is None and not needed:
        return ()
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        found = type(value).__name__
        raise InputError(f"{reader.at(key)}: expected a path or a list of paths, found {found}.")
    return tuple(
        text if text.startswith(HUB) else str(resolve_path(text, folder, reader.at(key))) for text in texts
    )


def _weights(reader: Reader) -> tuple[float, ...]:
    value = reader.raw("weights", [])
    if not isinstance(value, list) or not all(
        isinstance(w, (int, float)) and not isinstance(w, bool) and 0 < w <= 1000 for w in value
    ):
        raise InputError(f"{reader.at('weights')}: expected a list of numbers above 0 and at most 1000.")
    return tuple(float(w) for w in value)


def data_content(data: DataSpec) -> Mapping[str, Any]:
    """The section as the mapping that `parse_data` reads back to an equal value."""
    content: dict[str, Any] = {}
    for field in fields(DataSpec):
        value = getattr(data, field.name)
        if field.name in ("paths", "holdout_paths"):
            name = {"paths": "path", "holdout_paths": "holdout_path"}[field.name]
            if value:
                content[name] = value[0] if len(value) == 1 else list(value)
        elif field.name != "section" and value != field.default:
            content[field.name] = list(value) if isinstance(value, tuple) else value
    return content
