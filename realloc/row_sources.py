"""Rows of a data set by their index: JSONL, JSON, Parquet and Hugging Face data sets behind one face.

Decides which reader a path needs and how a row is named in messages. Keeps no more in memory than it
must: of a JSONL file where its lines begin, of Parquet the decoded table, of a Hugging Face data set what
that library maps. Knows nothing of what columns mean.
"""

from __future__ import annotations

import bisect
import glob
import gzip
import io
import json
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from realloc.data_spec import HUB, DataSpec
from realloc.errors import InputError

Row = Mapping[str, Any]
BLOCK = 1024
"""Rows that are read at once where all are."""
_OTHERS = (".csv", ".tsv", ".arrow", ".feather", ".zip", ".zst", ".xz", ".bz2")
"""Names of files that hold data, though none that is read here."""


class BadRow(InputError):
    """A row that cannot be used; `reason` is what rows that are skipped are counted under."""

    def __init__(self, where: str, problem: str, reason: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.reason = reason


class Rows(Protocol):
    """Rows with an index. `block` and `row` raise InputError when the whole source cannot be read."""

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """The place of a row as messages name it: file and line, or row number."""

    def block(self, start: int, stop: int) -> Sequence[Row | BadRow]:
        """Rows start to stop, in order; in place of one that is no row, what is wrong with it."""


def row_at(rows: Rows, index: int) -> Row:
    """One row. Raises BadRow."""
    (row,) = rows.block(index, index + 1)
    if isinstance(row, BadRow):
        raise row
    return row


@dataclass(frozen=True)
class Source:
    """The rows of a data section; `parts` are how many each of its paths has, in order."""

    rows: Rows
    parts: tuple[int, ...]


def open_source(data: DataSpec) -> Source:
    """Opens all paths. Raises InputError: no such file, nothing in it, a missing library."""
    opened = [_open_path(path, data) for path in data.paths]
    rows: Rows = opened[0] if len(opened) == 1 else _Chain(tuple(opened))
    if not len(rows):
        raise InputError(f"{data.path}: has no rows.")
    return Source(rows, tuple(len(rows) for rows in opened))


def held_out_spec(data: DataSpec) -> DataSpec | None:
    """The data section of what is held out by a path or split of its own; None where none is."""
    if not data.holdout_paths and data.holdout_split is None:
        return None
    return replace(
        data,
        paths=data.holdout_paths or data.paths,
        split=data.holdout_split or data.split,
        weights=(),
        holdout_paths=(),
        holdout_split=None,
    )


def local_files(data: DataSpec) -> list[Path]:
    """The files and folders on this machine that the section names, globs expanded. Raises InputError."""
    paths = (*data.paths, *data.holdout_paths)
    return [path for text in paths if not text.startswith(HUB) for path in _matches(text, data)]


def _matches(text: str, data: DataSpec) -> list[Path]:
    path = Path(text)
    if path.exists() or not glob.has_magic(text):
        return [path]
    found = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    if not found:
        raise InputError(f"{text}: no file has such a name (the experiment's {data.section}.path).")
    return found


def _open_path(text: str, data: DataSpec) -> Rows:
    if text.startswith(HUB):
        from realloc.table_sources import open_hub

        return open_hub(text.removeprefix(HUB), data.config, data.split)
    opened = [_open_file(path, data) for path in _matches(text, data)]
    return opened[0] if len(opened) == 1 else _Chain(tuple(opened))


def _open_file(path: Path, data: DataSpec) -> Rows:
    if not path.exists():
        raise InputError(f"{path}: no such file (the experiment's {data.section}.path).")
    kind = data.format or _kind(path)
    if kind == "datasets":
        from realloc.table_sources import open_folder

        return open_folder(path, data.config, data.split)
    if path.is_dir():
        raise InputError(f"{path}: cannot be read: it is a folder, expected a file of {kind}.")
    if kind == "parquet":
        from realloc.table_sources import open_parquet

        return open_parquet(path)
    try:
        if kind == "json":
            return _read_json(path)
        return _read_lines(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from None


def _kind(path: Path) -> str:
    """The format that a name says; JSONL where it says none. Raises InputError for one that is not read."""
    if path.is_dir():
        return "datasets"
    suffix = path.suffix.lower()
    if suffix in _OTHERS:
        raise InputError(
            f"{path}: files of this kind ({suffix}) are not read; turn it into JSONL or Parquet, or, where "
            f"it only has this name, say what it is with data.format."
        )
    names = {".parquet": "parquet", ".pq": "parquet", ".json": "json"}
    return names.get(suffix, "jsonl")


@dataclass(frozen=True)
class _Chain:
    """Several sources, one after the other."""

    parts: tuple[Rows, ...]

    @property
    def _ends(self) -> list[int]:
        ends, total = [], 0
        for part in self.parts:
            total += len(part)
            ends.append(total)
        return ends

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def where(self, index: int) -> str:
        part = bisect.bisect_right(self._ends, index)
        return self.parts[part].where(index - ([0, *self._ends])[part])

    def block(self, start: int, stop: int) -> Sequence[Row | BadRow]:
        found: list[Row | BadRow] = []
        begin = 0
        for part in self.parts:
            low, high = max(start - begin, 0), min(stop - begin, len(part))
            if low < high:
                found += part.block(low, high)
            begin += len(part)
        return found


@dataclass(frozen=True)
class _Lines:
    """A JSONL file, of which only the places of its lines are kept: `starts[i]` to `starts[i + 1]`.

    Blank lines belong to the line before them; where there are any, `numbers` are those of the others.
    `content` holds a compressed file's text.
    """

    path: Path
    starts: array[int]
    numbers: array[int] | None = None
    content: bytes | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def where(self, index: int) -> str:
        return f"{self.path}, line {index + 1 if self.numbers is None else self.numbers[index]}"

    def block(self, start: int, stop: int) -> Sequence[Row | BadRow]:
        begin = self.starts[start]
        text = self._read(begin, self.starts[stop])
        lines = (
            text[self.starts[i] - begin : self.starts[i + 1] - begin].rstrip() for i in range(start, stop)
        )
        return [self._row(index, raw) for index, raw in enumerate(lines, start)]

    def _read(self, start: int, stop: int) -> bytes:
        if self.content is not None:
            return self.content[start:stop]
        try:
            with self.path.open("rb") as stream:
                stream.seek(start)
                found = stream.read(stop - start)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}.") from None
        if len(found) != stop - start:
            raise InputError(f"{self.path}: became shorter while it was read; leave data alone during a run.")
        return found

    def _row(self, index: int, raw: bytes) -> Row | BadRow:
        try:
            return _object(json.loads(raw.decode("utf-8-sig")), lambda: self.where(index))
        except UnicodeDecodeError as error:
            return BadRow(self.where(index), f"not UTF-8 text (byte {error.start} of the line).", "not UTF-8")
        except json.JSONDecodeError as error:
            problem = f"not valid JSON: {error.msg} (column {error.colno})."
        except RecursionError:
            problem = "not valid JSON: brackets within brackets without end."
        except ValueError as error:  # a number of thousands of digits
            problem = f"not valid JSON: {error}."
        return BadRow(self.where(index), problem, "not valid JSON")


def _object(value: Any, where: Any) -> Row | BadRow:
    if isinstance(value, Mapping):
        return value
    problem = f"expected a JSON object, found {type(value).__name__}."
    return BadRow(where(), problem, "not a JSON object")


def _read_lines(path: Path) -> Rows:
    content = None
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(path.read_bytes())
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{path}: cannot be decompressed: {error}.") from None
    starts, numbers, place, number = array("q"), array("q"), 0, 0
    with path.open("rb") if content is None else io.BytesIO(content) as stream:
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                starts.append(place)
                numbers.append(number)
            place += len(line)
    if not starts:
        raise InputError(f"{path}: has no rows; it needs one JSON object a line.")
    starts.append(place)
    return _Lines(path, starts, None if number == len(numbers) else numbers, content)


@dataclass(frozen=True)
class _Array:
    """The objects of one JSON list, all of them in memory."""

    path: Path
    values: Sequence[Any]

    def __len__(self) -> int:
        return len(self.values)

    def where(self, index: int) -> str:
        return f"{self.path}, row {index + 1}"

    def block(self, start: int, stop: int) -> Sequence[Row | BadRow]:
        return [_object(self.values[i], lambda i=i: self.where(i)) for i in range(start, stop)]


def _read_json(path: Path) -> Rows:
    """A list of objects; a file of JSON lines that is called .json is read as such."""
    raw = path.read_bytes()
    if not raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return _read_lines(path)
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}.") from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: not valid JSON: {error}.") from None
    if not value:
        raise InputError(f"{path}: has no rows; it needs a list of JSON objects.")
    return _Array(path, value)
