"""Real prompts with a real tokenizer: TinyStories and stories260K, against transformers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from realloc.columns import Want
from realloc.data_spec import DataSpec
from runtime.dataset import read_dataset
from runtime.tokenizer import read_tokenizer

DATA = Path(os.environ.get("REALLOC_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
MODEL, STORIES = DATA / "stories260k", DATA / "tinystories" / "train.jsonl"
pytestmark = pytest.mark.skipif(
    not (MODEL.is_dir() and STORIES.is_file()), reason=f"no stories260k and tinystories in {DATA}"
)


def test_tokens_equal_those_of_transformers() -> None:
    from transformers import AutoTokenizer

    dataset = read_dataset(
        DataSpec((str(STORIES),), "prompt", "story"),
        read_tokenizer(MODEL),
        want=Want.RESPONSES,
        sequences=32,
        max_prompt=24,
        max_response=200,
        seed=1,
    )
    oracle = AutoTokenizer.from_pretrained(str(MODEL))
    batch = dataset.batch(5)
    assert batch.responses is not None
    for row, prompt, response in zip(batch.rows, batch.prompts, batch.responses, strict=True):
        whole = [*oracle(row["story"]).input_ids, oracle.eos_token_id]
        assert list(prompt) == oracle(row["prompt"]).input_ids
        assert [*prompt, *response] == whole[: len(prompt) + 200]
        assert dataset.decode(prompt) == row["prompt"]
    assert 0 < sum(dataset.counts.dropped.values()) < 732
    assert dataset.counts.rows == 732
    assert (dataset.eos_ids, dataset.pad_id) == ((1,), 2)
