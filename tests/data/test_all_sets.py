"""Every real data set by a plain experiment: what is read, left out and cut, and how long its texts are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from realloc.cli import main
from realloc.errors import InputError
from realloc.experiment import Experiment, parse_experiment
from realloc.files import Reader
from realloc.tokenizer import read_tokenizer
from runtime.dataset import open_dataset

DATA = Path(os.environ.get("REALLOC_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
MODEL = DATA / "stories260k"
SETS: Mapping[str, tuple[str, Mapping[str, Any], int]] = {
    "prompts of stories": ("raft", {"path": "tinystories/train.jsonl"}, 732),
    "stories": ("sft", {"path": "tinystories/train.jsonl", "response": "story"}, 732),
    "stories, as one text": ("sft", {"path": "tinystories/test.jsonl", "text": "story"}, 100),
    "prompts of preferences": ("raft", {"path": "hh-rlhf/train.jsonl"}, 2000),
    "preferences": ("reward", {"path": "hh-rlhf/train.jsonl", "holdout_path": "hh-rlhf/test.jsonl"}, 2000),
    "preferences to train a policy on": ("dpo", {"path": "hh-rlhf/test.jsonl"}, 500),
    "both halves": ("reward", {"path": "hh-rlhf/*.jsonl", "holdout": 0.2}, 2500),
    "problems": ("raft", {"path": "gsm8k/train.jsonl", "prompt": "question"}, 7473),
    "solutions": ("sft", {"path": "gsm8k/test.jsonl", "prompt": "question", "response": "answer"}, 1319),
}


def experiment(algorithm: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
    roles = {"raft": ("actor",), "sft": ("actor",), "reward": ("reward",), "dpo": ("actor", "ref")}
    workload = {"sequences": 8, "prompt_tokens": 256, "response_tokens": 256, "samples_per_prompt": 2}
    if algorithm == "sft":
        workload.pop("samples_per_prompt")
    content: dict[str, Any] = {
        "algorithm": algorithm,
        "models": dict.fromkeys(roles[algorithm], str(MODEL)),
        "data": {**data, "path": str(DATA / data["path"])},
        "workload": workload,
    }
    if "holdout_path" in data:
        content["data"]["holdout_path"] = str(DATA / data["holdout_path"])
    if algorithm == "raft":
        content["reward"] = "experiments.rewards:sentiment"
    return content


def parsed(content: Mapping[str, Any]) -> Experiment:
    return parse_experiment(Reader(dict(content), "experiment"), DATA)


@pytest.mark.parametrize("name", SETS)
def test_a_plain_experiment_reads_it(name: str) -> None:
    algorithm, data, rows = SETS[name]
    if not MODEL.is_dir() or not list(DATA.glob(data["path"])):
        pytest.skip(f"no stories260k and {data['path']} in {DATA}")
    dataset = open_dataset(parsed(experiment(algorithm, data)))
    counts = dataset.counts
    assert counts.rows == rows
    assert counts.kept > rows / 2
    assert set(counts.dropped) <= {"prompt over 256 tokens"}
    held = 0 if dataset.held is None else len(dataset.held)
    if "holdout" in data:
        assert held == round(0.2 * counts.kept)
        held_here = held
    else:
        assert held == (0 if "holdout_path" not in data else dataset.held.counts.kept)  # type: ignore[union-attr]
        held_here = 0
    assert len(dataset) + held_here == counts.kept
    batch = dataset.batch(0)
    assert all(0 < len(prompt) <= 256 for prompt in batch.prompts)
    assert (batch.responses is None) == (algorithm == "raft")
    for prompt, response, row in zip(batch.prompts, batch.responses or (), batch.rows, strict=False):
        assert len(response) <= 256
        text = dataset.decode([*prompt, *response]).strip()
        texts = [value.strip() for key, value in row.items() if key != "id"]
        assert any(text[-20:] in whole for whole in texts)


def test_lengths_of_a_data_set_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not MODEL.is_dir() or not (DATA / "hh-rlhf").is_dir():
        pytest.skip(f"no stories260k and hh-rlhf in {DATA}")
    path = tmp_path / "experiment.yaml"
    content = {"realloc": "experiment/1", **experiment("reward", {"path": "hh-rlhf/test.jsonl"})}
    path.write_text(json.dumps(content))
    assert main(["lengths", str(path)]) == 0
    prompt, response = capsys.readouterr().out.splitlines()
    assert prompt.startswith("prompt_tokens: {max: ")
    assert response.startswith("response_tokens: {max: ")
    measured = {**content, "workload": {"sequences": 8, "samples_per_prompt": 2}}
    measured["workload"] |= {"prompt_tokens": "measured", "response_tokens": {"measured": True, "max": 9}}
    measured["models"] = {"reward": str(MODEL)}
    del measured["realloc"]
    with pytest.raises(InputError, match="has a context of 512"):  # the longest prompt is longer
        parsed(measured)
    measured["workload"]["prompt_tokens"] = {"measured": True, "max": 256}
    found = parsed(measured).workload
    assert found.prompt.maximum == 256
    assert 10 < found.prompt.mean < 256
    assert f"{{max: {longest_of(DATA / 'hh-rlhf' / 'test.jsonl')}," in prompt


def longest_of(path: Path) -> int:
    """Tokens of the longest prompt."""
    rows = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    return max(map(len, read_tokenizer(MODEL).encode(rows, special_tokens=True)))
