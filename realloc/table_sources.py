"""Rows of Parquet files and of Hugging Face data sets, through the libraries of the extra `data`.

Decides what those libraries are asked, and puts their errors into our words. Runs no code of a data set.
Both libraries are imported when such data are opened, never before.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from realloc.errors import InputError
from realloc.row_sources import BadRow, Row, Rows


@dataclass(frozen=True)
class _Table:
    """A Parquet file, decoded (pyarrow.Table)."""

    path: Path
    table: Any

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def where(self, index: int) -> str:
        return f"{self.path}, row {index + 1}"

    def block(self, start: int, stop: int) -> Sequence[Row | BadRow]:
        try:
            rows: list[Row] = self.table.slice(start, stop - start).to_pylist()
            return rows
        except UnicodeDecodeError as error:
            if stop - start == 1:
                return [BadRow(self.where(start), f"not UTF-8 text ({error.reason}).", "not UTF-8")]
            return [row for i in range(start, stop) for row in self.block(i, i + 1)]


@dataclass(frozen=True)
class _HubRows:
    """A split of a Hugging Face data set (datasets.Dataset), mapped from its cache."""

    name: str
    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, index: int) -> str:
        return f"{self.name}, row {index + 1}"

    def block(self, start: int, stop: int) -> Sequence[Row | BadRow]:
        columns: Mapping[str, Sequence[Any]] = self.dataset[start:stop]
        return [{name: values[i] for name, values in columns.items()} for i in range(stop - start)]


def open_parquet(path: Path) -> Rows:
    """Raises InputError: no pyarrow, no Parquet file."""
    parquet = _library("pyarrow.parquet", f"{path}: Parquet files are")
    arrow = importlib.import_module("pyarrow")
    try:
        table = parquet.read_table(str(path), memory_map=True)
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {_first_line(error)}") from None
    if not table.num_rows:
        raise InputError(f"{path}: has no rows.")
    return _Table(path, table)


def open_folder(path: Path, config: str | None, split: str | None) -> Rows:
    """A folder that save_to_disk wrote, or one of data files. Raises InputError."""
    library = _library("datasets", f"{path}: folders are")
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            found = library.load_from_disk(str(path))
        else:
            found = library.load_dataset(str(path), name=config)
    except (OSError, ValueError, RuntimeError, library.exceptions.DatasetsError) as error:
        raise InputError(f"{path}: cannot be read as a data set: {_first_line(error)}") from None
    return _split(library, str(path), found, split)


def open_hub(name: str, config: str | None, split: str | None) -> Rows:
    """A data set of the hub, or of its cache when offline. Raises InputError."""
    library = _library("datasets", f"hf://{name}: data sets of the hub are")
    try:
        found = library.load_dataset(name, name=config)
    except (OSError, ValueError, RuntimeError, library.exceptions.DatasetsError) as error:
        raise InputError(
            f"hf://{name}: cannot be loaded: {_first_line(error)} Without a network only data sets that "
            f"were loaded before are found."
        ) from None
    return _split(library, f"hf://{name}", found, split)


def _split(library: ModuleType, name: str, found: Any, split: str | None) -> Rows:
    """The split that was asked for: `train`, or the only one, where none was."""
    if isinstance(found, library.Dataset):
        if split is not None:
            raise InputError(f"{name}: has no splits; leave out data.split: {split}.")
        return _HubRows(name, found.with_format(None))
    known = list(found)
    wanted = split or ("train" if "train" in known else known[0])
    if wanted not in known or (split is None and len(known) > 1 and "train" not in known):
        said = f"no split '{split}'" if split else "several splits; choose one with data.split"
        raise InputError(f"{name}: has {said}; it has {', '.join(known)}.")
    return _HubRows(f"{name} ({wanted})", found[wanted].with_format(None))


def _library(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise InputError(
            f"{what} read with the package {package}, which cannot be imported ({error}); "
            f"pip install 'realloc[data]'."
        ) from None


def _first_line(error: Exception) -> str:
    """What a library's error says first, and what the one says that it comes from."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].removesuffix(".")
    return f"{line}: {_first_line(error.__cause__)}" if isinstance(error.__cause__, Exception) else line + "."
