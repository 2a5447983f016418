"""Every format gives the same rows, and names the place of one that is wrong."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from realloc.data_spec import DataSpec
from realloc.errors import InputError
from realloc.row_sources import BadRow, Row, Rows, open_source, row_at

ROWS: list[dict[str, Any]] = [
    {"prompt": f"p{i} ü", "messages": [{"role": "user", "content": "x"}], "number": i} for i in range(2500)
]


def jsonl(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n" + "\n\n".join(json.dumps(row) for row in ROWS))  # blank lines, no last newline
    return path


def zipped(folder: Path) -> Path:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\r\n" for row in ROWS).encode()))
    return path


def damaged(content: bytes) -> bytes:
    """Compressed, with a first block of a kind that there is none of."""
    found = bytearray(gzip.compress(content))
    found[10] = 0xFF
    return bytes(found)


def every(rows: Rows) -> list[Row | BadRow]:
    return [
        row for start in range(0, len(rows), 1000) for row in rows.block(start, min(start + 1000, len(rows)))
    ]


def array(folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(ROWS, indent=1))
    return path


def lines_called_json(folder: Path) -> Path:
    return jsonl(folder).rename(folder / "lines.json")


def parquet(folder: Path) -> Path:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = folder / "rows.parquet"
    writer.write_table(arrow.Table.from_pylist(ROWS), path, row_group_size=700)
    return path


def saved(folder: Path) -> Path:
    pytest.importorskip("datasets").Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_splits(folder: Path) -> Path:
    library = pytest.importorskip("datasets")
    splits = {"test": library.Dataset.from_list(ROWS[:1]), "train": library.Dataset.from_list(ROWS)}
    library.DatasetDict(splits).save_to_disk(folder / "splits")
    return folder / "splits"


def folder_of_files(folder: Path) -> Path:
    pytest.importorskip("datasets")
    (folder / "files").mkdir()
    return jsonl(folder).rename(folder / "files" / "train.jsonl").parent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


FORMATS = (jsonl, zipped, array, lines_called_json, parquet, saved, saved_splits, folder_of_files)


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, write: Callable[[Path], Path]):
    source = open_source(DataSpec((str(write(tmp_path)),)))
    assert every(source.rows) == ROWS
    assert row_at(source.rows, 2044) == ROWS[2044]
    assert source.parts == (2500,)


def test_places_are_named(tmp_path: Path):
    pytest.importorskip("datasets")
    places = [open_source(DataSpec((str(write(tmp_path)),))).rows.where(6) for write in FORMATS[:7]]
    endings = (
        "rows.jsonl, line 14",
        "rows.jsonl.gz, line 7",
        "rows.json, row 7",
        "lines.json, line 14",
        "rows.parquet, row 7",
        "saved, row 7",
        "splits (train), row 7",
    )
    for place, ending in zip(places, endings, strict=True):
        assert place.endswith(ending)


def test_globs_and_lists_are_read_in_order(tmp_path: Path):
    for name, rows in (("b2", ROWS[2:5]), ("b1", ROWS[:2]), ("c", ROWS[5:9])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(DataSpec((str(tmp_path / "b*.jsonl"), str(tmp_path / "c.jsonl"))))
    assert every(source.rows) == ROWS[:9]
    assert source.parts == (5, 4)
    assert source.rows.block(1, 7) == ROWS[1:7]
    assert [source.rows.where(i).rpartition("/")[2] for i in (1, 2, 5)] == [
        "b1.jsonl, line 2",
        "b2.jsonl, line 1",
        "c.jsonl, line 1",
    ]
    with pytest.raises(InputError, match="no file has such a name"):
        open_source(DataSpec((str(tmp_path / "z*.jsonl"),)))


def test_bad_lines_do_not_hide_good_ones(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": "\xff"}\n[1]\n{"a": 2}\n')
    found = open_source(DataSpec((str(path),))).rows.block(0, 5)
    assert [row.reason if isinstance(row, BadRow) else row for row in found] == [
        {"a": 1},
        "not valid JSON",
        "not UTF-8",
        "not a JSON object",
        {"a": 2},
    ]
    with pytest.raises(BadRow, match=r"x\.jsonl, line 3: not UTF-8 text \(byte 7 of the line\)"):
        row_at(open_source(DataSpec((str(path),))).rows, 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"[]", "x.json: has no rows"),
        ("x.json", b'[{"a": 1},\n{]', "x.json, line 2: not valid JSON"),
        ("x.json", b'["\xff"]', "x.json: not UTF-8 text"),
        ("x.jsonl.gz", b"no gzip", "x.jsonl.gz: cannot be decompressed"),
        ("x.jsonl.gz", damaged(b'{"a": 1}\n' * 99), "x.jsonl.gz: cannot be decompressed"),
        ("x.csv", b"a\n1\n", "x.csv: files of this kind (.csv) are not read; turn it into JSONL or Parquet"),
        ("x.parquet", b"no parquet", "x.parquet: cannot be read as Parquet"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        open_source(DataSpec((str(tmp_path / name),)))
    assert message in str(error.value)


def test_what_a_library_could_not_read_is_said(tmp_path: Path):
    folder_of_files(tmp_path)
    with (tmp_path / "files" / "train.jsonl").open("a") as file:
        file.write("\n{bad\n")
    with pytest.raises(InputError, match=r"files: cannot be read as a data set: .*JSON parse error"):
        open_source(DataSpec((str(tmp_path / "files"),)))


def test_splits_that_are_not_there_are_said(tmp_path: Path):
    path = str(saved_splits(tmp_path))
    with pytest.raises(InputError, match="no split 'val'; it has test, train"):
        open_source(DataSpec((path,), split="val"))
    assert len(open_source(DataSpec((path,), split="test")).rows) == 1
    with pytest.raises(InputError, match="has no splits"):
        open_source(DataSpec((str(saved(tmp_path)),), split="train"))


@pytest.mark.parametrize(("path", "package"), [("x.parquet", "pyarrow"), ("hf://org/name", "datasets")])
def test_a_missing_library_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, package: str):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=rf"the package {package}.*pip install 'realloc\[data\]'"):
        open_source(DataSpec((path if "//" in path else str(tmp_path / path),)))


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch):
    library = pytest.importorskip("datasets")

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'org/name' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(library, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"hf://org/name: cannot be loaded: .*only data sets that"):
        open_source(DataSpec(("hf://org/name",)))


def test_a_data_set_of_the_hub_is_read_by_config_and_split(monkeypatch: pytest.MonkeyPatch):
    library = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(path: str, name: str | None) -> Any:
        asked.append((path, name))
        return library.DatasetDict({"test": library.Dataset.from_list(ROWS[:3])})

    monkeypatch.setattr(library, "load_dataset", load)
    rows = open_source(DataSpec(("hf://org/name",), config="main", split="test")).rows
    assert (asked, rows.block(1, 3)) == ([("org/name", "main")], ROWS[1:3])
    assert rows.where(1) == "hf://org/name (test), row 2"


def test_a_file_that_shrinks_is_said(tmp_path: Path):
    path = jsonl(tmp_path)
    rows = open_source(DataSpec((str(path),))).rows
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="became shorter"):
        rows.block(2400, 2401)
