"""The section `pretrain_data`: read, measured and written back; what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from experiments import toy
from realloc.dataflow import Call, CallKind, DataflowGraph, DataKey, Mixture, Output, Per
from realloc.errors import InputError
from realloc.experiment import Experiment, experiment_content, parse_experiment
from realloc.files import Reader
from realloc.lengths import Lengths
from runtime.dataset import open_dataset
from tests.tiny import write_tiny_llama

TEXTS = {"path": "texts.jsonl", "sequences": 8, "tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("texts")
    for role in ("actor", "critic", "ref"):
        head, context = ("scalar", 32) if role == "critic" else ("lm", 64)
        write_tiny_llama(made / role, vocab=len(toy.vocabulary()), head=head, context=context)
        toy.write_tokenizer(made / role)
    toy.write_data(made, seed=5, num_train=30, num_test=2)
    rows = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    write(made / "texts.jsonl", [{"text": row["story"], "prompt": row["prompt"]} for row in rows])
    return made


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def experiment(folder: Path, section: Mapping[str, Any] | None = TEXTS, **changes: Any) -> Experiment:
    content: dict[str, Any] = {
        "algorithm": "ppo",
        "models": {role: f"./{role}" for role in ("actor", "critic", "ref")},
        "data": {"path": "train.jsonl"},
        "reward": "experiments.rewards:sentiment",
        "workload": {"sequences": 8, "prompt_tokens": 16, "response_tokens": 8},
        "hyperparameters": {"ptx_coef": 0.5, "mini_batches": 2, "epochs": 2},
        "pretrain_data": section,
    }
    return parse_experiment(Reader(content | changes, "experiment"), folder)


def test_it_is_read_measured_and_written_back(folder: Path) -> None:
    """A whole text's first token stands for a prompt: the others are what is learned."""
    measured = experiment(folder, TEXTS | {"tokens": {"measured": True, "max": 12}})
    assert parse_experiment(Reader(experiment_content(measured), "again"), folder) == measured
    assert measured.pretrain is not None
    assert measured.mixed is not None
    dataset = open_dataset(measured).mixed
    assert dataset is not None
    assert dataset.counts.cut_responses
    examples = [dataset.example(i) for i in range(len(dataset))]
    lengths = [len(example.responses[0]) for example in examples]
    assert {len(example.prompt) for example in examples} == {1}
    assert max(lengths) == 11 == measured.mixed.response.maximum
    assert measured.mixed.response.mean == pytest.approx(sum(lengths) / len(lengths))
    assert measured.mixed.sequences == len(dataset.batch(0).prompts) == 8
    assert experiment(folder).mixed.response == Lengths(11.0, 11)  # type: ignore[union-attr]


def test_texts_have_an_order_of_their_own_and_the_column_of_texts_comes_first(folder: Path) -> None:
    """The same rows as the prompts: those of an iteration are others."""
    both = experiment(folder, data={"path": "texts.jsonl"})
    dataset = open_dataset(both)
    assert dataset.mixed is not None
    assert dataset.mixed.examples.columns.text == "text"
    texts, prompts = ([row["prompt"] for row in one.batch(3).rows] for one in (dataset.mixed, dataset))
    assert texts != prompts
    assert texts == [row["prompt"] for row in open_dataset(both).mixed.batch(3).rows]  # type: ignore[union-attr]
    assert "; pretrain_data: 30 of 30 rows; cut: 30 responses; columns text" in dataset.summary()


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (None, {}, "pretrain_data: actor_train mixes in a loss on texts, and none are given; add"),
        (TEXTS, {"hyperparameters": {}}, "pretrain_data: nothing learns from it; .*ptx_coef above 0"),
        (TEXTS | {"sequences": 3}, {}, "sequences: 3 texts .* over the 4 optimizer steps of actor_train"),
        (TEXTS | {"tokens": 65}, {}, "texts of up to 65 tokens, but actor's model has a context of 64"),
        (TEXTS | {"tokens": 1}, {}, r"pretrain_data\.tokens: texts of one token teach nothing"),
        (TEXTS | {"holdout": 0.1}, {}, r"pretrain_data\.holdout: has no place here"),
        (
            TEXTS | {"loss_on": "all"},
            {},
            r"pretrain_data\.loss_on: has no place here: texts are learned whole",
        ),
        (TEXTS | {"txt": "text"}, {}, "pretrain_data: unknown key 'txt'. Did you mean 'text'"),
        ({"path": "texts.jsonl", "tokens": 12}, {}, "pretrain_data: the key 'sequences' is missing"),
        (TEXTS, {"hyperparameters": {"ptx_coef": -1}}, "ptx_coef: -1.0 is below the least allowed"),
        (
            TEXTS | {"tokens": "measured"},
            {"models": dict.fromkeys(("actor", "critic", "ref"), "llama-7b")},
            r"pretrain_data\.tokens: measuring takes a model's folder",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    folder: Path, section: Mapping[str, Any] | None, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        experiment(folder, section, **changes)


def test_a_critic_may_have_a_shorter_context_than_the_texts(folder: Path) -> None:
    assert experiment(folder, TEXTS | {"tokens": 60}).mixed is not None


@pytest.mark.parametrize(
    ("rows", "section", "message"),
    [
        ([{"text": "a fox ."}, {"text": "  "}], {}, r"bad\.jsonl, line 2: text: is empty"),
        ([{"story": "a fox ."}], {}, r"takes whole texts, .* found 'story'\. .* pretrain_data\.text"),
        ([{"text": "a fox ."}], {"text": "txt"}, r"line 1: has no column 'txt'\. Did you mean 'text'"),
        ([{"text": "a fox ."}], {"path": "none.jsonl"}, r"none\.jsonl: no such file .*pretrain_data\.path"),
        ([{"messages": [{"role": "assistant", "content": "hi"}]}], {}, r"pretrain_data\.chat_template"),
        (
            [{"text": "a fox met a dog in the garden ."}],
            {"tokens": 4, "long_responses": "error"},
            r"than pretrain_data\.tokens without the first, 3; .* pretrain_data\.long_responses",
        ),
    ],
)
def test_bad_texts_are_one_message(
    folder: Path, rows: list[Any], section: dict[str, Any], message: str
) -> None:
    write(folder / "bad.jsonl", rows)
    with pytest.raises(InputError, match=message):
        open_dataset(experiment(folder, TEXTS | {"path": "bad.jsonl"} | section))


@pytest.mark.parametrize(
    ("mixture", "kind", "message"),
    [
        ("texts", CallKind.TRAIN_STEP, "'texts' is mixed in: it must be declared"),
        ("tokens", CallKind.TRAIN_STEP, "'tokens' is mixed in: .* nor a source key"),
        ("other", CallKind.TRAIN_STEP, "'other' is mixed in: .* elements per token"),
        ("more", CallKind.INFERENCE, "x is no train_step and mixes in nothing"),
        ("more", CallKind.TRAIN_STEP, None),
    ],
)
def test_graphs_with_mixtures_are_checked(mixture: str, kind: CallKind, message: str | None) -> None:
    keys = (DataKey("tokens", Per.TOKEN, "int64"), DataKey("more", Per.TOKEN, "int64"))
    others = (DataKey("other", Per.SEQUENCE), DataKey("scores", Per.RESPONSE_TOKEN))
    call = Call(
        "x",
        kind,
        ("tokens",),
        ("scores",),
        "actor",
        "tokens",
        Output.LOGPROBS,
        loss="loss",
        mixture=Mixture(mixture, "other_loss"),
    )
    graph = DataflowGraph((call,), (*keys, *others), ("tokens",))
    if message is None:
        graph.check()
        return
    with pytest.raises(InputError, match=message):
        graph.check()
