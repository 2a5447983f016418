"""Tokenizers of model folders: what ends a text, and folders that have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import toy
from realloc.errors import InputError
from runtime.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    toy.write_tokenizer(folder)
    toy.write_tiny_model(folder, seed=0)
    return folder


def copy_model(model: Path, to: Path, **config: Any) -> Path:
    to.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (to / name).write_bytes((model / name).read_bytes())
    content = json.loads((model / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(content))
    return to


def test_eos_ids_come_from_every_file_that_names_them(tmp_path: Path, model: Path) -> None:
    folder = copy_model(model, tmp_path / "m", eos_token_id=[5, 2])
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert read_tokenizer(folder).eos_ids == (2, 7, 5)
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<bos>"}}')
    assert read_tokenizer(folder).eos_ids == (1, 7, 5, 2)


def test_settings_of_earlier_calls_do_not_cut_or_pad(tmp_path: Path, model: Path) -> None:
    folder = copy_model(model, tmp_path / "m")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (ids,) = read_tokenizer(folder).encode(["the dog was happy ."], special_tokens=True)
    assert len(ids) == 6


def test_bad_tokenizer_folders_are_named(tmp_path: Path, model: Path) -> None:
    folder = copy_model(model, tmp_path / "m")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: not valid JSON"):
        read_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        read_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        read_tokenizer(folder)
