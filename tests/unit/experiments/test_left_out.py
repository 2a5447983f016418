"""Samples without a score are not in the batch: groups, choices and means are of those that are left."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from experiments import dpo_functions, grpo_functions, raft_functions, rloo_functions
from tests.unit.experiments.fake_batch import FakeBatch, make_sequences, prepare_on_ranks

EACH = 4
MISSING = (1, 4, 5, 6, 12, 13, 14, 15)  # one of the first group, three of the second, all of the fourth
LENGTHS = tuple(1 + i % 7 for i in range(16))


def left() -> list[dict[str, Any]]:
    sequences = make_sequences(LENGTHS, seed=2)
    rows = [s | {"prompt": i // EACH, "sample": i % EACH} for i, s in enumerate(sequences)]
    return [row for i, row in enumerate(rows) if i not in MISSING]


def prepared(function: Any, key: str, **hyperparameters: Any) -> list[float]:
    """One value for each sequence of the batch in order, computed on two ranks that split groups."""
    rows = left()
    found = prepare_on_ranks(
        function, [rows[0::2], rows[1::2]], hyperparameters, num_prompts=4, samples_per_prompt=EACH
    )
    parts = [iter(part[key].tolist()) for part in found]
    return [next(parts[i % 2]) for i in range(len(rows))]


def selected(select: Any, **hyperparameters: Any) -> list[dict[str, Any]]:
    """The sequences that two ranks select."""
    flags = prepared(lambda batch, h: {"flags": select(batch, h)}, "flags", **hyperparameters)
    return [row for row, flag in zip(left(), flags, strict=True) if flag]


def by_group() -> Mapping[int, list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in left():
        groups.setdefault(row["prompt"], []).append(row)
    return groups


def scores(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [row["scores"] for row in rows]


def test_grpo_and_rloo_compare_with_those_that_are_left() -> None:
    grpo, rloo = [], []
    for rows in by_group().values():
        found = scores(rows)
        mean = statistics.mean(found)
        deviation = statistics.stdev(found) if len(found) > 1 else 0.0
        grpo += [(s - mean) / (deviation + grpo_functions.STD_FLOOR) for s in found]
        rloo += [s - (sum(found) - s) / (len(found) - 1) if len(found) > 1 else 0.0 for s in found]
    assert prepared(
        grpo_functions.prepare_actor, "advantages", scale="group", overlong_buffer=0
    ) == pytest.approx(grpo, rel=1e-4)
    assert prepared(
        rloo_functions.prepare_actor, "advantages", kl_coef=0, whiten_advantages=False
    ) == pytest.approx(rloo, rel=1e-4)


def test_raft_keeps_the_best_of_those_that_are_left() -> None:
    best = [row for rows in by_group().values() for row in sorted(rows, key=lambda r: -r["scores"])[:2]]
    assert len(best) == 5
    assert sorted(scores(selected(raft_functions.select_best, keep=2))) == sorted(scores(best))


def test_pairs_are_of_prompts_with_two_that_are_left_and_the_loss_is_their_mean() -> None:
    h = {"beta": 0.3, "loss": "ipo", "label_smoothing": 0.0}
    rows = selected(dpo_functions.select_best_and_worst)
    batch = FakeBatch(rows, len(rows), 0, num_prompts=4, samples_per_prompt=EACH)
    loss, metrics = dpo_functions.online_dpo_loss(batch["output"], batch, h)
    losses, expected = [], []
    for group in by_group().values():
        if len(group) == 1:
            continue
        best, worst = (pick(group, key=lambda r: r["scores"]) for pick in (max, min))
        expected += [row["scores"] for row in group if row in (best, worst)]
        ratio = [(sum(r["output"]) - sum(r["ref_logprobs"])) / len(r["output"]) for r in (best, worst)]
        losses.append((ratio[0] - ratio[1] - 1 / (2 * h["beta"])) ** 2)  # type: ignore[operator]
    assert scores(rows) == expected
    assert len(losses) == 2
    assert loss.item() == pytest.approx(statistics.mean(losses), rel=1e-4)
    assert metrics["accuracy"].item() in (0.0, 0.5, 1.0)


def test_prompts_without_any_score_are_the_last_to_be_learned_from() -> None:
    """Group 0 and 2 have signal, group 1 one sample alone, group 3 none at all."""
    h = {"overlong_buffer": 0}
    for select in (grpo_functions.select_prompts, rloo_functions.select_prompts):
        for count, prompts in ((1, {0}), (2, {0, 2}), (3, {0, 1, 2}), (4, {0, 1, 2})):
            rows = selected(select, dynamic_sampling=count, **h)
            assert rows == [row for row in left() if row["prompt"] in prompts]
