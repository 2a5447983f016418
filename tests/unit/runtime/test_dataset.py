"""Data sets: which rows an iteration has, how they become tokens, and what bad files are told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import toy
from realloc.columns import Want
from realloc.data_spec import DataSpec
from realloc.errors import InputError
from realloc.examples import FEW, Counts, Examples
from realloc.experiment import Experiment, parse_experiment
from realloc.files import Reader
from runtime.dataset import Dataset, open_dataset, read_dataset
from runtime.row_order import shuffled
from runtime.tokenizer import TextTokenizer, read_tokenizer

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    toy.write_tokenizer(folder)
    toy.write_tiny_model(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> TextTokenizer:
    return read_tokenizer(model)


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, tokenizer: TextTokenizer, response: str | None = None, **changes: Any) -> Dataset:
    settings = {"sequences": 4, "max_prompt": 16, "max_response": 8, "seed": 0} | changes
    want = Want.PROMPTS if response is None else Want.RESPONSES
    return read_dataset(DataSpec((str(path),), "prompt", response), tokenizer, want=want, **settings)


def prompts(count: int) -> list[dict[str, Any]]:
    words = [w for w in toy.vocabulary() if w not in toy.SPECIAL_TOKENS]
    return [{"prompt": f"the {words[i]} .", "number": i} for i in range(count)]


# which rows ---------------------------------------------------------------------------------------


def test_every_epoch_uses_every_row_once_in_another_order(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    dataset = read(write(tmp_path / "x.jsonl", prompts(10)), tokenizer)
    order = [row["number"] for iteration in range(5) for row in dataset.batch(iteration).rows]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert order[:10] != list(range(10))


def test_neighbours_share_a_prompt(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path / "x.jsonl", prompts(10))
    one, many = (read(path, tokenizer, sequences=2 * n, samples_per_prompt=n) for n in (1, 3))
    for iteration in range(7):
        alone, batch = one.batch(iteration), many.batch(iteration)
        assert batch.ids == tuple(range(6 * iteration, 6 * iteration + 6))
        assert batch.prompts == tuple(prompt for prompt in alone.prompts for _ in range(3))
        assert batch.rows == tuple(many.row(iteration, position) for position in range(6))
        assert batch.rows[::3] == alone.rows
        assert batch.samples_per_prompt == 3


def test_iterations_are_read_without_state(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path / "x.jsonl", prompts(10))
    straight, resumed = read(path, tokenizer), read(path, tokenizer)
    batches = [straight.batch(i) for i in range(8)]
    assert resumed.batch(7) == batches[7]
    assert resumed.batch(2) == batches[2]
    assert batches[7].ids == (28, 29, 30, 31)
    assert [resumed.row(7, p) for p in range(4)] == list(batches[7].rows)


def test_the_seed_decides_the_order(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path / "x.jsonl", prompts(10))
    first, same, other = (read(path, tokenizer, seed=seed).batch(0) for seed in (1, 1, 2))
    assert first == same
    assert first.prompts != other.prompts


def test_a_batch_may_be_larger_than_the_file(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    batch = read(write(tmp_path / "x.jsonl", prompts(3)), tokenizer, sequences=7).batch(0)
    assert len(batch.prompts) == 7
    assert sorted(row["number"] for row in batch.rows[:6]) == [0, 0, 1, 1, 2, 2]


def test_orders_are_those_of_a_hash_in_plain_python() -> None:
    def mix(state: int) -> int:
        z = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    assert mix(0) == 0xE220A8397B1DCDAF  # the published first output for seed 0
    for seed, epoch in ((0, 0), (7, 3), (2**31 - 1, 100)):
        start = mix((mix(seed) + epoch) % 2**64)
        expected = sorted(range(50), key=lambda i, start=start: mix((start + i) % 2**64))  # type: ignore[misc]
        assert shuffled(50, seed, epoch).tolist() == expected


def test_shuffling_has_no_visible_pattern() -> None:
    """Mean displacement of a random permutation is a third of its length."""
    order = shuffled(30_000, 0, 0)
    displacement = np.abs(order - np.arange(30_000)).mean()
    assert displacement == pytest.approx(10_000, rel=0.03)


def test_rows_held_out_are_never_trained_on(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path / "x.jsonl", prompts(20))
    settings: dict[str, Any] = {"sequences": 4, "max_prompt": 16, "max_response": 8, "seed": 3}
    whole = read_dataset(DataSpec((str(path),)), tokenizer, want=Want.PROMPTS, **settings)
    data = DataSpec((str(path),), holdout=0.25)
    dataset = read_dataset(data, tokenizer, want=Want.PROMPTS, **settings)
    trained = {row["number"] for iteration in range(20) for row in dataset.batch(iteration).rows}
    held = [row["number"] for row in dataset.held_out(sequences=5).batch(0).rows]
    assert len(trained) == 15
    assert trained | set(held) == set(range(20))
    assert not trained & set(held)
    both = dataset.held_out(sequences=10, samples_per_prompt=2).batch(0)
    assert [row["number"] for row in both.rows[::2]] == held
    with pytest.raises(InputError, match=r"data\.holdout"):
        whole.held_out(4)
    one = DataSpec((str(write(tmp_path / "one.jsonl", prompts(1))),), holdout=0.25)
    with pytest.raises(InputError, match=r"data\.holdout: 0\.25 of 1 rows keeps 0 and leaves 1"):
        read_dataset(one, tokenizer, want=Want.PROMPTS, **settings)


@pytest.mark.parametrize("changes", [{}, {"weights": (1.0, 0.5)}, {"holdout": 0.3}])
def test_a_resumed_run_goes_on_across_the_end_of_an_epoch(
    tmp_path: Path, tokenizer: TextTokenizer, changes: dict[str, Any]
) -> None:
    rows = prompts(17)
    paths = (str(write(tmp_path / "a.jsonl", rows[:7])), str(write(tmp_path / "b.jsonl", rows[7:])))

    def opened() -> Dataset:
        data = DataSpec(paths, **changes)
        return read_dataset(
            data, tokenizer, want=Want.PROMPTS, sequences=4, max_prompt=16, max_response=8, seed=5
        )

    straight = opened()
    batches = [straight.batch(i) for i in range(12)]
    for first in range(12):  # epochs of 12 or 17 rows end within and between iterations
        resumed = opened()
        assert [resumed.batch(i) for i in range(first, 12)] == batches[first:]
        assert resumed.row(first, 3) == batches[first].rows[3]


def test_weights_say_how_often_an_epoch_goes_through_a_path(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    rows = prompts(30)
    paths = (str(write(tmp_path / "a.jsonl", rows[:10])), str(write(tmp_path / "b.jsonl", rows[10:])))
    dataset = read_dataset(
        DataSpec(paths, weights=(2.0, 0.25)),
        tokenizer,
        want=Want.PROMPTS,
        sequences=25,
        max_prompt=16,
        max_response=8,
        seed=5,
    )
    epochs = [[row["number"] for row in dataset.batch(i).rows] for i in range(4)]
    assert len(dataset) == 25
    for epoch in epochs:
        assert sorted(n for n in epoch if n < 10) == sorted([*range(10), *range(10)])
        assert len({n for n in epoch if n >= 10}) == 5
    # a quarter of the second path an epoch, and in four all of it
    assert {n for epoch in epochs for n in epoch if n >= 10} == set(range(10, 30))
    assert max(epochs[0].index(n) for n in epochs[0] if n >= 10) > 5  # mixed, not one after the other


def test_a_path_of_its_own_is_held_out(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    rows = prompts(12)
    train, test = write(tmp_path / "a.jsonl", rows[:8]), write(tmp_path / "b.jsonl", rows[8:])
    data = DataSpec((str(train),), holdout_paths=(str(test),))
    dataset = read_dataset(
        data, tokenizer, want=Want.PROMPTS, sequences=4, max_prompt=16, max_response=8, seed=5
    )
    assert {row["number"] for i in range(4) for row in dataset.batch(i).rows} == set(range(8))
    assert {row["number"] for row in dataset.held_out(4).batch(0).rows} == set(range(8, 12))
    assert "8 of 8 rows; columns prompt; 4 rows held out" in dataset.summary()


def test_what_a_large_file_has_is_looked_up_once(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [w for w in toy.vocabulary() if w not in toy.SPECIAL_TOKENS]
    rows = [{"prompt": words[i % len(words)] + " dog" * (i % 3), "number": i} for i in range(FEW + 10)]
    path = write(tmp_path / "x.jsonl", rows)
    settings: dict[str, Any] = {"sequences": 64, "max_prompt": 3, "max_response": 8, "seed": 5}

    def opened(folder: Path | None = tmp_path / "cache", **data: Any) -> Dataset:
        spec = DataSpec((str(path),), **data)
        return read_dataset(spec, tokenizer, want=Want.PROMPTS, kept_in=folder, **settings)

    first = opened()
    assert first.counts.dropped == {"prompt over 3 tokens": (FEW + 10) // 3}
    scans: list[int] = []
    scan = Examples.scan

    def counted(self: Examples) -> tuple[list[int], Counts]:
        scans.append(1)
        return scan(self)

    monkeypatch.setattr(Examples, "scan", counted)
    again, without = opened(), opened(None)
    assert len(scans) == 1
    assert again.counts == without.counts == first.counts
    assert again.batch(3) == without.batch(3) == first.batch(3)
    opened(on_bad_row="skip")
    assert len(scans) == 2
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:100])  # cut off: made again
    assert opened().counts == first.counts
    with path.open("a") as stream:
        stream.write('{"prompt": "dog"}\n')
    assert opened().counts.rows == first.counts.rows + 1
    (tmp_path / "file").write_text("")
    assert opened(tmp_path / "file").counts.rows == first.counts.rows + 1  # a cache that is none


# tokens -------------------------------------------------------------------------------------------


def test_prompts_begin_with_bos_and_long_ones_are_dropped(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    rows = [{"prompt": "the dog ."}, {"prompt": "the dog . " * 5}, {"prompt": "the cat ."}]
    dataset = read(write(tmp_path / "x.jsonl", rows), tokenizer, sequences=2, max_prompt=15)
    batch = dataset.batch(0)
    assert sorted(dataset.decode(prompt) for prompt in batch.prompts) == ["the cat .", "the dog ."]
    assert all(prompt[0] == BOS and EOS not in prompt for prompt in batch.prompts)
    assert batch.responses is None
    assert dataset.counts.dropped == {"prompt over 15 tokens": 1}
    assert "2 of 3 rows; left out: 1 (prompt over 15 tokens)" in dataset.summary()


def test_a_prompt_of_exactly_the_maximum_stays(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "the dog ."}])
    assert read(path, tokenizer, max_prompt=4).counts.dropped == {}
    with pytest.raises(InputError, match=r"all 1 prompts are longer than .*, 3: they have 4 to 4 tokens"):
        read(path, tokenizer, max_prompt=3)


def test_responses_end_with_eos_or_are_cut(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    rows = [
        {"prompt": "the dog", "text": "the dog was happy ."},
        {"prompt": "the cat", "text": " was happy ."},
        {"prompt": "the fox", "text": " was happy . they danced together ."},
        {"prompt": "the bird", "text": ""},
    ]
    dataset = read(write(tmp_path / "x.jsonl", rows), tokenizer, "text", max_response=5)
    responses = {}
    batch = dataset.batch(0)
    assert batch.responses is not None
    for prompt, response in zip(batch.prompts, batch.responses, strict=True):
        responses[dataset.decode(prompt)] = (dataset.decode(response), response[-1] == EOS, len(response))
    assert responses == {
        "the dog": ("was happy .", True, 4),
        "the cat": ("was happy .", True, 4),
        "the fox": ("was happy . they danced", False, 5),
        "the bird": ("", True, 1),
    }
    assert dataset.counts.cut_responses == 1
    assert "cut: 1 responses" in dataset.summary()


def test_a_seam_within_a_token_leaves_the_prompt_alone(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "the dog", "text": "was happy"}])
    dataset = read(path, tokenizer, "text", sequences=1)
    batch = dataset.batch(0)
    assert batch.responses is not None
    assert dataset.decode(batch.prompts[0]) == "the dog"  # not "the dogwas", an unknown word
    assert dataset.decode(batch.responses[0]) == "was happy"


# bad files ----------------------------------------------------------------------------------------

GOOD = b'{"prompt": "the dog ."}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.jsonl: has no rows"),
        (b"\n  \n", "x.jsonl: has no rows"),
        (GOOD + b"{'prompt': 1}\n", "x.jsonl, line 2: not valid JSON"),
        (GOOD + b"\n[1]\n", "x.jsonl, line 3: expected a JSON object, found list"),
        (GOOD + b'{"promt": "a"}\n', "x.jsonl, line 2: has no column 'prompt'. Did you mean 'promt'?"),
        (GOOD + b'{"prompt": 3}\n', "x.jsonl, line 2: prompt: expected text, found int"),
        (GOOD + b'{"prompt": null}\n', "x.jsonl, line 2: prompt: expected text, found NoneType"),
        (GOOD + b'{"prompt": " \\n"}\n', "x.jsonl, line 2: prompt: is empty"),
        (GOOD + b'{"prompt": "\xff"}\n', "x.jsonl, line 2: not UTF-8 text (byte 12 of the line)"),
        (b"[" * 100_000, "x.jsonl, line 1: not valid JSON"),
    ],
)
def test_bad_files_are_named_with_their_line(
    tmp_path: Path, tokenizer: TextTokenizer, content: bytes, message: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read(path, tokenizer)
    assert message in str(error.value)


def test_missing_files_and_folders_are_said(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "none.jsonl", tokenizer)
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path, tokenizer)


def test_a_missing_response_column_is_an_error(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "the dog .", "story": "they danced ."}])
    with pytest.raises(InputError, match=r"'storys'\. Did you mean 'story'"):
        read(path, tokenizer, "storys")
    data = DataSpec((str(path),), prompt="promt")
    with pytest.raises(InputError, match=r"'promt'\. Did you mean 'prompt'"):
        read_dataset(data, tokenizer, want=Want.PROMPTS, sequences=1, max_prompt=9, max_response=9, seed=0)


def test_windows_files_are_read(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") * 2)
    assert len(read(path, tokenizer)) == 2


# experiments --------------------------------------------------------------------------------------


def experiment(model: Path, data: Path) -> Experiment:
    content = {
        "algorithm": "ppo",
        "models": {role: str(model) for role in ("actor", "critic", "ref")},
        "workload": {"sequences": 4, "prompt_tokens": 16, "response_tokens": 8},
        "data": {"path": str(data)},
        "reward": "experiments.rewards:sentiment",
        "seed": 3,
    }
    return parse_experiment(Reader(content, "experiment.yaml"), data.parent)


def test_an_experiment_names_all_that_is_needed(tmp_path: Path, model: Path) -> None:
    dataset = open_dataset(experiment(model, write(tmp_path / "x.jsonl", prompts(10))))
    assert (dataset.order.seed, dataset.sequences, dataset.eos_ids, dataset.pad_id) == (3, 4, (EOS,), 0)


def test_runs_need_data_weights_and_one_vocabulary(tmp_path: Path, model: Path) -> None:
    good = experiment(model, write(tmp_path / "x.jsonl", prompts(100)))
    with pytest.raises(InputError, match="a run needs prompts"):
        open_dataset(replace(good, data=None))
    actor = good.models["actor"]
    named = replace(actor, model="llama-7b")
    with pytest.raises(InputError, match="'llama-7b' is the name of a shape, for planning only"):
        open_dataset(replace(good, models={**good.models, "actor": named}))
    small = replace(actor, role="critic", shape=replace(actor.shape, vocab=40))
    with pytest.raises(InputError, match=r"models\.critic: has a vocabulary of 40, but"):
        open_dataset(replace(good, models={**good.models, "critic": small}))


# preferences --------------------------------------------------------------------------------------


def test_a_preference_is_two_neighbouring_sequences(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    words = [w for w in toy.vocabulary() if w not in toy.SPECIAL_TOKENS]
    rows = [
        {"prompt": f"the {words[i]} .", "chosen": f" {words[i + 1]} .", "rejected": f" {words[i + 2]} ."}
        for i in range(5)
    ]
    data = DataSpec((str(write(tmp_path / "x.jsonl", rows)),), "prompt", None, "chosen", "rejected")
    batch = read_dataset(
        data,
        tokenizer,
        want=Want.PAIRS,
        sequences=4,
        max_prompt=16,
        max_response=8,
        seed=0,
        samples_per_prompt=2,
    ).batch(1)
    assert batch.responses is not None
    for position, row in enumerate(batch.rows):
        column = ("chosen", "rejected")[position % 2]
        assert tokenizer.decode(batch.responses[position]).split() == row[column].split()
    assert batch.rows[0] == batch.rows[1] != batch.rows[2]
