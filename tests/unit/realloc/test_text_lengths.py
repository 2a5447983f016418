"""Measured lengths: as a run tokenizes, and what is said when there is nothing to measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import toy
from realloc.columns import Want
from realloc.data_spec import DataSpec
from realloc.errors import InputError
from realloc.experiment import Experiment, parse_experiment
from realloc.files import Reader
from runtime.dataset import read_dataset
from runtime.tokenizer import read_tokenizer
from tests.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("texts")
    write_tiny_llama(made / "actor", vocab=len(toy.vocabulary()))
    toy.write_tokenizer(made / "actor")
    toy.write_data(made, seed=5, num_train=60, num_test=2)
    return made


def experiment(folder: Path, workload: dict[str, Any], **changes: Any) -> Experiment:
    content: dict[str, Any] = {
        "algorithm": "sft",
        "models": {"actor": "./actor"},
        "data": {"path": "train.jsonl", "prompt": "prompt", "response": "story"},
        "workload": {"sequences": 8, **workload},
    }
    return parse_experiment(Reader(content | changes, "experiment"), folder)


def test_lengths_are_those_that_a_run_has(folder: Path):
    measured = {"prompt_tokens": "measured", "response_tokens": {"measured": True, "max": 9}}
    work = experiment(folder, measured).workload
    dataset = read_dataset(
        DataSpec((str(folder / "train.jsonl"),), "prompt", "story"),
        read_tokenizer(str(folder / "actor")),
        want=Want.RESPONSES,
        sequences=8,
        max_prompt=work.prompt.maximum,
        max_response=9,
        seed=0,
    )
    examples = [dataset.example(i) for i in range(len(dataset))]
    prompts = [len(example.prompt) for example in examples]
    responses = [len(response) for example in examples for response in example.responses]
    assert dataset.counts.cut_responses
    assert work.prompt.maximum == max(prompts)
    assert work.prompt.mean == pytest.approx(sum(prompts) / len(prompts))
    assert work.response.maximum == 9
    assert work.response.mean == pytest.approx(sum(responses) / len(responses), rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "measuring takes data"),
        ({"models": {"actor": "llama-7b"}}, "a model's folder"),
        ({"data": {"path": "train.jsonl", "prompt": "prompt"}}, "takes prompts with a response"),
        (
            {
                "algorithm": "reinforce_pp",
                "hyperparameters": {"kl_coef": 0},
                "reward": "experiments.rewards:sentiment",
            },
            "realloc lengths RUN",
        ),
        (
            {"data": {"path": "train.jsonl", "prompt": "text", "response": "story"}},
            "line 1: has no column 'text'",
        ),
        ({"data": {"path": "none.jsonl", "prompt": "prompt"}}, "no such file"),
        (
            {"lengths": {"prompt_tokens": {"measured": True, "max": 2}}},
            "all 60 prompts are longer",
        ),
    ],
)
def test_what_cannot_be_measured_is_said(folder: Path, changes: dict[str, Any], message: str):
    workload = {"prompt_tokens": "measured", "response_tokens": "measured", **changes.get("lengths", {})}
    with pytest.raises(InputError, match=message):
        experiment(folder, workload, **{k: v for k, v in changes.items() if k != "lengths"})


def test_a_bad_line_is_named(folder: Path, tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n\n{")
    with pytest.raises(InputError, match="line 3: not valid JSON"):
        experiment(
            folder,
            {"prompt_tokens": "measured", "response_tokens": 4},
            data={"path": str(path), "prompt": "prompt"},
        )


def test_prompts_are_what_the_algorithm_takes(folder: Path, tmp_path: Path):
    """Of a conversation whose first question is a column too, as some data sets have it."""
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    words = [{"role": role, "content": "dog"} for role in ("user", "assistant", "user", "assistant")]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"prompt": "dog", "messages": words}))
    data = {"path": str(path), "chat_template": str(tmp_path / "chat.jinja")}
    workload = {"prompt_tokens": "measured", "response_tokens": 4}
    assert experiment(folder, workload, data=data).workload.prompt.maximum == 3  # all but the last answer
    sampled = {
        "algorithm": "reinforce_pp",
        "hyperparameters": {"kl_coef": 0},
        "reward": "experiments.rewards:sentiment",
    }
    assert experiment(folder, workload, data=data, **sampled).workload.prompt.maximum == 2  # bos, dog
