"""Which rows of a large data set are used, found once on a machine and kept in the user's cache.

Looking at every row takes minutes for a million of them, and the launcher and all ranks would find the same.
Decides when a kept result still holds: when the data section, the tokenizer and the files are as they were.
Nothing is kept of small data sets, where looking is quick and makes the examples, nor of those of the hub,
whose files are another library's business.
"""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from numpy.typing import NDArray

from realloc import __version__
from realloc.data_spec import HUB, data_content
from realloc.examples import Counts, Examples
from realloc.row_sources import local_files

MOST_KEPT = 32


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/realloc`, or `~/.cache/realloc`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "realloc"


def used_rows(examples: Examples, folder: Path | None) -> tuple[NDArray[np.int64], Counts]:
    """The indices of the rows that are used, and what became of the others, from `folder` where it has them.

    `folder` None, or one that cannot be written, keeps nothing. Raises InputError as `Examples.scan` does.
    """
    from_hub = any(path.startswith(HUB) for path in examples.data.paths)
    if folder is None or examples.is_small or from_hub:
        rows, counts = examples.scan()
        return np.array(rows, dtype=np.int64), counts
    path = folder / f"rows-{_fingerprint(examples)}.npz"
    found = _read(path)
    if found is None:
        rows, counts = examples.scan()
        found = np.array(rows, dtype=np.int64), counts
        _write(path, *found)
    return found


def _fingerprint(examples: Examples) -> str:
    """Of all that decides which rows are used."""
    tokenizer = Path(examples.tokens.folder)
    files = [*local_files(examples.data), *sorted(tokenizer.glob("*.json")), *tokenizer.glob("*.jinja")]
    if examples.data.chat_template is not None:
        files.append(Path(examples.data.chat_template))
    inside = [f for path in files if path.is_dir() for f in sorted(path.rglob("*")) if f.is_file()]
    stamps = []
    for path in [path for path in files if path.is_file()] + inside:
        state = path.stat()
        stamps.append([str(path), state.st_size, state.st_mtime_ns])
    content = [
        __version__,
        data_content(examples.data),
        examples.reader.want.value,
        asdict(examples.limits),
        len(examples.source.rows),
        stamps,
    ]
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def _read(path: Path) -> tuple[NDArray[np.int64], Counts] | None:
    try:
        with np.load(path) as file:
            rows, counts = file["rows"], json.loads(str(file["counts"]))
        return rows.astype(np.int64), Counts(**counts)
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError):
        return None  # none yet, or one that was cut off: it is made again


def _write(path: Path, rows: NDArray[np.int64], counts: Counts) -> None:
    """In one step, so that another rank finds all of it or nothing; the oldest make room."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as stream:
            try:
                np.savez(stream, rows=rows, counts=np.array(json.dumps(asdict(counts))))
            except OSError:
                Path(stream.name).unlink(missing_ok=True)
                raise
        Path(stream.name).replace(path)
        kept = sorted(path.parent.glob("rows-*.npz"), key=lambda old: old.stat().st_mtime_ns)
        for old in kept[:-MOST_KEPT]:
            old.unlink(missing_ok=True)
    except OSError:
        return  # a cache that cannot be written only costs time
