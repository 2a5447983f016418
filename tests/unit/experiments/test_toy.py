"""The toy language: reproducible data, a tokenizer that round-trips, an initial model that is read."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import rewards, toy
from realloc.model_shape import read_config, shape_from_config
from runtime.tokenizer import read_tokenizer

FIRST_STORY = (
    "once there was a small farmer who lived near the beach . they waited together . "
    "suddenly the farmer felt grateful . the farmer angrily ran to the cave . at "
    "night they all fought ."
)


def test_the_command_writes_the_same_files_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        toy.main([str(tmp_path / name), "--seed", seed, "--stories", "50"])
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    for seeded in ("train.jsonl", "test.jsonl", "model/model.safetensors"):
        assert (tmp_path / "a" / seeded).read_bytes() != (tmp_path / "c" / seeded).read_bytes()


def test_the_language_itself_does_not_drift() -> None:
    """Demonstrations and their artefact rely on this stream; change it only with the artefact."""
    first = next(toy.stories(seed=0))
    assert first.story.startswith(first.prompt)
    assert first.story == FIRST_STORY


def test_no_prompt_is_in_both_files(tmp_path: Path) -> None:
    toy.write_data(tmp_path, seed=0, num_train=500, num_test=100)
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    }
    assert (len(rows["train"]), len(rows["test"])) == (500, 100)
    assert not {row["prompt"] for row in rows["train"]} & {row["prompt"] for row in rows["test"]}
    assert all(row["story"].startswith(row["prompt"] + " ") for row in rows["train"])


def test_stories_vary() -> None:
    stories = list(islice(toy.stories(seed=1), 1000))
    assert len({story.story for story in stories}) > 990
    assert len({story.prompt for story in stories}) > 500
    words = {word for story in stories for word in story.story.split()}
    assert words == set(toy.vocabulary()) - set(toy.SPECIAL_TOKENS)


def test_the_tokenizer_round_trips_every_story(tmp_path: Path) -> None:
    toy.write_tokenizer(tmp_path)
    toy.write_tiny_model(tmp_path, seed=0)
    tokenizer = read_tokenizer(tmp_path)
    texts = [story.story for story in islice(toy.stories(seed=2), 200)]
    for text, ids in zip(texts, tokenizer.encode(texts, special_tokens=True), strict=True):
        assert ids[0] == toy.SPECIAL_TOKENS.index("<bos>")
        assert len(ids) == len(text.split()) + 1 < toy.CONTEXT
        assert toy.SPECIAL_TOKENS.index("<unk>") not in ids
        assert tokenizer.decode([*ids, tokenizer.eos_ids[0]]) == text
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.pad_id == 0
    assert tokenizer.backend.get_vocab_size() == len(toy.vocabulary()) <= 512


def test_the_initial_model_has_the_shape_that_its_config_says(tmp_path: Path) -> None:
    toy.write_tiny_model(tmp_path, seed=0)
    shape = shape_from_config(read_config(tmp_path), "config.json")
    weights = load_file(tmp_path / "model.safetensors")
    assert shape.num_params == sum(w.size for w in weights.values())
    assert 200_000 < shape.num_params < 450_000
    assert shape.vocab % 8 == 0
    assert shape.vocab >= len(toy.vocabulary())
    assert all(w.dtype == np.float32 for w in weights.values())
    assert float(weights["model.embed_tokens.weight"].std()) == pytest.approx(0.05, rel=0.05)


def test_the_demos_prompts_are_those_of_its_model(tmp_path: Path) -> None:
    """`make demo-model` writes them; the model beside them was trained on the same stories."""
    toy.write_data(tmp_path, seed=1, num_train=4000, num_test=256)
    demo = Path(toy.__file__).parent / "demo"
    assert (tmp_path / "prompts.jsonl").read_text() == (demo / "prompts.jsonl").read_text()
    assert sum(file.stat().st_size for file in demo.rglob("*") if file.is_file()) < 2_000_000


def test_of_a_pair_the_chosen_end_is_the_gladder_one_on_average() -> None:
    some = list(islice(toy.pairs(0), 300))
    assert all(pair[end].startswith(pair["prompt"] + " ") for pair in some for end in ("chosen", "rejected"))
    gain = [rewards.mood(pair["chosen"]) - rewards.mood(pair["rejected"]) for pair in some]
    assert sum(gain) / len(gain) > 2
    assert sum(value > 0 for value in gain) > 0.8 * len(gain)
